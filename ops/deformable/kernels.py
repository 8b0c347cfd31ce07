"""Multi-scale deformable attention in Triton, forward and backward.

- `_forward`: a program owns a tile of queries of one head and visits their points level by level. A point's four
  corners are gathered from the values as they lie; tiles of neighbouring queries find each other's in the cache.
- `_backward`: the same tiles, with the gradient of the output in registers. Locations and weights have their gradients
  from the corners' products with it. A corner's share of it is added to the gradient of the values, where the shares of
  different programs meet in any order: they are added as integers, whose sum knows no order.
- `_cells` and `_limits` run before it: for every key of a head, the most that its sum can be. A point's weight times
  the largest gradient of its query counts at its first corner, and a key's limit is the sum of that of itself and of
  its neighbours before it, with which it shares points.
- `_convert` takes the sums to the values' dtype.

A sum is 32 bits wide, in multiples of its key's limit / 2^30, where float32 resolves 2^-24 of what it has summed; two
channels' are added at once, as one number of 64 bits. What is added to the limits are such numbers themselves, in
multiples of bound / 2^(62 - bits): `bound`, the largest gradient times the largest weight, is the most that a share can
be, and 2^bits are more shares than a key can get. A gradient without a finite bound is NaN.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.deformable.reference import ms_deform_attn_reference
from densezoo.ops.launch import Table
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@triton.jit
def _corners(x, y, height, width):
    """Row and column of a point's first corner, and the shares of the second ones; no share where out of reach."""
    x = x.to(tl.float32) * width - 0.5
    y = y.to(tl.float32) * height - 0.5
    # NaN is out of reach, too.
    near = (x > -1) & (x < width) & (y > -1) & (y < height)
    x = tl.where(near, x, -2.0)
    y = tl.where(near, y, -2.0)
    row = tl.floor(y)
    column = tl.floor(x)
    return row.to(tl.int32), column.to(tl.int32), y - row, x - column


@triton.jit
def _corner(row, column, height, width, start, keys, mask):
    """Number of a corner's key, and whether there is one."""
    key = start + row * width + column
    inside = mask & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return key, inside & (key >= 0) & (key < keys)


@compiling.kernel(do_not_specialize=["keys", "queries", "heads"])
def _forward(
    value, shapes, starts, locations, weights, out, keys, queries, heads, stride_b, stride_k, stride_n,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    image = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    exists = query < queries
    d = tl.arange(0, BLOCK_DIM)
    value += image * stride_b + head * stride_n
    row_of = (image * queries + query) * heads + head
    acc = tl.zeros((BLOCK, BLOCK_DIM), tl.float32)
    for level in range(LEVELS):
        height = tl.load(shapes + 2 * level).to(tl.int32)
        width = tl.load(shapes + 2 * level + 1).to(tl.int32)
        start = tl.load(starts + level).to(tl.int32)
        for point in tl.static_range(POINTS):
            at = row_of * (LEVELS * POINTS) + level * POINTS + point
            x = tl.load(locations + 2 * at, mask=exists, other=-1.0)
            y = tl.load(locations + 2 * at + 1, mask=exists, other=-1.0)
            weight = tl.load(weights + at, mask=exists, other=0.0).to(tl.float32)
            row, column, share_y, share_x = _corners(x, y, height, width)
            for i in tl.static_range(2):
                for j in tl.static_range(2):
                    key, inside = _corner(row + i, column + j, height, width, start, keys, exists)
                    share = (share_y if i else 1 - share_y) * (share_x if j else 1 - share_x) * weight
                    mask = inside[:, None] & (d < DIM)[None, :]
                    v = tl.load(value + key.to(INDEX)[:, None] * stride_k + d[None, :], mask=mask, other=0.0)
                    acc += v.to(tl.float32) * share[:, None]
    mask = exists[:, None] & (d < DIM)[None, :]
    tl.store(out + row_of[:, None] * DIM + d[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _bound(x):
    """The most that numbers are, from a tensor of that one."""
    bound = tl.load(x).to(tl.float32)
    # So that its inverse is finite; not tl.maximum, for which NaN is the least.
    return tl.where(bound < 1e-38, 1e-38, bound)


@compiling.kernel(do_not_specialize=["keys", "queries", "heads", "steps"])
def _cells(
    shapes, starts, locations, weights, grad, grad_bound, weight_bound, cells, keys, queries, heads, steps,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_POINTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    image = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    exists = query < queries
    d = tl.arange(0, BLOCK_DIM)
    row_of = (image * queries + query) * heads + head
    g = tl.load(grad + row_of[:, None] * DIM + d[None, :], mask=exists[:, None] & (d < DIM)[None, :], other=0.0)
    most = tl.max(tl.abs(g.to(tl.float32)), 1) / _bound(grad_bound)
    point = tl.arange(0, BLOCK_POINTS)
    level = tl.minimum(point // POINTS, LEVELS - 1)
    height = tl.load(shapes + 2 * level).to(tl.int32)[None, :]
    width = tl.load(shapes + 2 * level + 1).to(tl.int32)[None, :]
    start = tl.load(starts + level).to(tl.int32)[None, :]
    mask = exists[:, None] & (point < LEVELS * POINTS)[None, :]
    at = row_of[:, None] * (LEVELS * POINTS) + point[None, :]
    x = tl.load(locations + 2 * at, mask=mask, other=-1.0)
    y = tl.load(locations + 2 * at + 1, mask=mask, other=-1.0)
    weight = tl.abs(tl.load(weights + at, mask=mask, other=0.0).to(tl.float32))
    row, column, _, _ = _corners(x, y, height, width)
    mask = mask & (row > -2)
    key, inside = _corner(tl.maximum(row, 0), tl.maximum(column, 0), height, width, start, keys, mask)
    share = (weight / _bound(weight_bound) * most[:, None] * steps).to(tl.int64) + 1
    tl.atomic_add(cells + (image * keys + key) * heads + head, share, mask=inside, sem="relaxed")


@compiling.kernel(do_not_specialize=["keys", "heads", "steps"])
def _limits(
    shapes, starts, cells, limits, keys, heads, steps,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cells += tl.program_id(1).to(tl.int64) * keys * heads
    limits += tl.program_id(1).to(tl.int64) * keys * heads
    exists = at < keys * heads
    total = tl.zeros((BLOCK,), tl.int64)
    for level in range(LEVELS):
        height = tl.load(shapes + 2 * level).to(tl.int32)
        width = tl.load(shapes + 2 * level + 1).to(tl.int32)
        key = at // heads - tl.load(starts + level).to(tl.int32)
        inside = exists & (key >= 0) & (key < height * width)
        row = key // tl.maximum(width, 1)
        column = key % tl.maximum(width, 1)
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                mask = inside & (row >= i) & (column >= j)
                total += tl.load(cells + at - (i * width + j) * heads, mask=mask, other=0)
    tl.store(limits + at, total.to(tl.float32) / steps, mask=exists)


@triton.jit
def _add(sums, pairs, mask, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, VECTOR: tl.constexpr):
    """Add pairs of shares (BLOCK, BLOCK_DIM / 2); those of a thread lie apart, and its neighbours' between them.

    An atomic addition costs by the 128 bytes that a warp touches at once, however few of them it adds to.
    """
    lanes: tl.constexpr = BLOCK_DIM // VECTOR
    place = sums[:, None] + tl.arange(0, lanes)[None, :]
    mask = tl.broadcast_to(mask[:, None], place.shape)
    if VECTOR == 2:
        tl.atomic_add(place, pairs, mask=mask, sem="relaxed")
    else:
        # Of Triton's interpreter atomics want tensors without gaps: sums, not the halves of a split.
        even, odd = tl.split(tl.reshape(pairs, (BLOCK, BLOCK_DIM // 4, 2)))
        if VECTOR == 4:
            tl.atomic_add(place, even + 0, mask=mask, sem="relaxed")
            tl.atomic_add(place + lanes, odd + 0, mask=mask, sem="relaxed")
        else:
            first, third = tl.split(tl.reshape(even, (BLOCK, lanes, 2)))
            second, fourth = tl.split(tl.reshape(odd, (BLOCK, lanes, 2)))
            tl.atomic_add(place, first + 0, mask=mask, sem="relaxed")
            tl.atomic_add(place + lanes, second + 0, mask=mask, sem="relaxed")
            tl.atomic_add(place + 2 * lanes, third + 0, mask=mask, sem="relaxed")
            tl.atomic_add(place + 3 * lanes, fourth + 0, mask=mask, sem="relaxed")


@compiling.kernel(do_not_specialize=["keys", "queries", "heads"])
def _backward(
    value, shapes, starts, locations, weights, grad, grad_bound, weight_bound, limits, sums,
    grad_locations, grad_weights, keys, queries, heads, stride_b, stride_k, stride_n,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    image = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    exists = query < queries
    d = tl.arange(0, BLOCK_DIM)
    value += image * stride_b + head * stride_n
    limits += image * keys * heads + head
    sums += (image * keys * heads + head) * (BLOCK_DIM // 2)
    row_of = (image * queries + query) * heads + head
    g = tl.load(grad + row_of[:, None] * DIM + d[None, :], mask=exists[:, None] & (d < DIM)[None, :], other=0.0)
    g = g.to(tl.float32)
    relative = g * (1 / _bound(grad_bound))
    inverse = 1073741824.0 / _bound(weight_bound)
    for level in range(LEVELS):
        height = tl.load(shapes + 2 * level).to(tl.int32)
        width = tl.load(shapes + 2 * level + 1).to(tl.int32)
        start = tl.load(starts + level).to(tl.int32)
        for point in range(POINTS):
            at = row_of * (LEVELS * POINTS) + level * POINTS + point
            x = tl.load(locations + 2 * at, mask=exists, other=-1.0)
            y = tl.load(locations + 2 * at + 1, mask=exists, other=-1.0)
            weight = tl.load(weights + at, mask=exists, other=0.0).to(tl.float32)
            row, column, share_y, share_x = _corners(x, y, height, width)
            by_weight = tl.zeros((BLOCK,), tl.float32)
            by_x = tl.zeros((BLOCK,), tl.float32)
            by_y = tl.zeros((BLOCK,), tl.float32)
            for i in tl.static_range(2):
                for j in tl.static_range(2):
                    key, inside = _corner(row + i, column + j, height, width, start, keys, exists)
                    mask = inside[:, None] & (d < DIM)[None, :]
                    v = tl.load(value + key.to(INDEX)[:, None] * stride_k + d[None, :], mask=mask, other=0.0)
                    product = tl.sum(v.to(tl.float32) * g, 1)
                    along_y = share_y if i else 1 - share_y
                    along_x = share_x if j else 1 - share_x
                    by_weight += product * along_y * along_x
                    by_x += product * along_y * (1 if j else -1)
                    by_y += product * along_x * (1 if i else -1)
                    limit = tl.load(limits + key * heads, mask=inside, other=1.0)
                    share = (relative * (along_y * along_x * (weight * inverse) / limit)[:, None]).to(tl.int32)
                    low, high = tl.split(tl.reshape(share, (BLOCK, BLOCK_DIM // 2, 2)))
                    pairs = (high.to(tl.int64) << 32) + low
                    _add(sums + key.to(INDEX) * (heads * (BLOCK_DIM // 2)), pairs, inside, BLOCK, BLOCK_DIM, VECTOR)
            dtype = grad_locations.dtype.element_ty
            tl.store(grad_locations + 2 * at, (by_x * weight * width).to(dtype), mask=exists)
            tl.store(grad_locations + 2 * at + 1, (by_y * weight * height).to(dtype), mask=exists)
            tl.store(grad_weights + at, by_weight.to(grad_weights.dtype.element_ty), mask=exists)


@compiling.kernel(do_not_specialize=["rows"])
def _convert(
    limits, sums, grad_bound, weight_bound, out, rows,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_DIM)
    exists = row < rows
    mask = exists[:, None] & (d < DIM)[None, :]
    # See `_add`.
    place = d % VECTOR // 2 * (BLOCK_DIM // VECTOR) + d // VECTOR
    pair = tl.load(sums + row[:, None] * (BLOCK_DIM // 2) + place[None, :], mask=mask, other=0)
    low = pair.to(tl.int32)
    total = tl.where((d % 2 == 0)[None, :], low, ((pair - low) >> 32).to(tl.int32)).to(tl.float32)
    grad_bound = _bound(grad_bound)
    # Infinity has no fractions.
    grad_bound = tl.where(grad_bound == float("inf"), float("nan"), grad_bound)
    limit = tl.load(limits + row, mask=exists, other=0.0)
    # The bound last: of the smallest one 2^-30 is no number any more.
    total = total * (limit * (1 / 1073741824.0) * _bound(weight_bound))[:, None] * grad_bound
    tl.store(out + row[:, None] * DIM + d[None, :], total.to(out.dtype.element_ty), mask=mask)


class _Launch(NamedTuple):
    """Elements a program has in hand, values of all channels or points, and warps a program."""

    block: int
    warps: int


# By kernel.
LAUNCH = {
    "forward": _Launch(1024, 4), "cells": _Launch(256, 2), "limits": _Launch(256, 4),
    "convert": _Launch(1024, 4),
}  # fmt: skip
LAUNCH = Table("ms_deform_attn", LAUNCH)


class _Problem:
    """How the kernels are launched; the same for all calls alike."""

    def __init__(self, shape, strides, itemsize: int, locations_shape):
        batch, keys, heads, dim = shape
        _, queries, _, levels, points, _ = locations_shape
        self.arguments = keys, queries, heads
        self.strides = strides[:3]
        # A key gets no more than one share a point.
        self.steps = 2.0 ** (62 - (queries * levels * points).bit_length())
        block_dim = max(2, triton.next_power_of_2(dim))
        self.limits_shape = batch, keys, heads
        # Two channels a number.
        self.sums_shape = *self.limits_shape, block_dim // 2
        # Of the values and of the sums of their gradient, within an image.
        extent = max(keys * heads * block_dim, keys * strides[1])
        levels_of = {"LEVELS": levels, "num_stages": 1}
        sizes = {"DIM": dim, "BLOCK_DIM": block_dim}
        points_of = {**levels_of, **sizes, "POINTS": points}
        index = {"INDEX": tl.int32 if extent < 2**31 else tl.int64}
        # The channels of 16 bytes, which a thread loads at once; in the backward it has no more in hand.
        vector = {"VECTOR": min(16 // itemsize, block_dim)}
        block_points = triton.next_power_of_2(max(levels * points, 1))

        def launch(kernel: str, width: int, count: int, heads: int = 1, **constants) -> tuple[tuple[int, ...], dict]:
            """Return the grid and the constants of a kernel over rows of `width` elements."""
            block, warps = LAUNCH[kernel]
            block = max(1, block // width)
            return (triton.cdiv(count, block) * heads, batch), {**constants, "BLOCK": block, "num_warps": warps}

        self.forward = launch("forward", block_dim, queries, heads, **points_of, **index)
        self.cells = launch("cells", block_points, queries, heads, **points_of, BLOCK_POINTS=block_points)
        self.limits = launch("limits", 1, keys * heads, **levels_of)
        block = max(1, 32 * vector["VECTOR"] // block_dim)
        self.backward = (triton.cdiv(queries, block) * heads, batch), {
            **points_of, **index, **vector, "BLOCK": block, "num_warps": 1,
        }  # fmt: skip
        self.rows = batch * keys * heads
        (tiles, _), constants = launch("convert", block_dim, self.rows, **sizes, **vector)
        self.convert = (tiles,), constants


_problem = lru_cache(maxsize=1024)(_Problem)


def _prepare(value: Tensor, *others: Tensor) -> tuple[_Problem, list[Tensor]]:
    """Return how the kernels are launched, and the inputs as they read them."""
    value = value if value.stride(-1) == 1 else value.contiguous()
    problem = _problem(value.shape, value.stride(), value.itemsize, others[2].shape)
    return problem, [value, *(t.contiguous() for t in others)]


def _ms_deform_attn(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem, inputs = _prepare(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    out, nothing = _fake(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    if out.numel():
        grid, constants = problem.forward
        _forward[grid](*inputs, out, *problem.arguments, *problem.strides, **constants)
    return out, nothing


def _ms_deform_attn_backward(
    grad_out: Tensor, value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor,
    attention_weights: Tensor, out: Tensor | None, nothing: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem, inputs = _prepare(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    grad_value, *others, grad_locations, grad_weights = _fake_backward(
        grad_out, value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    if not grad_out.numel() or not grad_weights.numel():
        return grad_value.zero_(), *others, grad_locations, grad_weights
    grad_out = grad_out.contiguous()
    bounds = [torch.linalg.vector_norm(t, float("inf")) for t in (grad_out, attention_weights)]
    cells = torch.zeros(problem.limits_shape, dtype=torch.int64, device=value.device)
    limits = torch.empty(problem.limits_shape, dtype=torch.float32, device=value.device)
    sums = torch.zeros(problem.sums_shape, dtype=torch.int64, device=value.device)
    keys, queries, heads = problem.arguments
    levels = inputs[1:3]
    grid, constants = problem.cells
    _cells[grid](*inputs[1:], grad_out, *bounds, cells, keys, queries, heads, problem.steps, **constants)
    grid, constants = problem.limits
    _limits[grid](*levels, cells, limits, keys, heads, problem.steps, **constants)
    grid, constants = problem.backward
    _backward[grid](
        *inputs, grad_out, *bounds, limits, sums, grad_locations, grad_weights,
        keys, queries, heads, *problem.strides, **constants,
    )  # fmt: skip
    grid, constants = problem.convert
    _convert[grid](limits, sums, *bounds, grad_value, problem.rows, **constants)
    return grad_value, *others, grad_locations, grad_weights


def _fake(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    batch, _, heads, dim = value.shape
    # PyTorch 2.11 compiles anew for every batch where an operator returns a tuple of one: here are two.
    return value.new_empty(batch, sampling_locations.shape[1], heads * dim), value.new_empty(0)


def _fake_backward(grad_out, value, spatial_shapes, level_start_index, sampling_locations, attention_weights, *others):
    tensors = value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    return tuple(t.new_empty(t.shape if t.is_floating_point() else 0) for t in tensors)


_call = register(
    "ms_deform_attn", _ms_deform_attn, _fake, _ms_deform_attn_backward, _fake_backward, ms_deform_attn_reference
)


@register_flop_formula(torch.ops.densezoo.ms_deform_attn)
def _(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, *args, **kwargs) -> int:
    batch, _, heads, dim = value
    _, queries, _, levels, points, _ = sampling_locations
    # Four corners a point, each a multiplication and an addition.
    return 8 * batch * queries * heads * levels * points * dim


@register_flop_formula(torch.ops.densezoo.ms_deform_attn_backward)
def _(grad_out, value, shapes, starts, sampling_locations, *args, **kwargs) -> int:
    batch, _, heads, dim = value
    _, queries, _, levels, points, _ = sampling_locations
    # A corner's product with the gradient, and its share of it.
    return 16 * batch * queries * heads * levels * points * dim


def ms_deform_attn_triton(value, spatial_shapes, level_start_index, sampling_locations, attention_weights) -> Tensor:
    """Compute `densezoo.ops.ms_deform_attn` with the kernels; arguments checked."""
    return _call(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)


def ms_deform_attn_triton_backward(
    grad_out: Tensor, value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of value, sampling_locations and attention_weights from that of the output."""
    args = value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    grad_value, _, _, *others = torch.ops.densezoo.ms_deform_attn_backward(grad_out, *args, None, None)
    return grad_value, *others
