"""Window attention: Swin's windows and shifted windows, CSwin's stripes, MaxViT's blocks and grids."""

import torch
from densezoo.ops.backend import takes_triton
from densezoo.ops.shapes import check_tensors, per_axis
from densezoo.ops.window.reference import window_attention_reference
from torch import Tensor

__all__ = ["window_attention"]

# Partial gradients of the bias grow with the cube of a window's positions.
MAX_BIASED = 1024


def window_attention(
    qkv: Tensor,
    rel_pos_bias: Tensor | None = None,
    *,
    num_heads: int,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    grid: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attend within each window of a map, from the output of the qkv projection to the input of the output projection.

    Windows of neighbouring positions (Swin, arXiv 2103.14030), stripes (CSwin, arXiv 2107.00652: one side of the window
    is the map's) and the lattices of MaxViT (arXiv 2204.01697). With `shift` the windows start that many rows and
    columns further on, and what is left at the top and left forms smaller windows: what Swin computes by a cyclic shift
    with a mask.

    A map of any size will do. A window that reaches over the border holds the positions inside the map alone: no
    padding is attended to. Models that were trained with zero-padded maps (Swin, DaViT) pad before the projection.

    Args:
        qkv: (B, H, W, 3 * C), float16, bfloat16, float32 or float64, any strides; channels in the order query, key,
            value, then head, then dim.
        rel_pos_bias: (num_heads, 2 * window_size[0] - 1, 2 * window_size[1] - 1), added to the scaled scores; the entry
            per axis is key - query + window_size - 1, in positions of the window. Any floating dtype.
        num_heads: Attention heads; must divide C.
        window_size: Positions of a window per axis; an int serves both axes, as below.
        shift: Where the first whole window starts, 0 to `window_size` - 1.
        grid: Whether a window takes positions spread evenly over the map, ceil(size / window_size) apart, in place of
            neighbouring ones; takes no shift.
        scale: Multiplies query . key; dim ** -0.5 by default.

    Returns:
        (B, H, W, C), of `qkv`'s dtype; channels in the order head, dim. Softmax and sums run in float32 for 16-bit
        inputs.

    Raises:
        ValueError: An argument's shape, dtype, device or value is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads: got {num_heads!r}, expected a positive int")
    window_size, shift = per_axis("window_size", window_size), per_axis("shift", shift)
    _check(qkv, rel_pos_bias, num_heads, window_size, shift, grid)
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5 if scale is None else float(scale)
    args = (qkv, rel_pos_bias, num_heads, window_size, shift, bool(grid), scale)
    if takes_triton("window_attention", qkv, _unsupported, qkv, rel_pos_bias, num_heads, window_size):
        from densezoo.ops.window.kernels import window_attention_triton

        return window_attention_triton(*args)
    return window_attention_reference(*args)


def _check(qkv, rel_pos_bias, num_heads, window_size, shift, grid) -> None:
    check_tensors(qkv=qkv)
    fits = qkv.dim() == 4 and qkv.shape[-1] and not qkv.shape[-1] % (3 * num_heads)
    if not fits or not qkv.is_floating_point():
        raise ValueError(
            f"qkv: got {qkv.dtype} of shape {tuple(qkv.shape)}, expected floating (B, H, W, 3 * C) with C a "
            f"multiple of num_heads {num_heads}"
        )
    if any(side < 1 for side in window_size):
        raise ValueError(f"window_size: got {window_size}, expected at least 1 per axis")
    if any(not 0 <= s < w for s, w in zip(shift, window_size, strict=True)):
        raise ValueError(f"shift: got {shift}, expected 0 to window_size - 1 per axis, for window_size {window_size}")
    if grid and any(shift):
        raise ValueError(f"shift: got {shift} with grid=True, expected 0: a grid covers the whole map")
    if rel_pos_bias is not None:
        check_tensors(rel_pos_bias=rel_pos_bias)
        expected = (num_heads, 2 * window_size[0] - 1, 2 * window_size[1] - 1)
        if tuple(rel_pos_bias.shape) != expected:
            raise ValueError(
                f"rel_pos_bias: got shape {tuple(rel_pos_bias.shape)}, expected (num_heads, 2 * rows - 1, "
                f"2 * columns - 1) = {expected}"
            )
        if not rel_pos_bias.is_floating_point() or rel_pos_bias.device != qkv.device:
            raise ValueError(
                f"rel_pos_bias: got {rel_pos_bias.dtype} on {rel_pos_bias.device}, expected a floating dtype on "
                f"{qkv.device}"
            )


def _unsupported(qkv, rel_pos_bias, num_heads, window_size) -> str | None:
    """Return why the kernels cannot take these inputs, or None where they can."""
    if qkv.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {qkv.dtype} (kernels: float16, bfloat16, float32)"
    if not 8 <= (dim := qkv.shape[-1] // (3 * num_heads)) <= 128:
        return f"head dim {dim} (kernels: 8 to 128)"
    if rel_pos_bias is not None and window_size[0] * window_size[1] > MAX_BIASED:
        return f"window_size {window_size} with a bias (kernels: {MAX_BIASED} positions)"
    return None
