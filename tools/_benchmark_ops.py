"""The operators' cases for tools/benchmark.py: each at the shapes of its networks, beside what a user would pick."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from densezoo.ops import channel_attention, focal_modulation, na2d, set_backend
from densezoo.ops.channel.reference import channel_attention_reference
from densezoo.ops.focal.reference import focal_modulation_reference
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

    blocks = create_block_mask(mask, None, None, height * width, height * width, device=device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(q, k, v, rpb):
        def bias(score, b, h, i, j):
            row = (j // width) // dilation - (i // width) // dilation + 6
            col = (j % width) // dilation - (i % width) // dilation + 6
            return score + rpb[h, row.clamp(0, 12), col.clamp(0, 12)]

        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, score_mod=bias, block_mask=blocks).transpose(1, 2)

    return {"FlexAttention": flex}


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
    "channel_attention": channel_attention_cases,
    "focal_modulation": focal_modulation_cases,
}
