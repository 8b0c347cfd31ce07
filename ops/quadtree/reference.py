"""QuadTree attention in plain PyTorch: the CPU path, the export path and what kernels are tested against."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from densezoo.ops.backend import is_exporting
from densezoo.ops.precision import widen, without_autocast
from densezoo.ops.shapes import fold
from torch import Tensor


class Kept(NamedTuple):
    """The keys that the queries of a level keep, each (B, heads, queries, topk).

    Where a map has fewer keys than are kept, the surplus ones lie outside of it, and so do all their descendants.
    """

    row: Tensor
    column: Tensor
    # In type A alone.
    weight: Tensor | None = None


def _pairs(size: int, device: torch.device) -> Tensor:
    """Return the positions along a side two by two, (ceil(size / 2), 2): the last one twice where the side is odd."""
    return torch.arange((size + 1) // 2 * 2, device=device).clamp(max=size - 1).view(-1, 2)


def extend_to_even(x: Tensor) -> Tensor:
    """Repeat the last row and the last column of a map (B, H, W, ...) where the side is odd."""
    for dim, size in enumerate(x.shape[1:3], start=1):
        # A branch would fix the exported sizes.
        if is_exporting() or size % 2:
            x = x.index_select(dim, _pairs(size, x.device).flatten())
    return x


def to_quads(x: Tensor) -> Tensor:
    """Cut a map (B, H, W, ...) into its 2x2 quads: (B, ceil(H / 2), ceil(W / 2), 2, 2, ...).

    Where a side is odd its last positions stand twice in their quad, so that its mean is the mean of what is there.
    """
    if is_exporting():
        # Export cannot prove that a side of 2 * n + 2 splits by n + 1.
        row, column = (_pairs(size, x.device) for size in x.shape[1:3])
        return x[:, row[:, None, :, None], column[:, None, :]]
    return extend_to_even(x).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)


def halve(x: Tensor) -> Tensor:
    """Take a map (B, H, W, ...) to the means of its quads, (B, ceil(H / 2), ceil(W / 2), ...)."""
    return to_quads(x).mean((3, 4))


def quadtree_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Sequence[Tensor],
    topk: int,
    attn_type: str,
    scale: float,
    encoding: Sequence[Tensor] | None = None,
) -> Tensor:
    """Compute `densezoo.ops.quadtree_attention` level by level, gathering the candidates of each query.

    Memory grows with positions * topk, and with the square of the positions at the coarsest level alone. 16-bit inputs
    are computed in float32.
    """
    dtype = query.dtype
    query, key, *maps = widen(query, key, *value, *(encoding or ()))
    value, encoding = maps[: len(value)], maps[len(value) :] or [0] * len(value)
    levels = [(query * scale, key)]
    for _ in value[1:]:
        levels.append(tuple(map(halve, levels[-1])))
    with without_autocast(query):
        out, kept = _attend_to_all(*levels.pop(), value[-1], topk, attn_type)
        out = out + encoding[-1]
        while levels:
            last = len(levels) == 1
            out, kept = _attend_to_children(*levels.pop(), value[len(levels)], out, kept, topk, attn_type, last)
            out = out + encoding[len(levels)]
    return out.to(dtype)


def _attend_to_all(query: Tensor, key: Tensor, value: Tensor, topk: int, attn_type: str) -> tuple[Tensor, Kept]:
    """Attend to all keys of a level (B, H, W, heads, dim); return the output, as that, and what the queries keep."""
    batch, height, width, heads, dim = query.shape
    query, key, value = (fold(x.permute(0, 3, 1, 2, 4), batch, heads, height * width, dim) for x in (query, key, value))
    # Keys in rows below the map, without weight: an exported graph has them always, as a branch would fix its sizes.
    surplus = topk if is_exporting() else max(topk - height * width, 0)
    scores = F.pad(query @ key.mT, (0, surplus), value=float("-inf"))
    attn = scores.softmax(-1)
    place = scores.detach().topk(topk).indices
    weight = None
    if attn_type == "A":
        weight = attn.gather(-1, place)
        attn = attn.scatter(-1, place, 0)
    out = attn @ F.pad(value, (0, 0, 0, surplus))
    out = out.unflatten(2, (height, width)).permute(0, 2, 3, 1, 4)
    return out, Kept(place // width, place % width, weight)


def _attend_to_children(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coarser: Tensor,
    kept: Kept,
    topk: int,
    attn_type: str,
    last: bool,
) -> tuple[Tensor, Kept | None]:
    """Attend of a level's queries (B, H, W, heads, dim) to the children of the keys that their parents kept.

    Returns the output with that of the parents, `coarser`, added, and what the queries keep, unless it is the last
    level.
    """
    (_, height, width, _, _), (batch, rows, columns, heads, dim) = query.shape, coarser.shape
    parents = rows * columns

    def family(x: Tensor) -> Tensor:
        return to_quads(x).permute(0, 5, 1, 2, 3, 4, 6)

    # Every row of a table holds the four children of a key.
    index = kept.row.clamp(max=rows - 1) * columns + kept.column.clamp(max=columns - 1)
    index = index + torch.arange(batch * heads, device=index.device).view(batch, heads, 1, 1) * parents
    key, value = (
        F.embedding(index, fold(family(x), batch * heads * parents, 4 * dim)).unflatten(-1, (4, dim)).flatten(3, 4)
        for x in (key, value)
    )
    child = torch.arange(4, device=index.device)
    row, column = 2 * kept.row[..., None] + child // 2, 2 * kept.column[..., None] + child % 2
    outside = (row >= height) | (column >= width)

    query = fold(family(query), batch, heads, parents, 4, dim)
    # (B, heads, parents, queries of a parent, topk, children)
    scores = (query @ key.mT).unflatten(-1, (topk, 4))
    if attn_type == "A":
        # The children of a key outside of the map get no weight from it: their softmax is of no matter, if not empty.
        hidden = outside & ~outside[..., :1]
        attn = scores.masked_fill(hidden[:, :, :, None], float("-inf")).softmax(-1) * kept.weight[..., None, :, None]
        attn = scores = attn.flatten(-2)
    else:
        scores = scores.masked_fill(outside[:, :, :, None], float("-inf")).flatten(-2)
        attn = scores.softmax(-1)

    def to_map(x: Tensor) -> Tensor:
        # (B, heads, parents, queries of a parent, n) to (B, heads, H, W, n)
        x = x.unflatten(3, (2, 2)).unflatten(2, (rows, columns))
        if is_exporting():
            row, column = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)
            return x[:, :, row // 2, column // 2, row % 2, column % 2]
        return fold(x.transpose(3, 4), batch, heads, 2 * rows, 2 * columns, x.shape[-1])[:, :, :height, :width]

    chosen = None
    if not last:
        place = scores.detach().topk(topk).indices
        chosen = [x.flatten(-2)[..., None, :].expand_as(scores).gather(-1, place) for x in (row, column)]
        if attn_type == "A":
            chosen.append(attn.gather(-1, place))
            attn = attn.scatter(-1, place, 0)
        chosen = Kept(*(to_map(x).flatten(2, 3) for x in chosen))
    coarser = fold(coarser.permute(0, 3, 1, 2, 4), batch, heads, parents, 1, dim)
    return to_map(attn @ value + coarser).permute(0, 2, 3, 1, 4), chosen
