"""Focal modulation in Triton, forward and backward.

A level's convolution is arithmetic more than traffic: 9 to 121 products a number read. A thread therefore holds one
channel and walks down a strip of COLS columns, row by row, with all taps in registers: a number is loaded and widened
once for all the products that it takes part in down the strip, and a program's threads load neighbouring channels. A
program owns CHANNELS channels of a strip of one image, or of a piece of `rows` rows of it where images are few.

- `_level` convolves one level into the next. Sums of KERNEL rows are under way at a time; the topmost is complete when
  a row has been read. It writes the level before the GELU, which the backward needs, and after it, which the next level
  needs. At the last level only the sum over its positions is kept of the latter.
- `_combine` gates the levels and the mean of the last, position by position.

The backward goes the other way. `_backward_mean` sums what reaches the mean, and `_backward_last` takes it through the
last GELU. Then two kernels a level: `_backward_level` goes through the convolution, in the manner of `_level`, and the
GELU before it. `_backward_weight` holds KERNEL rows of the level that was convolved and multiplies them by each row of
gradients, for the kernel's gradient: one partial table a program. Gradients of the gates are sums over channels: one
partial value a block of channels. PyTorch sums partial values: two deterministic stages.

Of the levels what precedes the GELU is kept for the backward, in the context's dtype: to convolve all of them again
would cost a third of the backward's arithmetic.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops.focal.reference import focal_modulation_reference
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@triton.jit
def _normal(z):
    """Cumulative distribution of the normal distribution; z times it is right to 6e-7."""
    # 1 / (1 + 2^(z p)), with a polynomial p of z^2 fitted to it: cheaper than erf, and the tails keep their digits.
    s = z * z
    p = -5.209907543800543e-09 * s + 3.850449398212734e-07
    p = p * s - 1.1452428973382406e-05
    p = p * s + 1.5939940480161385e-04
    p = p * s + 9.559295651805719e-05
    p = p * s - 0.10483858127994435
    p = p * s - 2.302207203588972
    # Its square is fewer instructions than a division, which allows for numbers that do not occur.
    root = tl.rsqrt(1.0 + tl.exp2(z * p))
    return root * root


@triton.jit
def _gelu(z):
    return z * _normal(z)


@triton.jit
def _gelu_slope(z, below):
    """Derivative of the GELU, given the cumulative distribution."""
    return below + z * (tl.exp2(z * z * -0.7213475204444817) * 0.3989422804014327)


@triton.jit
def _block(tile, blocks, channels, CHANNELS: tl.constexpr):
    """A program's tile of positions, its channels, and which of them exist."""
    c = tile % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return tile // blocks, c, c < channels


@triton.jit
def _strip(width, channels, rows, height, COLS: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's strip: first column, first and last row, its channels, which of them exist, and its tile's number."""
    blocks = tl.cdiv(channels, CHANNELS)
    strips = tl.cdiv(width, COLS)
    tile = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    top = tile // strips * rows
    return tile % strips * COLS, top, tl.minimum(top + rows, height), c, c < channels, tile


@triton.jit
def _taps(weights, first, channels, c, exist, KERNEL: tl.constexpr, TURNED: tl.constexpr):
    """A kernel's taps in order, or turned around; row `first` of the packed weights is where it begins."""
    taps = ()
    for i in tl.static_range(KERNEL * KERNEL):
        at = weights + (first + (KERNEL * KERNEL - 1 - i if TURNED else i)) * channels
        taps = taps + (tl.load(at + c, mask=exist, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _row(x, left, width, stride, exist, COUNT: tl.constexpr, INDEX: tl.constexpr):
    """A row's values from column `left`, zero outside of the map; `x` points to column 0."""
    row = ()
    for i in tl.static_range(COUNT):
        inside = (left + i >= 0) & (left + i < width)
        row = row + (tl.load(x + (left + i).to(INDEX) * stride, mask=exist & inside, other=0.0).to(tl.float32),)
    return row


@triton.jit
def _zeros(COUNT: tl.constexpr, CHANNELS: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros((CHANNELS,), tl.float32),)
    return values


@triton.jit
def _spread(sums, row, taps, KERNEL: tl.constexpr, COLS: tl.constexpr):
    """Add a row's products to the sums of the KERNEL rows that it reaches."""
    new = ()
    for k in tl.static_range(KERNEL):
        for x in tl.static_range(COLS):
            value = sums[k * COLS + x]
            for j in tl.static_range(KERNEL):
                value = tl.fma(row[x + j], taps[(KERNEL - 1 - k) * KERNEL + j], value)
            new = new + (value,)
    return new


@triton.jit
def _move_on(window, row, KERNEL: tl.constexpr, COLS: tl.constexpr):
    """Drop a window's first row and take another as its last."""
    new = ()
    for i in tl.static_range(KERNEL * COLS - COLS):
        new = new + (window[COLS + i],)
    for i in tl.static_range(COLS):
        new = new + (row[i],)
    return new


@triton.jit
def _write_level(
    sums, z, context, total, row, left, width, channels, exist, KEEP: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write a level's row, and return `total` with what the row adds to the sum over the positions."""
    for x in tl.static_range(COLS):
        mask = exist & (left + x < width)
        at = (row * width + left + x) * channels
        tl.store(z + at, sums[x].to(z.dtype.element_ty), mask=mask)
        value = _gelu(sums[x])
        if KEEP:
            tl.store(context + at, value.to(context.dtype.element_ty), mask=mask)
        else:
            total += tl.where(mask, value, 0.0)
    return total


@triton.jit(do_not_specialize=["first", "height", "width", "rows"])
def _level(
    x, weights, level, context, partial, first, height, width, channels, rows, stride_b, stride_h, stride_w,
    KERNEL: tl.constexpr, IS_LAST: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    left, top, bottom, c, exist, tile = _strip(width, channels, rows, height, COLS, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    x += image * stride_b + c
    level += image * height * width * channels + c
    context += image * height * width * channels + c
    taps = _taps(weights, first, channels, c, exist, KERNEL, False)
    sums = _zeros(KERNEL * COLS, CHANNELS)
    blank = _zeros(COLS, CHANNELS)
    total = tl.zeros((CHANNELS,), tl.float32)
    REACH: tl.constexpr = KERNEL // 2
    for y in range(tl.maximum(top - REACH, 0), bottom + REACH):
        if y < height:
            source = x + tl.cast(y, INDEX) * stride_h
            row = _row(source, left - REACH, width, stride_w, exist, COLS + KERNEL - 1, INDEX)
            sums = _spread(sums, row, taps, KERNEL, COLS)
        if y >= top + REACH:
            total = _write_level(
                sums, level, context, total, tl.cast(y - REACH, INDEX), left, width, channels, exist, not IS_LAST, COLS
            )
        sums = _move_on(sums, blank, KERNEL, COLS)
    if IS_LAST:
        tiles = tl.num_programs(0) // tl.cdiv(channels, CHANNELS)
        tl.store(partial + (image * tiles + tile) * channels + c, total, mask=exist)


@triton.jit(do_not_specialize=["positions", "width"])
def _combine(
    levels, gates, total, out, positions, width, channels, factor, level_stride,
    gate_stride_b, gate_stride_h, gate_stride_w,
    LEVELS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    tile, c, exist = _block(tl.program_id(0), tl.cdiv(channels, CHANNELS), channels, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    average = tl.load(total + image * channels + c, mask=exist, other=0.0) / positions
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


@triton.jit(do_not_specialize=["positions", "width"])
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


@triton.jit(do_not_specialize=["batch", "positions", "width"])
def _backward_last(
    grad_out, gates, level, total, to_mean, grad_level, grad_gates, batch, positions, width, channels, factor,
    gate_stride_b, gate_stride_h, gate_stride_w,
    LEVELS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, CHANNELS)
    tile, c, exist = _block(tl.program_id(0), blocks, channels, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    average = tl.load(total + image * channels + c, mask=exist, other=0.0) / positions
    below = _normal(average)
    from_mean = tl.load(to_mean + image * channels + c, mask=exist, other=0.0) / positions
    from_mean *= _gelu_slope(average, below)

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
    below = _normal(z)
    tl.store(grad_gates - 1, tl.sum(grad * z * below, 1), mask=here)
    grad = (grad * gate[:, None] + from_mean[None, :]) * _gelu_slope(z, below)
    tl.store(grad_level + at, grad.to(grad_level.dtype.element_ty), mask=mask)


@triton.jit
def _write_gradients(
    sums, z, grad_out, gates, grad_x, grad_gates, row, left, width, channels, exist, factor, gate_stride_h,
    gate_stride_w, LEVEL: tl.constexpr, LEVELS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Take a row of gradients of a level's context through the gates and the GELU, and write them."""
    for x in tl.static_range(COLS):
        here = left + x < width
        mask = exist & here
        position = row * width + left + x
        at = position * channels
        grad = sums[x]
        if LEVEL > 0:
            value = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
            from_out = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32) * factor
            gate = tl.load(gates + row * gate_stride_h + (left + x) * gate_stride_w + LEVEL - 1, mask=here, other=0.0)
            below = _normal(value)
            tl.store(grad_gates + position * (LEVELS + 1) + LEVEL - 1, tl.sum(from_out * value * below, 0), mask=here)
            grad = tl.fma(from_out, gate.to(tl.float32), grad) * _gelu_slope(value, below)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first", "batch", "height", "width", "rows"])
def _backward_level(
    grad_level, weights, z, grad_out, gates, grad_x, grad_gates, first, batch, height, width, channels, rows, factor,
    gate_stride_b, gate_stride_h, gate_stride_w,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, KERNEL: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    left, top, bottom, c, exist, _ = _strip(width, channels, rows, height, COLS, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    origin = image * height * width * channels + c
    grad_level += origin
    z += origin
    grad_out += origin
    grad_x += origin
    gates += image * gate_stride_b
    block = tl.program_id(0) % tl.cdiv(channels, CHANNELS)
    grad_gates += (block * batch + image) * height * width * (LEVELS + 1)
    # Gradients come from the other side: the kernel is turned around.
    taps = _taps(weights, first, channels, c, exist, KERNEL, True)
    sums = _zeros(KERNEL * COLS, CHANNELS)
    blank = _zeros(COLS, CHANNELS)
    REACH: tl.constexpr = KERNEL // 2
    for y in range(tl.maximum(top - REACH, 0), bottom + REACH):
        if y < height:
            source = grad_level + tl.cast(y, INDEX) * width * channels
            row = _row(source, left - REACH, width, channels, exist, COLS + KERNEL - 1, INDEX)
            sums = _spread(sums, row, taps, KERNEL, COLS)
        if y >= top + REACH:
            _write_gradients(
                sums, z, grad_out, gates, grad_x, grad_gates, tl.cast(y - REACH, INDEX), left, width, channels, exist,
                factor, gate_stride_h, gate_stride_w, LEVEL, LEVELS, COLS,
            )  # fmt: skip
        sums = _move_on(sums, blank, KERNEL, COLS)


@triton.jit
def _context_row(
    x, row, last, left, width, stride_h, stride_w, exist, COLS: tl.constexpr, INDEX: tl.constexpr,
    IS_FIRST: tl.constexpr,
):  # fmt: skip
    """A row of what a level convolved, zero from row `last` on."""
    values = _row(x + tl.cast(row, INDEX) * stride_h, left, width, stride_w, exist & (row < last), COLS, INDEX)
    if not IS_FIRST:
        passed = ()
        for i in tl.static_range(COLS):
            passed = passed + (_gelu(values[i]),)
        values = passed
    return values


@triton.jit
def _correlate(sums, window, row, KERNEL: tl.constexpr, COLS: tl.constexpr):
    """Add to each tap's sum the products of the numbers that it joins: KERNEL rows of contexts, one of gradients."""
    new = ()
    for k in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            value = sums[k * KERNEL + j]
            for x in tl.static_range(COLS):
                value = tl.fma(window[k * COLS + x], row[x + KERNEL - 1 - j], value)
            new = new + (value,)
    return new


@triton.jit(do_not_specialize=["first", "batch", "images", "height", "width", "rows", "taps"])
def _backward_weight(
    grad_level, x, partial, first, batch, images, height, width, channels, rows, taps, stride_b, stride_h, stride_w,
    IS_FIRST: tl.constexpr, KERNEL: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    left, top, bottom, c, exist, tile = _strip(width, channels, rows, height, COLS, CHANNELS)
    REACH: tl.constexpr = KERNEL // 2
    sums = _zeros(KERNEL * KERNEL, CHANNELS)
    start = tl.maximum(top - REACH, 0)
    begin = tl.program_id(1) * images
    for number in range(begin, tl.minimum(begin + images, batch)):
        image = tl.cast(number, tl.int64)
        source = x + image * stride_b + c
        grad = grad_level + image * height * width * channels + c
        window = _zeros(KERNEL * COLS, CHANNELS)
        for y in range(top, start + REACH):
            row = _context_row(source, y, bottom, left, width, stride_h, stride_w, exist, COLS, INDEX, IS_FIRST)
            window = _move_on(window, row, KERNEL, COLS)
        for y in range(start, tl.minimum(bottom + REACH, height)):
            row = _context_row(source, y + REACH, bottom, left, width, stride_h, stride_w, exist, COLS, INDEX, IS_FIRST)
            window = _move_on(window, row, KERNEL, COLS)
            from_row = grad + tl.cast(y, INDEX) * width * channels
            row = _row(from_row, left - REACH, width, channels, exist, COLS + KERNEL - 1, INDEX)
            sums = _correlate(sums, window, row, KERNEL, COLS)
    tiles = tl.num_programs(0) // tl.cdiv(channels, CHANNELS)
    partial += ((tl.program_id(1).to(tl.int64) * tiles + tile) * taps + first) * channels + c
    for i in tl.static_range(KERNEL * KERNEL):
        tl.store(partial + i * channels, sums[i], mask=exist)


class _Launch(NamedTuple):
    """Positions times channels of a program, and warps."""

    elements: int
    warps: int


POINTWISE = _Launch(4096, 4)
# A warp takes a strip: a channel a thread.
CHANNELS = 32
# Enough programs to fill the GPU come before long strips, and before many images a program.
PROGRAMS = 4096
WEIGHT_PROGRAMS = 2048
# A piece has these rows at least: it reads those around it as well.
ROWS = 8
# A thread's registers where it would take more and needs no more: each scheduler then has four warps to choose from.
REGISTERS = 128


def _columns(size: int, is_backward: bool) -> int:
    """Return a strip's columns, so that taps, sums under way and a row's numbers fit the registers of a thread."""
    return 7 if size <= (3 if is_backward else 5) else 4 if size <= 7 else 2 if size <= 9 else 1


class _Strips(NamedTuple):
    """Tiles of an image, programs for them, rows of a tile, images of a program, and the constants of a launch."""

    tiles: int
    programs: int
    rows: int
    images: int
    constants: dict


class _Problem:
    """How a call is cut into programs; the same for all calls alike."""

    def __init__(self, shape, strides, gate_strides, sizes, normalize):
        self.batch, self.height, self.width, self.channels = shape
        self.strides, self.gate_strides = strides[:3], gate_strides[:3]
        self.dense = (self.height * self.width * self.channels, self.width * self.channels, self.channels)
        levels = len(sizes)
        self.factor = 1.0 / (levels + 1) if normalize else 1.0
        # Where each level's kernel begins among the rows of the packed weights, and their number.
        *self.starts, self.taps = [sum(size * size for size in sizes[:level]) for level in range(levels + 1)]
        self.blocks = triton.cdiv(self.channels, CHANNELS)
        # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
        sides = self.height, self.width, max(self.channels, levels + 1)
        extent = max(
            sum(side * stride for side, stride in zip(sides, each, strict=True))
            for each in (strides[1:], gate_strides[1:], (*self.dense[1:], 1))
        )
        self.index = tl.int32 if extent < 2**30 else tl.int64
        across = max(1, POINTWISE.elements // CHANNELS)
        self.positions = self.height * self.width
        self.tiles = triton.cdiv(self.positions, across)
        self.grid = self.tiles * self.blocks, self.batch
        self.pointwise = {
            "LEVELS": levels, "POSITIONS": across, "CHANNELS": CHANNELS, "INDEX": self.index,
            "num_warps": POINTWISE.warps,
        }  # fmt: skip
        largest, cols = max(sizes), min(4, _columns(max(sizes), True))
        self.level, self.backward_level, self.backward_weight = [], [], []
        for level, size in enumerate(sizes):
            flags = {"KERNEL": size, "IS_LAST": level == levels - 1}
            self.level.append(self._strips(size, _columns(size, False), flags))
            flags = {"KERNEL": size, "LEVEL": level, "LEVELS": levels}
            self.backward_level.append(self._strips(size, _columns(size, True), flags))
            # One table of partial sums for all levels: the same strips for all.
            flags = {"KERNEL": size, "IS_FIRST": level == 0}
            self.backward_weight.append(self._strips(largest, cols, flags))

    def _strips(self, size: int, cols: int, flags: dict) -> _Strips:
        strips = triton.cdiv(self.width, cols)
        programs = max(1, strips * self.blocks * self.batch)
        pieces = max(1, min(triton.cdiv(PROGRAMS, programs), self.height // ROWS))
        rows = max(1, triton.cdiv(self.height, pieces))
        pieces = triton.cdiv(self.height, rows)
        images = max(1, programs * pieces // WEIGHT_PROGRAMS)
        constants = {"COLS": cols, "CHANNELS": CHANNELS, "INDEX": self.index, "num_warps": 1, "num_stages": 1, **flags}
        if 3 < size <= 7:
            constants["maxnreg"] = REGISTERS
        return _Strips(strips * pieces, strips * pieces * self.blocks, rows, images, constants)


_problem = lru_cache(maxsize=1024)(_Problem)


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _plan(context: Tensor, gates: Tensor, sizes: Sequence[int], normalize: bool) -> _Problem:
    return _problem(context.shape, context.stride(), gates.stride(), tuple(sizes), normalize)


def _focal_modulation(
    context: Tensor, gates: Tensor, weights: Tensor, sizes: list[int], normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    context, gates, weights = _dense(context), _dense(gates), weights.contiguous()
    plan = _plan(context, gates, sizes, normalize)
    batch, height, width, channels = context.shape
    out = context.new_empty(context.shape)
    levels = context.new_empty((len(sizes), *context.shape))
    # Sums over the last level; no other writes any.
    partial = torch.empty((batch, plan.level[-1].tiles, channels), dtype=torch.float32, device=context.device)
    x, strides = context, plan.strides
    for i, (strips, first, level) in enumerate(zip(plan.level, plan.starts, levels.unbind(), strict=True)):
        # The output's memory is free until the end, and the last level writes no context.
        target = out if i % 2 == 0 or strips.constants["IS_LAST"] else torch.empty_like(out)
        _level[strips.programs, batch](
            x, weights, level, target, partial, first, height, width, channels, strips.rows, *strides,
            **strips.constants,
        )  # fmt: skip
        x, strides = target, plan.dense
    total = partial.sum(1)
    _combine[plan.grid](
        levels, gates, total, out, plan.positions, width, channels, plan.factor, batch * plan.dense[0],
        *plan.gate_strides, **plan.pointwise,
    )  # fmt: skip
    return out, levels, total


def _focal_modulation_backward(
    grad_out: Tensor, context: Tensor, gates: Tensor, weights: Tensor, out: Tensor, levels: Tensor, total: Tensor,
    sizes: list[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    context, gates, weights, grad_out = _dense(context), _dense(gates), weights.contiguous(), grad_out.contiguous()
    plan = _plan(context, gates, sizes, normalize)
    batch, height, width, channels = context.shape
    inputs = context, *levels.unbind()

    partial = total.new_empty((batch, plan.tiles, channels))
    _backward_mean[plan.grid](
        grad_out, gates, partial, plan.positions, width, channels, plan.factor, *plan.gate_strides, **plan.pointwise
    )
    grad_gates = total.new_empty((plan.blocks, *gates.shape))
    grad_level, spare = torch.empty_like(out), torch.empty_like(out)
    _backward_last[plan.grid](
        grad_out, gates, inputs[-1], total, partial.sum(1), grad_level, grad_gates, batch, plan.positions, width,
        channels, plan.factor, *plan.gate_strides, **plan.pointwise,
    )  # fmt: skip

    groups = triton.cdiv(batch, plan.backward_weight[0].images)
    partial = total.new_empty((groups * plan.backward_weight[0].tiles, plan.taps, channels))
    for level in reversed(range(len(sizes))):
        x, first, strips = inputs[level], plan.starts[level], plan.backward_weight[level]
        _backward_weight[strips.programs, groups](
            grad_level, x, partial, first, batch, strips.images, height, width, channels, strips.rows, plan.taps,
            *(plan.dense if level else plan.strides), **strips.constants,
        )  # fmt: skip
        strips = plan.backward_level[level]
        _backward_level[strips.programs, batch](
            grad_level, weights, x, grad_out, gates, spare, grad_gates, first, batch, height, width, channels,
            strips.rows, plan.factor, *plan.gate_strides, **strips.constants,
        )  # fmt: skip
        grad_level, spare = spare, grad_level
    return grad_level, grad_gates.sum(0).to(gates.dtype), partial.sum(0).to(weights.dtype)


def _fake(context, gates, weights, sizes, normalize):
    out = context.new_empty(context.shape)
    levels = context.new_empty((gates.shape[3] - 1, *context.shape))
    return out, levels, context.new_empty((context.shape[0], context.shape[3]), dtype=torch.float32)


def _fake_backward(grad_out, context, gates, weights, *others):
    return context.new_empty(context.shape), gates.new_empty(gates.shape), weights.new_empty(weights.shape)


def _reference(context, gates, weights, sizes, normalize):
    kernels = weights.split([size * size for size in sizes])
    kernels = [rows.t().unflatten(1, (1, size, size)) for rows, size in zip(kernels, sizes, strict=True)]
    return focal_modulation_reference(context, gates, kernels, normalize)


_call = register("focal_modulation", _focal_modulation, _fake, _focal_modulation_backward, _fake_backward, _reference)


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
