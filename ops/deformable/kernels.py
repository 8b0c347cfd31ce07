"""Multi-scale deformable attention in Triton, forward and backward.

- `_forward`: a program owns a tile of queries of one head and visits their points level by level. A point's four
  corners are gathered from the values as they lie; tiles of neighbouring queries find each other's in the cache.
- `_backward`: the same tiles, with the gradient of the output in registers. Locations and weights have their gradients
  from the corners' products with it. A corner's share of it is added to the gradient of the values, where the shares of
  different programs meet in any order: they are added as integers, 64 bits wide, whose sum knows no order.
- `_convert` takes those sums to the values' dtype.

An integer counts multiples of bound / 2^(62 - bits): `bound`, the largest gradient times the largest weight, is the
most that a share can be, and 2^bits are more shares than a position can get. With Deformable DETR's 20,000 queries of 4
points that is 2^-44 of the bound, where float32 resolves 2^-24 of each share. A gradient without a finite bound is NaN.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
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


@triton.jit(do_not_specialize=["keys", "queries", "heads"])
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
def _bound(grad_bound, weight_bound):
    """The most that a share of the gradient can be."""
    bound = tl.load(grad_bound).to(tl.float32) * tl.load(weight_bound).to(tl.float32)
    # So that its inverse is finite; not tl.maximum, for which NaN is the least.
    return tl.where(bound < 1e-38, 1e-38, bound)


@triton.jit(do_not_specialize=["keys", "queries", "heads", "steps"])
def _backward(
    value, shapes, starts, locations, weights, grad, grad_bound, weight_bound, sums, grad_locations, grad_weights,
    keys, queries, heads, steps, stride_b, stride_k, stride_n,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    image = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    exists = query < queries
    d = tl.arange(0, BLOCK_DIM)
    value += image * stride_b + head * stride_n
    sums += (image * keys * heads + head) * DIM
    row_of = (image * queries + query) * heads + head
    g = tl.load(grad + row_of[:, None] * DIM + d[None, :], mask=exists[:, None] & (d < DIM)[None, :], other=0.0)
    g = g.to(tl.float32)
    inverse = 1 / _bound(grad_bound, weight_bound)
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
                    share = (g * (along_y * along_x * weight * inverse)[:, None] * steps).to(tl.int64)
                    place = key.to(INDEX)[:, None] * (heads * DIM) + d[None, :]
                    tl.atomic_add(sums + place, share, mask=mask, sem="relaxed")
            dtype = grad_locations.dtype.element_ty
            tl.store(grad_locations + 2 * at, (by_x * weight * width).to(dtype), mask=exists)
            tl.store(grad_locations + 2 * at + 1, (by_y * weight * height).to(dtype), mask=exists)
            tl.store(grad_weights + at, by_weight.to(grad_weights.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["count", "steps"])
def _convert(sums, grad_bound, weight_bound, out, count, steps, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bound = _bound(grad_bound, weight_bound)
    # Infinity has no fractions.
    bound = tl.where(bound == float("inf"), float("nan"), bound)
    total = tl.load(sums + at, mask=at < count, other=0).to(tl.float32) * (1 / steps) * bound
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


class _Launch(NamedTuple):
    """Elements of the values a program has in hand, of all channels, and warps a program."""

    block: int
    warps: int


# By kernel.
LAUNCH = {"forward": _Launch(1024, 4), "backward": _Launch(1024, 4), "convert": _Launch(1024, 4)}
LAUNCH = Table("ms_deform_attn", LAUNCH)


class _Problem:
    """How the kernels are launched; the same for all calls alike."""

    def __init__(self, shape, strides, locations_shape):
        batch, keys, heads, dim = shape
        _, queries, _, levels, points, _ = locations_shape
        self.arguments = keys, queries, heads
        self.strides = strides[:3]
        # A position gets no more than one share a point.
        self.steps = 2.0 ** (62 - (queries * levels * points).bit_length())
        block_dim = triton.next_power_of_2(dim)
        # Of the values and of the sums of their gradient, within an image.
        extent = max(keys * heads * dim, keys * strides[1])
        self.constants = {
            "LEVELS": levels, "POINTS": points, "DIM": dim, "BLOCK_DIM": block_dim,
            "INDEX": tl.int32 if extent < 2**31 else tl.int64, "num_stages": 1,
        }  # fmt: skip
        self.forward, self.backward = self._tiling("forward", batch), self._tiling("backward", batch)
        launch, self.count = LAUNCH["convert"], batch * keys * heads * dim
        self.convert = (triton.cdiv(self.count, launch.block),), {"BLOCK": launch.block, "num_warps": launch.warps}

    def _tiling(self, kernel: str, batch: int) -> tuple[tuple[int, int], dict]:
        """Return the grid and the constants of a kernel."""
        launch, (_, queries, heads) = LAUNCH[kernel], self.arguments
        block = max(1, launch.block // self.constants["BLOCK_DIM"])
        grid = (triton.cdiv(queries, block) * heads, batch)
        return grid, {**self.constants, "BLOCK": block, "num_warps": launch.warps}


_problem = lru_cache(maxsize=1024)(_Problem)


def _prepare(value: Tensor, *others: Tensor) -> tuple[_Problem, list[Tensor]]:
    """Return how the kernels are launched, and the inputs as they read them."""
    value = value if value.stride(-1) == 1 else value.contiguous()
    problem = _problem(value.shape, value.stride(), others[2].shape)
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
    sums = torch.zeros(value.shape, dtype=torch.int64, device=value.device)
    grid, constants = problem.backward
    _backward[grid](
        *inputs, grad_out, *bounds, sums, grad_locations, grad_weights,
        *problem.arguments, problem.steps, *problem.strides, **constants,
    )  # fmt: skip
    grid, constants = problem.convert
    _convert[grid](sums, *bounds, grad_value, problem.count, problem.steps, **constants)
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
