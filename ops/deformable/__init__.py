"""Multi-scale deformable attention: each query samples a few points of every level."""

import torch
from densezoo.ops.backend import takes_triton
from densezoo.ops.deformable.reference import ms_deform_attn_reference
from densezoo.ops.launch import MAX_IMAGES
from densezoo.ops.shapes import check_tensors
from torch import Tensor

__all__ = ["ms_deform_attn"]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum values sampled at a few points of each level of a pyramid, weighted (Deformable DETR, arXiv 2010.04159).

    A point (x, y) of a level lies at column x * width - 0.5 and row y * height - 0.5: whole numbers are the centres of
    positions, and 0 and 1 the level's edges. Values between positions are interpolated linearly along both axes, and
    outside of the level there are zeros. The weights are taken as they are: their softmax is the caller's. At the
    centre of a position, where the gradient of a location jumps, it is the one towards larger coordinates.

    Args:
        value: (B, keys, heads, dim), float16, bfloat16, float32 or float64, any strides: the positions of all levels,
            row by row, one level after the other.
        spatial_shapes: (levels, 2), int64 or int32: height and width of each level.
        level_start_index: (levels,), as `spatial_shapes`: the first key of each level.
        sampling_locations: (B, Q, heads, levels, points, 2), x before y, any floating dtype. At 16 bits a location is
            known to no more than 2^-8 (bfloat16) or 2^-11 of the level: keep float32.
        attention_weights: (B, Q, heads, levels, points), any floating dtype.

    Returns:
        (B, Q, heads * dim), of `value`'s dtype. Locations, interpolation and sums run in float32 for 16-bit inputs.

    Raises:
        ValueError: An argument's shape, dtype or device is wrong; the message names it. Levels that reach beyond the
            keys are not detected, which would wait for the device: their positions there count as zeros.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    _check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    args = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    if takes_triton("ms_deform_attn", value, unsupported, value, sampling_locations, attention_weights):
        from densezoo.ops.deformable.kernels import ms_deform_attn_triton

        return ms_deform_attn_triton(*args)
    return ms_deform_attn_reference(*args)


def _check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights) -> None:
    check_tensors(
        value=value,
        spatial_shapes=spatial_shapes,
        level_start_index=level_start_index,
        sampling_locations=sampling_locations,
        attention_weights=attention_weights,
    )
    if value.dim() != 4:
        raise ValueError(f"value: got shape {tuple(value.shape)}, expected (B, keys, heads, dim)")
    if sampling_locations.dim() != 6 or not sampling_locations.shape[3]:
        raise ValueError(
            f"sampling_locations: got shape {tuple(sampling_locations.shape)}, expected (B, Q, heads, levels, points, "
            f"2) with at least one level"
        )
    batch, _, heads, _ = value.shape
    _, queries, _, levels, points, _ = sampling_locations.shape
    for name, t, expected in [
        ("sampling_locations", sampling_locations, (batch, queries, heads, levels, points, 2)),
        ("attention_weights", attention_weights, (batch, queries, heads, levels, points)),
        ("spatial_shapes", spatial_shapes, (levels, 2)),
        ("level_start_index", level_start_index, (levels,)),
    ]:
        if t.dim() != len(expected) or any(a != b for a, b in zip(t.shape, expected, strict=True)):
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, expected {tuple(expected)} (value: {tuple(value.shape)}, "
                f"sampling_locations: {tuple(sampling_locations.shape)})"
            )
        if t.device != value.device:
            raise ValueError(f"{name}: got a tensor on {t.device}, expected {value.device}, where value is")
    for name, t in [
        ("value", value), ("sampling_locations", sampling_locations), ("attention_weights", attention_weights),
    ]:  # fmt: skip
        if not t.is_floating_point():
            raise ValueError(f"{name}: got {t.dtype}, expected a floating dtype")
    for name, t in [("spatial_shapes", spatial_shapes), ("level_start_index", level_start_index)]:
        if t.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: got {t.dtype}, expected int64 or int32")


def unsupported(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> str | None:
    """Return why the kernels cannot take these inputs, or None where they can."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for name, t in [
        ("value", value), ("sampling_locations", sampling_locations), ("attention_weights", attention_weights),
    ]:  # fmt: skip
        if t.dtype not in dtypes:
            return f"{name} of {t.dtype} (kernels: float16, bfloat16, float32)"
    if not 1 <= value.shape[-1] <= 256:
        return f"head dim {value.shape[-1]} (kernels: 1 to 256)"
    if value.shape[0] > MAX_IMAGES:
        return f"{value.shape[0]} images (kernels: up to {MAX_IMAGES})"
    return None
