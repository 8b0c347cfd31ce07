"""The convolution of two pooled maps to one, as CBAM and Triplet attention have it, in Triton, forward and backward.

With so few channels tensor cores have too little to share, but for this: COLUMNS numbers of a row depend on WINDOW
numbers of each row about it, so that each row of taps is a product with a banded matrix WINDOW x COLUMNS, whose
diagonals hold the taps.

A map of at most COLUMNS columns is all of a window, and the more rows there are, the fuller is a product. So one of as
few rows but more columns, WIDE, is convolved as its transpose, read where it lies, with the transposed weight.

- `_conv`: a program owns ROWS rows of COLUMNS numbers, of all channels. The forward has two channels in and one out,
  and the windows of both side by side; the gradient of the input one in and two out, with the weights turned by 180
  degrees.
- `_weight_gradient`: a program owns the gradient of the banded matrices of one row of taps, and a share of all rows,
  over which it sums the products of input and gradient.
- `_diagonals`: a program owns a weight, and adds up its diagonal over all shares, always in the same order.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from densezoo.ops.precision import without_autocast
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# The most rows and the columns of a program, its warps, its loads ahead from 2, and the programs over which weights'
# gradients are shared out.
ROWS, COLUMNS, WARPS, STAGES, PROGRAMS = 128, 16, 4, 1, 1024
_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit
def _sizes(lines, line_units, WIDE: tl.constexpr, UNIT: tl.constexpr):
    """Height and width of a map that is so many lines in memory, and the distances of its rows and columns."""
    # A multiple of UNIT in the compiler's eyes: so many numbers are read at once.
    line = line_units * UNIT
    if WIDE:
        return line, lines, 1, line
    else:
        return lines, line, line, 1


@triton.jit
def _place(piece, height, width, ROWS: tl.constexpr):
    """The image of a piece of all maps, its rows and its first column."""
    across, down = tl.cdiv(width, _COLUMNS), tl.cdiv(height, ROWS)
    image, block = (piece // (across * down)).to(tl.int64), piece // across % down
    return image, block * ROWS + tl.arange(0, ROWS), piece % across * _COLUMNS


@triton.jit
def _tile(x, row, first, height, width, to_row, to_column, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers of some rows and, from the first, of WIDTH columns of all channels of a map, zeros outside it."""
    place = tl.arange(0, CHANNELS * WIDTH)
    channel, column = place // WIDTH, first + place % WIDTH
    exist = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))[None, :]
    place = (row * to_row)[:, None] + (channel * height * width + column * to_column)[None, :]
    return tl.load(x + place, mask=exist, other=0.0)


@triton.jit
def _conv(
    x, weight, out, lines, line_units, weight_channel, weight_row, weight_column,
    IN: tl.constexpr, OUT: tl.constexpr, TURNED: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    height, width, to_row, to_column = _sizes(lines, line_units, WIDE, UNIT)
    image, row, column = _place(tl.program_id(0), height, width, ROWS)
    n, k = tl.arange(0, OUT * _COLUMNS), tl.arange(0, IN * WINDOW)
    beyond, channel = (WINDOW - _COLUMNS) // 2, (k // WINDOW)[:, None] + (n // _COLUMNS)[None, :]
    tap = (k % WINDOW)[:, None] - beyond - (n % _COLUMNS)[None, :] + SIZE // 2
    in_band = (tap >= 0) & (tap < SIZE)
    weight += channel * weight_channel + (SIZE - 1 - tap if TURNED else tap) * weight_column
    x += image * IN * height * width
    sums = tl.zeros((ROWS, OUT * _COLUMNS), tl.float32)
    for i in tl.range(0, SIZE, num_stages=STAGES):
        window = _tile(
            x, row + (i - SIZE // 2), column - beyond, height, width, to_row, to_column, IN, WINDOW
        )  # fmt: skip
        band = tl.load(weight + (SIZE - 1 - i if TURNED else i) * weight_row, mask=in_band, other=0.0)
        sums = tl.dot(window, band.to(window.dtype), sums, input_precision="tf32x3")
    column += n % _COLUMNS
    place = (row * to_row)[:, None] + (n // _COLUMNS * height * width + column * to_column)[None, :]
    exist = (row < height)[:, None] & (column < width)[None, :]
    tl.store(out + image * OUT * height * width + place, sums.to(out.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["pieces"])
def _weight_gradient(
    x, grad_out, partial, pieces, lines, line_units,
    WIDE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    height, width, to_row, to_column = _sizes(lines, line_units, WIDE, UNIT)
    i = tl.program_id(0)
    sums = tl.zeros((2 * WINDOW, _COLUMNS), tl.float32)
    for piece in tl.range(tl.program_id(1), pieces, tl.num_programs(1), num_stages=STAGES):
        image, row, column = _place(piece, height, width, ROWS)
        grad_out_image, x_image = grad_out + image * height * width, x + image * 2 * height * width
        grad = _tile(grad_out_image, row, column, height, width, to_row, to_column, 1, _COLUMNS)
        row, column = row + (i - SIZE // 2), column - (WINDOW - _COLUMNS) // 2
        window = _tile(x_image, row, column, height, width, to_row, to_column, 2, WINDOW)
        sums = tl.dot(tl.trans(window), grad, sums, input_precision="tf32x3")
    partial += (tl.program_id(1) * SIZE + i) * 2 * WINDOW * _COLUMNS
    k, n = tl.arange(0, 2 * WINDOW), tl.arange(0, _COLUMNS)
    tl.store(partial + k[:, None] * _COLUMNS + n[None, :], sums)


@triton.jit(do_not_specialize=["shares"])
def _diagonals(
    partial, out, shares, out_row, out_column, SIZE: tl.constexpr, WINDOW: tl.constexpr, SHARES: tl.constexpr
):  # fmt: skip
    channel, i, j = tl.program_id(0) // SIZE // SIZE, tl.program_id(0) // SIZE % SIZE, tl.program_id(0) % SIZE
    share, n = tl.arange(0, SHARES), tl.arange(0, _COLUMNS)
    k = n + (WINDOW - _COLUMNS) // 2 + j - SIZE // 2
    place = ((i * 2 + channel) * WINDOW + k) * _COLUMNS + n
    in_window = ((k >= 0) & (k < WINDOW))[None, :]
    sums = tl.zeros((SHARES, _COLUMNS), tl.float32)
    for start in range(0, shares, SHARES):
        offsets = (start + share)[:, None] * (SIZE * 2 * WINDOW * _COLUMNS) + place[None, :]
        sums += tl.load(partial + offsets, mask=in_window & (start + share < shares)[:, None], other=0.0)
    out += channel * SIZE * SIZE + i * out_row + j * out_column
    tl.store(out, tl.sum(tl.sum(sums, 1), 0).to(out.dtype.element_ty))


def _is_wide(height: int, width: int) -> bool:
    return height <= COLUMNS < width


def _strides(weight: Tensor, wide: bool) -> list[int]:
    """Return the distances of a weight's rows and of its columns, of the transpose for a wide map."""
    return [*(weight.mT if wide else weight).stride()[2:]]


def _tiling(x: Tensor, weight: Tensor) -> tuple[int, list[int], dict]:
    """Return the number of pieces of maps (B, ..., H, W), the kernels' sizes, and their constants."""
    batch, _, lines, line = x.shape
    size, unit, wide = weight.shape[-1], next(n for n in (8, 4, 2, 1) if line % n == 0), _is_wide(lines, line)
    height, width = (line, lines) if wide else (lines, line)
    rows = min(ROWS, max(16, triton.next_power_of_2(height)))
    # A map of a piece's columns is all of the window.
    window = COLUMNS if width <= COLUMNS else triton.next_power_of_2(COLUMNS + 2 * max(8, size // 2))
    constants = {"WIDE": wide, "SIZE": size, "ROWS": rows, "WINDOW": window, "UNIT": unit}
    constants |= {"STAGES": STAGES, "num_warps": WARPS}
    return batch * triton.cdiv(height, rows) * triton.cdiv(width, COLUMNS), [lines, line // unit], constants


def _map_conv(x: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    out, (pieces, sizes, constants) = x.new_empty(batch, 1, height, width), _tiling(x, weight)
    strides = weight.stride(1), *_strides(weight, constants["WIDE"])
    _conv[(pieces,)](x.contiguous(), weight, out, *sizes, *strides, IN=channels, OUT=1, TURNED=False, **constants)
    return out


def _map_conv_backward(grad_out: Tensor, x: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    x, grad_out, (pieces, sizes, constants) = x.contiguous(), grad_out.contiguous(), _tiling(x, weight)
    grad_x, channels, wide = torch.empty_like(x), x.shape[1], constants["WIDE"]
    strides = weight.stride(1), *_strides(weight, wide)
    _conv[(pieces,)](grad_out, weight, grad_x, *sizes, *strides, IN=1, OUT=channels, TURNED=True, **constants)
    size, window = constants["SIZE"], constants["WINDOW"]
    shares = min(triton.cdiv(PROGRAMS, size), pieces)
    partial = x.new_empty(shares, size, channels * window, COLUMNS, dtype=torch.float32)
    _weight_gradient[(size, shares)](x, grad_out, partial, pieces, *sizes, **constants)
    grad_weight = weight.new_empty(weight.shape)
    strides = _strides(grad_weight, wide)
    _diagonals[(weight.numel(),)](partial, grad_weight, shares, *strides, SIZE=size, WINDOW=window, SHARES=64)
    return grad_x, grad_weight


def _fake(x, weight):
    return x.new_empty(x.shape[0], 1, *x.shape[2:])


def _fake_backward(grad_out, x, weight, out):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _reference(x, weight):
    with without_autocast(x):
        return F.conv2d(x, weight.to(x.dtype), padding=weight.shape[-1] // 2)


_call = register("map_conv", _map_conv, _fake, _map_conv_backward, _fake_backward, _reference)


@register_flop_formula(torch.ops.densezoo.map_conv)
def _(x, weight, *args, **kwargs) -> int:
    # Two channels in, one out, a multiplication and an addition each.
    return 2 * x[0] * x[2] * x[3] * weight[-1] ** 2 * x[1]


@register_flop_formula(torch.ops.densezoo.map_conv_backward)
def _(grad_out, x, weight, *args, **kwargs) -> int:
    return 4 * x[0] * x[2] * x[3] * weight[-1] ** 2 * x[1]


def map_conv_triton(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve maps (B, 2, H, W) with a weight (1, 2, k, k), k odd, to (B, 1, H, W), zeros around the map."""
    if x.stride(-2) < x.stride(-1):
        # Rows that lie side by side in memory are read as columns.
        return _call(x.mT, weight.mT).mT
    return _call(x, weight)
