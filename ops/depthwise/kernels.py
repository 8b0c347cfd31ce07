"""Depthwise convolutions over channels-last maps in Triton, forward and backward.

A program owns CHANNELS channels of PARTS strips: COLS columns and a piece of `rows` rows of a window each, the map
where none is given. It walks down the rows with all taps in registers. A row is loaded and widened once for all the
products that it takes part in, while the next is on its way, and one further down to the L2 cache. Sums of KERNEL rows
are under way at a time, of which the topmost is complete when a row has been read.

- `_forward` begins each sum with the bias. A residual is 1 more on the tap of the centre. GELU, where asked for, is
  applied as a row is written, and what precedes it is written too where a backward will need it.
- `_backward` convolves the rows of the output's gradient with the kernel turned around, in the same manner, and
  multiplies each by the KERNEL rows of the input that it joins, for the gradient of the kernel. Each tensor is read and
  written once. A program's sums for the gradients of weight and bias, a table of KERNEL^2 + 1 rows of channels, are
  added up by `_sum_tables`, always in the same order.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.depthwise.reference import depthwise_conv_reference
from densezoo.ops.gelu import gelu, gelu_slope, normal
from densezoo.ops.launch import Table
from densezoo.ops.registration import register
from densezoo.ops.strips import correlate, fetch, move_on, repeat, spread, wide, widen
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@triton.jit
def _strips(
    batch, width, window_width, channels, COLS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """A program's images, first columns and their windows' bounds, channels, and which of them exist."""
    blocks = tl.cdiv(channels, CHANNELS)
    strips = tl.cdiv(window_width, COLS)
    across = tl.cdiv(width, window_width) * strips
    tile = (tl.program_id(0) // blocks * PARTS + tl.arange(0, PARTS))[:, None]
    c = (tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    exist = (tile < batch * across) & (c < channels)
    # Those that do not exist stand for the last one, for addresses to be valid.
    tile = tl.minimum(tile, batch * across - 1)
    begin = tile % across // strips * window_width
    end = tl.minimum(begin + window_width, width)
    left = begin + tile % strips * COLS
    # Of a last window that is narrower than the others there are fewer strips.
    return (tile // across).to(tl.int64), left, begin, end, c, exist & (left < end)


@triton.jit
def _piece(height, window_height, rows):
    """First and last row of a program, and of their window."""
    pieces = tl.cdiv(window_height, rows)
    begin = tl.program_id(1) // pieces * window_height
    end = tl.minimum(begin + window_height, height)
    top = tl.minimum(begin + tl.program_id(1) % pieces * rows, end)
    return top, tl.minimum(top + rows, end), begin, end


@triton.jit
def _taps(weight, c, exist, KERNEL: tl.constexpr, RESIDUAL: tl.constexpr, TURNED: tl.constexpr):
    """A kernel's taps in order, or turned around."""
    taps = ()
    for i in tl.static_range(KERNEL * KERNEL):
        at = weight + c * (KERNEL * KERNEL) + (KERNEL * KERNEL - 1 - i if TURNED else i)
        tap = tl.load(at, mask=exist, other=0.0).to(tl.float32)
        taps = taps + (tap + 1.0 if RESIDUAL and i == KERNEL * KERNEL // 2 else tap,)
    return taps


@triton.jit
def _row(
    x, row, top, bottom, left, begin, end, exist, stride_h, stride_w, FIRST: tl.constexpr,
    COLS: tl.constexpr, FITS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Numbers of a row from column `left` + FIRST to as far beyond the strip; zero outside of window and rows."""
    here = exist & (row >= top) & (row < bottom)
    x += tl.cast(row, INDEX) * stride_h
    numbers = ()
    for i in tl.static_range(FIRST, COLS - FIRST):
        mask = here
        if i < 0:
            mask = here & (left + i >= begin)
        elif i >= COLS or not FITS:
            mask = here & (left + i < end)
        numbers = numbers + (tl.load(x + i * stride_w, mask=mask, other=0.0),)
    return numbers


@triton.jit
def _write(
    values, out, row, top, bottom, left, end, channels, exist, stride, GELU: tl.constexpr,
    NARROW: tl.constexpr, COLS: tl.constexpr, FITS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    here = exist & (row >= top) & (row < bottom)
    out += tl.cast(row, INDEX) * stride
    for i in tl.static_range(COLS):
        mask = here if FITS else here & (left + i < end)
        value = gelu(values[i], NARROW) if GELU else values[i]
        tl.store(out + i * channels, value.to(out.dtype.element_ty), mask=mask)


@compiling.kernel(do_not_specialize=["batch", "height", "width", "window_height", "window_width", "rows"])
def _forward(
    x, weight, bias, out, before, batch, height, width, window_height, window_width, rows, channels,
    stride_b, stride_h, stride_w, KERNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GELU: tl.constexpr, SAVE: tl.constexpr, NARROW: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
    CHANNELS: tl.constexpr, FITS: tl.constexpr, INDEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    image, left, begin, end, c, exist = _strips(batch, width, window_width, channels, COLS, PARTS, CHANNELS)
    REACH: tl.constexpr = KERNEL // 2
    WIDE: tl.constexpr = COLS + 2 * REACH
    top, bottom, start, stop = _piece(height, window_height, rows)
    stride = width * channels
    base = x + image * stride_b + (left.to(INDEX) * stride_w + c)
    own = image * height * stride + (left.to(INDEX) * channels + c)
    out += own
    if SAVE:
        before += own
    taps = _taps(weight, c, exist, KERNEL, RESIDUAL, False)
    first = tl.zeros((PARTS, CHANNELS), tl.float32)
    if BIAS:
        first += tl.load(bias + c, mask=exist, other=0.0).to(tl.float32)
    sums = repeat(first, KERNEL * COLS)
    start = tl.maximum(top - REACH, start)
    stop = tl.minimum(bottom + REACH, stop)
    # The next row is under way while this one is worked on.
    ahead = repeat(tl.zeros((PARTS, CHANNELS), x.dtype.element_ty), WIDE)
    # Always so. What a branch sets apart keeps Triton's passes short; assumed, LLVM drops it.
    tl.assume(start < stop)
    if start < stop:
        ahead = _row(base, start, start, stop, left, begin, end, exist, stride_h, stride_w, -REACH, COLS, FITS, INDEX)
    for y in range(start, bottom + REACH):
        fetch(
            x, image, y, left, c, height, width, channels, stride_b, stride_h, stride_w, COLS, CHANNELS, INDEX, AHEAD
        )  # fmt: skip
        new = _row(base, y + 1, start, stop, left, begin, end, exist, stride_h, stride_w, -REACH, COLS, FITS, INDEX)
        sums = spread(sums, widen(ahead, WIDE, NARROW), taps, KERNEL, COLS)
        row = y - REACH
        if SAVE:
            _write(
                sums, before, row, top, bottom, left, end, channels, exist, stride, False, NARROW, COLS, FITS, INDEX
            )  # fmt: skip
        _write(
            sums, out, row, top, bottom, left, end, channels, exist, stride, GELU, NARROW, COLS, FITS, INDEX
        )  # fmt: skip
        sums = move_on(sums, repeat(first, COLS), KERNEL, COLS)
        ahead = new


@triton.jit
def _gradients(
    grad, before, row, start, stop, left, begin, end, exist, grad_h, grad_w, stride,
    channels, REACH: tl.constexpr, GELU: tl.constexpr, COLS: tl.constexpr, FITS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """A row of the output's gradient, followed by what precedes the GELU where there is one."""
    numbers = _row(grad, row, start, stop, left, begin, end, exist, grad_h, grad_w, -REACH, COLS, FITS, INDEX)
    if GELU:
        numbers += _row(before, row, start, stop, left, begin, end, exist, stride, channels, -REACH, COLS, FITS, INDEX)
    return numbers


@triton.jit
def _through_gelu(numbers, COUNT: tl.constexpr, GELU: tl.constexpr, NARROW: tl.constexpr):
    """Widen a row of gradients, and take it through the GELU."""
    new = ()
    for i in tl.static_range(COUNT):
        value = wide(numbers[i], NARROW)
        if GELU:
            z = wide(numbers[COUNT + i], NARROW)
            value *= gelu_slope(z, normal(z, NARROW))
        new = new + (value,)
    return new


@compiling.kernel(do_not_specialize=["batch", "height", "width", "window_height", "window_width", "rows"])
def _backward(
    grad_out, x, weight, before, grad_x, partial, batch, height, width, window_height, window_width, rows,
    channels, stride_b, stride_h, stride_w, grad_b, grad_h, grad_w, KERNEL: tl.constexpr, RESIDUAL: tl.constexpr,
    GELU: tl.constexpr, NARROW: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
    FITS: tl.constexpr, INDEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    image, left, begin, end, c, exist = _strips(batch, width, window_width, channels, COLS, PARTS, CHANNELS)
    REACH: tl.constexpr = KERNEL // 2
    WIDE: tl.constexpr = COLS + 2 * REACH
    top, bottom, start, stop = _piece(height, window_height, rows)
    stride = width * channels
    source = x + image * stride_b + (left.to(INDEX) * stride_w + c)
    own = image * height * stride + (left.to(INDEX) * channels + c)
    grad = grad_out + image * grad_b + (left.to(INDEX) * grad_w + c)
    grad_x += own
    if GELU:
        before += own
    taps = _taps(weight, c, exist, KERNEL, RESIDUAL, True)
    zero = tl.zeros((PARTS, CHANNELS), tl.float32)
    sums, products, total = repeat(zero, KERNEL * COLS), repeat(zero, KERNEL * KERNEL), zero
    start = tl.maximum(top - REACH, start)
    stop = tl.minimum(bottom + REACH, stop)
    # Rows of the input that the first row of gradients joins; the last of them comes in the loop.
    window = repeat(zero, KERNEL * COLS)
    joined = repeat(tl.zeros((PARTS, CHANNELS), x.dtype.element_ty), COLS)
    for y in range(start - REACH, start + REACH + 1):
        window = move_on(window, widen(joined, COLS, NARROW), KERNEL, COLS)
        joined = _row(source, y, top, bottom, left, begin, end, exist, stride_h, stride_w, 0, COLS, FITS, INDEX)
    ahead = repeat(tl.zeros((PARTS, CHANNELS), grad_out.dtype.element_ty), 2 * WIDE if GELU else WIDE)
    # Always so. What a branch sets apart keeps Triton's passes short; assumed, LLVM drops it.
    tl.assume(start < stop)
    if start < stop:
        ahead = _gradients(
            grad, before, start, start, stop, left, begin, end, exist, grad_h, grad_w, stride, channels, REACH, GELU,
            COLS, FITS, INDEX,
        )  # fmt: skip
    for y in range(start, bottom + REACH):
        fetch(
            grad_out, image, y, left, c, height, width, channels, grad_b, grad_h, grad_w, COLS, CHANNELS, INDEX, AHEAD
        )  # fmt: skip
        fetch(
            x, image, y + REACH, left, c, height, width, channels, stride_b, stride_h, stride_w, COLS, CHANNELS, INDEX,
            AHEAD,
        )  # fmt: skip
        window = move_on(window, widen(joined, COLS, NARROW), KERNEL, COLS)
        row = _through_gelu(ahead, WIDE, GELU, NARROW)
        # The next rows are under way while these are worked on.
        joined = _row(
            source, y + (1 + REACH), top, bottom, left, begin, end, exist, stride_h, stride_w, 0, COLS, FITS, INDEX
        )  # fmt: skip
        ahead = _gradients(
            grad, before, y + 1, start, stop, left, begin, end, exist, grad_h, grad_w, stride, channels, REACH, GELU,
            COLS, FITS, INDEX,
        )  # fmt: skip
        sums = spread(sums, row, taps, KERNEL, COLS)
        _write(
            sums, grad_x, y - REACH, top, bottom, left, end, channels, exist, stride, False, NARROW, COLS, FITS, INDEX
        )  # fmt: skip
        products = correlate(products, window, row, KERNEL, COLS)
        across = row[REACH]
        for i in tl.static_range(1, COLS):
            across += row[REACH + i]
        total += tl.where((y >= top) & (y < bottom), across, 0.0)
        sums = move_on(sums, repeat(zero, COLS), KERNEL, COLS)
    table = tl.program_id(1) * (tl.num_programs(0) // tl.cdiv(channels, CHANNELS))
    table += tl.program_id(0) // tl.cdiv(channels, CHANNELS)
    partial += table.to(tl.int64) * ((KERNEL * KERNEL + 1) * channels) + c
    some = c < channels
    for i in tl.static_range(KERNEL * KERNEL):
        tl.store(partial + i * channels, tl.sum(products[i], 0)[None, :], mask=some)
    tl.store(partial + KERNEL * KERNEL * channels, tl.sum(total, 0)[None, :], mask=some)


@compiling.kernel(do_not_specialize=["tables"])
def _sum_tables(
    partial, grad_weight, grad_bias, tables, channels, TAPS: tl.constexpr, BIAS: tl.constexpr, TABLES: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Add up the tables, (TAPS + 1, channels) each: rows for the weight, (channels, TAPS), and one for the bias."""
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    size = (TAPS + 1) * channels
    acc = tl.zeros((TABLES, COUNT), tl.float32)
    for start in range(0, tables, TABLES):
        table = start + tl.arange(0, TABLES)
        mask = (table < tables)[:, None] & (at < size)[None, :]
        acc += tl.load(partial + table.to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=0.0)
    value = tl.sum(acc, 0)
    tap, c = at // channels, at % channels
    tl.store(grad_weight + c * TAPS + tap, value.to(grad_weight.dtype.element_ty), mask=tap < TAPS)
    if BIAS:
        tl.store(grad_bias + c, value.to(grad_bias.dtype.element_ty), mask=tap == TAPS)


class _Launch(NamedTuple):
    """Columns of a strip, channels of a thread, warps, rows fetched ahead, registers of a thread at most."""

    cols: int
    vector: int
    warps: int
    ahead: int = 0
    registers: int | None = None


# By kernel size: taps, sums under way and the rows at work fit the registers of a thread.
LAUNCH = {
    ("forward", 3): _Launch(7, 2, 4, 3),
    ("forward", 5): _Launch(7, 1, 4, 3),
    ("forward", 7): _Launch(4, 1, 4, 3),
    ("backward", 3): _Launch(7, 1, 4, 3),
    ("backward", 5): _Launch(4, 1, 4, 3, 128),
    ("backward", 7): _Launch(2, 1, 4, 3),
}
LAUNCH = Table("depthwise_conv", LAUNCH)
# Tables and their entries at a time, and warps.
SUM = (128, 32, 4)
# Warps that fill the GPU come before long strips; a piece has these rows at least, as it reads those around it as well.
WARPS = 6144
ROWS = 7
# The interpreter takes no instructions of the GPU's own.
HAS_PTX = torch.version.hip is None and not triton.knobs.runtime.interpret


class _Problem:
    """How a call is cut into programs; the same for all calls alike."""

    def __init__(
        self,
        kind: str,
        shape: torch.Size,
        strides: tuple,
        grad_strides: tuple,
        narrow: bool,
        kernel: int,
        window: tuple,
    ):
        batch, height, width, channels = shape
        launch = LAUNCH[kind, kernel]
        # A window that holds the map is the map.
        sides = (min(side or size, size) for side, size in zip(window, (height, width), strict=True))
        self.window = window_height, window_width = tuple(max(1, side) for side in sides)
        cols = min(launch.cols, window_width)
        # A half block left empty would be wasted.
        block = min(32 if 0 < channels % 64 <= 32 else 64, triton.next_power_of_2(channels))
        parts = max(1, 32 * launch.warps * launch.vector // block)
        strips = batch * triton.cdiv(width, window_width) * triton.cdiv(window_width, cols)
        groups, blocks = triton.cdiv(strips, parts), triton.cdiv(channels, block)
        windows = triton.cdiv(height, window_height)
        warps = max(1, groups * blocks * windows * launch.warps)
        pieces = max(1, min(triton.cdiv(WARPS, warps), window_height // ROWS))
        self.rows = triton.cdiv(window_height, pieces)
        pieces = windows * triton.cdiv(window_height, self.rows)
        self.tables = groups * pieces
        self.grid = (groups * blocks, pieces)
        extent = max(
            sum(side * stride for side, stride in zip(shape[1:], each, strict=True))
            for each in (strides[1:], grad_strides[1:], (width * channels, channels, 1))
        )
        self.constants = {
            "KERNEL": kernel, "NARROW": narrow, "COLS": cols, "PARTS": parts, "CHANNELS": block,
            "FITS": width % window_width == 0 and window_width % cols == 0,
            # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
            "INDEX": tl.int32 if extent < 2**30 else tl.int64,
            "AHEAD": launch.ahead if HAS_PTX else 0, "num_warps": launch.warps, "num_stages": 1,
        }  # fmt: skip
        if launch.registers:
            self.constants["maxnreg"] = launch.registers


_problem = lru_cache(maxsize=1024)(_Problem)


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _plan(kind: str, x: Tensor, grad_out: Tensor, weight: Tensor, window: list[int]) -> _Problem:
    narrow = HAS_PTX and x.dtype == torch.bfloat16
    return _problem(kind, x.shape, x.stride(), grad_out.stride(), narrow, weight.shape[-1], tuple(window))


def _depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, sides: list[int], window: list[int], residual: bool, gelu: bool,
    saves: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, weight = _dense(x).unflatten(1, sides), weight.contiguous()
    out = x.new_empty(x.shape)
    before = x.new_empty(x.shape if gelu and saves else (0,))
    plan, (batch, height, width, channels) = _plan("forward", x, out, weight, window), x.shape
    if out.numel():
        _forward[plan.grid](
            x, weight, weight if bias is None else bias, out, before, batch, height, width, *plan.window, plan.rows,
            channels, *x.stride()[:3], BIAS=bias is not None, RESIDUAL=residual, GELU=gelu, SAVE=gelu and saves,
            **plan.constants,
        )  # fmt: skip
    return out.flatten(1, 2), before.flatten(1, 2) if gelu and saves else before


def _depthwise_conv_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, before: Tensor, sides: list[int],
    window: list[int], residual: bool, gelu: bool, saves: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, weight, grad_out = _dense(x), weight.contiguous(), _dense(grad_out)
    grad_x, grad_weight, grad_bias = _fake_backward(grad_out, x, weight, bias)
    x, grad_out = x.unflatten(1, sides), grad_out.unflatten(1, sides)
    plan, (batch, height, width, channels) = _plan("backward", x, grad_out, weight, window), x.shape
    taps = weight[0].numel()
    partial = torch.empty((plan.tables, taps + 1, channels), dtype=torch.float32, device=x.device)
    # One kernel serves all numbers of channels, but with the GELU, where constants save a sixth of the time.
    constant = tl.constexpr if gelu else int
    (*strides, stride_w), (*grad_strides, grad_w) = x.stride()[:3], grad_out.stride()[:3]
    if x.numel():
        _backward[plan.grid](
            grad_out, x, weight, before, grad_x, partial, batch, height, width, *plan.window, plan.rows,
            constant(channels), *strides, constant(stride_w), *grad_strides, constant(grad_w),
            RESIDUAL=residual, GELU=gelu, **plan.constants,
        )  # fmt: skip
    _sum_tables[triton.cdiv((taps + 1) * channels, SUM[1]),](
        partial, grad_weight, grad_bias, plan.tables, channels, taps, bias is not None, *SUM[:2],
        num_warps=SUM[2],
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def _fake(x, weight, bias, sides, window, residual, gelu, saves):
    return x.new_empty(x.shape), x.new_empty(x.shape if gelu and saves else (0,))


def _fake_backward(grad_out, x, weight, bias, *others):
    grad_bias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_bias


def _reference(x, weight, bias, sides, window, residual, gelu, saves):
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    tensors = (t if t is None else t.to(dtype) for t in (x.unflatten(1, sides), weight, bias))
    out = depthwise_conv_reference(*tensors, [side or None for side in window], residual, gelu)
    return out.flatten(1, 2).to(x.dtype)


_call = register(
    "depthwise_conv", _depthwise_conv, _fake, _depthwise_conv_backward, _fake_backward, _reference
)  # fmt: skip


@register_flop_formula(torch.ops.densezoo.depthwise_conv)
def _(x, weight, *args, **kwargs) -> int:
    # A multiplication and an addition a tap.
    return 2 * x.numel() * weight[2:].numel()


@register_flop_formula(torch.ops.densezoo.depthwise_conv_backward)
def _(grad_out, x, weight, *args, **kwargs) -> int:
    # Two products a tap: the gradients of the map and of the weight.
    return 4 * x.numel() * weight[2:].numel()


def depthwise_conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Sequence[int | None], residual: bool, gelu: bool
) -> Tensor:
    """Compute `densezoo.ops.depthwise_conv` with the kernels; arguments checked."""
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    sides, window = x.shape[1:3], [side or 0 for side in window]
    # torch.compile would store what has four axes for the backward as it likes convolutions to, rows innermost.
    out = _call(x.flatten(1, 2), weight, bias, list(sides), window, residual, gelu, gelu and needs_grad)
    return out.unflatten(1, sides)
