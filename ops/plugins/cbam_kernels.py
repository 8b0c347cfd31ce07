"""A map scaled by a gate for each channel, then by one for each position, as CBAM makes them, in Triton.

An image is a matrix in the order of memory: channels x positions, or in channels-last memory positions x channels. A
gate is a vector along one side of it, made of the maxima and means over the other: the channels' of the map, the
positions' of the map that the channels' gate has scaled. What a program knows of a part of a side it writes in float32,
and `_combine` or PyTorch reduces the parts, always in the same order.

- `_pool` reads the map once and reduces it over one side to maxima and means, those of positions after scaling.
- `_apply` scales: the forward the map; the backward the gradient, to which it adds what comes through the maxima and
  means.
- `_sums` sums the products of map and gradient over both sides, the gates' gradients, and counts the numbers that equal
  a maximum, among which its gradient is shared.
- `_through_maps` reads the map alone: the gradient that the channels' gate gets through the maxima and means over the
  channels, which is known only when that of the positions' gate is.

Except where `_pool` reduces rows, a program owns some columns of one image and walks down a share of its rows. Channels
of few positions, one after the other in memory, are `_pool_small`'s and so on: a program owns a share of the channels
of one image, and reads some at a time as they lie in memory. What belongs to a channel each number gathers from shared
memory; along channels numbers are gathered anew, so that threads reduce their own.

Every second kernel takes the images in reverse, so that it finds in L2 what the last one read last. The forward reads
the map three times and writes it once; the backward reads the map three times and the gradient twice, and writes once.
For this the gradient of the map is computed in one place, `_Pool`, which knows it last: the others hand over to it all
that their own parts take.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.partials import total
from densezoo.ops.plugins.axes import _combined, _gathered, _partial, _register, _store, _through_pool, _unit
from torch import Tensor


class _Launch(NamedTuple):
    """How a kernel is launched; the share of the rows is such that there are so many programs.

    A single warp must not load ahead: Triton 3.6 leaves out a barrier then.
    """

    tile: int  # Numbers that a program holds at a time.
    columns: int  # The most of a tile.
    warps: int
    stages: int  # Loads ahead, from 2.
    programs: int = 4096


class _SmallLaunch(NamedTuple):
    """How a kernel of whole channels is launched; the share of them is such that there are so many programs."""

    tile: int  # Numbers that a program holds at a time.
    warps: int
    programs: int


# Measured on an H200.
LAUNCH = {
    "pool_columns": _Launch(2048, 256, 4, 3, 1024),
    "pool_rows": _Launch(2048, 256, 4, 1),
    "scale": _Launch(4096, 256, 4, 1, 16384),
    "sums": _Launch(512, 256, 1, 1, 8192),
    "narrow_sums": _Launch(1024, 256, 1, 1),
    "through_maps": _Launch(512, 256, 1, 1),
    "backward": _Launch(1024, 256, 4, 1),
}
# With channels of at most SMALL positions in one piece of memory.
SMALL = 256
SMALL_LAUNCH = {
    "pool": _SmallLaunch(2048, 4, 2048),
    "scaled pool": _SmallLaunch(2048, 4, 1024),
    "scale": _SmallLaunch(2048, 4, 4096),
    "sums": _SmallLaunch(1024, 2, 2048),
    "backward": _SmallLaunch(1024, 4, 4096),
}


@triton.jit
def _piece(rows, columns, share, COLUMNS: tl.constexpr, REVERSED: tl.constexpr):
    """A program's image, part of the rows and tile of the columns, and the number of these parts and tiles."""
    parts, tiles = tl.cdiv(rows, share), tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    piece = program % (parts * tiles)
    return (program // (parts * tiles)).to(tl.int64), piece // tiles, piece % tiles, parts, tiles


@compiling.kernel(do_not_specialize=["share"])
def _pool(
    x, gate, out, rows, column_units, share, inverse,
    AXIS: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A multiple of UNIT in the compiler's eyes: so many numbers are read at once.
    columns = column_units * UNIT
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if AXIS == 0:
        image, part, column_tile, parts, _ = _piece(rows, columns, share, COLUMNS, SCALED)
        row, column = row + part * share, column + column_tile * COLUMNS
        length = tl.minimum(share, rows - part * share)
    else:
        image, part, _, _, _ = _piece(rows, 1, ROWS, 1, SCALED)
        row, length = row + part * ROWS, columns
    x += image * rows * columns
    if SCALED:
        gate += image * (rows if AXIS == 0 else columns)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    tops = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    for start in tl.range(0, length, ROWS if AXIS == 0 else COLUMNS, num_stages=STAGES):
        r, c = row + (start if AXIS == 0 else 0), column + (0 if AXIS == 0 else start)
        # A condition that EVEN makes true is none to the compiler; only along AXIS may nothing else be seen.
        if AXIS == 0:
            real = ((start + tl.arange(0, ROWS) < length) | EVEN)[:, None]
            exist = real & (c < columns)[None, :]
        else:
            real = ((c < columns) | EVEN)[None, :]
            exist = real & (r < rows)[:, None]
        tile = tl.load(x + r[:, None] * columns + c[None, :], mask=exist, other=0.0)
        if SCALED:
            if AXIS == 0:
                scale = tl.load(gate + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
            else:
                scale = tl.load(gate + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
            tile = _scaled(tile, scale)
        tile = tile.to(tl.float32)
        sums += tile
        tops = tl.maximum(tops, tl.where(real, tile, float("-inf")))
    tops, sums = tl.max(tops, AXIS), tl.sum(sums, AXIS)
    if AXIS == 0:
        out += (image * parts + part) * 2 * columns
        _store(out, tops, sums, inverse, column, columns, column < columns, False)
    else:
        _store(out + image * 2 * rows, tops, sums, inverse, row, rows, row < rows, False)


@triton.jit
def _scaled(tile, scale):
    """The map scaled by the channels' gate, in its own type, so that a maximum finds the numbers that it equals."""
    return (tile.to(tl.float32) * scale).to(tile.dtype)


@compiling.kernel(do_not_specialize=["share"])
def _apply(
    x, grad, out, gate_r, gate_c, pool_r, pool_c, fractions_r, fractions_c, grad_r, grad_c, rows, column_units, share,
    inverse_r, inverse_c,
    FIRST: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = column_units * UNIT
    image, part, column_tile, _, _ = _piece(rows, columns, share, COLUMNS, False)
    end = tl.minimum((part + 1) * share, rows)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    column_exist = column < columns
    x += image * rows * columns
    out += image * rows * columns
    scale_c = tl.load(gate_c + image * columns + column, mask=column_exist, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        grad += image * rows * columns
        pool_r, fractions_r, grad_r = (
            pool_r + image * 2 * rows, fractions_r + image * 2 * rows, grad_r + image * 2 * rows
        )  # fmt: skip
        top_c, top_grad_c, mean_grad_c = _through_pool(
            pool_c, fractions_c, grad_c, image * 2 * columns + column, columns, column_exist, inverse_c
        )  # fmt: skip
        top_c, top_grad_c, mean_grad_c = top_c[None, :], top_grad_c[None, :], mean_grad_c[None, :]
    for start in tl.range(part * share, end, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        row_exist = (row < end) | EVEN
        place, exist = row[:, None] * columns + column[None, :], row_exist[:, None] & column_exist[None, :]
        tile = tl.load(x + place, mask=exist, other=0.0)
        scale_r = tl.load(gate_r + image * rows + row, mask=row_exist, other=0.0).to(tl.float32)[:, None]
        if BACKWARD:
            result = tl.load(grad + place, mask=exist, other=0.0).to(tl.float32)
            top_r, top_grad_r, mean_grad_r = _through_pool(
                pool_r, fractions_r, grad_r, row, rows, row_exist, inverse_r
            )  # fmt: skip
            top_r, top_grad_r, mean_grad_r = top_r[:, None], top_grad_r[:, None], mean_grad_r[:, None]
            if FIRST:
                result = _through_gates(
                    tile, result, scale_r, top_r, top_grad_r, mean_grad_r, scale_c, top_c, top_grad_c, mean_grad_c
                )  # fmt: skip
            else:
                result = _through_gates(
                    tile, result, scale_c, top_c, top_grad_c, mean_grad_c, scale_r, top_r, top_grad_r, mean_grad_r
                )  # fmt: skip
        else:
            result = tile.to(tl.float32) * scale_r * scale_c
        tl.store(out + place, result.to(out.dtype.element_ty), mask=exist)


@triton.jit
def _through_gates(
    tile, grad, channel, top, top_grad, mean_grad, position, top_position, top_grad_position, mean_grad_position
):
    """The gradient of the map: through the positions' gate and maxima and means, then through the channels'."""
    is_top = _scaled(tile, channel).to(tl.float32) == top_position
    grad = grad * position + mean_grad_position
    grad = tl.where(is_top, grad + top_grad_position, grad) * channel + mean_grad
    return tl.where(tile.to(tl.float32) == top, grad + top_grad, grad)


@compiling.kernel(do_not_specialize=["share"])
def _sums(
    x, grad, gate_r, gate_c, pool_r, pool_c, out_r, out_c, rows, column_units, share,
    FIRST: tl.constexpr, INVERT_R: tl.constexpr, INVERT_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = column_units * UNIT
    image, part, column_tile, parts, tiles = _piece(rows, columns, share, COLUMNS, False)
    end = tl.minimum((part + 1) * share, rows)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    column_exist = column < columns
    x += image * rows * columns
    grad += image * rows * columns
    gate_r += image * rows
    pool_r += image * 2 * rows
    out_r += (image * tiles + column_tile) * 2 * rows
    scale_c = tl.load(gate_c + image * columns + column, mask=column_exist, other=0.0).to(tl.float32)[None, :]
    top_c = tl.load(pool_c + image * 2 * columns + column, mask=column_exist, other=0.0).to(tl.float32)[None, :]
    tops = tl.zeros((ROWS, COLUMNS), tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(part * share, end, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        row_exist = (row < end) | EVEN
        place, exist = row[:, None] * columns + column[None, :], row_exist[:, None] & column_exist[None, :]
        tile = tl.load(x + place, mask=exist, other=0.0)
        product = tile.to(tl.float32) * tl.load(grad + place, mask=exist, other=0.0).to(tl.float32)
        scale_r = tl.load(gate_r + row, mask=row_exist, other=0.0).to(tl.float32)[:, None]
        top_r = tl.load(pool_r + row, mask=row_exist, other=0.0).to(tl.float32)[:, None]
        # Maxima over positions are those of the map, over channels those of the map that is scaled.
        scaled = _scaled(tile, scale_r if FIRST else scale_c)
        is_top_r = (tile if FIRST else scaled).to(tl.float32) == top_r
        is_top_c = (scaled if FIRST else tile).to(tl.float32) == top_c
        tops = tl.where(is_top_c & row_exist[:, None], tops + 1.0, tops)
        sums += product * scale_r
        tops_r = tl.sum(tl.where(is_top_r & column_exist[None, :], 1.0, 0.0), 1)
        _store(out_r, tops_r, tl.sum(product * scale_c, 1), 1.0, row, rows, row_exist, INVERT_R)
    out_c += (image * parts + part) * 2 * columns
    _store(out_c, tl.sum(tops, 0), tl.sum(sums, 0), 1.0, column, columns, column_exist, INVERT_C)


@compiling.kernel(do_not_specialize=["share"])
def _through_maps(
    x, gate, maps, fractions, grad_maps, out, rows, column_units, share, inverse,
    FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    columns = column_units * UNIT
    image, part, column_tile, parts, tiles = _piece(rows, columns, share, COLUMNS, True)
    end = tl.minimum((part + 1) * share, rows)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    column_exist = column < columns
    x += image * rows * columns
    gate += image * (rows if FIRST else columns)
    positions = columns if FIRST else rows
    maps += image * 2 * positions
    fractions += image * 2 * positions
    grad_maps += image * 2 * positions
    if FIRST:
        out += (image * tiles + column_tile) * rows
        top, top_grad, mean_grad = _through_pool(maps, fractions, grad_maps, column, columns, column_exist, inverse)
        top, top_grad, mean_grad = top[None, :], (mean_grad + top_grad)[None, :], mean_grad[None, :]
    else:
        scale = tl.load(gate + column, mask=column_exist, other=0.0).to(tl.float32)[None, :]
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(part * share, end, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        row_exist = (row < end) | EVEN
        exist = row_exist[:, None] & column_exist[None, :]
        tile = tl.load(x + row[:, None] * columns + column[None, :], mask=exist, other=0.0)
        if FIRST:
            scale = tl.load(gate + row, mask=row_exist, other=0.0).to(tl.float32)[:, None]
        else:
            top, top_grad, mean_grad = _through_pool(maps, fractions, grad_maps, row, rows, row_exist, inverse)
            top, top_grad, mean_grad = top[:, None], (mean_grad + top_grad)[:, None], mean_grad[:, None]
        is_top = _scaled(tile, scale).to(tl.float32) == top
        product = tile.to(tl.float32) * tl.where(is_top, top_grad, mean_grad)
        if FIRST:
            tl.store(out + row, tl.sum(product, 1).to(out.dtype.element_ty), mask=row_exist)
        else:
            sums += product
    if not FIRST:
        out += (image * parts + part) * columns + column
        tl.store(out, tl.sum(sums, 0).to(out.dtype.element_ty), mask=column_exist)


@triton.jit
def _numbers(
    channels, steps, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, TILE: tl.constexpr, REVERSED: tl.constexpr
):
    """A program's image, part of the channels, first channel and end, and the numbers of a tile and their channels."""
    parts = tl.cdiv(channels, steps * CHANNELS)
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    image, part = (program // parts).to(tl.int64), program % parts
    UNIT: tl.constexpr = 4 if POSITIONS % 4 == 0 else 2 if POSITIONS % 2 == 0 else 1
    number = tl.arange(0, TILE)
    # Of numbers of a unit the compiler sees that they are of one channel.
    channel = tl.minimum(number // UNIT // (POSITIONS // UNIT), CHANNELS - 1)
    begin = part * steps * CHANNELS
    return image, part, parts, begin, tl.minimum(begin + steps * CHANNELS, channels), number, channel


@triton.jit
def _along_channels(numbers, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, IS_MAX: tl.constexpr):
    """The sums, or maxima, of the channels of a tile, of as many channels as a power of 2."""
    UNIT: tl.constexpr = 4 if POSITIONS % 4 == 0 else 2 if POSITIONS % 2 == 0 else 1
    UNITS: tl.constexpr = POSITIONS // UNIT
    numbers = tl.reshape(numbers, [numbers.numel // UNIT, UNIT])
    unit, channel = tl.arange(0, triton.next_power_of_2(UNITS)), tl.arange(0, triton.next_power_of_2(CHANNELS))
    place = tl.minimum(channel, CHANNELS - 1)[None, :] * UNITS + tl.minimum(unit, UNITS - 1)[:, None]
    real = (unit < UNITS)[:, None]
    if IS_MAX:
        return tl.max(tl.where(real, _gathered(tl.max(numbers, 1), place), float("-inf")), 0)
    else:
        return tl.sum(tl.where(real, _gathered(tl.sum(numbers, 1), place), 0.0), 0)


@triton.jit
def _along_positions(numbers, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, IS_MAX: tl.constexpr):
    """The sums, or maxima, of the positions of a tile, of as many positions as a power of 2."""
    channel = tl.arange(0, triton.next_power_of_2(CHANNELS))
    position = tl.arange(0, triton.next_power_of_2(POSITIONS))
    place = tl.minimum(channel, CHANNELS - 1)[:, None] * POSITIONS + tl.minimum(position, POSITIONS - 1)[None, :]
    numbers, real = _gathered(numbers, place), (channel < CHANNELS)[:, None]
    if IS_MAX:
        return tl.max(tl.where(real, numbers, float("-inf")), 0)
    else:
        return tl.sum(tl.where(real, numbers, 0.0), 0)


@compiling.kernel(do_not_specialize=["steps"])
def _pool_small(
    x, gate, out, channels, steps, inverse,
    SCALED: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    image, part, parts, begin, end, number, channel = _numbers(channels, steps, CHANNELS, POSITIONS, TILE, SCALED)
    some = tl.arange(0, triton.next_power_of_2(CHANNELS))
    x += image * channels * POSITIONS
    if SCALED:
        gate += image * channels
        sums = tl.zeros((TILE,), tl.float32)
        tops = sums + float("-inf")
    else:
        out += image * 2 * channels
    for start in tl.range(begin, end, CHANNELS, num_stages=1):
        count = tl.minimum(CHANNELS, end - start)
        exist = number < count * POSITIONS
        tile = tl.load(x + start * POSITIONS + number, mask=exist, other=0.0)
        if SCALED:
            scale = tl.load(gate + start + some, mask=some < count, other=0.0).to(tl.float32)
            tile = _scaled(tile, _gathered(scale, channel)).to(tl.float32)
            tops = tl.maximum(tops, tl.where(exist, tile, float("-inf")))
            sums += tile
        else:
            tile = tile.to(tl.float32)
            top = _along_channels(tile, CHANNELS, POSITIONS, True)
            total = _along_channels(tile, CHANNELS, POSITIONS, False)
            _store(out, top, total, inverse, start + some, channels, some < count, False)
    if SCALED:
        tops = _along_positions(tops, CHANNELS, POSITIONS, True)
        sums = _along_positions(sums, CHANNELS, POSITIONS, False)
        position = tl.arange(0, triton.next_power_of_2(POSITIONS))
        out += (image * parts + part) * 2 * POSITIONS
        _store(out, tops, sums, inverse, position, POSITIONS, position < POSITIONS, False)


@compiling.kernel(do_not_specialize=["steps"])
def _apply_small(
    x, grad, out, gate_c, gate_p, pool_c, pool_p, fractions_c, fractions_p, grad_c, grad_p, channels, steps,
    inverse_c, inverse_p,
    BACKWARD: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    image, _, _, begin, end, number, channel = _numbers(channels, steps, CHANNELS, POSITIONS, TILE, False)
    some, position = tl.arange(0, triton.next_power_of_2(CHANNELS)), number % POSITIONS
    x, out, gate_c = x + image * channels * POSITIONS, out + image * channels * POSITIONS, gate_c + image * channels
    scale_p = tl.load(gate_p + image * POSITIONS + position).to(tl.float32)
    if BACKWARD:
        grad += image * channels * POSITIONS
        pool_c, fractions_c, grad_c = (
            pool_c + image * 2 * channels, fractions_c + image * 2 * channels, grad_c + image * 2 * channels
        )  # fmt: skip
        top_p, top_grad_p, mean_grad_p = _through_pool(
            pool_p, fractions_p, grad_p, image * 2 * POSITIONS + position, POSITIONS, number >= 0, inverse_p
        )  # fmt: skip
    for start in tl.range(begin, end, CHANNELS, num_stages=1):
        count = tl.minimum(CHANNELS, end - start)
        exist, some_exist = number < count * POSITIONS, some < count
        tile = tl.load(x + start * POSITIONS + number, mask=exist, other=0.0)
        scale_c = _gathered(tl.load(gate_c + start + some, mask=some_exist, other=0.0).to(tl.float32), channel)
        if BACKWARD:
            result = tl.load(grad + start * POSITIONS + number, mask=exist, other=0.0).to(tl.float32)
            top_c, top_grad_c, mean_grad_c = _through_pool(
                pool_c, fractions_c, grad_c, start + some, channels, some_exist, inverse_c
            )  # fmt: skip
            result = _through_gates(
                tile, result, scale_c, _gathered(top_c, channel), _gathered(top_grad_c, channel),
                _gathered(mean_grad_c, channel), scale_p, top_p, top_grad_p, mean_grad_p,
            )  # fmt: skip
        else:
            result = tile.to(tl.float32) * scale_c * scale_p
        tl.store(out + start * POSITIONS + number, result.to(out.dtype.element_ty), mask=exist)


@compiling.kernel(do_not_specialize=["steps"])
def _sums_small(
    x, grad, gate_c, gate_p, pool_c, pool_p, out_c, out_p, channels, steps,
    INVERT_P: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    image, part, parts, begin, end, number, channel = _numbers(channels, steps, CHANNELS, POSITIONS, TILE, False)
    some, position = tl.arange(0, triton.next_power_of_2(CHANNELS)), number % POSITIONS
    x, grad, gate_c = x + image * channels * POSITIONS, grad + image * channels * POSITIONS, gate_c + image * channels
    pool_c, out_c = pool_c + image * 2 * channels, out_c + image * 2 * channels
    scale_p = tl.load(gate_p + image * POSITIONS + position).to(tl.float32)
    top_p = tl.load(pool_p + image * 2 * POSITIONS + position).to(tl.float32)
    tops = tl.zeros((TILE,), tl.float32)
    sums = tops
    for start in tl.range(begin, end, CHANNELS, num_stages=1):
        count = tl.minimum(CHANNELS, end - start)
        exist, some_exist = number < count * POSITIONS, some < count
        tile = tl.load(x + start * POSITIONS + number, mask=exist, other=0.0)
        product = tl.load(grad + start * POSITIONS + number, mask=exist, other=0.0).to(tl.float32)
        scale_c = tl.load(gate_c + start + some, mask=some_exist, other=0.0).to(tl.float32)
        top_c = tl.load(pool_c + start + some, mask=some_exist, other=0.0).to(tl.float32)
        scale_c, top_c = _gathered(scale_c, channel), _gathered(top_c, channel)
        product *= tile.to(tl.float32)
        # Maxima over positions are those of the map, over channels those of the map that is scaled.
        tops = tl.where((_scaled(tile, scale_c).to(tl.float32) == top_p) & exist, tops + 1.0, tops)
        sums += product * scale_c
        tops_c = _along_channels(tl.where(tile.to(tl.float32) == top_c, 1.0, 0.0), CHANNELS, POSITIONS, False)
        sums_c = _along_channels(product * scale_p, CHANNELS, POSITIONS, False)
        _store(out_c, tops_c, sums_c, 1.0, start + some, channels, some_exist, True)
    tops, sums = (
        _along_positions(tops, CHANNELS, POSITIONS, False), _along_positions(sums, CHANNELS, POSITIONS, False)
    )  # fmt: skip
    position = tl.arange(0, triton.next_power_of_2(POSITIONS))
    out_p += (image * parts + part) * 2 * POSITIONS
    _store(out_p, tops, sums, 1.0, position, POSITIONS, position < POSITIONS, INVERT_P)


def _tiling(x: Tensor, launch: _Launch) -> tuple[int, int, list[int], dict]:
    """Return the parts of the rows, the tiles of the columns, the kernels' sizes, and their constants."""
    batch, rows, columns = x.shape
    unit, columns_tile = _unit(columns), min(launch.columns, triton.next_power_of_2(columns))
    if launch.warps > 1:
        # A row of a tile is a warp's, so that no warp waits for another to sum it.
        columns_tile = min(columns_tile, 32 * min(unit, 16 // x.element_size()))
    rows_tile = min(launch.tile // columns_tile, triton.next_power_of_2(rows))
    tiles = triton.cdiv(columns, columns_tile)
    shares = max(1, launch.programs // (batch * tiles))
    share = triton.cdiv(triton.cdiv(rows, shares), rows_tile) * rows_tile
    constants = {"ROWS": rows_tile, "COLUMNS": columns_tile, "UNIT": unit, "EVEN": rows % rows_tile == 0}
    constants |= {"STAGES": launch.stages, "num_warps": launch.warps}
    return triton.cdiv(rows, share), tiles, [rows, columns // unit, share], constants


def _is_small(x: Tensor, first: bool) -> bool:
    return first and x.shape[2] <= SMALL


def _small_tiling(x: Tensor, kind: str) -> tuple[int, list[int], dict]:
    """Return the same of whole channels, without tiles."""
    (batch, channels, positions), launch = x.shape, SMALL_LAUNCH[kind]
    some = min(channels, launch.tile // positions)
    # Of numbers read at once, none is another program's.
    some -= some % (4 // math.gcd(positions, 4)) if some >= 8 else 0
    steps = triton.cdiv(triton.cdiv(channels, some), max(1, launch.programs // batch))
    constants = {"CHANNELS": some, "POSITIONS": positions, "TILE": triton.next_power_of_2(some * positions)}
    return triton.cdiv(channels, steps * some), [channels, steps], constants | {"num_warps": launch.warps}


def _pooled_small(x: Tensor, gate: Tensor | None) -> Tensor:
    parts, sizes, constants = _small_tiling(x, "pool" if gate is None else "scaled pool")
    programs = x.shape[0] * parts
    axis = 2 if gate is None else 1
    inverse, parts = 1 / x.shape[axis], 1 if gate is None else parts
    partial = _partial(x, parts, 2, x.shape[3 - axis])
    early = inverse if parts == 1 else 1.0
    _pool_small[(programs,)](x, gate, partial, *sizes, early, SCALED=gate is not None, **constants)
    return _combined(x, partial, inverse, False)


def _pooled(x: Tensor, gate: Tensor | None, axis: int) -> Tensor:
    (batch, *sizes), launch = x.shape, LAUNCH["pool_rows" if axis == 1 else "pool_columns"]
    inverse = 1 / sizes[axis]
    parts, tiles, (rows, column_units, share), constants = _tiling(x, launch)
    programs = batch * parts * tiles
    if axis == 1:
        # All of some rows.
        constants["EVEN"] = sizes[1] % constants["COLUMNS"] == 0
        parts, programs = 1, batch * triton.cdiv(rows, constants["ROWS"])
    partial = _partial(x, parts, 2, sizes[1 - axis])
    early = inverse if parts == 1 else 1.0
    _pool[(programs,)](
        x, gate, partial, rows, column_units, share, early, AXIS=axis, SCALED=gate is not None, **constants
    )
    return _combined(x, partial, inverse, False)


def _pool_channels(x: Tensor, first: bool) -> Tensor:
    x = x.contiguous()
    return _pooled_small(x, None) if _is_small(x, first) else _pooled(x, None, 1 if first else 0)


def _pool_positions(x: Tensor, channel: Tensor, first: bool) -> Tensor:
    x, channel = x.contiguous(), channel.contiguous()
    return _pooled_small(x, channel) if _is_small(x, first) else _pooled(x, channel, 0 if first else 1)


def _applied(x: Tensor, grad: Tensor | None, pairs: list[tuple[Tensor | None, Tensor | None]], first: bool) -> Tensor:
    """Launch `_apply`; the pairs are of channels and positions."""
    x, out = x.contiguous(), x.new_empty(x.shape)
    kind = "scale" if grad is None else "backward"
    sides = [t if t is None else t.contiguous() for pair in pairs for t in (pair if first else pair[::-1])]
    inverses = 1 / x.shape[2], 1 / x.shape[1]
    if _is_small(x, first):
        parts, sizes, constants = _small_tiling(x, kind)
        _apply_small[(x.shape[0] * parts,)](
            x, grad, out, *sides, *sizes, *inverses, BACKWARD=grad is not None, **constants
        )
        return out
    parts, tiles, sizes, constants = _tiling(x, LAUNCH[kind])
    _apply[(x.shape[0] * parts * tiles,)](
        x, grad, out, *sides, *sizes, *inverses, FIRST=first, BACKWARD=grad is not None, **constants
    )
    return out


def _gate_twice(x: Tensor, channel: Tensor, position: Tensor, first: bool) -> Tensor:
    return _applied(x, None, [(channel, position)] + 3 * [(None, None)], first)


def _gate_twice_backward(
    grad_out: Tensor, x: Tensor, channel: Tensor, position: Tensor, pool: Tensor, maps: Tensor,
    sums_channel: Tensor, sums_position: Tensor, grad_pool: Tensor, grad_maps: Tensor, first: bool,
) -> Tensor:  # fmt: skip
    pairs = [(channel, position), (pool, maps), (sums_channel, sums_position), (grad_pool, grad_maps)]
    return _applied(x, grad_out.contiguous(), pairs, first)


def _gate_twice_sums(
    grad_out: Tensor, x: Tensor, channel: Tensor, position: Tensor, pool: Tensor, maps: Tensor, first: bool
) -> tuple[Tensor, Tensor]:
    x, grad_out = x.contiguous(), grad_out.contiguous()
    pairs = (channel, position), (pool, maps)
    sides = [t.contiguous() for pair in pairs for t in (pair if first else pair[::-1])]
    if _is_small(x, first):
        parts, sizes, constants = _small_tiling(x, "sums")
        sums, out = x.new_empty(pool.shape), _partial(x, parts, *maps.shape[1:])
        _sums_small[(x.shape[0] * parts,)](x, grad_out, *sides, sums, out, *sizes, INVERT_P=parts == 1, **constants)
        return sums, _combined(x, out, 1.0, True)
    # A tile that holds all columns, and not few, is worth more rows.
    launch = LAUNCH["narrow_sums" if 128 < x.shape[2] < 256 else "sums"]
    parts, tiles, sizes, constants = _tiling(x, launch)
    outs = _partial(x, tiles, 2, x.shape[1]), _partial(x, parts, 2, x.shape[2])
    _sums[(x.shape[0] * parts * tiles,)](
        x, grad_out, *sides, *outs, *sizes, FIRST=first, INVERT_R=tiles == 1, INVERT_C=parts == 1,
        **constants,
    )  # fmt: skip
    of_rows, of_columns = (_combined(x, out, 1.0, True) for out in outs)
    return (of_rows, of_columns) if first else (of_columns, of_rows)


def _gate_through_maps(
    x: Tensor, channel: Tensor, maps: Tensor, sums_position: Tensor, grad_maps: Tensor, first: bool
) -> Tensor:
    x = x.contiguous()
    tensors = [t.contiguous() for t in (channel, maps, sums_position, grad_maps)]
    parts, tiles, sizes, constants = _tiling(x, LAUNCH["through_maps"])
    out = _partial(x, tiles if first else parts, *channel.shape[1:])
    _through_maps[(x.shape[0] * parts * tiles,)](
        x, *tensors, out, *sizes, 1 / channel.shape[1], FIRST=first, **constants
    )
    return out[:, 0] if out.shape[1] == 1 else total(out, 1, x.dtype)


def _sizes(x: Tensor, first: bool) -> tuple[int, int]:
    """Return the numbers of channels and positions."""
    return (x.shape[1], x.shape[2]) if first else (x.shape[2], x.shape[1])


def _fake_pool(x, first):
    return x.new_empty(x.shape[0], 2, _sizes(x, first)[0])


def _fake_maps(x, channel, first):
    return x.new_empty(x.shape[0], 2, _sizes(x, first)[1])


def _fake_sums(grad_out, x, channel, position, pool, maps, first):
    return x.new_empty(pool.shape), x.new_empty(maps.shape)


def _fake_map(grad_out, x, *_):
    return x.new_empty(x.shape)


_pool_c = _register(_pool_channels, _fake_pool)
_pool_p = _register(_pool_positions, _fake_maps)
_scale = _register(_gate_twice, lambda x, *_: x.new_empty(x.shape))
_reduce = _register(_gate_twice_sums, _fake_sums)
_channel_grad = _register(_gate_through_maps, lambda x, channel, *_: x.new_empty(channel.shape))
_backward = _register(_gate_twice_backward, _fake_map)


def _empty(x: Tensor, first: bool, *kinds: str) -> list[Tensor]:
    """Return tensors without memory: maxima and means, or a gate, of channels or positions."""
    shapes = dict(zip(("channel", "position"), _sizes(x, first), strict=True))
    nothing = x.new_empty(())
    return [nothing.expand(x.shape[0], *(2,) * kind.startswith("two "), shapes[kind.split()[-1]]) for kind in kinds]


class _Pool(torch.autograd.Function):
    """The maxima and means of channels, then what `_Map` takes: x, and empty tensors.

    Their gradients are none: they are what `_Map` hands over, the gradient of the scaled map, gates, and reductions.
    """

    @staticmethod
    def forward(ctx, x, first):
        pool = _pool_c(x, first)
        ctx.first = first
        ctx.save_for_backward(x, pool)
        kinds = "channel", "position", "two position", "two channel", "two position", "two position"
        return pool, x.view_as(x), *_empty(x, first, *kinds)

    @staticmethod
    def backward(ctx, grad_pool, grad_out, channel, position, maps, sums_channel, sums_position, grad_maps):
        x, pool = ctx.saved_tensors
        sums = sums_channel, sums_position
        return _backward(grad_out, x, channel, position, pool, maps, *sums, grad_pool, grad_maps, ctx.first), None


class _Map(torch.autograd.Function):
    """The maxima and means of positions, then what `_Scale` takes; `_Pool`'s beside the channels' gate."""

    @staticmethod
    def forward(ctx, x, channel, first, *_):
        maps = _pool_p(x, channel, first)
        ctx.first = first
        ctx.save_for_backward(x, channel, maps)
        return maps, x.view_as(x), *_empty(x, first, "position", "two channel", "two position")

    @staticmethod
    def backward(ctx, grad_maps, grad_out, position, sums_channel, sums_position):
        x, channel, maps = ctx.saved_tensors
        grad_channel = _channel_grad(x, channel, maps, sums_position, grad_maps, ctx.first)
        return grad_out, grad_channel, None, channel, position, maps, sums_channel, sums_position, grad_maps


class _Scale(torch.autograd.Function):
    """The product of x with both gates; pools and maps, and what `_Map` gives beside them."""

    @staticmethod
    def forward(ctx, x, channel, position, pool, maps, first, *_):
        ctx.first = first
        ctx.save_for_backward(x, channel, position, pool, maps)
        return _scale(x, channel, position, first)

    @staticmethod
    def backward(ctx, grad_out):
        x, channel, position, pool, maps = ctx.saved_tensors
        sums = _reduce(grad_out, x, channel, position, pool, maps, ctx.first)
        return grad_out, sums[0][:, 1], sums[1][:, 1], None, None, None, position, *sums


def gate_twice_triton(
    x: Tensor, channel_gate: Callable[[Tensor], Tensor], position_gate: Callable[[Tensor], Tensor]
) -> Tensor:
    """Scale x (B, C, H, W) by a gate for each channel, and the result by a gate for each position.

    Args:
        x: float32, float16 or bfloat16; channels-last memory stays so, other memory becomes contiguous.
        channel_gate: Takes the maxima and means over H and W (B, 2, C) to (B, C).
        position_gate: Takes the maxima and means over C of the map that is scaled (B, 2, H, W) to (B, 1, H, W).
    """
    size, first = x.shape[2:], x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    flat = x.flatten(2) if first else x.permute(0, 2, 3, 1).flatten(1, 2)
    pool, flat, *empty = _Pool.apply(flat, first)
    channel = channel_gate(pool).to(x.dtype)
    maps, flat, *empty = _Map.apply(flat, channel, first, *empty)
    position = position_gate(maps.unflatten(2, size)).flatten(1).to(x.dtype)
    out = _Scale.apply(flat, channel, position, pool, maps, first, *empty)
    return out.unflatten(2, size) if first else out.unflatten(1, size).permute(0, 3, 1, 2)
