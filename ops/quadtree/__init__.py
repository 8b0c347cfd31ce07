"""QuadTree attention: from coarse to fine, each position attends in the regions that its parent chose."""

from collections.abc import Sequence

import torch
from densezoo.ops.backend import takes_triton
from densezoo.ops.launch import MAX_IMAGES
from densezoo.ops.quadtree.reference import halve, quadtree_attention_reference, to_quads
from densezoo.ops.shapes import check_tensors
from torch import Tensor

__all__ = ["halve", "quadtree_attention", "to_quads"]


def quadtree_attention(
    query: Tensor,
    key: Tensor,
    value: Sequence[Tensor],
    *,
    topk: int = 8,
    attn_type: str = "B",
    scale: float | None = None,
    encoding: Sequence[Tensor] | None = None,
) -> Tensor:
    """Attend over a pyramid of maps, at a cost linear in the positions of the finest (QuadTree, arXiv 2201.02767).

    Queries and keys of each coarser level are the means of 2x2 positions of the level before. At the coarsest level
    every query attends to all keys, and keeps the `topk` keys of the largest weights. At each finer level the four
    children of a query attend to the children of the keys that it kept, and keep `topk` of these in turn. The output is
    the sum over the levels, where a position takes its ancestors' outputs as they are.

    With type "B", the paper's for image recognition, a query's weights are a softmax over all of its candidates. With
    type "A" they are a softmax over each four children, times the weight of their parent; a key that is kept counts at
    the levels below alone: it has no part in the output of its own level, except at the finest of several levels.

    A map of any size will do. Where a side is odd, the quads at its end have two children or one: means are of those,
    and nothing else is attended to. Where a level has fewer positions than `topk`, all are kept.

    Args:
        query: (B, H, W, heads, dim), float16, bfloat16, float32 or float64, any strides.
        key: As `query`.
        value: A map as `query` for each level, the finest first; each side is half that of the level before, rounded
            up. Published models make them by averaging (A) or by convolutions (B). Levels are weighted by scaling
            their values.
        topk: Keys that a query keeps at each level but the finest.
        attn_type: "A" or "B".
        scale: Multiplies query . key; dim ** -0.5 by default.
        encoding: Maps as `value`, of a position encoding for one, which are added to the outputs of their levels, so
            that a position takes its ancestors' too.

    Returns:
        (B, H, W, heads, dim), of `query`'s dtype. Means, softmax and sums run in float32 for 16-bit inputs. The choice
        of keys has no gradient.

    Raises:
        ValueError: An argument's shape, dtype, device or value is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    _check(query, key, value, topk, attn_type, encoding)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if takes_triton("quadtree_attention", query, _unsupported, query, value, topk, attn_type):
        from densezoo.ops.quadtree.kernels import quadtree_attention_triton

        return quadtree_attention_triton(query, key, value, topk, scale, encoding)
    return quadtree_attention_reference(query, key, value, topk, attn_type, scale, encoding)


def _check(query, key, value, topk, attn_type, encoding) -> None:
    check_tensors(query=query, key=key)
    for name, maps in (("value", value), *([] if encoding is None else [("encoding", encoding)])):
        if not isinstance(maps, Sequence) or not maps or not all(isinstance(t, Tensor) for t in maps):
            kind = [type(t).__name__ for t in maps] if isinstance(maps, Sequence) else type(maps).__name__
            raise ValueError(f"{name}: got {kind}, expected a list of maps, one per level, the finest first")
    if encoding is not None and len(encoding) != len(value):
        raise ValueError(f"encoding: got {len(encoding)} maps, expected {len(value)}, one for each of value")
    height, width = query.shape[1:3] if query.dim() == 5 else (0, 0)
    expected = [("query", query, height, width), ("key", key, height, width)]
    for level, t in enumerate(value):
        expected.append((f"value[{level}]", t, height, width))
        if encoding is not None:
            expected.append((f"encoding[{level}]", encoding[level], height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    for name, t, rows, columns in expected:
        shape = (query.shape[0], rows, columns, *query.shape[3:])
        fits = query.dim() == t.dim() == 5 and all(a == b for a, b in zip(t.shape, shape, strict=True))
        if not fits or 0 in t.shape[3:]:
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, expected (B, H, W, heads, dim), the same for query, key and "
                f"the finest level, with half the sides, rounded up, at each further one (query: {tuple(query.shape)})"
            )
        if not t.is_floating_point() or t.dtype != query.dtype or t.device != query.device:
            raise ValueError(
                f"{name}: got {t.dtype} on {t.device}, expected one floating dtype and one device for all maps "
                f"(query: {query.dtype} on {query.device})"
            )
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise ValueError(f"topk: got {topk!r}, expected a positive int")
    if attn_type not in ("A", "B"):
        raise ValueError(f"attn_type: got {attn_type!r}, expected 'A' or 'B'")


def _unsupported(query: Tensor, value: Sequence[Tensor], topk: int, attn_type: str) -> str | None:
    """Return why the kernels cannot take these arguments, or None where they can."""
    if attn_type != "B":
        return f"attn_type {attn_type!r} (kernels: 'B', whose weights were published)"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {query.dtype} (kernels: float16, bfloat16, float32)"
    if not 8 <= query.shape[-1] <= 128:
        return f"head dim {query.shape[-1]} (kernels: 8 to 128)"
    if len(value) > 4:
        return f"{len(value)} levels (kernels: up to 4)"
    if len(value) > 1 and topk > 64:
        return f"topk {topk} (kernels: up to 64)"
    batch, height, width, heads, _ = value[-1].shape
    if batch > MAX_IMAGES:
        return f"{batch} images (kernels: up to {MAX_IMAGES})"
    if len(value) > 1 and height * width > 4096:
        return f"a coarsest level of {height}x{width} positions (kernels: up to 4096)"
    if batch * heads * query.shape[1] * query.shape[2] >= 2**31:
        return f"{batch} x {heads} maps of {query.shape[1]}x{query.shape[2]} (kernels: fewer than 2^31 positions)"
    return None
