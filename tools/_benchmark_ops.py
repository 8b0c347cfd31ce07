"""The operators' cases for tools/benchmark.py: each at the shapes of its networks, beside what a user would pick."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from densezoo.ops import (
    agent_attention,
    channel_attention,
    focal_modulation,
    focused_linear_attention,
    ms_deform_attn,
    na2d,
    quadtree_attention,
    set_backend,
    window_attention,
)
from densezoo.ops.agent.reference import agent_attention_reference
from densezoo.ops.channel.reference import channel_attention_reference
from densezoo.ops.deformable.reference import ms_deform_attn_reference
from densezoo.ops.focal.reference import focal_modulation_reference
from densezoo.ops.linear.reference import focused_linear_attention_reference
from densezoo.ops.quadtree.reference import quadtree_attention_reference
from densezoo.ops.window.reference import window_attention_reference
from torch import Tensor

# Relative RMS error that a kernel may have against its reference, by dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Case:
    """One operator at one shape: inputs that need gradients, and the ways to compute it, ours first."""

    name: str
    inputs: tuple[Tensor, ...]
    ways: dict[str, Callable[..., Tensor]]
    check: Callable[[], float]


def na2d_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Neighbourhood attention, kernel 7 with bias: NAT-T's stages at 224 and 800x1216, and dilated ones of DiNAT-T."""
    shapes = [(128, 56, 56, 2, 1), (128, 28, 28, 4, 1), (128, 14, 14, 8, 1), (128, 56, 56, 2, 8)]
    shapes += [(2, 200, 304, 2, 1), (2, 100, 152, 4, 1), (2, 200, 304, 2, 28)]
    for batch, height, width, heads, dilation in shapes:
        qkv = torch.randn(batch, height, width, 3, heads, 32, device=device, dtype=dtype)
        inputs = (*qkv.unbind(3), torch.randn(heads, 13, 13, device=device))

        def run(q, k, v, rpb, dilation=dilation):
            return na2d(q, k, v, 7, dilation=dilation, rpb=rpb)

        def check(inputs=inputs, run=run) -> float:
            return worst_error(run, [t[:1] if t.dim() == 5 else t for t in inputs])

        ways = {"densezoo": run, **flex_ways(height, width, heads, dilation, device)}
        yield Case(f"na2d {batch}, {height}x{width}, {heads}x32, dilation {dilation}", inputs, ways, check)


def flex_ways(height: int, width: int, heads: int, dilation: int, device: str) -> dict[str, Callable[..., Tensor]]:
    """Return FlexAttention's way to neighbourhood attention of kernel 7 with the bias."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def window(position, size):
        length = (size - position % dilation + dilation - 1) // dilation
        return torch.minimum((position // dilation - 3).clamp(min=0), length - 7)

    rows, cols = torch.arange(height, device=device), torch.arange(width, device=device)
    start_h, start_w = window(rows, height), window(cols, width)

    def near(q, k, start):
        return (q % dilation == k % dilation) & (k // dilation >= start[q]) & (k // dilation < start[q] + 7)

    def mask(b, h, q, k):
        return near(q // width, k // width, start_h) & near(q % width, k % width, start_w)

    # Compiled, it holds no mask of all pairs, but at 100x152 its compilation does not end.
    tokens = height * width
    blocks = create_block_mask(mask, None, None, tokens, tokens, device=device, _compile=tokens**2 > 2**30)
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(q, k, v, rpb):
        def bias(score, b, h, i, j):
            row = (j // width) // dilation - (i // width) // dilation + 6
            col = (j % width) // dilation - (i % width) // dilation + 6
            return score + rpb[h, row.clamp(0, 12), col.clamp(0, 12)]

        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, score_mod=bias, block_mask=blocks).transpose(1, 2)

    return {"FlexAttention": flex}


def window_attention_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Window attention with bias, with and without shift: Swin-T's stages at 224 and 800x1216, and windows of 8x8."""
    shapes = [(128, 56, 56, 3, 7), (128, 28, 28, 6, 7), (128, 14, 14, 12, 7), (2, 203, 308, 3, 7), (64, 64, 64, 3, 8)]
    for batch, height, width, heads, window in shapes:
        for shift in (0, window // 2):
            qkv = torch.randn(batch, height, width, 3 * heads * 32, device=device, dtype=dtype)
            inputs = (qkv, torch.randn(heads, 2 * window - 1, 2 * window - 1, device=device))

            def run(qkv, bias, heads=heads, window=window, shift=shift):
                return window_attention(qkv, bias, num_heads=heads, window_size=window, shift=shift)

            def reference(qkv, bias, heads=heads, window=window, shift=shift):
                pairs = ((window, window), (shift, shift))
                return window_attention_reference(qkv, bias, heads, *pairs, False, 32**-0.5)

            def check(inputs=inputs, run=run) -> float:
                return worst_error(run, [inputs[0][:2], inputs[1]])

            ways = {
                "densezoo": run,
                **reference_ways(reference),
                **sdpa_ways(height, width, heads, window, shift, device),
            }
            name = f"window_attention {batch}, {height}x{width}, {heads}x32, window {window}, shift {shift}"
            yield Case(name, inputs, ways, check)


def sdpa_ways(
    height: int, width: int, heads: int, window: int, shift: int, device: str
) -> dict[str, Callable[..., Tensor]]:
    """Return window attention as Swin's users compile it: cyclic shift, partition, SDPA with bias and mask, merge."""
    place = torch.arange(window, device=device)
    entry = place[None, :] - place[:, None] + window - 1
    rows, cols = (
        torch.arange(size, device=device).roll(-shift) < shift for size in (height, width)
    )  # positions that the shift brought round
    run = 2 * rows[:, None].int() + cols[None, :].int()
    n, m = height // window, width // window
    run = run.view(n, window, m, window).transpose(1, 2).reshape(n * m, 1, window * window)
    mask = torch.where(run == run.mT, 0.0, -100.0)

    def sdpa(qkv, bias):
        batch = qkv.shape[0]
        x = qkv.roll((-shift, -shift), (1, 2)) if shift else qkv
        x = x.view(batch, n, window, m, window, 3, heads, 32).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = x.reshape(3, batch * n * m, heads, window * window, 32).unbind()
        attn_mask = bias[:, entry[:, None, :, None], entry[None, :, None, :]].flatten(3).flatten(1, 2)
        if shift:
            attn_mask = (attn_mask + mask[:, None]).repeat(batch, 1, 1, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask.to(q.dtype))
        out = out.view(batch, n, m, heads, window, window, 32).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(batch, height, width, heads * 32)
        return out.roll((shift, shift), (1, 2)) if shift else out

    return {"compiled SDPA": torch.compile(sdpa, dynamic=False)}


def channel_attention_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Channel attention: DaViT-T's stages at 224, and the first two at 800x1216."""
    shapes = [(128, 56, 56, 3), (128, 28, 28, 6), (128, 14, 14, 12), (128, 7, 7, 24)]
    shapes += [(2, 200, 304, 3), (2, 100, 152, 6)]
    for batch, height, width, heads in shapes:
        inputs = torch.randn(batch, height, width, 3, heads, 32, device=device, dtype=dtype).unbind(3)

        def check(inputs=inputs) -> float:
            return worst_error(channel_attention, [t[:1] for t in inputs])

        def reference(q, k, v):
            return channel_attention_reference(q, k, v, 32**-0.5)

        ways = {"densezoo": channel_attention, **reference_ways(reference)}
        yield Case(f"channel_attention {batch}, {height}x{width}, {heads}x32", inputs, ways, check)


def focal_modulation_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Focal modulation: the stages of FocalNet-T, srf and lrf, at 224, and their first at 800x1216."""
    shapes = [(128, 56, 56, 96), (128, 28, 28, 192), (128, 14, 14, 384), (128, 7, 7, 768), (2, 200, 304, 96)]
    for sizes in ((3, 5), (3, 5, 7)):
        for batch, height, width, dim in shapes:
            split = (dim, dim, len(sizes) + 1)
            projected = torch.randn(batch, height, width, sum(split), device=device, dtype=dtype)
            inputs = projected.split(split, dim=-1)[1:]
            inputs += tuple(torch.randn(dim, 1, size, size, device=device) / size for size in sizes)

            def run(context, gates, *weights):
                return focal_modulation(context, gates, weights)

            def check(inputs=inputs, run=run) -> float:
                return worst_error(run, [t[:1] if i < 2 else t for i, t in enumerate(inputs)])

            def reference(context, gates, *weights):
                return focal_modulation_reference(context, gates, weights, False)

            ways = {"densezoo": run, **reference_ways(reference)}
            yield Case(f"focal_modulation {batch}, {height}x{width}x{dim}, kernels {sizes}", inputs, ways, check)


# Tokens, heads, dim and agents of the stages of PVT and Swin at 224 whose attention FLatten and Agent replace.
PVT_STAGES = [(3136, 1, 64, 9), (784, 2, 64, 16), (196, 5, 64, 49), (49, 8, 64, 49)]
SWIN_STAGES = [(3136, 3, 32, 9), (784, 6, 32, 16), (196, 12, 32, 49)]


def focused_linear_attention_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Focused linear attention: the stages of FLatten-PVT and FLatten-Swin-T at 224."""
    for tokens, heads, dim, _ in PVT_STAGES + SWIN_STAGES[:2]:
        qkv = torch.randn(128, tokens, 3, heads, dim, device=device, dtype=dtype)
        scale, encoding = torch.rand(heads, dim, device=device) + 0.5, torch.randn(tokens, heads, dim, device=device)
        inputs = (*qkv.unbind(2), scale, encoding)

        def run(q, k, v, scale, encoding):
            return focused_linear_attention(q, k, v, scale, positional_encoding=encoding)

        def reference(*tensors):
            return focused_linear_attention_reference(*tensors, 3.0)

        def check(inputs=inputs, run=run) -> float:
            return worst_error(run, [t[:2] if t.dim() == 4 else t for t in inputs])

        ways = {"densezoo": run, **reference_ways(reference)}
        yield Case(f"focused_linear_attention 128, {tokens}, {heads}x{dim}", inputs, ways, check)


def agent_attention_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Agent attention with its biases: the stages of Agent-PVT and Agent-Swin-T at 224."""
    for tokens, heads, dim, agents in PVT_STAGES + SWIN_STAGES:
        qkv = torch.randn(128, tokens, 3, heads, dim, device=device, dtype=dtype)
        agent = torch.randn(128, agents, heads, dim, device=device, dtype=dtype)
        # As the backbones make them: both with the tokens innermost.
        biases = torch.randn(2, heads, agents, tokens, device=device)
        inputs = (*qkv.unbind(2), agent, biases[0], biases[1].mT)

        def run(q, k, v, agent, aggregation, broadcast):
            return agent_attention(q, k, v, agent, aggregation_bias=aggregation, broadcast_bias=broadcast)

        def reference(*tensors, scale=dim**-0.5):
            return agent_attention_reference(*tensors, scale)

        def sdpa(q, k, v, agent, aggregation, broadcast):
            q, k, v, agent = (t.transpose(1, 2) for t in (q, k, v, agent))
            attend = torch.nn.functional.scaled_dot_product_attention
            gathered = attend(agent, k, v, attn_mask=aggregation.to(q.dtype))
            return attend(q, agent, gathered, attn_mask=broadcast.to(q.dtype)).transpose(1, 2)

        def check(inputs=inputs, run=run) -> float:
            return worst_error(run, [t[:2] if t.dim() == 4 else t for t in inputs])

        ways = {"densezoo": run, **reference_ways(reference), "compiled SDPA": torch.compile(sdpa, dynamic=False)}
        yield Case(f"agent_attention 128, {tokens}, {heads}x{dim}, {agents} agents", inputs, ways, check)


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

            def check(inputs=inputs, run=run) -> float:
                return worst_error(run, [t[:1] for t in inputs])

            name = f"quadtree_attention {batch}, {height}x{width}, {heads}x{dim}, {len(maps)} levels, top {topk}"
            yield Case(name, inputs, {"densezoo": run, **reference_ways(reference)}, check)


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
    name = f"ms_deform_attn {batch}, {total} keys and queries, {heads}x32, {len(sizes)} levels of {points} points"
    yield Case(name, inputs, ways, lambda: worst_error(run, [value[:1], *(t[:1, ::8] for t in inputs[1:])]))


def worst_error(run: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Return the worst relative RMS error of the output and of every gradient against the float64 reference."""
    results = []
    grad = None
    for backend, dtype in (("triton", None), ("reference", torch.float64)):
        set_backend(backend)
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        out = run(*leaves)
        grad = torch.randn_like(out) if grad is None else grad
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    set_backend("auto")
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))


def reference_ways(reference: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """Return an operator's reference as the ways that every user has: eager, and compiled."""
    return {"eager": reference, "compiled": torch.compile(reference, dynamic=False)}


OPERATORS: dict[str, Callable[[torch.dtype, str], Iterator[Case]]] = {
    "na2d": na2d_cases,
    "window_attention": window_attention_cases,
    "channel_attention": channel_attention_cases,
    "focal_modulation": focal_modulation_cases,
    "focused_linear_attention": focused_linear_attention_cases,
    "agent_attention": agent_attention_cases,
    "quadtree_attention": quadtree_attention_cases,
    "ms_deform_attn": ms_deform_attn_cases,
}
