"""The operators' cases for tools/benchmark.py: each at the shapes of its networks, beside what a user would pick."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from _benchmark_cases import Case, reference_ways, worst_error
from _benchmark_layers import activated_conv_cases, depthwise_conv_cases, layer_norm_cases, mlp_cases, pool_mix_cases
from _benchmark_local import na2d_cases, window_attention_cases
from _benchmark_sparse import ms_deform_attn_cases, quadtree_attention_cases
from densezoo.ops import agent_attention, channel_attention, focal_modulation, focused_linear_attention
from densezoo.ops.agent.reference import agent_attention_reference
from densezoo.ops.channel.reference import channel_attention_reference
from densezoo.ops.focal.reference import focal_modulation_reference
from densezoo.ops.linear.reference import focused_linear_attention_reference


def channel_attention_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Channel attention: DaViT-T's stages at 224, and the first two at 800x1216."""
    shapes = [(128, 56, 56, 3), (128, 28, 28, 6), (128, 14, 14, 12), (128, 7, 7, 24)]
    shapes += [(2, 200, 304, 3), (2, 100, 152, 6)]
    for batch, height, width, heads in shapes:
        qkv = torch.randn(batch, height, width, 3, heads, 32, device=device, dtype=dtype)
        # Scores, which are sums over all positions, of order one: else nothing but rounding decides.
        qkv[:, :, :, 0] *= (32 / (height * width)) ** 0.5
        inputs = qkv.unbind(3)

        def reference(q, k, v):
            return channel_attention_reference(q, k, v, 32**-0.5)

        ways = {"densezoo": channel_attention, **reference_ways(reference)}
        check = partial(worst_error, channel_attention, [t[:1] for t in inputs])
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

            def reference(context, gates, *weights):
                return focal_modulation_reference(context, gates, weights, False)

            ways = {"densezoo": run, **reference_ways(reference)}
            check = partial(worst_error, run, [t[:1] if i < 2 else t for i, t in enumerate(inputs)])
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

        ways = {"densezoo": run, **reference_ways(reference)}
        check = partial(worst_error, run, [t[:2] if t.dim() == 4 else t for t in inputs])
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

        ways = {"densezoo": run, **reference_ways(reference), "compiled SDPA": torch.compile(sdpa, dynamic=False)}
        check = partial(worst_error, run, [t[:2] if t.dim() == 4 else t for t in inputs])
        yield Case(f"agent_attention 128, {tokens}, {heads}x{dim}, {agents} agents", inputs, ways, check)


OPERATORS: dict[str, Callable[[torch.dtype, str], Iterator[Case]]] = {
    "na2d": na2d_cases,
    "window_attention": window_attention_cases,
    "channel_attention": channel_attention_cases,
    "depthwise_conv": depthwise_conv_cases,
    "activated_conv": activated_conv_cases,
    "focal_modulation": focal_modulation_cases,
    "focused_linear_attention": focused_linear_attention_cases,
    "agent_attention": agent_attention_cases,
    "quadtree_attention": quadtree_attention_cases,
    "ms_deform_attn": ms_deform_attn_cases,
    "layer_norm": layer_norm_cases,
    "mlp": mlp_cases,
    "pool_mix": pool_mix_cases,
}
