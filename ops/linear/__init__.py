"""Linear attention: softmax replaced by a product of feature maps, at a cost linear in the tokens."""

import math

import torch
from densezoo.ops.backend import takes_triton
from densezoo.ops.linear.reference import focused_linear_attention_reference
from densezoo.ops.shapes import check_tensors
from torch import Tensor

__all__ = ["focused_linear_attention"]


def focused_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_scale: Tensor,
    *,
    positional_encoding: Tensor | None = None,
    focusing_factor: float = 3,
) -> Tensor:
    """Attend with focused feature maps in place of softmax (FLatten Transformer, arXiv 2308.00442).

    With x = (relu(.) + 1e-6) / feature_scale, of `query` and of `key + positional_encoding`, and
    phi(x) = |x| * x ** focusing_factor / |x ** focusing_factor|, where |.| is the norm over the heads and channels of
    a token, every head computes

        out = phi(query) @ mean(phi(key)^T value) / (phi(query) . mean(phi(key)) + 1e-6)

    with means over the tokens. There is no 1 / sqrt(dim). The paper's depthwise convolution of the values is left to
    the caller.

    Args:
        query: (B, tokens, heads, dim), float16, bfloat16, float32 or float64, any strides.
        key: As `query`.
        value: As `query`.
        feature_scale: (heads, dim), positive, any floating dtype.
        positional_encoding: (tokens, heads, dim), any floating dtype, added to `key`.
        focusing_factor: The power; 1 leaves the features as they are, larger ones sharpen them.

    Returns:
        (B, tokens, heads, dim), of `query`'s dtype. Features and sums run in float32 for 16-bit inputs: powers and sums
        over the tokens leave the range of float16.

    Raises:
        ValueError: An argument's shape, dtype, device or value is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    _check(query, key, value, feature_scale, positional_encoding, focusing_factor)
    args = (query, key, value, feature_scale, positional_encoding, focusing_factor)
    if takes_triton("focused_linear_attention", query, _unsupported, query, feature_scale, positional_encoding):
        from densezoo.ops.linear.kernels import focused_linear_attention_triton

        return focused_linear_attention_triton(*args)
    return focused_linear_attention_reference(*args)


def _check(query, key, value, feature_scale, positional_encoding, focusing_factor) -> None:
    check_tensors(query=query, key=key, value=value, feature_scale=feature_scale)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4 or t.shape != query.shape or 0 in t.shape[2:]:
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, expected (B, tokens, heads, dim), the same for query, key and "
                "value"
            )
        if not t.is_floating_point() or t.dtype != query.dtype or t.device != query.device:
            raise ValueError(
                f"{name}: got {t.dtype} on {t.device}, expected one floating dtype and one device for query, key and "
                f"value (query: {query.dtype} on {query.device})"
            )
    for name, t, axes, expected in (
        ("feature_scale", feature_scale, "(heads, dim)", query.shape[2:]),
        ("positional_encoding", positional_encoding, "(tokens, heads, dim)", query.shape[1:]),
    ):
        if t is None:
            continue
        check_tensors(**{name: t})
        if t.shape != expected:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {axes} = {tuple(expected)}")
        if not t.is_floating_point() or t.device != query.device:
            raise ValueError(f"{name}: got {t.dtype} on {t.device}, expected a floating dtype on {query.device}")
    if not isinstance(focusing_factor, (int, float)) or not 1 <= focusing_factor < math.inf:
        raise ValueError(f"focusing_factor: got {focusing_factor!r}, expected a number of at least 1")


def _unsupported(query: Tensor, feature_scale: Tensor, positional_encoding: Tensor | None) -> str | None:
    """Return why the kernels cannot take these inputs, or None where they can."""
    for t in (query, feature_scale, positional_encoding):
        if t is not None and t.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"dtype {t.dtype} (kernels: float16, bfloat16, float32)"
    heads, dim = query.shape[2:]
    if not 8 <= dim <= 128:
        return f"head dim {dim} (kernels: 8 to 128)"
    if heads * dim > 4096:
        return f"{heads} heads of dim {dim} (kernels: up to 4096 channels)"
    if query.numel() == 0:
        return "an input without elements"
    return None
