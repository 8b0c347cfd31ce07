"""Focal modulation in Triton, forward and backward.

A level's convolution is arithmetic more than traffic: 9 to 121 products a number read. A thread therefore holds one
channel and walks down a strip of COLS columns, row by row, with all taps in registers: a number is loaded and widened
once for all the products that it takes part in down the strip, and a program's threads load neighbouring channels. A
program owns CHANNELS channels of a strip of one image, or of a piece of `rows` rows of it where images are few. While a
row is worked on, the next is on its way to the registers, and one further down to the L2 cache.

- `_level` convolves one level into the next. Sums of KERNEL rows are under way at a time; the topmost is complete when
  a row has been read. It writes the level before the GELU, which the backward needs; the next level takes it through
  the GELU as it reads. Of the last, the sum over its positions is kept too: `_mean` adds those of the tiles.
- `_combine` gates the levels and the mean of the last, position by position.

The backward goes the other way. `_backward_mean` sums what reaches the mean, and `_backward_average` takes it back to
each position. `_backward_gates` sees all channels of a few positions, for the gradients of the gates, and takes those
of the last level through its GELU. Then two kernels a level: `_backward_level` goes through the convolution, in
the manner of `_level`, and the GELU before it. `_backward_weight` holds KERNEL rows of the level that was convolved and
multiplies them by each row of gradients, for the kernel's gradient: one partial table a program. Partial values
take two deterministic stages everywhere.

Of the levels what precedes the GELU is kept for the backward, in the context's dtype: to convolve all of them again
would cost a third of the backward's arithmetic.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.focal.reference import focal_modulation_reference
from densezoo.ops.gelu import gelu, gelu_slope, normal
from densezoo.ops.launch import Table
from densezoo.ops.partials import total
from densezoo.ops.registration import register
from densezoo.ops.strips import correlate, move_on, spread, wide, widen
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Not told apart by whether 16 divides them, which would only mean more kernels to compile: threads read single numbers.
STRIDES = ["stride_b", "stride_h", "stride_w"]
GATE_STRIDES = ["gate_stride_b", "gate_stride_h", "gate_stride_w"]


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
def _row(
    x, row, left, height, width, stride_h, stride_w, exist, COUNT: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """Numbers of a row from column `left`, zero outside of the map; `x` points to position 0."""
    # Without sign, what lies before the first column or row lies beyond the last. One comparison a number.
    limit = tl.where(tl.cast(row, tl.uint32) < tl.cast(height, tl.uint32), width, 0).to(tl.uint32)
    x += tl.cast(row, INDEX) * stride_h
    numbers = ()
    for i in tl.static_range(COUNT):
        mask = exist & ((left + i).to(tl.uint32) < limit)
        numbers = numbers + (tl.load(x + (left + i).to(INDEX) * stride_w, mask=mask, other=0.0),)
    return numbers


@triton.jit
def _fetch(
    x, row, left, height, width, stride_h, stride_w, AHEAD: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Bring the row AHEAD rows on, from column `left`, into the L2 cache: two threads a column, 16 channels apart."""
    if AHEAD > 0:
        row = tl.minimum(tl.maximum(tl.cast(row, tl.int32) + AHEAD, 0), height - 1)
        lane = tl.arange(0, CHANNELS)
        column = tl.minimum(tl.maximum(left + tl.minimum(lane % 16, COUNT - 1), 0), width - 1)
        x += row.to(INDEX) * stride_h
        at = x + column.to(INDEX) * stride_w + (lane // 16 * 16 - lane)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32, False, 1
        )


@triton.jit
def _gelu_each(values, COUNT: tl.constexpr, NARROW: tl.constexpr):
    new = ()
    for i in tl.static_range(COUNT):
        new = new + (gelu(values[i], NARROW),)
    return new


@triton.jit
def _zeros(COUNT: tl.constexpr, CHANNELS: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros((CHANNELS,), tl.float32),)
    return values


@triton.jit
def _write_level(
    sums, level, total, row, left, width, channels, exist, IS_LAST: tl.constexpr, NARROW: tl.constexpr,
    COLS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Write a level's row, and return `total` with what a last level's adds to the sum over the positions."""
    level += tl.cast(row, INDEX) * width * channels
    for i in tl.static_range(COLS):
        mask = exist & (left + i < width)
        tl.store(level + (left + i).to(INDEX) * channels, sums[i].to(level.dtype.element_ty), mask=mask)
        if IS_LAST:
            total += tl.where(mask, gelu(sums[i], NARROW), 0.0)
    return total


@compiling.kernel(do_not_specialize=["first", "height", "width", "rows", *STRIDES])
def _level(
    x, weights, level, partial, first, height, width, channels, rows, stride_b, stride_h, stride_w,
    KERNEL: tl.constexpr, IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr, NARROW: tl.constexpr, COLS: tl.constexpr,
    CHANNELS: tl.constexpr, INDEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    left, top, bottom, c, exist, tile = _strip(width, channels, rows, height, COLS, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    x += image * stride_b + c
    level += image * height * width * channels + c
    taps = _taps(weights, first, channels, c, exist, KERNEL, False)
    sums = _zeros(KERNEL * COLS, CHANNELS)
    blank = _zeros(COLS, CHANNELS)
    total = tl.zeros((CHANNELS,), tl.float32)
    REACH: tl.constexpr = KERNEL // 2
    WIDE: tl.constexpr = COLS + KERNEL - 1
    start = tl.maximum(top - REACH, 0)
    # The next row is under way while this one is worked on.
    ahead = _row(x, start, left - REACH, height, width, stride_h, stride_w, exist, WIDE, INDEX)
    ahead = widen(ahead, WIDE, NARROW)
    end = tl.minimum(bottom + REACH, height)
    for y in range(start, end):
        _fetch(x, y, left - REACH, height, width, stride_h, stride_w, AHEAD, WIDE, CHANNELS, INDEX)
        new = _row(x, y + 1, left - REACH, height, width, stride_h, stride_w, exist, WIDE, INDEX)
        sums = spread(sums, ahead if IS_FIRST else _gelu_each(ahead, WIDE, NARROW), taps, KERNEL, COLS)
        if y >= top + REACH:
            row = y - REACH
            total = _write_level(sums, level, total, row, left, width, channels, exist, IS_LAST, NARROW, COLS, INDEX)
        sums = move_on(sums, blank, KERNEL, COLS)
        ahead = widen(new, WIDE, NARROW)
    # Nothing reaches the last rows any more.
    for y in range(end - REACH, bottom):
        if y >= top:
            total = _write_level(sums, level, total, y, left, width, channels, exist, IS_LAST, NARROW, COLS, INDEX)
        sums = move_on(sums, blank, KERNEL, COLS)
    if IS_LAST:
        tiles = tl.num_programs(0) // tl.cdiv(channels, CHANNELS)
        tl.store(partial + (image * tiles + tile) * channels + c, total, mask=exist)


@triton.jit
def _sum_tiles(partial, image, tiles, channels, c, exist, TILES: tl.constexpr, CHANNELS: tl.constexpr):
    """Sum an image's partial values, one a tile and channel."""
    acc = tl.zeros((TILES, CHANNELS), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & exist[None, :]
        acc += tl.load(partial + ((image * tiles + tile) * channels)[:, None] + c[None, :], mask=mask, other=0.0)
    return tl.sum(acc, 0)


@compiling.kernel(do_not_specialize=["tiles", "positions"])
def _mean(partial, average, mean, tiles, positions, channels, TILES: tl.constexpr, CHANNELS: tl.constexpr):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    value = _sum_tiles(partial, image, tiles, channels, c, c < channels, TILES, CHANNELS) / positions
    tl.store(average + image * channels + c, value, mask=c < channels)
    tl.store(mean + image * channels + c, gelu(value, False), mask=c < channels)


@compiling.kernel(do_not_specialize=["tiles", "positions"])
def _backward_average(
    partial, average, from_mean, tiles, positions, channels, TILES: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    value = tl.load(average + image * channels + c, mask=c < channels, other=0.0)
    grad = _sum_tiles(partial, image, tiles, channels, c, c < channels, TILES, CHANNELS) / positions
    grad *= gelu_slope(value, normal(value, False))
    tl.store(from_mean + image * channels + c, grad, mask=c < channels)


@compiling.kernel(do_not_specialize=["positions", "width", *GATE_STRIDES])
def _combine(
    levels, gates, mean, out, positions, width, channels, factor, level_stride,
    gate_stride_b, gate_stride_h, gate_stride_w,
    LEVELS: tl.constexpr, NARROW: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    tile, c, exist = _block(tl.program_id(0), tl.cdiv(channels, CHANNELS), channels, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    last = tl.load(mean + image * channels + c, mask=exist, other=0.0)
    n = tile * POSITIONS + tl.arange(0, POSITIONS)
    here = n < positions
    mask = here[:, None] & exist[None, :]
    gates += image * gate_stride_b + (n // width).to(INDEX) * gate_stride_h + (n % width).to(INDEX) * gate_stride_w
    at = image * positions * channels + (n.to(INDEX) * channels)[:, None] + c[None, :]
    acc = tl.load(gates + LEVELS, mask=here, other=0.0).to(tl.float32)[:, None] * last[None, :]
    for level in tl.static_range(LEVELS):
        gate = tl.load(gates + level, mask=here, other=0.0).to(tl.float32)
        value = tl.load(levels + level * level_stride + at, mask=mask, other=0.0).to(tl.float32)
        acc += gate[:, None] * gelu(value, NARROW)
    tl.store(out + at, (acc * factor).to(out.dtype.element_ty), mask=mask)


@compiling.kernel(do_not_specialize=["positions", "width", *GATE_STRIDES])
def _backward_mean(
    grad_out, gates, partial, positions, width, channels, factor, gate_stride_b, gate_stride_h, gate_stride_w,
    LEVELS: tl.constexpr, NARROW: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
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


@compiling.kernel(do_not_specialize=["positions", "width", *GATE_STRIDES])
def _backward_gates(
    grad_out, gates, levels, mean, from_mean, grad_level, grad_gates, positions, width, channels, factor, level_stride,
    gate_stride_b, gate_stride_h, gate_stride_w,
    LEVELS: tl.constexpr, NARROW: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    here = n < positions
    gates += image * gate_stride_b + (n // width).to(INDEX) * gate_stride_h + (n % width).to(INDEX) * gate_stride_w
    gate = tl.load(gates + LEVELS - 1, mask=here, other=0.0).to(tl.float32) * factor
    origin = image * positions * channels + (n.to(INDEX) * channels)[:, None]
    sums = _zeros(LEVELS + 1, POSITIONS)
    for start in range(0, channels, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        exist = c < channels
        mask = here[:, None] & exist[None, :]
        at = origin + c[None, :]
        grad = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
        values = ()
        for level in tl.static_range(LEVELS):
            values = values + (tl.load(levels + level * level_stride + at, mask=mask, other=0.0),)
        average = tl.load(mean + image * channels + c, mask=exist, other=0.0)
        offset = tl.load(from_mean + image * channels + c, mask=exist, other=0.0)
        new = ()
        for level in tl.static_range(LEVELS):
            z = values[level].to(tl.float32)
            each = normal(z, NARROW)
            new = new + (sums[level] + tl.sum(grad * (z * each), 1),)
            if level == LEVELS - 1:
                to_level = tl.fma(grad, gate[:, None], offset[None, :]) * gelu_slope(z, each)
                tl.store(grad_level + at, to_level.to(grad_level.dtype.element_ty), mask=mask)
        sums = new + (sums[LEVELS] + tl.sum(grad * average[None, :], 1),)
    grad_gates += (image * positions + n) * (LEVELS + 1)
    for level in tl.static_range(LEVELS + 1):
        tl.store(grad_gates + level, (sums[level] * factor).to(grad_gates.dtype.element_ty), mask=here)


@triton.jit
def _before_gates(
    z, grad_out, gates, row, left, height, width, channels, gate_stride_h, gate_stride_w, exist, LEVEL: tl.constexpr,
    COLS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """What takes a row of gradients through the gates and the GELU: the level before it, `grad_out` and the gates."""
    numbers = ()
    if LEVEL > 0:
        stride = width * channels
        numbers = _row(z, row, left, height, width, stride, channels, exist, COLS, INDEX)
        numbers += _row(grad_out, row, left, height, width, stride, channels, exist, COLS, INDEX)
        numbers += _row(gates, row, left, height, width, gate_stride_h, gate_stride_w, True, COLS, INDEX)
    return numbers


@triton.jit
def _write_gradients(
    sums, numbers, grad_x, row, left, width, channels, exist, factor, LEVEL: tl.constexpr, NARROW: tl.constexpr,
    COLS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Write a row of gradients, past the first level taken through the gates and the GELU."""
    grad_x += tl.cast(row, INDEX) * width * channels
    for i in tl.static_range(COLS):
        grad = sums[i]
        if LEVEL > 0:
            value, gate = wide(numbers[i], NARROW), wide(numbers[2 * COLS + i], NARROW) * factor
            grad = tl.fma(wide(numbers[COLS + i], NARROW), gate, grad)
            grad *= gelu_slope(value, normal(value, NARROW))
        mask = exist & (left + i < width)
        tl.store(grad_x + (left + i).to(INDEX) * channels, grad.to(grad_x.dtype.element_ty), mask=mask)


@compiling.kernel(do_not_specialize=["first", "height", "width", "rows", *GATE_STRIDES])
def _backward_level(
    grad_level, weights, z, grad_out, gates, grad_x, first, height, width, channels, rows, factor,
    gate_stride_b, gate_stride_h, gate_stride_w,
    LEVEL: tl.constexpr, KERNEL: tl.constexpr, NARROW: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
    INDEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    left, top, bottom, c, exist, _ = _strip(width, channels, rows, height, COLS, CHANNELS)
    image = tl.program_id(1).to(tl.int64)
    stride = width * channels
    origin = image * height * stride + c
    grad_level += origin
    z += origin
    grad_out += origin
    grad_x += origin
    gates += image * gate_stride_b + LEVEL - 1
    # Gradients come from the other side: the kernel is turned around.
    taps = _taps(weights, first, channels, c, exist, KERNEL, True)
    sums = _zeros(KERNEL * COLS, CHANNELS)
    blank = _zeros(COLS, CHANNELS)
    REACH: tl.constexpr = KERNEL // 2
    WIDE: tl.constexpr = COLS + KERNEL - 1
    start = tl.maximum(top - REACH, 0)
    ahead = _row(grad_level, start, left - REACH, height, width, stride, channels, exist, WIDE, INDEX)
    ahead = widen(ahead, WIDE, NARROW)
    end = tl.minimum(bottom + REACH, height)
    for y in range(start, end):
        _fetch(grad_level, y, left - REACH, height, width, stride, channels, AHEAD, WIDE, CHANNELS, INDEX)
        if LEVEL > 0:
            _fetch(z, y - REACH, left, height, width, stride, channels, AHEAD, COLS, CHANNELS, INDEX)
            _fetch(grad_out, y - REACH, left, height, width, stride, channels, AHEAD, COLS, CHANNELS, INDEX)
        new = _row(grad_level, y + 1, left - REACH, height, width, stride, channels, exist, WIDE, INDEX)
        values = _before_gates(
            z, grad_out, gates, y - REACH, left, height, width, channels, gate_stride_h, gate_stride_w, exist, LEVEL,
            COLS, INDEX,
        )  # fmt: skip
        sums = spread(sums, ahead, taps, KERNEL, COLS)
        if y >= top + REACH:
            _write_gradients(
                sums, values, grad_x, y - REACH, left, width, channels, exist, factor, LEVEL, NARROW, COLS, INDEX
            )
        sums = move_on(sums, blank, KERNEL, COLS)
        ahead = widen(new, WIDE, NARROW)
    # Nothing reaches the last rows any more.
    for y in range(end - REACH, bottom):
        values = _before_gates(
            z,
            grad_out,
            gates,
            y,
            left,
            height,
            width,
            channels,
            gate_stride_h,
            gate_stride_w,
            exist,
            LEVEL,
            COLS,
            INDEX,
        )
        if y >= top:
            _write_gradients(sums, values, grad_x, y, left, width, channels, exist, factor, LEVEL, NARROW, COLS, INDEX)
        sums = move_on(sums, blank, KERNEL, COLS)


@compiling.kernel(do_not_specialize=["batch", "images", "height", "width", "rows", *STRIDES])
def _backward_weight(
    grad_level, x, partial, batch, images, height, width, channels, rows, stride_b, stride_h, stride_w,
    IS_FIRST: tl.constexpr, KERNEL: tl.constexpr, NARROW: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
    INDEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    left, top, bottom, c, exist, tile = _strip(width, channels, rows, height, COLS, CHANNELS)
    REACH: tl.constexpr = KERNEL // 2
    WIDE: tl.constexpr = COLS + KERNEL - 1
    stride = width * channels
    sums = _zeros(KERNEL * KERNEL, CHANNELS)
    start = tl.maximum(top - REACH, 0)
    begin = tl.program_id(1) * images
    for number in range(begin, tl.minimum(begin + images, batch)):
        image = tl.cast(number, tl.int64)
        source = x + image * stride_b + c
        grad = grad_level + image * height * stride + c
        window = _zeros(KERNEL * COLS, CHANNELS)
        new = _row(source, top, left, bottom, width, stride_h, stride_w, exist, COLS, INDEX)
        new = widen(new, COLS, NARROW)
        for y in range(top, start + REACH):
            window = move_on(window, new if IS_FIRST else _gelu_each(new, COLS, NARROW), KERNEL, COLS)
            new = _row(source, y + 1, left, bottom, width, stride_h, stride_w, exist, COLS, INDEX)
            new = widen(new, COLS, NARROW)
        row = _row(grad, start, left - REACH, height, width, stride, channels, exist, WIDE, INDEX)
        row = widen(row, WIDE, NARROW)
        # The next rows are under way while these are worked on.
        for y in range(start, tl.minimum(bottom + REACH, height)):
            _fetch(grad, y, left - REACH, height, width, stride, channels, AHEAD, WIDE, CHANNELS, INDEX)
            _fetch(source, y + REACH + 1, left, height, width, stride_h, stride_w, AHEAD, COLS, CHANNELS, INDEX)
            grads = _row(grad, y + 1, left - REACH, height, width, stride, channels, exist, WIDE, INDEX)
            ahead = _row(source, y + REACH + 1, left, bottom, width, stride_h, stride_w, exist, COLS, INDEX)
            window = move_on(window, new if IS_FIRST else _gelu_each(new, COLS, NARROW), KERNEL, COLS)
            sums = correlate(sums, window, row, KERNEL, COLS)
            row, new = widen(grads, WIDE, NARROW), widen(ahead, COLS, NARROW)
    tiles = tl.num_programs(0) // tl.cdiv(channels, CHANNELS)
    partial += (tl.program_id(1).to(tl.int64) * tiles + tile) * (KERNEL * KERNEL * channels) + c
    for i in tl.static_range(KERNEL * KERNEL):
        tl.store(partial + i * channels, sums[i], mask=exist)


class _Launch(NamedTuple):
    """Positions and channels of a program, and warps."""

    positions: int
    channels: int
    warps: int


class _Walk(NamedTuple):
    """Columns of a strip, and the registers of a thread where it would take more and needs no more."""

    cols: int
    registers: int | None = None


# Measured on an H200.
LAUNCH = {
    "combine": _Launch(8, 128, 4),
    "mean": _Launch(128, 64, 4),
    "gates": _Launch(8, 128, 4),
    # Tiles and channels at a time.
    "means": _Launch(32, 32, 1),
    # By kernel size: taps, sums under way and a row's numbers fit the registers of a thread.
    ("level", 3): _Walk(7),
    ("level", 5): _Walk(7, 168),
    ("level", 7): _Walk(7, 168),
    ("backward_level", 3): _Walk(7),
    ("backward_level", 5): _Walk(4, 128),
    ("backward_level", 7): _Walk(4, 168),
    ("backward_weight", 3): _Walk(4),
    ("backward_weight", 5): _Walk(4, 128),
    ("backward_weight", 7): _Walk(2, 128),
}
LAUNCH = Table("focal_modulation", LAUNCH)
# A warp takes a strip: a channel a thread.
CHANNELS = 32
# Rows fetched into the L2 cache before their turn: a program's own loads are too few to hide the way to memory.
AHEAD = 4
# The interpreter takes no instructions of the GPU's own.
HAS_PTX = torch.version.hip is None and not triton.knobs.runtime.interpret
# See `normal`.
NARROW = {torch.bfloat16: True, torch.float16: 3}
# Enough programs to fill the GPU come before long strips, and before many images a program.
PROGRAMS = 4096
# A piece has these rows at least: it reads those around it as well.
ROWS = 8


def _walk(name: str, size: int) -> _Walk:
    """Return the launch settings of a kernel size; few are wider than those of the table, or have no neighbours."""
    return LAUNCH[name, size] if (name, size) in LAUNCH else _Walk(7 if size < 3 else 2 if size <= 9 else 1)


class _Strips(NamedTuple):
    """Tiles of an image, programs for them, rows of a tile, images of a program, and the constants of a launch."""

    tiles: int
    programs: int
    rows: int
    images: int
    constants: dict


class _Tiles(NamedTuple):
    """Tiles of an image, the grid, and the constants of a launch that goes position by position."""

    tiles: int
    grid: tuple[int, int]
    constants: dict


class _Problem:
    """How a call is cut into programs; the same for all calls alike."""

    def __init__(self, shape, strides, gate_strides, sizes, normalize, narrow):
        self.batch, self.height, self.width, self.channels = shape
        self.strides, self.gate_strides = strides[:3], gate_strides[:3]
        self.dense = (self.height * self.width * self.channels, self.width * self.channels, self.channels)
        self.levels, self.narrow = len(sizes), narrow
        self.factor = 1.0 / (self.levels + 1) if normalize else 1.0
        # Where each level's kernel begins among the rows of the packed weights.
        self.starts = [sum(size * size for size in sizes[:level]) for level in range(self.levels)]
        self.blocks = triton.cdiv(self.channels, CHANNELS)
        # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
        sides = self.height, self.width, max(self.channels, self.levels + 1)
        extent = max(
            sum(side * stride for side, stride in zip(sides, each, strict=True))
            for each in (strides[1:], gate_strides[1:], (*self.dense[1:], 1))
        )
        self.index = tl.int32 if extent < 2**30 else tl.int64
        self.positions = self.height * self.width
        self.combine, self.mean, self.gates = (
            self._tiles(LAUNCH["combine"]),
            self._tiles(LAUNCH["mean"]),
            self._tiles(LAUNCH["gates"], True),
        )
        means = LAUNCH["means"]
        constants = {"TILES": means.positions, "CHANNELS": means.channels, "num_warps": means.warps}
        self.means = _Tiles(1, (triton.cdiv(self.channels, means.channels), self.batch), constants)
        self.level, self.backward_level, self.backward_weight = [], [], []
        for level, size in enumerate(sizes):
            flags = {"KERNEL": size, "IS_FIRST": level == 0, "IS_LAST": level == self.levels - 1}
            self.level.append(self._strips(_walk("level", size), flags))
            flags = {"KERNEL": size, "LEVEL": level}
            self.backward_level.append(self._strips(_walk("backward_level", size), flags))
            flags = {"KERNEL": size, "IS_FIRST": level == 0}
            self.backward_weight.append(self._strips(_walk("backward_weight", size), flags))

    def _tiles(self, launch: _Launch, takes_all_channels: bool = False) -> _Tiles:
        channels = min(launch.channels, triton.next_power_of_2(self.channels))
        positions = min(launch.positions * launch.channels // channels, triton.next_power_of_2(self.positions))
        constants = {
            "LEVELS": self.levels, "NARROW": self.narrow, "POSITIONS": positions, "CHANNELS": channels,
            "INDEX": self.index, "num_warps": launch.warps,
        }  # fmt: skip
        tiles = triton.cdiv(self.positions, positions)
        blocks = 1 if takes_all_channels else triton.cdiv(self.channels, channels)
        return _Tiles(tiles, (tiles * blocks, self.batch), constants)

    def _strips(self, walk: _Walk, flags: dict) -> _Strips:
        strips = triton.cdiv(self.width, walk.cols)
        programs = max(1, strips * self.blocks * self.batch)
        pieces = max(1, min(triton.cdiv(PROGRAMS, programs), self.height // ROWS))
        rows = max(1, triton.cdiv(self.height, pieces))
        pieces = triton.cdiv(self.height, rows)
        images = max(1, programs * pieces // PROGRAMS)
        constants = {
            "NARROW": self.narrow, "COLS": walk.cols, "CHANNELS": CHANNELS, "INDEX": self.index,
            "AHEAD": AHEAD if HAS_PTX else 0, "num_warps": 1, "num_stages": 1, **flags,
        }  # fmt: skip
        if walk.registers:
            constants["maxnreg"] = walk.registers
        return _Strips(strips * pieces, strips * pieces * self.blocks, rows, images, constants)


_problem = lru_cache(maxsize=1024)(_Problem)


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _plan(context: Tensor, gates: Tensor, sizes: Sequence[int], normalize: bool) -> _Problem:
    narrow = HAS_PTX and NARROW.get(context.dtype, False)
    return _problem(context.shape, context.stride(), gates.stride(), tuple(sizes), normalize, narrow)


def _focal_modulation(
    context: Tensor, gates: Tensor, weights: Tensor, sizes: list[int], normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context, gates, weights = _dense(context), _dense(gates), weights.contiguous()
    plan = _plan(context, gates, sizes, normalize)
    batch, height, width, channels = context.shape
    out = context.new_empty(context.shape)
    levels = context.new_empty((len(sizes), *context.shape))
    # Sums over the last level; no other writes any.
    partial = torch.empty((batch, plan.level[-1].tiles, channels), dtype=torch.float32, device=context.device)
    x, strides = context, plan.strides
    for strips, first, level in zip(plan.level, plan.starts, levels.unbind(), strict=True):
        _level[strips.programs, batch](
            x, weights, level, partial, first, height, width, channels, strips.rows, *strides, **strips.constants
        )
        x, strides = level, plan.dense
    average, mean = (partial.new_empty((batch, channels)) for _ in range(2))
    tail = partial.shape[1], plan.positions, channels
    _mean[plan.means.grid](partial, average, mean, *tail, **plan.means.constants)
    _combine[plan.combine.grid](
        levels, gates, mean, out, plan.positions, width, channels, plan.factor, batch * plan.dense[0],
        *plan.gate_strides, **plan.combine.constants,
    )  # fmt: skip
    return out, levels, average, mean


def _focal_modulation_backward(
    grad_out: Tensor, context: Tensor, gates: Tensor, weights: Tensor, out: Tensor, levels: Tensor, average: Tensor,
    mean: Tensor, sizes: list[int], normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    context, gates, weights, grad_out = _dense(context), _dense(gates), weights.contiguous(), grad_out.contiguous()
    plan = _plan(context, gates, sizes, normalize)
    batch, height, width, channels = context.shape
    inputs = context, *levels.unbind()

    partial = mean.new_empty((batch, plan.mean.tiles, channels))
    tail = plan.positions, width, channels, plan.factor
    _backward_mean[plan.mean.grid](grad_out, gates, partial, *tail, *plan.gate_strides, **plan.mean.constants)
    from_mean = torch.empty_like(mean)
    _backward_average[plan.means.grid](
        partial, average, from_mean, plan.mean.tiles, plan.positions, channels, **plan.means.constants
    )
    grad_gates = gates.new_empty(gates.shape)
    grad_level, spare = torch.empty_like(out), torch.empty_like(out)
    _backward_gates[plan.gates.grid](
        grad_out, gates, levels, mean, from_mean, grad_level, grad_gates, *tail, batch * plan.dense[0],
        *plan.gate_strides, **plan.gates.constants,
    )  # fmt: skip

    grad_weights = torch.empty_like(weights)
    for level in reversed(range(len(sizes))):
        x, first, strips = inputs[level], plan.starts[level], plan.backward_weight[level]
        groups, count = triton.cdiv(batch, strips.images), sizes[level] ** 2 * channels
        partial = mean.new_empty((groups * strips.tiles, count))
        _backward_weight[strips.programs, groups](
            grad_level, x, partial, batch, strips.images, height, width, channels, strips.rows,
            *(plan.dense if level else plan.strides), **strips.constants,
        )  # fmt: skip
        total(partial, out=grad_weights.view(-1)[first * channels :][:count])
        strips = plan.backward_level[level]
        _backward_level[strips.programs, batch](
            grad_level, weights, x, grad_out, gates, spare, first, height, width, channels, strips.rows, plan.factor,
            *plan.gate_strides, **strips.constants,
        )  # fmt: skip
        grad_level, spare = spare, grad_level
    return grad_level, grad_gates, grad_weights


def _fake(context, gates, weights, sizes, normalize):
    out = context.new_empty(context.shape)
    levels = context.new_empty((gates.shape[3] - 1, *context.shape))
    means = (context.new_empty((context.shape[0], context.shape[3]), dtype=torch.float32) for _ in range(2))
    return out, levels, *means


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
