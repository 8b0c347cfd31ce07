"""Window attention in plain PyTorch: the CPU path, the export path and what the kernels are tested against."""

import torch
import torch.nn.functional as F
from densezoo.ops.backend import is_exporting
from densezoo.ops.precision import widen, without_autocast
from densezoo.ops.shapes import fold
from torch import Tensor


def _lay_out(
    size: int, window: int, windows: int, shift: int, grid: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay one axis of the map out window by window, rolled to the left by `shift` and filled up.

    Returns:
        The index into the map at each place (any for a filler), the run that each place belongs to (0, or 1 behind the
        roll's seam, or 2 for a filler; within a window, places of one run attend to each other), and the place of each
        index into the map.
    """
    place, index = torch.arange(windows * window, device=device), torch.arange(size, device=device)
    if grid:
        spacing = (size + window - 1) // window
        source = place % window * spacing + place // window
        inside, seam = (place // window < spacing) & (source < size), windows * window
        home = index % spacing * window + index // spacing
    else:
        source = (place + shift) % (windows * window)
        inside, seam = source < size, windows * window - shift
        home = (index - shift) % (windows * window)
    # Fillers attend to fillers, so that no softmax is empty; their results are dropped.
    return source.clamp(max=size - 1), torch.where(inside, (place >= seam).long(), 2), home


def _bias_entries(window: int, device: torch.device) -> Tensor:
    """Return the entry of the bias table along one axis for each query and key of a window."""
    position = torch.arange(window, device=device)
    return position[None, :] - position[:, None] + window - 1


def window_attention_reference(
    qkv: Tensor,
    rel_pos_bias: Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    grid: bool,
    scale: float,
) -> Tensor:
    """Compute `densezoo.ops.window_attention` by cutting the map into windows and attending in each.

    16-bit inputs are computed in float32.
    """
    dtype, device = qkv.dtype, qkv.device
    (qkv,) = widen(qkv)
    batch, height, width, channels = qkv.shape
    if is_exporting():
        # A size that may be 1 or fit exactly would fix the exported sizes: at least two windows, and always laid out.
        # But a window whose own size is free is the map's: one, of at least two rows or columns.
        window_size = [torch.sym_max(side, 2) if isinstance(side, torch.SymInt) else side for side in window_size]
        pairs = zip((height, width), window_size, strict=True)
        windows = [
            1 if isinstance(side, torch.SymInt) else torch.sym_max((size + side - 1) // side, 2) for size, side in pairs
        ]
    else:
        windows = [(size + window - 1) // window for size, window in zip((height, width), window_size, strict=True)]
    (n, m), (rows, cols) = windows, window_size
    laid_out = is_exporting() or any(shift) or (n * rows, m * cols) != (height, width)
    tokens, dim = rows * cols, channels // (3 * num_heads)

    if laid_out:
        (row_source, row_run, row_home), (col_source, col_run, col_home) = (
            _lay_out(*axis, grid, device) for axis in zip((height, width), window_size, windows, shift, strict=True)
        )
        qkv = qkv.index_select(1, row_source).index_select(2, col_source)

    # (B, H, W, 3 * C) to (3, B, row windows, column windows, heads, rows, columns, dim)
    if grid and not laid_out:
        qkv = qkv.view(batch, rows, n, cols, m, 3, num_heads, dim).permute(5, 0, 2, 4, 6, 1, 3, 7)
    else:
        qkv = qkv.view(batch, n, rows, m, cols, 3, num_heads, dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
    # A bias alone is the same in all windows, a mask in all images.
    shape = (batch, n * m * num_heads) if laid_out else (batch * n * m, num_heads)
    q, k, v = fold(qkv, 3, *shape, tokens, dim).unbind()

    bias = None
    if rel_pos_bias is not None:
        row_entry, col_entry = _bias_entries(rows, device), _bias_entries(cols, device)
        bias = rel_pos_bias.to(qkv.dtype)[:, row_entry[:, None, :, None], col_entry[None, :, None, :]]
        bias = bias.reshape(1, num_heads, tokens, tokens)
    if laid_out:
        run = 3 * row_run.view(n, 1, rows, 1) + col_run.view(1, m, 1, cols)
        run = fold(run, n * m, tokens)
        mask = torch.where(run[:, :, None] == run[:, None, :], 0.0, float("-inf")).to(qkv.dtype)
        if bias is None:
            # A copy for each head. Of an expanded mask, export cannot prove that it folds.
            bias = mask.index_select(0, torch.arange(n * m * num_heads, device=device) // num_heads)[None]
        else:
            bias = fold(mask[:, None] + bias, 1, n * m * num_heads, tokens, tokens)
    with without_autocast(q):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    order = (0, 4, 1, 5, 2, 3, 6) if grid and not laid_out else (0, 1, 4, 2, 5, 3, 6)
    out = out.view(batch, n, m, num_heads, rows, cols, dim).permute(order)
    out = fold(out, batch, n * rows, m * cols, num_heads * dim)
    if laid_out:
        out = out.index_select(1, row_home).index_select(2, col_home)
    return out.to(dtype)
