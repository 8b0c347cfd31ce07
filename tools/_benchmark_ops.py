"""The operators' cases for tools/benchmark.py: each at the shapes of its networks, beside what a user would pick."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from densezoo.ops import agent_attention, focused_linear_attention, na2d, set_backend
from densezoo.ops.agent.reference import agent_attention_reference
from densezoo.ops.linear.reference import focused_linear_attention_reference
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
    "focused_linear_attention": focused_linear_attention_cases,
    "agent_attention": agent_attention_cases,
}
