"""Focal modulation: context gathered by convolutions of growing reach, and gated at every position."""

from collections.abc import Sequence

import torch
from densezoo.ops.backend import takes_triton
from densezoo.ops.focal.reference import focal_modulation_reference
from densezoo.ops.launch import MAX_IMAGES
from densezoo.ops.shapes import check_tensors
from torch import Tensor

__all__ = ["focal_modulation"]

# Beyond it a program's code grows too long to compile in reasonable time.
MAX_KERNEL_SIZE = 15


def focal_modulation(
    context: Tensor, gates: Tensor, weights: Sequence[Tensor], *, normalize_modulator: bool = False
) -> Tensor:
    """Gather the context of every position over focal levels (FocalNet, arXiv 2203.11926).

    Each level convolves the one before it, channel by channel; the last context is the mean of the map. With
    context[0] = `context` and L = len(weights),

        context[l + 1] = gelu(depthwise_convolution(context[l], weights[l]))    for l in 0 .. L - 1
        out = sum of gates[..., l] * context[l + 1] + gates[..., L] * gelu(mean of context[L] over the positions)

    with the exact GELU and zero padding that keeps the size. The paper's modulator is a linear map of `out`, and its
    product with the query is the output of focal modulation; both are left to the caller.

    Args:
        context: (B, H, W, dim), float16, bfloat16, float32 or float64, any strides.
        gates: (B, H, W, L + 1), of `context`'s dtype: one a level, then the one of the mean. No activation is applied.
        weights: One kernel a level, (dim, 1, size, size) with an odd size, any floating dtype.
        normalize_modulator: Whether to divide the sum by L + 1.

    Returns:
        (B, H, W, dim), of `context`'s dtype. Convolutions and sums run in float32 for 16-bit inputs; the kernels keep
        the levels between them in `context`'s dtype, and take the GELU of 16-bit levels through the GPU's own tanh,
        which moves it by less than 6e-4 of its argument.

    Raises:
        ValueError: An argument's shape, dtype or device is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    _check(context, gates, weights)
    if takes_triton("focal_modulation", context, _unsupported, context, weights):
        from densezoo.ops.focal.kernels import focal_modulation_triton

        return focal_modulation_triton(context, gates, weights, normalize_modulator)
    return focal_modulation_reference(context, gates, weights, normalize_modulator)


def _check(context, gates, weights) -> None:
    check_tensors(context=context, gates=gates)
    if context.dim() != 4 or 0 in context.shape[1:]:
        raise ValueError(f"context: got shape {tuple(context.shape)}, expected (B, H, W, dim), H, W and dim not 0")
    if not isinstance(weights, (list, tuple)) or not weights:
        raise ValueError(
            f"weights: got {type(weights).__name__}, expected a list or tuple of kernels (dim, 1, size, size), one a "
            "level"
        )
    if gates.dim() != 4 or gates.shape[:3] != context.shape[:3] or gates.shape[3] != len(weights) + 1:
        raise ValueError(
            f"gates: got shape {tuple(gates.shape)}, expected (B, H, W, levels + 1) for {len(weights)} levels "
            f"(context: {tuple(context.shape)})"
        )
    for name, t in (("context", context), ("gates", gates)):
        if not t.is_floating_point() or t.dtype != context.dtype or t.device != context.device:
            raise ValueError(
                f"{name}: got {t.dtype} on {t.device}, expected one floating dtype and one device for context and "
                f"gates (context: {context.dtype} on {context.device})"
            )
    for level, t in enumerate(weights):
        check_tensors(**{f"weights[{level}]": t})
        fits = t.dim() == 4 and t.shape[:2] == (context.shape[3], 1) and t.shape[2] == t.shape[3] and t.shape[2] % 2
        if not fits:
            raise ValueError(
                f"weights[{level}]: got shape {tuple(t.shape)}, expected (dim, 1, size, size) with dim = "
                f"{context.shape[3]} and an odd size"
            )
        if not t.is_floating_point() or t.device != context.device:
            raise ValueError(
                f"weights[{level}]: got {t.dtype} on {t.device}, expected a floating dtype on {context.device}"
            )


def _unsupported(context: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Return why the kernels cannot take these inputs, or None where they can."""
    if context.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {context.dtype} (kernels: float16, bfloat16, float32)"
    size = max(weight.shape[-1] for weight in weights)
    if size > MAX_KERNEL_SIZE:
        return f"kernel size {size} (kernels: at most {MAX_KERNEL_SIZE})"
    if context.shape[0] > MAX_IMAGES:
        return f"{context.shape[0]} images (kernels: up to {MAX_IMAGES})"
    return None
