"""Agent attention: tokens attend through a few agent tokens."""

import torch
from densezoo.ops.agent.reference import agent_attention_reference
from densezoo.ops.backend import takes_triton
from densezoo.ops.shapes import check_tensors
from torch import Tensor

__all__ = ["agent_attention"]


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    *,
    aggregation_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend in two steps through agent tokens, at a cost linear in the tokens (Agent Attention, arXiv 2312.08874).

    The agents gather from the tokens, then the tokens gather from the agents:

        agent_value = softmax(scale * agent @ key^T + aggregation_bias) @ value
        out = softmax(scale * query @ agent^T + broadcast_bias) @ agent_value

    Args:
        query: (B, tokens, heads, dim), float16, bfloat16, float32 or float64, any strides.
        key: As `query`.
        value: As `query`.
        agent: (B, agents, heads, dim), of `query`'s dtype; the paper pools them from the queries.
        aggregation_bias: (heads, agents, tokens), any floating dtype.
        broadcast_bias: (heads, tokens, agents), any floating dtype.
        scale: Multiplies the scores of both steps; dim ** -0.5 by default.

    Returns:
        (B, tokens, heads, dim), of `query`'s dtype. Softmax and sums run in float32 for 16-bit inputs.

    Raises:
        ValueError: An argument's shape, dtype or device is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    _check(query, key, value, agent, aggregation_bias, broadcast_bias)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    args = (query, key, value, agent, aggregation_bias, broadcast_bias, scale)
    if takes_triton("agent_attention", query, _unsupported, query, agent, aggregation_bias, broadcast_bias):
        from densezoo.ops.agent.kernels import agent_attention_triton

        return agent_attention_triton(*args)
    return agent_attention_reference(*args)


def _check(query, key, value, agent, aggregation_bias, broadcast_bias) -> None:
    tensors = dict(query=query, key=key, value=value, agent=agent)
    check_tensors(**tensors)
    for name, t in tensors.items():
        # Agents have their own number of tokens; all else is shared.
        fits = t.dim() == query.dim() == 4 and t.shape[0] == query.shape[0] and t.shape[2:] == query.shape[2:]
        if not fits or 0 in t.shape[2:] or (name != "agent" and t.shape[1] != query.shape[1]):
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, expected (B, tokens, heads, dim), the same for query, key and "
                f"value, and (B, agents, heads, dim) for agent (query: {tuple(query.shape)})"
            )
        if not t.is_floating_point() or t.dtype != query.dtype or t.device != query.device:
            raise ValueError(
                f"{name}: got {t.dtype} on {t.device}, expected one floating dtype and one device for query, key, "
                f"value and agent (query: {query.dtype} on {query.device})"
            )
    (_, tokens, heads, _), agents = query.shape, agent.shape[1]
    for name, bias, axes, expected in (
        ("aggregation_bias", aggregation_bias, "(heads, agents, tokens)", (heads, agents, tokens)),
        ("broadcast_bias", broadcast_bias, "(heads, tokens, agents)", (heads, tokens, agents)),
    ):
        if bias is None:
            continue
        check_tensors(**{name: bias})
        if tuple(bias.shape) != expected:
            raise ValueError(f"{name}: got shape {tuple(bias.shape)}, expected {axes} = {expected}")
        if not bias.is_floating_point() or bias.device != query.device:
            raise ValueError(f"{name}: got {bias.dtype} on {bias.device}, expected a floating dtype on {query.device}")


def _unsupported(query: Tensor, agent: Tensor, *biases: Tensor | None) -> str | None:
    """Return why the kernels cannot take these inputs, or None where they can."""
    for t in (query, *biases):
        if t is not None and t.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"dtype {t.dtype} (kernels: float16, bfloat16, float32)"
    if not 8 <= query.shape[-1] <= 128:
        return f"head dim {query.shape[-1]} (kernels: 8 to 128)"
    if agent.shape[1] > 64:
        return f"{agent.shape[1]} agents (kernels: up to 64)"
    if query.numel() == 0 or agent.numel() == 0:
        return "an input without elements"
    return None
