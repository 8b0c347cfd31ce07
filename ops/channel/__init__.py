"""Channel attention: the channels of a group attend to each other, over all positions of a map."""

import torch
from densezoo.ops.backend import takes_triton
from densezoo.ops.channel.reference import channel_attention_qkv_reference, channel_attention_reference
from densezoo.ops.shapes import check_tensors
from torch import Tensor

__all__ = ["channel_attention", "channel_attention_qkv"]


def channel_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """Mix the channels of each group at every position, by weights that all positions determine together.

    Grouped channel attention (DaViT, arXiv 2204.03645): per head (a group of `dim` channels) the weights are the
    softmax over the last axis of the (dim, dim) matrix scale * query^T key, summed over the positions, and
    out[i] = sum_j weights[i, j] * value[j] at each position.

    The roles are the caller's order: the published DaViT gives the projections called k, v and q as query, key and
    value, with `dim ** -0.5`; Florence-2 (arXiv 2311.06242) gives q, k and v, with (number of positions) ** -0.5.

    Args:
        query: (B, H, W, heads, dim), or with any other number of position axes, float16, bfloat16, float32 or float64,
            any strides.
        key: As `query`.
        value: As `query`.
        scale: Multiplies query^T key; dim ** -0.5 by default.

    Returns:
        Of `query`'s shape and dtype. Sums and softmax run in float32 for 16-bit inputs.

    Raises:
        ValueError: An argument's shape, dtype or device is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    check_tensors(query=query, key=key, value=value)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 4 or t.shape != query.shape or 0 in t.shape[-2:]:
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, expected (B, positions..., heads, dim), the same for query, key "
                "and value"
            )
        if not t.is_floating_point() or t.dtype != query.dtype or t.device != query.device:
            raise ValueError(
                f"{name}: got {t.dtype} on {t.device}, expected one floating dtype and one device for query, key and "
                f"value (query: {query.dtype} on {query.device})"
            )
    # An int would not be one of the operator's floats; float() would fix a scale that follows the map's size.
    scale = query.shape[-1] ** -0.5 if scale is None else 1.0 * scale
    if takes_triton("channel_attention", query, _unsupported, query):
        from densezoo.ops.channel.kernels import channel_attention_triton

        return channel_attention_triton(query, key, value, scale)
    return channel_attention_reference(query, key, value, scale)


def channel_attention_qkv(
    qkv: Tensor, *, roles: tuple[int, int, int] = (0, 1, 2), scale: float | None = None
) -> Tensor:
    """Compute `channel_attention` of query, key and value as one projection gave them.

    Its backward writes one gradient, in the layout of `qkv`, where those of three views would have to be stacked.

    Args:
        qkv: (B, H, W, 3, heads, dim), or with any other number of position axes, float16, bfloat16, float32 or float64,
            any strides.
        roles: Which of the three acts as query, as key and as value; (1, 2, 0) in the published DaViT.
        scale: As `channel_attention` has it.

    Returns:
        (B, H, W, heads, dim), of `qkv`'s dtype.

    Raises:
        ValueError: An argument's shape, dtype or value is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    check_tensors(qkv=qkv)
    if qkv.dim() < 5 or qkv.shape[-3] != 3 or 0 in qkv.shape[-2:]:
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, expected (B, positions..., 3, heads, dim)")
    if not qkv.is_floating_point():
        raise ValueError(f"qkv: got {qkv.dtype}, expected a floating dtype")
    if not isinstance(roles, (tuple, list)) or len(roles) != 3 or set(roles) != {0, 1, 2}:
        raise ValueError(f"roles: got {roles!r}, expected 0, 1 and 2 in some order")
    scale = qkv.shape[-1] ** -0.5 if scale is None else 1.0 * scale
    if takes_triton("channel_attention_qkv", qkv, _unsupported, qkv):
        from densezoo.ops.channel.kernels import channel_attention_qkv_triton

        return channel_attention_qkv_triton(qkv, roles, scale)
    return channel_attention_qkv_reference(qkv, roles, scale)


def _unsupported(query: Tensor) -> str | None:
    """Return why the kernels cannot take `query`, or None where they can."""
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {query.dtype} (kernels: float16, bfloat16, float32)"
    if not 8 <= query.shape[-1] <= 128:
        return f"head dim {query.shape[-1]} (kernels: 8 to 128)"
    return None
