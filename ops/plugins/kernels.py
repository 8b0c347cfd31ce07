"""The convolution of two pooled maps to one, as CBAM and Triplet attention have it, in Triton, forward and backward.

With so few channels a convolution library's tiles are nearly empty. Here the k taps along a row are a product with a
square banded matrix, band[d, q] = weight[d - q], of the columns of input that a tile of the output sees by those that
it owns, k - 1 fewer.

- `_conv`: a program owns a tile of one channel of one image's output, and adds the products of k rows of taps a
  channel of the input. The forward has two channels in and one out; the gradient of the input one in and two out, with
  the weights turned by 180 degrees.
- `_weight_gradient`: a program owns the k weights of one row of taps in one channel, and a share of all tiles. It sums
  the products of input and gradient over the tiles' rows, whose diagonals are the weights' gradients. PyTorch adds up
  the shares, always in the same order.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from densezoo.ops.precision import without_autocast
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# A tile's rows, and the columns that it sees at most; the programs over which weights' gradients are shared out.
ROWS, COLUMNS, PROGRAMS = 64, 64, 512


@triton.jit
def _tile_of(index, height, width, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows and columns of a tile, outside the map where it owns none, and the columns that it sees."""
    own: tl.constexpr = COLUMNS - SIZE + 1
    across = tl.cdiv(width, own)
    rows = index // across * ROWS + tl.arange(0, ROWS)
    first, column = index % across * own, tl.arange(0, COLUMNS)
    return rows, tl.where(column < own, first + column, width), first - SIZE // 2 + column


@triton.jit
def _load(x, rows, columns, height, width):
    exist = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
    return tl.load(x + rows[:, None] * width + columns[None, :], mask=exist, other=0.0)


@triton.jit
def _conv(
    x, weight, out, height, width, weight_channel, weight_row, weight_column,
    CHANNELS: tl.constexpr, TURNED: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    image, own = tl.program_id(0).to(tl.int64), tl.program_id(2)
    rows, columns, seen = _tile_of(tl.program_id(1), height, width, SIZE, ROWS, COLUMNS)
    taps = tl.arange(0, COLUMNS)[:, None] - tl.arange(0, COLUMNS)[None, :]
    in_band = (taps >= 0) & (taps < SIZE)
    if TURNED:
        taps = SIZE - 1 - taps
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for i in range(CHANNELS * SIZE):
        channel, row = i // SIZE, i % SIZE
        source = x + (image * CHANNELS + channel) * height * width
        tile = _load(source, rows + (row - SIZE // 2), seen, height, width)
        if TURNED:
            row = SIZE - 1 - row
        place = weight + (channel + own) * weight_channel + row * weight_row
        band = tl.load(place + taps * weight_column, mask=in_band, other=0.0).to(tile.dtype)
        sums = tl.dot(tile, band, sums, input_precision=PRECISION)
    target = out + (image * tl.num_programs(2) + own) * height * width
    exist = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(target + rows[:, None] * width + columns[None, :], sums.to(out.dtype.element_ty), mask=exist)


@triton.jit
def _weight_gradient(
    x, grad_out, partial, images, tiles, height, width,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    channel, row = own // SIZE, own % SIZE
    sums = tl.zeros((COLUMNS, COLUMNS), dtype=tl.float32)
    for index in range(tl.program_id(1), images * tiles, tl.num_programs(1)):
        image = (index // tiles).to(tl.int64)
        rows, columns, seen = _tile_of(index % tiles, height, width, SIZE, ROWS, COLUMNS)
        source = x + (image * 2 + channel) * height * width
        tile = _load(source, rows + (row - SIZE // 2), seen, height, width)
        grad = _load(grad_out + image * height * width, rows, columns, height, width)
        sums = tl.dot(tile.T, grad, sums, input_precision=PRECISION)
    taps = tl.arange(0, COLUMNS)[:, None] - tl.arange(0, COLUMNS)[None, :]
    place = partial + (tl.program_id(1) * tl.num_programs(0) + own) * SIZE
    for tap in range(SIZE):
        tl.store(place + tap, tl.sum(tl.sum(tl.where(taps == tap, sums, 0.0), 1), 0))


def _tiling(x: Tensor, size: int) -> tuple[int, dict]:
    """Return the number of an image's tiles, and the kernels' constants."""
    height, width = x.shape[-2:]
    most = max(COLUMNS, triton.next_power_of_2(2 * size))
    columns = max(16, min(most, triton.next_power_of_2(width + size - 1)))
    allows_tf32 = x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    constants = {"SIZE": size, "ROWS": ROWS, "COLUMNS": columns, "PRECISION": "tf32" if allows_tf32 else "ieee"}
    constants["num_warps"] = max(4, columns // 8)
    return triton.cdiv(height, ROWS) * triton.cdiv(width, columns - size + 1), constants


def _map_conv(x: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    out = x.new_empty(batch, 1, height, width)
    tiles, constants = _tiling(x, weight.shape[-1])
    _conv[(batch, tiles, 1)](
        x.contiguous(), weight, out, height, width, *weight.stride()[1:], CHANNELS=channels, TURNED=False, **constants
    )
    return out


def _map_conv_backward(grad_out: Tensor, x: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    x, grad_out, size = x.contiguous(), grad_out.contiguous(), weight.shape[-1]
    grad_x, (tiles, constants) = torch.empty_like(x), _tiling(x, size)
    _conv[(batch, tiles, channels)](
        grad_out, weight, grad_x, height, width, *weight.stride()[1:], CHANNELS=1, TURNED=True, **constants
    )
    shares = min(triton.cdiv(PROGRAMS, channels * size), max(1, batch * tiles))
    partial = x.new_empty(shares, *weight.shape, dtype=torch.float32)
    _weight_gradient[(channels * size, shares)](x, grad_out, partial, batch, tiles, height, width, **constants)
    return grad_x, partial.sum(0).to(weight.dtype)


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
