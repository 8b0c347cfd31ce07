"""Focal modulation in Triton, forward and backward.

A level's convolution is arithmetic more than traffic: 9 to 121 products a number read. It is computed in strips: a
strip is ROWS positions below each other, of which a thread holds the sums for some channels, so that a number is
loaded and widened once for all positions of the strip that it serves. A program owns STRIPS strips of one image, side
by side and wrapping at the end of a row of strips, and CHANNELS channels.

- `_level` convolves one level into the next: before the GELU, which the backward needs, and after it, which the next
  level needs. At the last level only the sum over its positions is kept of the latter.
- `_combine` gates the levels and the mean of the last, position by position.

The backward goes the other way. `_backward_mean` sums what reaches the mean, `_backward_last` takes it through the last
GELU, and `_backward_level` through one convolution and the GELU before it. The latter also multiplies the gradients
that it has loaded by the level that was convolved, for the kernel's gradient: one partial table a program, for IMAGES
images in turn. Gradients of the gates are sums over channels: one partial value a block of channels. PyTorch sums
partial values: two deterministic stages.

Of the levels what precedes the GELU is kept for the backward, in the context's dtype: to convolve all of them again
would cost half of the backward's arithmetic.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@triton.jit
def _normal(z):
    """Cumulative distribution and density of the normal distribution, to 1e-7 (Abramowitz and Stegun, 26.2.17)."""
    density = tl.exp2(z * z * -0.7213475204444817) * 0.3989422804014327
    t = 1.0 / (1.0 + 0.2316419 * tl.abs(z))
    tail = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail *= density
    return tl.where(z < 0, tail, 1.0 - tail), density


@triton.jit
def _gelu(z):
    below, _ = _normal(z)
    return z * below


@triton.jit
def _block(tile, blocks, channels, CHANNELS: tl.constexpr):
    """A program's tile of positions, its channels, and which of them exist."""
    c = tile % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return tile // blocks, c, c < channels


@triton.jit
def _strips(tile, width, ROWS: tl.constexpr, STRIPS: tl.constexpr):
    """First row and column of a tile's strips; the rows of strips that do not exist lie below the map."""
    s = tile * STRIPS + tl.arange(0, STRIPS)
    return s // width * ROWS, s % width


@triton.jit
def _level(
    x, weights, level, context, partial, height, width, channels, stride_b, stride_h, stride_w,
    KERNEL: tl.constexpr, ROWS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr, IS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, CHANNELS)
    tile, c, exist = _block(tl.program_id(0), blocks, channels, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    row, col = _strips(tile, width, ROWS, STRIPS)
    top, left = row - KERNEL // 2, col - KERNEL // 2
    x += image * stride_b + top.to(INDEX)[:, None] * stride_h + left.to(INDEX)[:, None] * stride_w + c[None, :]

    acc = ()
    for _ in tl.static_range(ROWS):
        acc = acc + (tl.zeros((STRIPS, CHANNELS), tl.float32),)
    for j in range(KERNEL):
        inside = ((left + j >= 0) & (left + j < width))[:, None] & exist[None, :]
        column = ()
        for i in tl.static_range(KERNEL):
            column = column + (tl.load(weights + (i * KERNEL + j) * channels + c, exist, 0.0).to(tl.float32)[None, :],)
        for i in tl.static_range(ROWS + KERNEL - 1):
            mask = ((top + i >= 0) & (top + i < height))[:, None] & inside
            value = tl.load(x + (i * stride_h + j * stride_w), mask=mask, other=0.0).to(tl.float32)
            sums = ()
            for r in tl.static_range(ROWS):
                if i - r >= 0 and i - r < KERNEL:
                    sums = sums + (acc[r] + value * column[i - r],)
                else:
                    sums = sums + (acc[r],)
            acc = sums

    dtype = level.dtype.element_ty
    at = image * height * width * channels + ((row * width + col).to(INDEX) * channels)[:, None] + c[None, :]
    total = tl.zeros((STRIPS, CHANNELS), tl.float32)
    for r in tl.static_range(ROWS):
        mask = (row + r < height)[:, None] & exist[None, :]
        tl.store(level + at + r * width * channels, acc[r].to(dtype), mask=mask)
        value = _gelu(acc[r])
        if IS_LAST:
            total += tl.where(mask, value, 0.0)
        else:
            tl.store(context + at + r * width * channels, value.to(dtype), mask=mask)
    if IS_LAST:
        tiles = tl.num_programs(0) // blocks
        tl.store(partial + (image * tiles + tile) * channels + c, tl.sum(total, 0), mask=exist)


@triton.jit
def _total(partial, image, tiles, channels, c, exist, CHANNELS: tl.constexpr):
    """Sum of a partial sum over an image's tiles."""
    total = tl.zeros((CHANNELS,), tl.float32)
    for tile in range(tiles):
        total += tl.load(partial + (image * tiles + tile) * channels + c, mask=exist, other=0.0)
    return total


@triton.jit
def _combine(
    levels, gates, partial, mean, out, positions, width, channels, tiles, factor, level_stride,
    gate_stride_b, gate_stride_h, gate_stride_w,
    LEVELS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    tile, c, exist = _block(tl.program_id(0), tl.cdiv(channels, CHANNELS), channels, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    average = _total(partial, image, tiles, channels, c, exist, CHANNELS) / positions
    tl.store(mean + image * channels + c, average, mask=exist & (tile == 0))

    n = tile * POSITIONS + tl.arange(0, POSITIONS)
    here = n < positions
    mask = here[:, None] & exist[None, :]
    gates += image * gate_stride_b + (n // width).to(INDEX) * gate_stride_h + (n % width).to(INDEX) * gate_stride_w
    at = image * positions * channels + (n.to(INDEX) * channels)[:, None] + c[None, :]
    acc = tl.load(gates + LEVELS, mask=here, other=0.0).to(tl.float32)[:, None] * _gelu(average)[None, :]
    for level in tl.static_range(LEVELS):
        gate = tl.load(gates + level, mask=here, other=0.0).to(tl.float32)
        value = tl.load(levels + level * level_stride + at, mask=mask, other=0.0).to(tl.float32)
        acc += gate[:, None] * _gelu(value)
    tl.store(out + at, (acc * factor).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_mean(
    grad_out, gates, partial, positions, width, channels, factor, gate_stride_b, gate_stride_h, gate_stride_w,
    LEVELS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, CHANNELS)
    tile, c, exist = _block(tl.program_id(0), blocks, channels, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    n = tile * POSITIONS + tl.arange(0, POSITIONS)
    here = n < positions
    gates += image * gate_stride_b + (n // width).to(INDEX) * gate_stride_h + (n % width).to(INDEX) * gate_stride_w
    at = image * positions * channels + (n.to(INDEX) * channels)[:, None] + c[None, :]
    grad = tl.load(grad_out + at, mask=here[:, None] & exist[None, :], other=0.0).to(tl.float32)
    gate = tl.load(gates + LEVELS, mask=here, other=0.0).to(tl.float32)
    tiles = tl.num_programs(0) // blocks
    tl.store(partial + (image * tiles + tile) * channels + c, tl.sum(grad * gate[:, None], 0) * factor, mask=exist)


@triton.jit
def _backward_last(
    grad_out, gates, level, mean, partial, grad_level, grad_gates, batch, positions, width, channels, tiles, factor,
    gate_stride_b, gate_stride_h, gate_stride_w,
    LEVELS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, CHANNELS)
    tile, c, exist = _block(tl.program_id(0), blocks, channels, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    average = tl.load(mean + image * channels + c, mask=exist, other=0.0)
    below, density = _normal(average)
    from_mean = _total(partial, image, tiles, channels, c, exist, CHANNELS) / positions
    from_mean *= below + average * density

    n = tile * POSITIONS + tl.arange(0, POSITIONS)
    here = n < positions
    mask = here[:, None] & exist[None, :]
    gates += image * gate_stride_b + (n // width).to(INDEX) * gate_stride_h + (n % width).to(INDEX) * gate_stride_w
    at = image * positions * channels + (n.to(INDEX) * channels)[:, None] + c[None, :]
    grad = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32) * factor
    z = tl.load(level + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gates + LEVELS - 1, mask=here, other=0.0).to(tl.float32)
    grad_gates += ((tl.program_id(0) % blocks * batch + image) * positions + n) * (LEVELS + 1) + LEVELS
    tl.store(grad_gates, tl.sum(grad * (average * below)[None, :], 1), mask=here)
    below, density = _normal(z)
    tl.store(grad_gates - 1, tl.sum(grad * z * below, 1), mask=here)
    grad = (grad * gate[:, None] + from_mean[None, :]) * (below + z * density)
    tl.store(grad_level + at, grad.to(grad_level.dtype.element_ty), mask=mask)


@triton.jit
def _backward_level(
    grad_level, weights, x, grad_out, gates, grad_x, grad_gates, partial, batch, height, width, channels, factor,
    stride_b, stride_h, stride_w, gate_stride_b, gate_stride_h, gate_stride_w, taps,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, KERNEL: tl.constexpr, ROWS: tl.constexpr, STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr, IMAGES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, CHANNELS)
    tile, c, exist = _block(tl.program_id(0), blocks, channels, CHANNELS)
    row, col = _strips(tile, width, ROWS, STRIPS)
    top, left = row - KERNEL // 2, col - KERNEL // 2
    here = (row * width + col).to(INDEX)
    tiles = tl.num_programs(0) // blocks
    partial += (tl.program_id(1).to(tl.int64) * tiles + tile) * taps * channels + c
    first_image = tl.program_id(1).to(tl.int64) * IMAGES
    for image in range(first_image, tl.minimum(first_image + IMAGES, batch)):
        origin = image * height * width
        source = origin * channels + ((top * width + left).to(INDEX) * channels)[:, None] + c[None, :]
        at = image * stride_b + row.to(INDEX)[:, None] * stride_h + col.to(INDEX)[:, None] * stride_w + c[None, :]
        values, acc = (), ()
        for r in tl.static_range(ROWS):
            mask = (row + r < height)[:, None] & exist[None, :]
            value = tl.load(x + at + r * stride_h, mask=mask, other=0.0).to(tl.float32)
            values = values + ((_gelu(value) if LEVEL > 0 else value),)
            acc = acc + (tl.zeros((STRIPS, CHANNELS), tl.float32),)
        for j in range(KERNEL):
            inside = ((left + j >= 0) & (left + j < width))[:, None] & exist[None, :]
            # Gradients come from the other side: the kernel is turned around.
            tap = weights + (KERNEL * KERNEL - 1 - j) * channels + c
            column, sums = (), ()
            for i in tl.static_range(KERNEL):
                column = column + (tl.load(tap - i * KERNEL * channels, exist, 0.0).to(tl.float32)[None, :],)
                sums = sums + (tl.zeros((STRIPS, CHANNELS), tl.float32),)
            for i in tl.static_range(ROWS + KERNEL - 1):
                mask = ((top + i >= 0) & (top + i < height))[:, None] & inside
                pointers = grad_level + source + (i * width + j) * channels
                grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                new_acc, new_sums = (), ()
                for r in tl.static_range(ROWS):
                    if i - r >= 0 and i - r < KERNEL:
                        new_acc = new_acc + (acc[r] + grad * column[i - r],)
                    else:
                        new_acc = new_acc + (acc[r],)
                for k in tl.static_range(KERNEL):
                    if i - k >= 0 and i - k < ROWS:
                        new_sums = new_sums + (sums[k] + grad * values[i - k],)
                    else:
                        new_sums = new_sums + (sums[k],)
                acc, sums = new_acc, new_sums
            for i in tl.static_range(KERNEL):
                entry = partial + (KERNEL * KERNEL - 1 - j - i * KERNEL) * channels
                total = tl.sum(sums[i], 0)
                if image > first_image:
                    total += tl.load(entry, mask=exist, other=0.0)
                tl.store(entry, total, mask=exist)
        if IMAGES > 1:
            # The next image reads what other threads of this one wrote.
            tl.debug_barrier()

        for r in tl.static_range(ROWS):
            below_map = row + r < height
            mask = below_map[:, None] & exist[None, :]
            grad = acc[r]
            pointers = origin * channels + ((here + r * width) * channels)[:, None] + c[None, :]
            if LEVEL > 0:
                z = tl.load(x + at + r * stride_h, mask=mask, other=0.0).to(tl.float32)
                below, density = _normal(z)
                from_out = tl.load(grad_out + pointers, mask=mask, other=0.0).to(tl.float32) * factor
                gate = gates + image * gate_stride_b + (row + r).to(INDEX) * gate_stride_h
                gate = tl.load(gate + col.to(INDEX) * gate_stride_w + LEVEL - 1, mask=below_map, other=0.0)
                gate_entry = (tl.program_id(0) % blocks * batch + image) * height * width + here + r * width
                gate_entry = grad_gates + gate_entry * (LEVELS + 1) + LEVEL - 1
                tl.store(gate_entry, tl.sum(from_out * z * below, 1), mask=below_map)
                grad = (grad + from_out * gate.to(tl.float32)[:, None]) * (below + z * density)
            tl.store(grad_x + pointers, grad.to(grad_x.dtype.element_ty), mask=mask)


class _Launch(NamedTuple):
    """Positions (or strips) times channels of a program, rows of a strip, images at most, and warps."""

    elements: int
    rows: int
    images: int
    warps: int


LAUNCH = {
    "level": _Launch(1024, 7, 1, 4),
    # Rows that do not begin at 16 bytes are loaded number by number: neighbouring threads then take neighbouring ones.
    "level_unaligned": _Launch(128, 7, 1, 4),
    "pointwise": _Launch(4096, 1, 1, 4),
    "backward_level": _Launch(512, 4, 8, 4),
}
# Enough programs to fill the GPU come before many images a program.
PROGRAMS = 1024


class _Problem:
    """Arguments that the kernels share, and the grid of a launch."""

    def __init__(self, context: Tensor, gates: Tensor, normalize: bool):
        self.batch, self.height, self.width, self.channels = context.shape
        self.levels = gates.shape[3] - 1
        self.factor = 1.0 / (self.levels + 1) if normalize else 1.0
        extent = max(
            sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
            for t in (context, gates)
        )
        # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
        self.index = tl.int32 if max(extent, context.shape[1:].numel()) < 2**30 else tl.int64

        # All kernels cut the channels alike; blocks of nothing but channels that exist come first.
        self.block = min(max(self.channels & -self.channels, 32), 128)
        self.blocks = triton.cdiv(self.channels, self.block)

    def tiling(self, name: str) -> tuple[int, dict]:
        """Return the number of tiles of an image, and the constants, of the kernels called `name`."""
        launch = LAUNCH[name]
        constants = {"CHANNELS": self.block, "INDEX": self.index, "num_warps": launch.warps, "num_stages": 1}
        across = max(1, launch.elements // self.block)
        if name == "pointwise":
            return triton.cdiv(self.height * self.width, across), constants | {"POSITIONS": across}
        strips = triton.cdiv(self.height, launch.rows) * self.width
        return triton.cdiv(strips, across), constants | {"STRIPS": across, "ROWS": launch.rows}

    def images(self, programs: int) -> int:
        """Return how many images a program of the backward takes: a power of two, so that few kernels are compiled."""
        most = max(1, min(LAUNCH["backward_level"].images, self.batch * programs // PROGRAMS))
        return 1 << (most.bit_length() - 1)


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _is_aligned(t: Tensor) -> bool:
    """Return whether every position begins at 16 bytes."""
    return all(n * t.itemsize % 16 == 0 for n in t.stride()[:3]) and t.data_ptr() % 16 == 0


def _taps(sizes: Sequence[int]) -> list[int]:
    """Return where each level's kernel begins among the rows of the packed weights, and their number."""
    return [sum(size * size for size in sizes[:level]) for level in range(len(sizes) + 1)]


def _focal_modulation(
    context: Tensor, gates: Tensor, weights: Tensor, sizes: list[int], normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    context, gates, weights = _dense(context), _dense(gates), weights.contiguous()
    problem = _Problem(context, gates, normalize)
    batch, height, width, channels = context.shape
    levels = torch.empty((problem.levels, *context.shape), dtype=context.dtype, device=context.device)
    out = torch.empty(context.shape, dtype=context.dtype, device=context.device)
    mean = torch.empty((batch, channels), dtype=torch.float32, device=context.device)
    x = context
    for level, (size, start) in enumerate(zip(sizes, _taps(sizes), strict=False)):
        tiles, constants = problem.tiling("level" if _is_aligned(x) else "level_unaligned")
        # Sums over the last level; no other writes any.
        partial = torch.empty((batch, tiles, channels), dtype=torch.float32, device=context.device)
        is_last = level == problem.levels - 1
        # The output's memory is free until the end, and the last level writes no context.
        target = out if level % 2 == 0 or is_last else torch.empty_like(out)
        _level[(tiles * problem.blocks, batch)](
            x, weights[start:], levels[level], target, partial, height, width, channels, *x.stride()[:3],
            **constants, KERNEL=size, IS_LAST=is_last,
        )  # fmt: skip
        x = target
    positions_tiles, constants = problem.tiling("pointwise")
    _combine[(positions_tiles * problem.blocks, batch)](
        levels, gates, partial, mean, out, height * width, width, channels, tiles, problem.factor, levels.stride(0),
        *gates.stride()[:3], **constants, LEVELS=problem.levels,
    )  # fmt: skip
    return out, levels, mean


def _focal_modulation_backward(
    grad_out: Tensor, context: Tensor, gates: Tensor, weights: Tensor, out: Tensor, levels: Tensor, mean: Tensor,
    sizes: list[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    context, gates, weights, grad_out = _dense(context), _dense(gates), weights.contiguous(), grad_out.contiguous()
    problem = _Problem(context, gates, normalize)
    batch, height, width, channels = context.shape

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=context.device)

    tiles, constants = problem.tiling("pointwise")
    grid = tiles * problem.blocks, batch
    constants["LEVELS"] = problem.levels
    grad_gates = empty(problem.blocks, *gates.shape)
    partial = empty(batch, tiles, channels)
    grad_level = torch.empty_like(out)
    _backward_mean[grid](
        grad_out, gates, partial, height * width, width, channels, problem.factor, *gates.stride()[:3], **constants
    )
    _backward_last[grid](
        grad_out, gates, levels[-1], mean, partial, grad_level, grad_gates, batch, height * width, width, channels,
        tiles, problem.factor, *gates.stride()[:3], **constants,
    )  # fmt: skip

    tiles, constants = problem.tiling("backward_level")
    images = problem.images(tiles * problem.blocks)
    groups = triton.cdiv(batch, images)
    starts = _taps(sizes)
    partial = empty(groups, tiles, starts[-1], channels)
    spare = torch.empty_like(out)
    for level in reversed(range(problem.levels)):
        x = levels[level - 1] if level else context
        _backward_level[(tiles * problem.blocks, groups)](
            grad_level, weights[starts[level] :], x, grad_out, gates, spare, grad_gates, partial[:, :, starts[level] :],
            batch, height, width, channels, problem.factor, *x.stride()[:3], *gates.stride()[:3], starts[-1],
            **constants, LEVEL=level, LEVELS=problem.levels, KERNEL=sizes[level], IMAGES=images,
        )  # fmt: skip
        grad_level, spare = spare, grad_level
    return grad_level, grad_gates.sum(0).to(gates.dtype), partial.sum((0, 1)).to(weights.dtype)


def _fake(context, gates, weights, sizes, normalize):
    out = context.new_empty(context.shape)
    levels = context.new_empty((gates.shape[3] - 1, *context.shape))
    return out, levels, context.new_empty((context.shape[0], context.shape[3]), dtype=torch.float32)


def _fake_backward(grad_out, context, gates, weights, *others):
    return context.new_empty(context.shape), gates.new_empty(gates.shape), weights.new_empty(weights.shape)


_call = register("focal_modulation", _focal_modulation, _fake, _focal_modulation_backward, _fake_backward)


@register_flop_formula(torch.ops.densezoo.focal_modulation)
def _(context, gates, weights, *args, **kwargs) -> int:
    # A multiplication and an addition a tap; weights are (taps of all levels, dim).
    return 2 * context.numel() * weights[0]


@register_flop_formula(torch.ops.densezoo.focal_modulation_backward)
def _(grad_out, context, gates, weights, *args, **kwargs) -> int:
    # Two products a tap: the gradients of its level and of its weight.
    return 4 * context.numel() * weights[0]


def focal_modulation_triton(context: Tensor, gates: Tensor, weights: Sequence[Tensor], normalize: bool) -> Tensor:
    """Compute `densezoo.ops.focal_modulation` with the kernels; arguments checked."""
    # (taps of all levels, dim): neighbouring channels lie side by side.
    packed = torch.cat([weight.flatten(1).t() for weight in weights])
    return _call(context, gates, packed, [weight.shape[-1] for weight in weights], normalize)
