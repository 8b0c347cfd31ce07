"""Channel attention in plain PyTorch: the CPU path, the export path and what the kernels are tested against."""

from collections.abc import Sequence

from densezoo.ops.precision import widen, without_autocast
from torch import Tensor


def channel_attention_reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute `densezoo.ops.channel_attention`; 16-bit inputs are computed in float32."""
    shape, dtype = query.shape, query.dtype
    # (B, heads, dim, positions)
    query, key, value = (t.flatten(1, -3).permute(0, 2, 3, 1) for t in widen(query, key, value))
    with without_autocast(query):
        out = (query * scale @ key.mT).softmax(-1) @ value
    return out.permute(0, 3, 1, 2).reshape(shape).to(dtype)


def channel_attention_qkv_reference(qkv: Tensor, roles: Sequence[int], scale: float) -> Tensor:
    """Compute `densezoo.ops.channel_attention_qkv`: `channel_attention_reference` of the views."""
    parts = qkv.unbind(-3)
    return channel_attention_reference(*(parts[role] for role in roles), scale)
