"""Neighbourhood attention in plain PyTorch: the CPU path, the export path and what the kernels are tested against."""

import torch
import torch.nn.functional as F
from densezoo.ops.backend import is_exporting
from torch import Tensor


def window(rank: Tensor, length: Tensor, kernel_size: int, stride: int, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Return the first and one past the last key rank that the query at `rank` attends to, along one axis.

    Ranks count the `length` members of one dilation group. `stride` queries share the window of their leader
    (generalised neighbourhood attention, arXiv 2504.16922): the middle one, the right one of two, or the last one where
    causal.

    Args:
        rank: Ranks of the queries, int64, broadcastable with `length`.
        length: Members of the queries' dilation groups, int64.
    """
    leader = rank // stride * stride + (stride - 1 if is_causal else stride // 2)
    leader = torch.minimum(leader, length - 1)
    if is_causal:
        return (leader - kernel_size + 1).clamp(min=0), rank + 1
    start = torch.minimum((leader - kernel_size // 2).clamp(min=0), length - kernel_size)
    return start, start + kernel_size


def _tile_axis(
    size: int, kernel_size: int, stride: int, dilation: int, is_causal: bool, device: torch.device
) -> tuple[Tensor, ...]:
    """Cut one axis into tiles of queries of one dilation group, and find the span of keys that each tile sees.

    Returns:
        Index tables: positions of each tile's queries (tiles, tile), positions of its keys (tiles, span), whether a
        query attends to a key (tiles, tile, span), their entry of the bias table (tiles, tile, span), and the place of
        each position of the axis in the flattened tiles (size,).
    """
    tile = max(kernel_size, 7)
    longest = (size + dilation - 1) // dilation
    tiles = (longest + tile - 1) // tile
    span = tile + kernel_size + stride - 2
    if is_exporting():  # asking for one tile or several, or a short span, would fix the exported sizes
        tiles = torch.sym_max(tiles, 2)
    else:
        span = min(span, longest)

    number = torch.arange(dilation * tiles, device=device)[:, None]
    group, first = number // tiles, number % tiles * tile
    length = (size - group + dilation - 1) // dilation
    # Groups differ by one in length and the last tile is ragged: surplus queries repeat the last one and are dropped.
    query = torch.minimum(first + torch.arange(tile, device=device), length - 1)
    start, stop = window(query, length, kernel_size, stride, is_causal)
    key = torch.minimum(start[:, :1], (length - span).clamp(min=0)) + torch.arange(span, device=device)
    seen = (key[:, None, :] >= start[:, :, None]) & (key[:, None, :] < stop[:, :, None])
    entry = (key[:, None, :] - query[:, :, None] + kernel_size - 1).clamp(0, 2 * kernel_size - 2)
    key = torch.minimum(key, length - 1)  # past the group's end only where not seen

    position = torch.arange(size, device=device)
    place = (position % dilation * tiles) * tile + position // dilation
    return group + dilation * query, group + dilation * key, seen, entry, place


def _fold(x: Tensor, *shape: int) -> Tensor:
    """Reshape through one dimension: torch.export cannot prove that symbolic sizes merge, only that they split."""
    return x.contiguous().flatten().view(shape)


def na2d_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    is_causal: tuple[bool, bool],
    scale: float,
) -> Tensor:
    """Compute `densezoo.ops.na2d` tile by tile: dense attention of a tile of queries to the span of keys around it.

    Memory grows with the number of tokens: a query is scored against at most (2 * tile)^2 keys, never against the map.
    16-bit inputs are computed in float32.
    """
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    batch, height, width, heads, dim = query.shape
    (q_rows, k_rows, *rows, row_place), (q_cols, k_cols, *cols, col_place) = (
        _tile_axis(size, *args, query.device)
        for size, *args in zip((height, width), kernel_size, stride, dilation, is_causal, strict=True)
    )
    (n, tile_h), (m, tile_w) = q_rows.shape, q_cols.shape

    def gather(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        # (B, H, W, heads, dim) to (B * row tiles * column tiles * heads, tokens of a tile, dim)
        x = x.index_select(1, rows.flatten()).index_select(2, cols.flatten())
        x = x.view(batch, n, rows.shape[1], m, cols.shape[1], heads, dim).permute(0, 1, 3, 5, 2, 4, 6)
        return _fold(x, batch * n * m * heads, rows.shape[1] * cols.shape[1], dim)

    # (row tiles, tile, span), (column tiles, tile, span) to (row tiles * column tiles, queries, keys)
    (row_seen, row_entry), (col_seen, col_entry) = (
        (t[:, None, :, None, :, None] for t in rows),
        (t[None, :, None, :, None, :] for t in cols),
    )
    shape = (n * m, tile_h * tile_w, k_rows.shape[1] * k_cols.shape[1])
    hidden = _fold(~(row_seen & col_seen), *shape)
    if rpb is None:
        bias = hidden.new_zeros((), dtype=query.dtype).expand(1, *shape).masked_fill(hidden, float("-inf"))
    else:
        # What is hidden has an entry of its own, at the table's end.
        table = F.pad(rpb.to(query.dtype).flatten(1), (0, 1), value=float("-inf"))
        entry = _fold(row_entry * (2 * kernel_size[1] - 1) + col_entry, *shape)
        entry = entry.masked_fill(hidden, table.shape[1] - 1).flatten()
        bias = table.gather(1, entry.expand(heads, -1)).view(heads, *shape)
    bias = bias.transpose(0, 1)  # (tiles, heads or 1, queries, keys)

    scores = gather(query * scale, q_rows, q_cols) @ gather(key, k_rows, k_cols).mT
    attn = (scores.view(batch, n * m, heads, *shape[1:]) + bias).softmax(-1)
    out = _fold(attn, batch * n * m * heads, *shape[1:]) @ gather(value, k_rows, k_cols)
    out = out.view(batch, n, m, heads, tile_h, tile_w, dim).permute(0, 1, 4, 2, 5, 3, 6)
    out = _fold(out, batch, n * tile_h, m * tile_w, heads, dim)
    return out.index_select(1, row_place).index_select(2, col_place).to(dtype)


def na2d_qkv_reference(qkv: Tensor, rpb: Tensor | None, *args) -> Tensor:
    """Compute `densezoo.ops.na2d_qkv`: `na2d_reference` of the views."""
    return na2d_reference(*qkv.unbind(3), rpb, *args)
