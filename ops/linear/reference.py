"""Focused linear attention in plain PyTorch: the CPU path, the export path and what kernels are tested against."""

import torch
import torch.nn.functional as F
from densezoo.ops.precision import widen, without_autocast
from torch import Tensor

EPS = 1e-6


def focused_linear_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_scale: Tensor,
    positional_encoding: Tensor | None,
    focusing_factor: float,
) -> Tensor:
    """Compute `densezoo.ops.focused_linear_attention`; 16-bit inputs are computed in float32."""
    dtype = query.dtype
    query, key, value = widen(query, key, value)
    if positional_encoding is not None:
        key = key + positional_encoding
    feature_scale = feature_scale.to(query.dtype)
    query, key = (_focus((F.relu(x) + EPS) / feature_scale, focusing_factor) for x in (query, key))

    # (B, tokens, heads, dim) to (B, heads, tokens, dim)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    with without_autocast(query):
        # The mean over the tokens, not their sum: it stays in range however large the map.
        key_value = key.mT @ (value / value.shape[2])
        total = query @ key.mean(2, keepdim=True).mT
        out = query @ key_value / (total + EPS)
    return out.transpose(1, 2).to(dtype)


def _focus(x: Tensor, factor: float) -> Tensor:
    """Raise all channels (..., heads, dim) of a token to a power, and scale them back to their norm.

    Taken of unit vectors, the power neither overflows nor vanishes.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = (x / norm) ** factor
    return x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) * norm
