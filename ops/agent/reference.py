"""Agent attention in plain PyTorch: the CPU path, the export path and what kernels are tested against."""

from densezoo.ops.precision import widen, without_autocast
from torch import Tensor


def agent_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    aggregation_bias: Tensor | None,
    broadcast_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Compute `densezoo.ops.agent_attention`: two softmax attentions, each against no more than the agents.

    Memory grows with tokens * agents. 16-bit inputs are computed in float32.
    """
    dtype = query.dtype
    query, key, value, agent = (t.transpose(1, 2) for t in widen(query, key, value, agent))
    with without_autocast(query):
        agent_value = _attend(agent * scale, key, value, aggregation_bias)
        out = _attend(query * scale, agent, agent_value, broadcast_bias)
    return out.transpose(1, 2).to(dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attend over (B, heads, tokens, dim), with a bias (heads, queries, keys)."""
    scores = query @ key.mT
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.softmax(-1) @ value
