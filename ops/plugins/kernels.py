"""The convolution of two pooled maps to one, as CBAM and Triplet attention have it, in Triton, forward and backward.

With so few channels tensor cores have too little to share, but for this: COLUMNS numbers of a row depend on WINDOW
numbers of each row about it, so that each row of taps is a product with a banded matrix WINDOW x COLUMNS, whose
diagonals hold the taps.

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
ROWS, COLUMNS, WARPS, STAGES, PROGRAMS = 128, 16, 4, 1, 512
_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit
def _place(piece, height, width, ROWS: tl.constexpr):
    """The image of a piece of all maps, its rows and its first column."""
    across, down = tl.cdiv(width, _COLUMNS), tl.cdiv(height, ROWS)
    image, block = (piece // (across * down)).to(tl.int64), piece // across % down
    return image, block * ROWS + tl.arange(0, ROWS), piece % across * _COLUMNS


@triton.jit
def _tile(x, row, first, height, width, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers of some rows and, from the first, of WIDTH columns of all channels of a map, zeros outside it."""
    place = tl.arange(0, CHANNELS * WIDTH)
    channel, column = place // WIDTH, first + place % WIDTH
    exist = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))[None, :]
    return tl.load(x + (row * width)[:, None] + (channel * height * width + column)[None, :], mask=exist, other=0.0)


@triton.jit
def _conv(
    x, weight, out, height, width_units, weight_channel, weight_row, weight_column,
    IN: tl.constexpr, OUT: tl.constexpr, TURNED: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    WINDOW: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A multiple of UNIT in the compiler's eyes: so many numbers are read at once.
    width = width_units * UNIT
    image, row, column = _place(tl.program_id(0), height, width, ROWS)
    n, k = tl.arange(0, OUT * _COLUMNS), tl.arange(0, IN * WINDOW)
    beyond, channel = (WINDOW - _COLUMNS) // 2, (k // WINDOW)[:, None] + (n // _COLUMNS)[None, :]
    tap = (k % WINDOW)[:, None] - beyond - (n % _COLUMNS)[None, :] + SIZE // 2
    in_band = (tap >= 0) & (tap < SIZE)
    weight += channel * weight_channel + (SIZE - 1 - tap if TURNED else tap) * weight_column
    x += image * IN * height * width
    sums = tl.zeros((ROWS, OUT * _COLUMNS), tl.float32)
    for i in tl.range(0, SIZE, num_stages=STAGES):
        window = _tile(x, row + (i - SIZE // 2), column - beyond, height, width, IN, WINDOW)
        band = tl.load(weight + (SIZE - 1 - i if TURNED else i) * weight_row, mask=in_band, other=0.0)
        sums = tl.dot(window, band.to(window.dtype), sums, input_precision="tf32x3")
    column += n % _COLUMNS
    place = (row * width)[:, None] + (n // _COLUMNS * height * width + column)[None, :]
    exist = (row < height)[:, None] & (column < width)[None, :]
    tl.store(out + image * OUT * height * width + place, sums.to(out.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["pieces"])
def _weight_gradient(
    x, grad_out, partial, pieces, height, width_units,
    SIZE: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    width, i = width_units * UNIT, tl.program_id(0)
    sums = tl.zeros((2 * WINDOW, _COLUMNS), tl.float32)
    for piece in tl.range(tl.program_id(1), pieces, tl.num_programs(1), num_stages=STAGES):
        image, row, column = _place(piece, height, width, ROWS)
        grad = _tile(grad_out + image * height * width, row, column, height, width, 1, _COLUMNS)
        first = column - (WINDOW - _COLUMNS) // 2
        window = _tile(x + image * 2 * height * width, row + (i - SIZE // 2), first, height, width, 2, WINDOW)
        sums = tl.dot(tl.trans(window), grad, sums, input_precision="tf32x3")
    partial += (tl.program_id(1) * SIZE + i) * 2 * WINDOW * _COLUMNS
    k, n = tl.arange(0, 2 * WINDOW), tl.arange(0, _COLUMNS)
    tl.store(partial + k[:, None] * _COLUMNS + n[None, :], sums)


@triton.jit(do_not_specialize=["shares"])
def _diagonals(partial, out, shares, SIZE: tl.constexpr, WINDOW: tl.constexpr, SHARES: tl.constexpr):
    channel, i, j = tl.program_id(0) // SIZE // SIZE, tl.program_id(0) // SIZE % SIZE, tl.program_id(0) % SIZE
    share, n = tl.arange(0, SHARES), tl.arange(0, _COLUMNS)
    k = n + (WINDOW - _COLUMNS) // 2 + j - SIZE // 2
    place = ((i * 2 + channel) * WINDOW + k) * _COLUMNS + n
    in_window = ((k >= 0) & (k < WINDOW))[None, :]
    sums = tl.zeros((SHARES, _COLUMNS), tl.float32)
    for start in range(0, shares, SHARES):
        offsets = (start + share)[:, None] * (SIZE * 2 * WINDOW * _COLUMNS) + place[None, :]
        sums += tl.load(partial + offsets, mask=in_window & (start + share < shares)[:, None], other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(tl.sum(sums, 1), 0).to(out.dtype.element_ty))


def _tiling(x: Tensor, weight: Tensor) -> tuple[int, list[int], dict]:
    """Return the number of pieces of maps (B, ..., H, W), the kernels' sizes, and their constants."""
    batch, _, height, width = x.shape
    size, unit = weight.shape[-1], next(n for n in (8, 4, 2, 1) if width % n == 0)
    rows = min(ROWS, max(16, triton.next_power_of_2(height)))
    # A map of a piece's columns is all of the window.
    window = COLUMNS if width <= COLUMNS else triton.next_power_of_2(COLUMNS + 2 * max(8, size // 2))
    constants = {"SIZE": size, "ROWS": rows, "WINDOW": window, "UNIT": unit, "STAGES": STAGES, "num_warps": WARPS}
    return batch * triton.cdiv(height, rows) * triton.cdiv(width, COLUMNS), [height, width // unit], constants


def _map_conv(x: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    out, (pieces, sizes, constants) = x.new_empty(batch, 1, height, width), _tiling(x, weight)
    _conv[(pieces,)](
        x.contiguous(), weight, out, *sizes, *weight.stride()[1:], IN=channels, OUT=1, TURNED=False, **constants
    )
    return out


def _map_conv_backward(grad_out: Tensor, x: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    x, grad_out, (pieces, sizes, constants) = x.contiguous(), grad_out.contiguous(), _tiling(x, weight)
    grad_x, channels = torch.empty_like(x), x.shape[1]
    _conv[(pieces,)](
        grad_out, weight, grad_x, *sizes, *weight.stride()[1:], IN=1, OUT=channels, TURNED=True, **constants
    )
    size, window = constants["SIZE"], constants["WINDOW"]
    shares = min(triton.cdiv(PROGRAMS, size), pieces)
    partial = x.new_empty(shares, size, channels * window, COLUMNS, dtype=torch.float32)
    _weight_gradient[(size, shares)](x, grad_out, partial, pieces, *sizes, **constants)
    grad_weight = weight.new_empty(weight.shape)
    _diagonals[(weight.numel(),)](partial, grad_weight, shares, SIZE=size, WINDOW=window, SHARES=64)
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
