"""Cases of tools/benchmark.py, of attention to positions that the data chooses: quadtrees and deformable sampling."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from _benchmark_cases import Case, reference_ways, worst_error
from densezoo.ops import ms_deform_attn, quadtree_attention
from densezoo.ops.deformable.reference import ms_deform_attn_reference
from densezoo.ops.quadtree.reference import quadtree_attention_reference


def quadtree_attention_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """QuadTree attention: the stages of b1 and b2, and the widest maps of b0, at 224 and as a detector at 800x1216."""
    for batch, sides, topk in [(128, (56, 56), 8), (2, (200, 304), 32)]:
        stages = [(0, 1, 64), (1, 2, 64), (2, 5, 64), (3, 8, 64), (0, 1, 32), (1, 2, 32)]
        for stage, heads, dim in stages:
            height, width = (-(-side >> stage) for side in sides)
            maps = [(height, width)]
            for _ in range(3 - stage):
                maps.append(tuple((side + 1) // 2 for side in maps[-1]))
            qkv = torch.randn(batch, height, width, 3, heads, dim, device=device, dtype=dtype)
            coarser = (torch.randn(batch, *m, heads, dim, device=device, dtype=dtype) for m in maps[1:])

            def run(q, k, *v, topk=topk):
                return quadtree_attention(q, k, v, topk=topk)

            def reference(q, k, *v, topk=topk):
                return quadtree_attention_reference(q, k, v, topk, "B", q.shape[-1] ** -0.5)

            inputs = (*qkv.unbind(3), *coarser)

            # Four children share the keys and values that their parent kept, but for those of the coarsest level.
            parents = batch * heads * sum(h * w for h, w in maps[1:])
            gathers = 2 * parents * 4 * topk * dim * dtype.itemsize
            gathered = gathers - sum(t.nbytes for t in inputs[1:-1]) if len(maps) > 1 else 0
            name = f"quadtree_attention {batch}, {height}x{width}, {heads}x{dim}, {len(maps)} levels, top {topk}"
            check = partial(worst_error, run, [t[:1] for t in inputs])
            yield Case(name, inputs, {"densezoo": run, **reference_ways(reference)}, check, gathered)


def ms_deform_attn_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Multi-scale deformable attention: Deformable DETR's encoder at 800x1216; queries sample around themselves."""
    sizes = [(100, 152), (50, 76), (25, 38), (13, 19)]
    shapes = torch.tensor(sizes, device=device)
    keys = shapes.prod(1)
    starts = keys.cumsum(0) - keys
    total, batch, heads, points = sum(h * w for h, w in sizes), 2, 8, 4
    centres = torch.cat([torch.cartesian_prod(*((torch.arange(n) + 0.5) / n for n in size)) for size in sizes])
    offsets = torch.randn(batch, total, heads, len(sizes), points, 2, device=device) * 3 / shapes.flip(1)[:, None]
    value = torch.randn(batch, total, heads, 32, device=device, dtype=dtype)
    locations = centres.flip(1).to(device)[:, None, None, None] + offsets
    weights = torch.randn(batch, total, heads, len(sizes) * points, device=device).softmax(-1).to(dtype)
    inputs = (value, locations, weights.unflatten(-1, (len(sizes), points)))

    def run(value, locations, weights):
        return ms_deform_attn(value, shapes, starts, locations, weights)

    def reference(value, locations, weights):
        return ms_deform_attn_reference(value, shapes, starts, locations, weights)

    def grid_sample(value, locations, weights):
        # What Deformable DETR's users fall back to without its extension.
        grid, samples = 2 * locations - 1, []
        for i, part in enumerate(value.float().split([h * w for h, w in sizes], 1)):
            part = part.permute(0, 2, 3, 1).reshape(-1, value.shape[-1], *sizes[i])
            where = grid[:, :, :, i].transpose(1, 2).flatten(0, 1)
            samples.append(F.grid_sample(part, where, padding_mode="zeros", align_corners=False))
        weights = weights.float().transpose(1, 2).flatten(0, 1).flatten(2)[:, None]
        out = (torch.stack(samples, -2).flatten(-2) * weights).sum(-1)
        return out.view(len(value), -1, value.shape[1]).transpose(1, 2).to(value.dtype)

    ways = {"densezoo": run, "grid_sample": grid_sample, **reference_ways(reference)}
    # A part of the queries: the reference keeps every sample, in float64.
    check = partial(worst_error, run, [value[:1], *(t[:1, ::8] for t in inputs[1:])])
    name = f"ms_deform_attn {batch}, {total} keys and queries, {heads}x32, {len(sizes)} levels of {points} points"
    # Four corners a point, of all channels; the few that lie outside count too.
    gathered = 4 * inputs[2].numel() * value.shape[-1] * value.itemsize - value.nbytes
    yield Case(name, inputs, ways, check, gathered)
