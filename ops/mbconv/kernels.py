"""The middle of an inverted bottleneck in Triton: an affine map, an activation and a depthwise 3x3 convolution.

A program owns CHANNELS channels of PARTS strips: COLS columns of the output, and a piece of `rows` rows. It walks down
the rows with all taps in registers; the next rows are on their way while it works, and further ones on theirs to the L2
cache. What is activated stays in registers: only the 1x1 convolution's result and the depthwise convolution's are in
memory. With STRIDE 2 the input's columns and rows are twice those of the output.

- `_forward` activates each number of the input as it is read, and adds it to the sums of the output's rows that it
  reaches, of which the topmost is then complete. In inference (LAST) the sums begin with a bias, a second activation is
  applied as a row is written, and each strip's sums are written too, for the mean over the map.
- `_backward` owns the input's numbers, each of which it reads and activates once. It gathers the three rows of the
  output's gradient around them: for the gradient of the activated, and with it for those of the weight. A program's
  sums, 9 rows of channels for the weight and one each for shift and scale, are added up by `partials.total`, always in
  the same order.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.launch import Table
from densezoo.ops.mbconv.reference import activated_conv_reference
from densezoo.ops.partials import total
from densezoo.ops.registration import define, register
from densezoo.ops.strips import fetch, move_on, repeat, wide, widen
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@triton.jit
def _below(u, LINEAR: tl.constexpr, CUBIC: tl.constexpr, NARROW: tl.constexpr):
    """What the activation multiplies u by: the logistic function of LINEAR u + CUBIC u^3."""
    if NARROW:
        # The GPU's own hyperbolic tangent, right to 5e-4.
        z = u * tl.fma(u * u, CUBIC / 2, LINEAR / 2)
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], tl.float32, True, 1)
        below = tl.fma(tanh, 0.5, 0.5)
    else:
        LOG2E: tl.constexpr = 1.4426950408889634
        below = 1.0 / (1.0 + tl.exp2(u * tl.fma(u * u, -CUBIC * LOG2E, -LINEAR * LOG2E)))
    return below


@triton.jit
def _strips(batch, width, channels, COLS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's strips and their images and first columns, its channels, and which of them exist."""
    blocks, across = tl.cdiv(channels, CHANNELS), tl.cdiv(width, COLS)
    tile = (tl.program_id(0) // blocks * PARTS + tl.arange(0, PARTS))[:, None]
    c = (tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    exist = (tile < batch * across) & (c < channels)
    # Those that do not exist stand for the last one, for addresses to be valid.
    tile = tl.minimum(tile, batch * across - 1)
    return tile, (tile // across).to(tl.int64), tile % across * COLS, c, exist


@triton.jit
def _parameter(at, c, channels):
    return tl.load(at + c, mask=c < channels, other=0.0).to(tl.float32)


@triton.jit
def _taps(weight, c, channels):
    taps = ()
    for i in tl.static_range(9):
        taps = taps + (_parameter(weight + i, c * 9, channels * 9),)
    return taps


@triton.jit
def _row(
    x, row, height, column, width, exist, channels, COUNT: tl.constexpr, INNER: tl.constexpr,
    FITS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A row's numbers from `column` on; zeros outside the map. `x` is at that column of row 0.

    Where strips fit the map, columns 1 to INNER are inside.
    """
    here = exist & (row >= 0) & (row < height)
    x += tl.cast(row, INDEX) * (width * channels)
    numbers = ()
    for i in tl.static_range(COUNT):
        mask = here
        if i == 0 or i >= INNER or not FITS:
            mask = here & (column + i >= 0) & (column + i < width)
        numbers = numbers + (tl.load(x + i * channels, mask=mask, other=0.0),)
    return numbers


@triton.jit
def _affine(
    numbers, row, height, column, width, scale, shift, FIRST: tl.constexpr, COUNT: tl.constexpr, INNER: tl.constexpr,
    FITS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """What a row activates; 0 outside the map, of which each activation makes 0."""
    shift = tl.where((row >= 0) & (row < height), shift, 0.0)
    new = ()
    for i in tl.static_range(COUNT):
        offset = shift
        if i == 0 or i >= INNER or not FITS:
            offset = tl.where((column + i >= 0) & (column + i < width), shift, 0.0)
        new = new + (tl.fma(wide(numbers[FIRST + i], NARROW), scale, offset),)
    return new


@triton.jit
def _activated(
    numbers, row, height, column, width, scale, shift, FIRST: tl.constexpr, COUNT: tl.constexpr, INNER: tl.constexpr,
    FITS: tl.constexpr, NARROW: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr,
):  # fmt: skip
    values = _affine(numbers, row, height, column, width, scale, shift, FIRST, COUNT, INNER, FITS, NARROW)
    new = ()
    for i in tl.static_range(COUNT):
        new = new + (values[i] * _below(values[i], LINEAR, CUBIC, NARROW),)
    return new


@triton.jit
def _add(sums, FIRST: tl.constexpr, row, taps, K: tl.constexpr, STRIDE: tl.constexpr, COLS: tl.constexpr):
    """Sums of COLS columns and a row's products with the K-th row of taps."""
    new = ()
    for i in tl.static_range(COLS):
        value = sums[FIRST + i]
        for j in tl.static_range(3):
            value = tl.fma(row[STRIDE * i + j], taps[3 * K + j], value)
        new = new + (value,)
    return new


@compiling.kernel(do_not_specialize=["batch", "height", "width", "out_height", "out_width", "rows"])
def _forward(
    x, scale, shift, weight, bias, out, partial, batch, height, width, out_height, out_width, rows, channels,
    STRIDE: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr,
    LAST: tl.constexpr, NARROW: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
    FITS: tl.constexpr, INDEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    tile, image, left, c, exist = _strips(batch, out_width, channels, COLS, PARTS, CHANNELS)
    # Columns that a strip reads, and those of them that are inside wherever strips fit.
    WIDE: tl.constexpr = STRIDE * COLS + 3 - STRIDE
    INNER: tl.constexpr = COLS + 1 if STRIDE == 1 else 2 * COLS
    top = tl.program_id(1) * rows
    bottom = tl.minimum(top + rows, out_height)
    column = left * STRIDE - PAD_W
    base = x + image * (height * width).to(tl.int64) * channels + (column.to(INDEX) * channels + c)
    out += image * (out_height * out_width).to(tl.int64) * channels + (left.to(INDEX) * channels + c)
    taps = _taps(weight, c, channels)
    scale, shift = _parameter(scale, c, channels), _parameter(shift, c, channels)
    first = tl.zeros((PARTS, CHANNELS), tl.float32)
    if LAST:
        first += _parameter(bias, c, channels)
    first = repeat(first, COLS)
    total = tl.zeros((PARTS, CHANNELS), tl.float32)
    # Of STRIDE 1 the sums of two rows are under way, of STRIDE 2 those of one.
    sums = first if STRIDE == 2 else first + first
    begin = top + (STRIDE - 3)
    y = STRIDE * begin + (2 - PAD_H)
    ahead = repeat(tl.zeros((PARTS, CHANNELS), x.dtype.element_ty), STRIDE * WIDE)
    # Always so. What a branch sets apart keeps Triton's passes short; assumed, LLVM drops it.
    tl.assume(top < bottom)
    if top < bottom:
        ahead = _row(base, y, height, column, width, exist, channels, WIDE, INNER, FITS, INDEX)
        if STRIDE == 2:
            ahead += _row(base, y + 1, height, column, width, exist, channels, WIDE, INNER, FITS, INDEX)
    for r in range(begin, bottom):
        y = STRIDE * r + (2 - PAD_H)
        for i in tl.static_range(STRIDE):
            fetch(
                x, image, y + i, tl.maximum(column, 0), c, height, width, channels,
                (height * width).to(tl.int64) * channels, width * channels, channels, WIDE, CHANNELS, INDEX, AHEAD,
            )  # fmt: skip
        next_rows = _row(base, y + STRIDE, height, column, width, exist, channels, WIDE, INNER, FITS, INDEX)
        if STRIDE == 2:
            next_rows += _row(base, y + 3, height, column, width, exist, channels, WIDE, INNER, FITS, INDEX)
        row = _activated(
            ahead, y, height, column, width, scale, shift, 0, WIDE, INNER, FITS, NARROW, LINEAR, CUBIC
        )  # fmt: skip
        done = _add(sums, 0, row, taps, 2, STRIDE, COLS)
        if STRIDE == 1:
            sums = _add(sums, COLS, row, taps, 1, 1, COLS) + _add(first, 0, row, taps, 0, 1, COLS)
        else:
            sums = _add(first, 0, row, taps, 0, 2, COLS)
            row = _activated(
                ahead, y + 1, height, column, width, scale, shift, WIDE, WIDE, INNER, FITS, NARROW, LINEAR, CUBIC
            )  # fmt: skip
            sums = _add(sums, 0, row, taps, 1, 2, COLS)
        here = exist & (r >= top)
        for i in tl.static_range(COLS):
            mask = here if FITS else here & (left + i < out_width)
            value = done[i]
            if LAST:
                value *= _below(value, LINEAR, CUBIC, NARROW)
                total += tl.where(mask, value, 0.0)
            at = tl.cast(r, INDEX) * (out_width * channels) + i * channels
            tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)
        ahead = next_rows
    if LAST:
        at = (tile * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * channels + c
        tl.store(partial + at, total, mask=exist)


@triton.constexpr_function
def _joined(d, i, tap, stride, pad_h, pad_w, wide):
    """Where the gradient that a tap joins to the i-th number of the d-th row is, among three rows; -1: none."""
    # Rows and columns of gradients begin one before those of the output.
    row, col = d + pad_h - tap // 3 + stride, i + pad_w - tap % 3 + stride
    return -1 if row % stride or col % stride else row // stride * wide + col // stride


@triton.jit
def _gather(
    grads, taps, D: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of the D-th row of activated numbers."""
    new = ()
    for i in tl.static_range(COUNT):
        value = grads[0] * 0.0
        for tap in tl.static_range(9):
            if _joined(D, i, tap, STRIDE, PAD_H, PAD_W, WIDE) >= 0:
                value = tl.fma(grads[_joined(D, i, tap, STRIDE, PAD_H, PAD_W, WIDE)], taps[tap], value)
        new = new + (value,)
    return new


@triton.jit
def _correlate(
    sums, row, grads, D: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add to each tap's sum the products of the D-th row of activated numbers and the gradients that it joins."""
    new = ()
    for tap in tl.static_range(9):
        value = sums[tap]
        for i in tl.static_range(COUNT):
            if _joined(D, i, tap, STRIDE, PAD_H, PAD_W, WIDE) >= 0:
                value = tl.fma(row[i], grads[_joined(D, i, tap, STRIDE, PAD_H, PAD_W, WIDE)], value)
        new = new + (value,)
    return new


@compiling.kernel(do_not_specialize=["batch", "height", "width", "out_height", "out_width", "rows"])
def _backward(
    grad_out, x, scale, shift, weight, grad_x, partial, batch, height, width, out_height, out_width, rows, channels,
    STRIDE: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr,
    NARROW: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr, FITS: tl.constexpr,
    INDEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    tile, image, left, c, exist = _strips(batch, out_width, channels, COLS, PARTS, CHANNELS)
    WIDE: tl.constexpr = COLS + 2
    COUNT: tl.constexpr = STRIDE * COLS
    # With an odd side the last strip lacks a column.
    FULL: tl.constexpr = FITS and (STRIDE == 1 or PAD_W == 0)
    top = tl.program_id(1) * rows
    bottom = tl.minimum(top + rows, out_height)
    column = left * STRIDE
    own = image * (height * width).to(tl.int64) * channels + (column.to(INDEX) * channels + c)
    source, grad_x = x + own, grad_x + own
    out_size = (out_height * out_width).to(tl.int64) * channels
    grad = grad_out + image * out_size + ((left - 1).to(INDEX) * channels + c)
    taps = _taps(weight, c, channels)
    scale, shift = _parameter(scale, c, channels), _parameter(shift, c, channels)
    zero = tl.zeros((PARTS, CHANNELS), tl.float32)
    products, shift_sum, scale_sum = repeat(zero, 9), zero, zero
    # Three rows of gradients are at work; the last of them comes in the loop.
    grads = repeat(zero, 3 * WIDE)
    joined = repeat(tl.zeros((PARTS, CHANNELS), grad_out.dtype.element_ty), WIDE)
    for r in range(top - 1, top + 2):
        grads = move_on(grads, widen(joined, WIDE, NARROW), 3, WIDE)
        joined = _row(grad, r, out_height, left - 1, out_width, exist, channels, WIDE, COLS + 1, FITS, INDEX)
    ahead = repeat(tl.zeros((PARTS, CHANNELS), x.dtype.element_ty), STRIDE * COUNT)
    # Always so. What a branch sets apart keeps Triton's passes short; assumed, LLVM drops it.
    tl.assume(top < bottom)
    if top < bottom:
        ahead = _row(source, top * STRIDE, height, column, width, exist, channels, COUNT, COUNT, FULL, INDEX)
        if STRIDE == 2:
            ahead += _row(source, top * 2 + 1, height, column, width, exist, channels, COUNT, COUNT, FULL, INDEX)
    for r in range(top, bottom):
        fetch(
            grad_out, image, r + 1, left, c, out_height, out_width, channels, out_size, out_width * channels, channels,
            COLS, CHANNELS, INDEX, AHEAD,
        )  # fmt: skip
        for i in tl.static_range(STRIDE):
            fetch(
                x, image, r * STRIDE + i, column, c, height, width, channels,
                (height * width).to(tl.int64) * channels, width * channels, channels, COUNT, CHANNELS, INDEX, AHEAD,
            )  # fmt: skip
        grads = move_on(grads, widen(joined, WIDE, NARROW), 3, WIDE)
        current = ahead
        # The next rows are under way while these are worked on.
        joined = _row(grad, r + 2, out_height, left - 1, out_width, exist, channels, WIDE, COLS + 1, FITS, INDEX)
        y = r * STRIDE + STRIDE
        ahead = _row(source, y, height, column, width, exist, channels, COUNT, COUNT, FULL, INDEX)
        if STRIDE == 2:
            ahead += _row(source, y + 1, height, column, width, exist, channels, COUNT, COUNT, FULL, INDEX)
        for d in tl.static_range(STRIDE):
            y = r * STRIDE + d
            values = _affine(
                current, y, height, column, width, scale, shift, d * COUNT, COUNT, COUNT, FULL, NARROW
            )  # fmt: skip
            gathered = _gather(grads, taps, d, COUNT, STRIDE, PAD_H, PAD_W, WIDE)
            activated = ()
            shift_row = zero
            here = exist & (y < height)
            for i in tl.static_range(COUNT):
                u = values[i]
                below = _below(u, LINEAR, CUBIC, NARROW)
                value = u * below
                activated = activated + (value,)
                # The derivative of the logistic function is it times 1 less it.
                slope = tl.fma(value - value * below, tl.fma(u * u, 3 * CUBIC, LINEAR), below)
                inner = gathered[i] * slope
                mask = here
                if not FULL:
                    inside = column + i < width
                    inner = tl.where(inside, inner, 0.0)
                    mask = here & inside
                shift_row += inner
                scale_sum = tl.fma(inner, wide(current[d * COUNT + i], NARROW), scale_sum)
                at = tl.cast(y, INDEX) * (width * channels) + i * channels
                tl.store(grad_x + at, (inner * scale).to(grad_x.dtype.element_ty), mask=mask)
            shift_sum += tl.where(y < height, shift_row, 0.0)
            products = _correlate(products, activated, grads, d, COUNT, STRIDE, PAD_H, PAD_W, WIDE)
    table = tl.program_id(1) * (tl.num_programs(0) // tl.cdiv(channels, CHANNELS))
    table += tl.program_id(0) // tl.cdiv(channels, CHANNELS)
    partial += table.to(tl.int64) * (11 * channels) + c
    some = c < channels
    for i in tl.static_range(9):
        tl.store(partial + i * channels, tl.sum(products[i], 0)[None, :], mask=some)
    tl.store(partial + 9 * channels, tl.sum(shift_sum, 0)[None, :], mask=some)
    tl.store(partial + 10 * channels, tl.sum(scale_sum, 0)[None, :], mask=some)


class _Launch(NamedTuple):
    """Columns of a strip, channels of a thread, warps, rows fetched ahead, least rows of a piece, most registers."""

    cols: int
    vector: int
    warps: int
    ahead: int = 0
    rows: int = 7
    registers: int | None = None


# By stride; measured on an H200.
LAUNCH = {
    ("forward", 1): _Launch(7, 2, 4, 3),
    ("forward", 2): _Launch(4, 2, 4, 3),
    ("backward", 1): _Launch(7, 1, 4, 3),
    ("backward", 2): _Launch(2, 2, 4, 3),
}
LAUNCH = Table("activated_conv", LAUNCH)
# Warps that fill the GPU come before long strips, as a piece reads the rows around it as well.
WARPS = 6144
# The interpreter takes no instructions of the GPU's own.
HAS_PTX = torch.version.hip is None and not triton.knobs.runtime.interpret
# Factors of the number and of its cube in the logistic function that makes an activation.
ACTS = {"silu": (1.0, 0.0), "gelu_tanh": (1.5957691216057308, 0.07135481627159759)}


class _Problem:
    """How a call is cut into programs; the same for all calls alike."""

    def __init__(
        self, kind: str, batch: int, sides: tuple, channels: int, stride: int, padding: tuple, dtype: torch.dtype,
        act: str,
    ):  # fmt: skip
        launch = LAUNCH[kind, stride]
        self.out_sides = height, width = tuple(triton.cdiv(side, stride) for side in sides)
        cols = max(1, min(launch.cols, width))
        # A half block left empty would be wasted.
        block = min(32 if 0 < channels % 64 <= 32 else 64, triton.next_power_of_2(channels))
        parts = max(1, 32 * launch.warps * launch.vector // block)
        self.strips = triton.cdiv(width, cols)
        groups, blocks = triton.cdiv(batch * self.strips, parts), triton.cdiv(channels, block)
        pieces = max(1, min(triton.cdiv(WARPS, max(1, groups * blocks * launch.warps)), height // launch.rows))
        self.rows = max(1, triton.cdiv(height, pieces))
        self.pieces = triton.cdiv(height, self.rows)
        self.tables = groups * self.pieces
        self.grid = (groups * blocks, self.pieces)
        linear, cubic = ACTS[act]
        # An odd side without zeros before it lacks the last column of the last strip.
        fits = width % cols == 0 and (stride == 1 or sides[1] % 2 == 0 or padding[1] == 1)
        self.constants = {
            "STRIDE": stride, "PAD_H": padding[0], "PAD_W": padding[1], "LINEAR": linear,
            "CUBIC": cubic, "NARROW": HAS_PTX and dtype == torch.bfloat16, "COLS": cols, "PARTS": parts,
            "CHANNELS": block, "FITS": fits,
            # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
            "INDEX": tl.int32 if sides[0] * sides[1] * channels < 2**30 else tl.int64,
            "AHEAD": launch.ahead if HAS_PTX else 0, "num_warps": launch.warps, "num_stages": 1,
        }  # fmt: skip
        if launch.registers:
            self.constants["maxnreg"] = launch.registers


_problem = lru_cache(maxsize=1024)(_Problem)


def _plan(kind: str, x: Tensor, sides: list[int], stride: int, padding: list[int], act: str) -> _Problem:
    return _problem(kind, x.shape[0], tuple(sides), x.shape[2], stride, tuple(padding), x.dtype, act)


def _positions(sides: list[int], stride: int) -> int:
    return -(-sides[0] // stride) * -(-sides[1] // stride)


def _launch_forward(x, scale, shift, weight, bias, sides, stride, padding, act, out, partial, plan) -> None:
    x, scale, shift, weight = (t.contiguous() for t in (x, scale, shift, weight))
    if out.numel():
        _forward[plan.grid](
            x, scale, shift, weight, bias, out, partial, x.shape[0], *sides, *plan.out_sides, plan.rows, x.shape[2],
            LAST=partial is not out, **plan.constants,
        )  # fmt: skip


def _conv(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, sides: list[int], stride: int, padding: list[int], act: str
) -> Tensor:
    out, plan = _fake(x, scale, shift, weight, sides, stride), _plan("forward", x, sides, stride, padding, act)
    _launch_forward(x, scale, shift, weight, scale, sides, stride, padding, act, out, out, plan)
    return out


def _conv_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, out: Tensor, sides: list[int],
    stride: int, padding: list[int], act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_out, x, scale, shift, weight = (t.contiguous() for t in (grad_out, x, scale, shift, weight))
    plan = _plan("backward", x, sides, stride, padding, act)
    grad_x = x.new_empty(x.shape)
    partial = torch.empty((plan.tables, 11, x.shape[2]), dtype=torch.float32, device=x.device)
    if x.numel():
        _backward[plan.grid](
            grad_out, x, scale, shift, weight, grad_x, partial, x.shape[0], *sides, *plan.out_sides, plan.rows,
            x.shape[2], **plan.constants,
        )  # fmt: skip
    sums = total(partial)
    # Outputs of operators are no views of one another.
    grad_scale, grad_shift, grad_weight = (
        part.to(t.dtype, memory_format=torch.contiguous_format, copy=True).view(t.shape)
        for part, t in zip((sums[10], sums[9], sums[:9].t()), (scale, shift, weight), strict=True)
    )
    return grad_x, grad_scale, grad_shift, grad_weight


def _conv_inference(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, sides: list[int], stride: int,
    padding: list[int], act: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, plan = _fake(x, scale, shift, weight, sides, stride), _plan("forward", x, sides, stride, padding, act)
    tables = (x.shape[0], plan.strips * plan.pieces, x.shape[2])
    partial = torch.empty(tables, dtype=torch.float32, device=x.device)
    _launch_forward(x, scale, shift, weight, bias.contiguous(), sides, stride, padding, act, out, partial, plan)
    return out, total(partial, 1, factor=1 / _positions(sides, stride))


def _fake(x, scale, shift, weight, sides, stride, *others):
    return x.new_empty(x.shape[0], _positions(sides, stride), x.shape[2])


def _fake_backward(grad_out, x, scale, shift, weight, *others):
    return tuple(t.new_empty(t.shape) for t in (x, scale, shift, weight))


def _fake_inference(x, scale, shift, weight, bias, sides, stride, *others):
    return _fake(x, scale, shift, weight, sides, stride), x.new_empty((x.shape[0], x.shape[2]), dtype=torch.float32)


def _reference(x, scale, shift, weight, sides, stride, padding, act):
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    tensors = (t.to(dtype) for t in (x.unflatten(1, sides), scale, shift, weight))
    return activated_conv_reference(*tensors, stride, padding, act).flatten(1, 2).to(x.dtype)


activated_conv_triton = register("activated_conv", _conv, _fake, _conv_backward, _fake_backward, _reference)
activated_conv_inference = define("activated_conv_inference", _conv_inference, _fake_inference)


@register_flop_formula(torch.ops.densezoo.activated_conv)
def _(x, scale, shift, weight, sides, stride, *args, **kwargs) -> int:
    # A multiplication and an addition a tap, as of a convolution.
    return 18 * x[0] * _positions(sides, stride) * x[2]


@register_flop_formula(torch.ops.densezoo.activated_conv_inference)
def _(x, scale, shift, weight, bias, sides, stride, *args, **kwargs) -> int:
    return 18 * x[0] * _positions(sides, stride) * x[2]


@register_flop_formula(torch.ops.densezoo.activated_conv_backward)
def _(grad_out, x, *args, **kwargs) -> int:
    # Two products a tap: the gradients of the map and of the weight.
    return 36 * grad_out[0] * grad_out[1] * grad_out[2]
