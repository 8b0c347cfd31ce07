"""The convolution of two pooled maps to one, as CBAM and Triplet attention have it, in Triton, forward and backward.

With so few channels there is nothing for tensor cores to share, so this is the direct sum. A thread owns a column of
ROWS numbers of a map. Of each column of taps it reads, one column of the input beside the others that it needs, ROWS +
k - 1 numbers, which serve all of its own; neighbours in a row are neighbouring threads.

- `_conv`: a program owns a block of threads' numbers. The forward has two channels in and one out; the gradient of the
  input one in and two out, with the weights turned by 180 degrees.
- `_weight_gradient`: a program owns the k weights of one column of taps in one channel, and a share of all threads'
  numbers, over which it sums the products of input and gradient. PyTorch adds up the shares, always in the same order.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from densezoo.ops.precision import without_autocast
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Threads of a program, the rows that each owns, and the programs over which weights' gradients are shared out.
THREADS, ROWS, PROGRAMS = 128, 8, 1024


@triton.jit
def _place(block, height, width, THREADS: tl.constexpr, ROWS: tl.constexpr):
    """The image, the first row and the column of what each thread owns."""
    index, blocks = block * THREADS + tl.arange(0, THREADS), tl.cdiv(height, ROWS)
    return (index // width // blocks).to(tl.int64), index // width % blocks * ROWS, index % width


@triton.jit
def _column(x, row, column, exist, height, width, BEYOND: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """A thread's ROWS numbers of a column, which need not be in the map, and BEYOND more above and below them."""
    exist = exist & (column >= 0) & (column < width)
    x += (row - BEYOND) * width + column
    numbers = ()
    for i in tl.static_range(ROWS + 2 * BEYOND):
        in_map = exist
        if i < BEYOND:
            in_map = exist & (row + i >= BEYOND)
        elif i >= BEYOND + ROWS or not EVEN:
            in_map = exist & (row + (i - BEYOND) < height)
        numbers += (tl.load(x + i * width, mask=in_map, other=0.0).to(tl.float32),)
    return numbers


@triton.jit(do_not_specialize=["images"])
def _conv(
    x, weight, out, images, height, width, weight_channel, weight_row, weight_column,
    CHANNELS: tl.constexpr, TURNED: tl.constexpr, SIZE: tl.constexpr, THREADS: tl.constexpr, ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(1)
    image, row, column = _place(tl.program_id(0), height, width, THREADS, ROWS)
    exist = image < images
    x += image * CHANNELS * height * width
    sums = (tl.zeros((THREADS,), tl.float32),) * ROWS
    for i in range(CHANNELS * SIZE):
        channel, tap = i // SIZE, i % SIZE
        source = x + channel * height * width
        numbers = _column(source, row, column + tap - SIZE // 2, exist, height, width, SIZE // 2, ROWS, EVEN)
        if TURNED:
            tap = SIZE - 1 - tap
        taps = weight + (channel + own) * weight_channel + tap * weight_column
        for j in tl.static_range(SIZE):
            scale = tl.load(taps + (SIZE - 1 - j if TURNED else j) * weight_row).to(tl.float32)
            added = ()
            for k in tl.static_range(ROWS):
                added += (sums[k] + scale * numbers[j + k],)
            sums = added
    out += (image * tl.num_programs(1) + own) * height * width + row * width + column
    for k in tl.static_range(ROWS):
        tl.store(out + k * width, sums[k].to(out.dtype.element_ty), mask=exist & (row + k < height))


@triton.jit(do_not_specialize=["images", "blocks"])
def _weight_gradient(
    x, grad_out, partial, images, blocks, height, width,
    SIZE: tl.constexpr, THREADS: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    channel, tap = tl.program_id(0) // SIZE, tl.program_id(0) % SIZE
    sums = (tl.zeros((THREADS,), tl.float32),) * SIZE
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        image, row, column = _place(block, height, width, THREADS, ROWS)
        exist = image < images
        grads = _column(grad_out + image * height * width, row, column, exist, height, width, 0, ROWS, EVEN)
        source = x + (image * 2 + channel) * height * width
        numbers = _column(source, row, column + tap - SIZE // 2, exist, height, width, SIZE // 2, ROWS, EVEN)
        added = ()
        for j in tl.static_range(SIZE):
            products = sums[j]
            for k in tl.static_range(ROWS):
                products += grads[k] * numbers[j + k]
            added += (products,)
        sums = added
    place = partial + ((tl.program_id(1) * 2 + channel) * SIZE) * SIZE + tap
    for j in tl.static_range(SIZE):
        tl.store(place + j * SIZE, tl.sum(sums[j], 0))


def _tiling(x: Tensor, weight: Tensor) -> tuple[int, dict]:
    """Return the number of programs that own all of a map (B, ..., H, W), and the kernels' constants."""
    batch, _, height, width = x.shape
    blocks = triton.cdiv(batch * triton.cdiv(height, ROWS) * width, THREADS)
    return blocks, {"SIZE": weight.shape[-1], "THREADS": THREADS, "ROWS": ROWS, "EVEN": height % ROWS == 0}


def _map_conv(x: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    out, (blocks, constants) = x.new_empty(batch, 1, height, width), _tiling(x, weight)
    _conv[(blocks, 1)](
        x.contiguous(), weight, out, batch, height, width, *weight.stride()[1:],
        CHANNELS=channels, TURNED=False, **constants,
    )  # fmt: skip
    return out


def _map_conv_backward(grad_out: Tensor, x: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    x, grad_out, (blocks, constants) = x.contiguous(), grad_out.contiguous(), _tiling(x, weight)
    grad_x, columns = torch.empty_like(x), channels * weight.shape[-1]
    _conv[(blocks, channels)](
        grad_out, weight, grad_x, batch, height, width, *weight.stride()[1:], CHANNELS=1, TURNED=True, **constants
    )
    shares = min(triton.cdiv(PROGRAMS, columns), max(1, blocks))
    partial = x.new_empty(shares, *weight.shape, dtype=torch.float32)
    _weight_gradient[(columns, shares)](x, grad_out, partial, batch, blocks, height, width, **constants)
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
