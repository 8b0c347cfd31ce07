"""Neighbourhood attention in plain PyTorch: the CPU path, the export path and what the kernels are tested against."""

import torch
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
) -> list[Tensor]:
    """Cut one axis into tiles of queries of one dilation group, and find the span of keys that each tile sees.

    Returns:
        Index tables: positions of each tile's queries (tiles, tile), positions of its keys (tiles, span), whether a
        query attends to a key (tiles, tile, span), their entry of the bias table (tiles, tile, span), and the place of
        each position of the axis in the flattened tiles (size,).
    """
    tile = max(kernel_size, 7)
    longest = (size + dilation - 1) // dilation
    tiles = (longest + tile - 1) // tile
    span = torch.sym_min(tile + kernel_size + stride - 2, longest)

    def arange(n: int) -> Tensor:
        return torch.arange(n, device=device)

    group = arange(dilation)[:, None, None]
    length = (size - group + dilation - 1) // dilation
    first = arange(tiles)[:, None] * tile
    # Groups differ by one in length and the last tile is ragged: surplus queries repeat the last one and are dropped.
    query = torch.minimum(first + arange(tile), length - 1)
    start, stop = window(query, length, kernel_size, stride, is_causal)
    key = torch.minimum(start[..., :1], (length - span).clamp(min=0)) + arange(span)
    seen = (key[..., None, :] >= start[..., None]) & (key[..., None, :] < stop[..., None])
    entry = (key[..., None, :] - query[..., None] + kernel_size - 1).clamp(0, 2 * kernel_size - 2)
    key = torch.minimum(key, length - 1)  # past the group's end only where not seen

    position = arange(size)
    place = (position % dilation * tiles) * tile + position // dilation
    return [t.flatten(0, 1) for t in (group + dilation * query, group + dilation * key, seen, entry)] + [place]


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
    height, width, heads = query.shape[1:4]
    (q_rows, k_rows, row_seen, row_entry, row_place), (q_cols, k_cols, col_seen, col_entry, col_place) = (
        _tile_axis(size, *args, query.device)
        for size, *args in zip((height, width), kernel_size, stride, dilation, is_causal, strict=True)
    )

    def gather(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        # (B, H, W, heads, dim) to (B, row tiles, column tiles, heads, tokens of a tile, dim)
        x = x.index_select(1, rows.flatten()).index_select(2, cols.flatten())
        x = x.unflatten(2, cols.shape).unflatten(1, rows.shape)
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)

    def pair(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        # (row tiles, tile, span), (column tiles, tile, span) broadcast to (row tiles, column tiles, *queries, *keys).
        return rows[:, None, :, None, :, None], cols[None, :, None, :, None, :]

    row_seen, col_seen = pair(row_seen, col_seen)
    seen = row_seen & col_seen
    bias = torch.zeros((), dtype=query.dtype, device=query.device).expand(seen.shape).unsqueeze(0)
    if rpb is not None:
        bias = rpb.to(query.dtype)[(slice(None), *pair(row_entry, col_entry))]
    bias = bias.masked_fill(~seen, float("-inf"))
    bias = bias.flatten(5, 6).flatten(3, 4).permute(1, 2, 0, 3, 4)  # (row tiles, column tiles, heads, queries, keys)

    attn = (gather(query * scale, q_rows, q_cols) @ gather(key, k_rows, k_cols).mT + bias).softmax(-1)
    out = attn @ gather(value, k_rows, k_cols)
    out = out.unflatten(4, (q_rows.shape[1], q_cols.shape[1])).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.flatten(3, 4).flatten(1, 2)
    return out.index_select(1, row_place).index_select(2, col_place).to(dtype)
