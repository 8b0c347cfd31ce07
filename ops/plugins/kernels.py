"""The convolution of two pooled maps to one, as CBAM and Triplet attention have it, in Triton, forward and backward.

With so few channels tensor cores have too little to share, but for this: COLUMNS numbers of a row depend on WINDOW
numbers of each row about it, so that each row of taps is a product with a banded matrix WINDOW x COLUMNS, whose
diagonals hold the taps. Rows of all images follow one another, and a program's may be of several.

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

# What a program owns, its warps, its loads ahead from 2, and the programs over which weights' gradients are shared out.
ROWS, COLUMNS, WARPS, STAGES, PROGRAMS = 128, 16, 4, 2, 512
_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit
def _place(block, rows, height, ROWS: tl.constexpr):
    """The images of a block's rows, where they are in them, and whether they exist."""
    index = block * ROWS + tl.arange(0, ROWS)
    return (index // height).to(tl.int64), index % height, index < rows


@triton.jit
def _tile(x, row, exist, first, height, width, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers of some rows and, from the first, of WIDTH columns of all channels of maps, zeros outside them."""
    place = tl.arange(0, CHANNELS * WIDTH)
    column = first + place % WIDTH
    exist = (exist & (row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))[None, :]
    return tl.load(
        x + (row * width)[:, None] + (place // WIDTH * height * width + column)[None, :], mask=exist, other=0.0
    )


@triton.jit(do_not_specialize=["rows"])
def _conv(
    x, weight, out, rows, height, width_units, weight_channel, weight_row, weight_column,
    IN: tl.constexpr, OUT: tl.constexpr, TURNED: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    WINDOW: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A multiple of UNIT in the compiler's eyes: so many numbers are read at once.
    width = width_units * UNIT
    image, row, exist = _place(tl.program_id(0), rows, height, ROWS)
    n, k = tl.arange(0, OUT * _COLUMNS), tl.arange(0, IN * WINDOW)
    own, column, beyond = n // _COLUMNS, tl.program_id(1) * _COLUMNS, (WINDOW - _COLUMNS) // 2
    tap = (k % WINDOW)[:, None] - beyond - (n % _COLUMNS)[None, :] + SIZE // 2
    in_band = (tap >= 0) & (tap < SIZE)
    taps = (own[None, :] + (k // WINDOW)[:, None]) * weight_channel + (
        SIZE - 1 - tap if TURNED else tap
    ) * weight_column
    x += (image * IN * height * width)[:, None]
    sums = tl.zeros((ROWS, OUT * _COLUMNS), tl.float32)
    for i in tl.range(0, SIZE, num_stages=STAGES):
        window = _tile(x, row + (i - SIZE // 2), exist, column - beyond, height, width, IN, WINDOW)
        band = tl.load(weight + taps + (SIZE - 1 - i if TURNED else i) * weight_row, mask=in_band, other=0.0)
        sums = tl.dot(window, band.to(window.dtype), sums, input_precision="tf32x3")
    column += n % _COLUMNS
    place = (own * height * width + column)[None, :] + (image * OUT * height * width + row * width)[:, None]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=exist[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["rows", "tiles"])
def _weight_gradient(
    x, grad_out, partial, rows, tiles, height, width_units,
    SIZE: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    width, across, i = width_units * UNIT, tl.cdiv(width_units * UNIT, _COLUMNS), tl.program_id(0)
    sums = tl.zeros((2 * WINDOW, _COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(1), tiles, tl.num_programs(1), num_stages=STAGES):
        image, row, exist = _place(tile // across, rows, height, ROWS)
        column, image = tile % across * _COLUMNS, (image * height * width)[:, None]
        grad = _tile(grad_out + image, row, exist, column, height, width, 1, _COLUMNS)
        column -= (WINDOW - _COLUMNS) // 2
        window = _tile(x + 2 * image, row + (i - SIZE // 2), exist, column, height, width, 2, WINDOW)
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


def _tiling(x: Tensor, weight: Tensor) -> tuple[tuple[int, int], list[int], dict]:
    """Return the blocks of rows and of columns of maps (B, ..., H, W), the kernels' sizes, and their constants."""
    batch, _, height, width = x.shape
    size, unit = weight.shape[-1], next(n for n in (8, 4, 2, 1) if width % n == 0)
    # A map of one block is all of the window.
    window = COLUMNS if width <= COLUMNS else triton.next_power_of_2(COLUMNS + 2 * max(8, size // 2))
    blocks = triton.cdiv(batch * height, ROWS), triton.cdiv(width, COLUMNS)
    constants = {"SIZE": size, "ROWS": ROWS, "WINDOW": window, "UNIT": unit}
    constants |= {"STAGES": STAGES, "num_warps": WARPS}
    return blocks, [height, width // unit], constants


def _map_conv(x: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    out, (blocks, sizes, constants) = x.new_empty(batch, 1, height, width), _tiling(x, weight)
    _conv[blocks](
        x.contiguous(), weight, out, batch * height, *sizes, *weight.stride()[1:],
        IN=channels, OUT=1, TURNED=False, **constants,
    )  # fmt: skip
    return out


def _map_conv_backward(grad_out: Tensor, x: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, height, _ = x.shape
    x, grad_out, (blocks, sizes, constants) = x.contiguous(), grad_out.contiguous(), _tiling(x, weight)
    grad_x, size, tiles = torch.empty_like(x), weight.shape[-1], blocks[0] * blocks[1]
    _conv[blocks](
        grad_out, weight, grad_x, batch * height, *sizes, *weight.stride()[1:],
        IN=1, OUT=channels, TURNED=True, **constants,
    )  # fmt: skip
    shares, window = min(triton.cdiv(PROGRAMS, size), tiles), constants["WINDOW"]
    partial = x.new_empty(shares, size, channels * window, COLUMNS, dtype=torch.float32)
    _weight_gradient[(size, shares)](x, grad_out, partial, batch * height, tiles, *sizes, **constants)
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
