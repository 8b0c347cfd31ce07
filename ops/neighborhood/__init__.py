"""Neighbourhood attention, dilated, strided or causal, with a relative position bias."""

import torch
from densezoo.ops.backend import takes_triton
from densezoo.ops.neighborhood.reference import na2d_qkv_reference, na2d_reference
from densezoo.ops.shapes import check_tensors
from torch import Tensor

__all__ = ["na2d", "na2d_qkv"]

MAX_KERNEL_SIZE = 13


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend from each position of a map to the `kernel_size` nearest positions per axis of its dilation group.

    Neighbourhood attention (NAT, arXiv 2204.07143) and its dilated form (DiNAT, arXiv 2209.15001) as NATTEN up to 0.17
    defined them, relative position bias included, with the strided and causal forms of arXiv 2504.16922. Arguments are
    named as in NATTEN's `na2d`.

    Per axis of length n, position i belongs to dilation group i mod dilation at rank i // dilation. It attends to
    `kernel_size` consecutive members of its group, centred on it (one more to the left where the size is even) and slid
    inwards at the borders, so that every query has all of its keys. With `stride`, runs of `stride` queries share the
    window of their middle one. A causal axis attends to the query's own rank and those before it, fewer at the border.

    Args:
        query: (B, H, W, heads, dim), float16, bfloat16, float32 or float64, any strides.
        key: As `query`.
        value: As `query`.
        kernel_size: Window size per axis, 1 to 13, odd or even; an int serves both axes, as below.
        stride: Queries that share a window, 1 to `kernel_size`.
        dilation: Step between neighbours; `kernel_size * dilation` must fit into the map.
        is_causal: Whether the axis attends to the past only.
        rpb: Relative position bias (heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1), added to the scaled scores;
            the entry per axis is rank(key) - rank(query) + kernel_size - 1. Any floating dtype.
        scale: Multiplies query . key; dim ** -0.5 by default.

    Returns:
        (B, H, W, heads, dim), of `query`'s dtype. Softmax and sums run in float32 for 16-bit inputs.

    Raises:
        ValueError: An argument's shape, dtype, device or value is wrong; the message names it. Maps smaller than
            `kernel_size * dilation` raise: pad them, as `densezoo.backbones.nat` does.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    check_tensors(query=query, key=key, value=value)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 5 or t.shape != query.shape or 0 in t.shape[3:]:
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, expected (B, H, W, heads, dim), the same for query, key and value"
            )
        if not t.is_floating_point() or t.dtype != query.dtype or t.device != query.device:
            raise ValueError(
                f"{name}: got {t.dtype} on {t.device}, expected one floating dtype and one device for query, key and "
                f"value (query: {query.dtype} on {query.device})"
            )
    args = _options(query.shape, query.device, rpb, kernel_size, stride, dilation, is_causal, scale)
    if takes_triton("na2d", query, _unsupported, query):
        from densezoo.ops.neighborhood.kernels import na2d_triton

        return na2d_triton(query, key, value, rpb, *args)
    return na2d_reference(query, key, value, rpb, *args)


def na2d_qkv(
    qkv: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `na2d` of query, key and value as one projection gave them.

    The values are those of `na2d(*qkv.unbind(3), ...)`. Its backward writes one gradient, in the layout of `qkv`, where
    those of three views would have to be stacked.

    Args:
        qkv: (B, H, W, 3, heads, dim), float16, bfloat16, float32 or float64, any strides: query, key and value.
        kernel_size: As `na2d` has it, and so has all that follows.
        stride: Queries that share a window.
        dilation: Step between neighbours.
        is_causal: Whether the axis attends to the past only.
        rpb: Relative position bias (heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1).
        scale: Multiplies query . key; dim ** -0.5 by default.

    Returns:
        (B, H, W, heads, dim), of `qkv`'s dtype.

    Raises:
        ValueError: An argument's shape, dtype, device or value is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    check_tensors(qkv=qkv)
    if qkv.dim() != 6 or qkv.shape[3] != 3 or 0 in qkv.shape[4:]:
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, expected (B, H, W, 3, heads, dim)")
    if not qkv.is_floating_point():
        raise ValueError(f"qkv: got {qkv.dtype}, expected a floating dtype")
    args = _options(qkv.shape[:3] + qkv.shape[4:], qkv.device, rpb, kernel_size, stride, dilation, is_causal, scale)
    if takes_triton("na2d_qkv", qkv, _unsupported, qkv):
        from densezoo.ops.neighborhood.kernels import na2d_qkv_triton

        return na2d_qkv_triton(qkv, rpb, *args)
    return na2d_qkv_reference(qkv, rpb, *args)


def _options(shape, device, rpb, kernel_size, stride, dilation, is_causal, scale) -> tuple:
    """Return the options with one entry per axis, checked, and the scale."""
    kernel_size, stride, dilation = (
        _per_axis(n, v) for n, v in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    is_causal = _per_axis("is_causal", is_causal, bool)
    _check(shape, device, rpb, kernel_size, stride, dilation)
    return kernel_size, stride, dilation, is_causal, shape[-1] ** -0.5 if scale is None else float(scale)


def _per_axis(name: str, value, kind: type = int) -> tuple:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    # A bool is an int to Python, but no size.
    if len(pair) != 2 or any(not isinstance(v, kind) or (kind is int and isinstance(v, bool)) for v in pair):
        raise ValueError(f"{name}: got {value!r}, expected {kind.__name__} or (rows, columns) of them")
    return pair


def _check(shape, device, rpb, kernel_size, stride, dilation) -> None:
    for axis in range(2):
        k, s, d, size = kernel_size[axis], stride[axis], dilation[axis], shape[1 + axis]
        if not 1 <= k <= MAX_KERNEL_SIZE:
            raise ValueError(f"kernel_size: got {kernel_size}, expected 1 to {MAX_KERNEL_SIZE} per axis")
        if not 1 <= s <= k:
            raise ValueError(f"stride: got {stride}, expected 1 to kernel_size {kernel_size} per axis")
        if d < 1:
            raise ValueError(f"dilation: got {dilation}, expected at least 1 per axis")
        if k * d > size:
            raise ValueError(
                f"kernel_size * dilation: got {k} * {d} = {k * d} on an axis of {size}, expected at most {size}; pad "
                f"the map to {k * d} (densezoo.backbones.nat.NeighborhoodAttention does) or lower the dilation"
            )
    if rpb is not None:
        check_tensors(rpb=rpb)
        expected = (shape[3], 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
        if tuple(rpb.shape) != expected:
            raise ValueError(f"rpb: got shape {tuple(rpb.shape)}, expected (heads, 2k-1, 2k-1) = {expected}")
        if not rpb.is_floating_point() or rpb.device != device:
            raise ValueError(f"rpb: got {rpb.dtype} on {rpb.device}, expected a floating dtype on {device}")


def _unsupported(query: Tensor) -> str | None:
    """Return why the kernels cannot take `query`, or None where they can."""
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {query.dtype} (kernels: float16, bfloat16, float32)"
    if not 8 <= query.shape[-1] <= 128:
        return f"head dim {query.shape[-1]} (kernels: 8 to 128)"
    return None
