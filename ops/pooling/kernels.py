"""PoolFormer's mixing with the norms around it as Triton kernels, three passes each way.

The norm before pooling is n(x) = w * (x - m) * r + b, with one mean m and one r an image, so that of pool(n(x)) - n(x)
there remains w * r * (pool(x) - x): a factor a[image, channel] = layer_scale * w * r * drop. Forward:

1. `_statistics` reads x for the moments of each image: a program takes a piece of an image, and whoever needs the
   moments merges the pieces'.
2. `_mix` writes x + a * (pool(x) - x) and the sums that its own moments take. A program owns COLUMNS x BLOCK channels
   of `rows` rows and goes down them: of each row it adds a position's neighbours at the left and right, and keeps the
   sums of three rows in registers.
3. `_apply` norms what `_mix` wrote.

Backward, of the norm's gradient and the sum's:

1. `_norm_sums` reads the norm's gradient and the sum for the gradients of the norm's parameters, by piece of an image;
   what the norm's input needs, two numbers an image, are sums of those.
2. `_join` writes the gradient of the sum, the norm's and its own together, and its products with pool(x) - x, summed
   over positions: the gradient of a.
3. `_spread` gives it to x: through pooling, whose adjoint weighs neighbours by their own counts, and through r.

`_branch` is the backward of x + drop * (branch + bias): the branch's gradient in its own dtype, and the bias's.
Under autocast, x and the sum in float32 and the norm in 16 bits, the forward moves 4 + 8 + 6 bytes an element and the
backward 6 + 18 + 12, and `_branch` 6. Sums over programs are stored as partial ones, which are added up in the
same order every time.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.launch import Table
from densezoo.ops.partials import total
from densezoo.ops.precision import autocast_dtype
from densezoo.ops.registration import define
from torch import Tensor


@triton.jit
def _merged(parts, image, pieces, chunk, size, PIECES: tl.constexpr):
    """Return the mean and the variance of an image from those of its pieces."""
    piece = tl.arange(0, PIECES)
    exists = piece < pieces
    count = tl.where(exists, tl.minimum(size - piece * chunk, chunk), 0).to(tl.float32)
    place = parts + (image * pieces + piece) * 2
    means = tl.load(place, exists, 0.0)
    squares = tl.load(place + 1, exists, 0.0)
    mean = tl.sum(means * count, 0) / size
    return mean, (tl.sum(squares, 0) + tl.sum(count * (means - mean) * (means - mean), 0)) / size


@triton.jit
def _pair(parts, image, pieces, PIECES: tl.constexpr):
    """Return the two sums of an image from those of its programs."""
    piece = tl.arange(0, PIECES)
    place = parts + (image * pieces + piece) * 2
    return tl.sum(tl.load(place, piece < pieces, 0.0), 0), tl.sum(tl.load(place + 1, piece < pieces, 0.0), 0)


@compiling.kernel(do_not_specialize=["pieces", "tiles"])
def _statistics(x, parts, pieces, tiles, size, ELEMENTS: tl.constexpr):
    image, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    origin = x + image.to(tl.int64) * size
    first = piece * tiles * ELEMENTS
    last = tl.minimum(first + tiles * ELEMENTS, size)
    lane = tl.arange(0, ELEMENTS)
    head = first + lane
    # About a mean, so that the squares keep their digits.
    pivot = tl.sum(tl.load(origin + head, head < last, 0.0).to(tl.float32), 0) / tl.minimum(last - first, ELEMENTS)
    sums = tl.zeros((ELEMENTS,), tl.float32)
    squares = tl.zeros((ELEMENTS,), tl.float32)
    for start in range(first, last, ELEMENTS):
        place = start + lane
        value = tl.load(origin + place, place < last, 0.0).to(tl.float32)
        value = tl.where(place < last, value - pivot, 0.0)
        sums += value
        squares += value * value
    total = tl.sum(sums, 0) / (last - first)
    tl.store(parts + tl.program_id(0) * 2, pivot + total)
    tl.store(parts + tl.program_id(0) * 2 + 1, tl.sum(squares, 0) - total * total * (last - first))


@triton.jit
def _row(pointer, row, limit, step, inside, left, right, CHANNELS: tl.constexpr):
    """Return a row's values, and those at the left and at the right of them; 0 outside of the map."""
    exists = (row >= 0) & (row < limit)
    place = pointer + row * step
    centre = tl.load(place, inside & exists, 0.0).to(tl.float32)
    before = tl.load(place - CHANNELS, left & exists, 0.0).to(tl.float32)
    after = tl.load(place + CHANNELS, right & exists, 0.0).to(tl.float32)
    return centre, before, after


@triton.jit
def _share(i, size):
    """Return 1 over the number of neighbours of `i` along an axis, itself among them."""
    return 1.0 / (3.0 - tl.where(i == 0, 1.0, 0.0) - tl.where(i == size - 1, 1.0, 0.0))


@triton.jit
def _place(height, width, rows, strips, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Return what a program of a map owns: image, first row and end, columns, channels and what of them exists."""
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    program = program // blocks
    columns = tl.cdiv(width, COLUMNS)
    column = program % columns * COLUMNS + tl.arange(0, COLUMNS)
    program = program // columns
    first = program % strips * rows
    return program // strips, first, tl.minimum(first + rows, height), column, channel, channel < CHANNELS


@compiling.kernel(do_not_specialize=["rows", "strips", "pieces", "chunk"])
def _mix(
    x, scale, drop, parts, out, sums, statistics, height, width, rows, strips, pieces, chunk, eps,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    image, first, end, column, channel, exist = _place(height, width, rows, strips, CHANNELS, COLUMNS, BLOCK)
    step = width * CHANNELS
    mean, variance = _merged(parts, image, pieces, chunk, height * step, PIECES)
    rstd = 1.0 / tl.sqrt(variance + eps)
    # Every program of an image knows the same.
    tl.store(statistics + image * 4, mean)
    tl.store(statistics + image * 4 + 1, rstd)
    factor = tl.load(scale + channel, exist, 0.0) * rstd
    if drop is not None:
        factor *= tl.load(drop + image).to(tl.float32)
    inside = (column < width)[:, None] & exist[None, :]
    left = inside & (column > 0)[:, None]
    right = (column + 1 < width)[:, None] & exist[None, :]
    offset = column[:, None] * CHANNELS + channel[None, :]
    origin = image.to(tl.int64) * height * step
    pointer, target = x + origin + offset, out + origin + offset
    limit = tl.minimum(end + 1, height)
    share = _share(column, width)[:, None]
    centre, before, after = _row(pointer, first - 1, limit, step, inside, left, right, CHANNELS)
    above = centre + before + after
    centre, before, after = _row(pointer, first, limit, step, inside, left, right, CHANNELS)
    here = centre + before + after
    below, before, after = _row(pointer, first + 1, limit, step, inside, left, right, CHANNELS)
    total = tl.zeros((COLUMNS, BLOCK), tl.float32)
    squares = tl.zeros((COLUMNS, BLOCK), tl.float32)
    for row in range(first, end):
        # The row after the next is on its way while this one is computed.
        ahead, ahead_before, ahead_after = _row(pointer, row + 2, limit, step, inside, left, right, CHANNELS)
        under = below + before + after
        value = centre + factor[None, :] * ((above + here + under) * (share * _share(row, height)) - centre)
        value = value.to(out.dtype.element_ty)
        tl.store(target + row * step, value, inside)
        value = tl.where(inside, value.to(tl.float32) - mean, 0.0)
        total += value
        squares += value * value
        above, here, centre = here, under, below
        below, before, after = ahead, ahead_before, ahead_after
    tl.store(sums + tl.program_id(0) * 2, tl.sum(tl.sum(total, 1), 0))
    tl.store(sums + tl.program_id(0) * 2 + 1, tl.sum(tl.sum(squares, 1), 0))


@compiling.kernel(do_not_specialize=["pieces", "parts", "chunk"])
def _apply(
    x, weight, bias, sums, statistics, out, positions, pieces, parts, chunk, eps,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    part, image = tl.program_id(0) // blocks % parts, tl.program_id(0) // blocks // parts
    exist = channel < CHANNELS
    total, squares = _pair(sums, image, pieces, PIECES)
    size = positions * CHANNELS
    shift = total / size
    mean = tl.load(statistics + image * 4) + shift
    rstd = 1.0 / tl.sqrt(squares / size - shift * shift + eps)
    tl.store(statistics + image * 4 + 2, mean)
    tl.store(statistics + image * 4 + 3, rstd)
    slope = tl.load(weight + channel, exist, 0.0).to(tl.float32) * rstd
    lift = -mean * slope
    if bias is not None:
        lift += tl.load(bias + channel, exist, 0.0).to(tl.float32)
    origin = image.to(tl.int64) * size
    last = tl.minimum((part + 1) * chunk, positions)
    for start in range(part * chunk, last, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        mask = (position < last)[:, None] & exist[None, :]
        place = origin + (position[:, None] * CHANNELS + channel[None, :])
        value = tl.load(x + place, mask, 0.0).to(tl.float32) * slope[None, :] + lift[None, :]
        tl.store(out + place, value.to(out.dtype.element_ty), mask)


@compiling.kernel(do_not_specialize=["parts", "chunk"])
def _norm_sums(
    grad, x, weight, statistics, partial, scalars, positions, parts, chunk,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    rank = tl.program_id(0) // blocks
    part, image = rank % parts, rank // parts
    exist = channel < CHANNELS
    mean = tl.load(statistics + image * 4 + 2)
    rstd = tl.load(statistics + image * 4 + 3)
    origin = image.to(tl.int64) * positions * CHANNELS
    grad_weight = tl.zeros((POSITIONS, BLOCK), tl.float32)
    grad_bias = tl.zeros((POSITIONS, BLOCK), tl.float32)
    last = tl.minimum((part + 1) * chunk, positions)
    for start in range(part * chunk, last, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        mask = (position < last)[:, None] & exist[None, :]
        place = origin + (position[:, None] * CHANNELS + channel[None, :])
        g = tl.load(grad + place, mask, 0.0).to(tl.float32)
        grad_weight += g * (tl.load(x + place, mask, 0.0).to(tl.float32) - mean)
        grad_bias += g
    grad_weight, grad_bias = tl.sum(grad_weight, 0) * rstd, tl.sum(grad_bias, 0)
    tl.store(partial + rank * 2 * CHANNELS + channel, grad_weight, exist)
    tl.store(partial + (rank * 2 + 1) * CHANNELS + channel, grad_bias, exist)
    w = tl.load(weight + channel, exist, 0.0).to(tl.float32)
    tl.store(scalars + tl.program_id(0) * 2, tl.sum(w * grad_bias, 0))
    tl.store(scalars + tl.program_id(0) * 2 + 1, tl.sum(w * grad_weight, 0))


@compiling.kernel(do_not_specialize=["rows", "strips", "pieces"])
def _join(
    grad_out, grad_norm, x, out, scale, drop, weight, statistics, scalars, grad, partial, slopes,
    height, width, rows, strips, pieces,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    image, first, end, column, channel, exist = _place(height, width, rows, strips, CHANNELS, COLUMNS, BLOCK)
    step = width * CHANNELS
    size = height * step
    shift, slope = _pair(scalars, image, pieces, PIECES)
    mean = tl.load(statistics + image * 4 + 2)
    rstd = tl.load(statistics + image * 4 + 3)
    # The norm's own gradient is linear in its input and in the gradient of its output.
    gain = (tl.load(weight + channel, exist, 0.0).to(tl.float32) * rstd)[None, :]
    slope = -slope / size * rstd * rstd
    shift = -shift / size * rstd - mean * slope
    inside = (column < width)[:, None] & exist[None, :]
    left = inside & (column > 0)[:, None]
    right = (column + 1 < width)[:, None] & exist[None, :]
    origin = image.to(tl.int64) * height * step + (column[:, None] * CHANNELS + channel[None, :])
    pointer = x + origin
    limit = tl.minimum(end + 1, height)
    share = _share(column, width)[:, None]
    centre, before, after = _row(pointer, first - 1, limit, step, inside, left, right, CHANNELS)
    above = centre + before + after
    centre, before, after = _row(pointer, first, limit, step, inside, left, right, CHANNELS)
    here = centre + before + after
    below, before, after = _row(pointer, first + 1, limit, step, inside, left, right, CHANNELS)
    total = tl.zeros((COLUMNS, BLOCK), tl.float32)
    for row in range(first, end):
        ahead, ahead_before, ahead_after = _row(pointer, row + 2, limit, step, inside, left, right, CHANNELS)
        g = tl.load(grad_out + origin + row * step, inside, 0.0).to(tl.float32)
        g += tl.load(grad_norm + origin + row * step, inside, 0.0).to(tl.float32) * gain
        g += tl.load(out + origin + row * step, inside, 0.0).to(tl.float32) * slope + shift
        g = g.to(grad.dtype.element_ty)
        tl.store(grad + origin + row * step, g, inside)
        under = below + before + after
        difference = (above + here + under) * (share * _share(row, height)) - centre
        total += tl.where(inside, g.to(tl.float32) * difference, 0.0)
        above, here, centre = here, under, below
        below, before, after = ahead, ahead_before, ahead_after
    factor = tl.load(statistics + image * 4 + 1)
    if drop is not None:
        factor *= tl.load(drop + image).to(tl.float32)
    sums = tl.sum(total, 0) * factor
    rank = tl.program_id(0) // tl.cdiv(CHANNELS, BLOCK)
    tl.store(partial + rank * CHANNELS + channel, sums, exist)
    tl.store(slopes + tl.program_id(0), tl.sum(sums * tl.load(scale + channel, exist, 0.0), 0))


@compiling.kernel(do_not_specialize=["rows", "strips", "pieces"])
def _spread(
    grad, x, scale, drop, statistics, slopes, grad_x, height, width, rows, strips, pieces,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    image, first, end, column, channel, exist = _place(height, width, rows, strips, CHANNELS, COLUMNS, BLOCK)
    step = width * CHANNELS
    piece = tl.arange(0, PIECES)
    slope = tl.sum(tl.load(slopes + image * pieces + piece, piece < pieces, 0.0), 0)
    mean = tl.load(statistics + image * 4)
    rstd = tl.load(statistics + image * 4 + 1)
    slope = -slope * rstd * rstd / (height * step)
    factor = tl.load(scale + channel, exist, 0.0) * rstd
    if drop is not None:
        factor *= tl.load(drop + image).to(tl.float32)
    factor = factor[None, :]
    inside = (column < width)[:, None] & exist[None, :]
    left = inside & (column > 0)[:, None]
    right = (column + 1 < width)[:, None] & exist[None, :]
    origin = image.to(tl.int64) * height * step + (column[:, None] * CHANNELS + channel[None, :])
    pointer = grad + origin
    limit = tl.minimum(end + 1, height)
    # Each neighbour's own share of what it averaged.
    share = _share(column, width)[:, None]
    share_left = _share(column - 1, width)[:, None]
    share_right = _share(column + 1, width)[:, None]
    centre, before, after = _row(pointer, first - 1, limit, step, inside, left, right, CHANNELS)
    above = (centre * share + before * share_left + after * share_right) * _share(first - 1, height)
    centre, before, after = _row(pointer, first, limit, step, inside, left, right, CHANNELS)
    here = (centre * share + before * share_left + after * share_right) * _share(first, height)
    below, before, after = _row(pointer, first + 1, limit, step, inside, left, right, CHANNELS)
    for row in range(first, end):
        ahead, ahead_before, ahead_after = _row(pointer, row + 2, limit, step, inside, left, right, CHANNELS)
        value = (tl.load(x + origin + row * step, inside, 0.0).to(tl.float32) - mean) * slope
        under = (below * share + before * share_left + after * share_right) * _share(row + 1, height)
        value += centre + factor * (above + here + under - centre)
        tl.store(grad_x + origin + row * step, value.to(grad_x.dtype.element_ty), inside)
        above, here, centre = here, under, below
        below, before, after = ahead, ahead_before, ahead_after


@compiling.kernel(do_not_specialize=["parts", "chunk"])
def _branch(
    grad, drop, grad_branch, partial, positions, parts, chunk,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    rank = tl.program_id(0) // blocks
    part, image = rank % parts, rank // parts
    exist = channel < CHANNELS
    factor = 1.0
    if drop is not None:
        factor = tl.load(drop + image).to(tl.float32)
    origin = image.to(tl.int64) * positions * CHANNELS
    total = tl.zeros((POSITIONS, BLOCK), tl.float32)
    last = tl.minimum((part + 1) * chunk, positions)
    for start in range(part * chunk, last, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        mask = (position < last)[:, None] & exist[None, :]
        place = origin + (position[:, None] * CHANNELS + channel[None, :])
        g = tl.load(grad + place, mask, 0.0).to(tl.float32) * factor
        tl.store(grad_branch + place, g.to(grad_branch.dtype.element_ty), mask)
        total += g
    tl.store(partial + rank * CHANNELS + channel, tl.sum(total, 0), exist)


class _Launch(NamedTuple):
    """Elements of a program's tile, and rows that it goes down, or tiles that it reads one after the other; warps."""

    elements: int
    length: int
    warps: int


# Measured on an H200.
LAUNCH = {
    "statistics": _Launch(4096, 1, 4),
    "mix": _Launch(512, 28, 4),
    "apply": _Launch(1024, 8, 2),
    "norm_sums": _Launch(1024, 8, 2),
    "join": _Launch(1024, 28, 4),
    "spread": _Launch(1024, 28, 4),
    "branch": _Launch(1024, 8, 2),
}
LAUNCH = Table("pool_mix", LAUNCH)
# Channels of a tile at most, and programs that fill a large GPU.
CHANNELS, PROGRAMS = 64, 1024


class _Tiles(NamedTuple):
    """A grid over maps.

    Attributes:
        programs: Of all images.
        pieces: Programs of an image.
        ranks: The same, of one block of channels.
        step: Positions or, of kernels that go down rows, rows of a program.
        strips: Programs above each other.
        constants: Of the kernel.
    """

    programs: int
    pieces: int
    ranks: int
    step: int
    strips: int
    constants: dict[str, int]


@cache
def _tiles(name: str, batch: int, height: int, width: int, channels: int) -> _Tiles:
    """Return how the kernel called `name` cuts maps."""
    launch = LAUNCH[name]
    block = min(CHANNELS, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block)
    tile = max(1, launch.elements // block)
    constants = {"CHANNELS": channels, "BLOCK": block, "num_warps": launch.warps}
    if name in ("apply", "norm_sums", "branch"):
        tile = min(tile, triton.next_power_of_2(height * width))
        length = launch.length
        while length > 1 and batch * blocks * triton.cdiv(height * width, tile * length) < PROGRAMS:
            length //= 2
        step = tile * length
        strips = parts = triton.cdiv(height * width, step)
        constants["POSITIONS"] = tile
    else:
        tile = min(tile, triton.next_power_of_2(width))
        columns, step = triton.cdiv(width, tile), min(launch.length, height)
        while step > 7 and batch * blocks * columns * triton.cdiv(height, step) < PROGRAMS:
            step = triton.cdiv(step, 2)
        strips = triton.cdiv(height, step)
        parts = columns * strips
        constants["COLUMNS"] = tile
    return _Tiles(batch * parts * blocks, parts * blocks, parts, step, strips, constants)


def _block(pieces: int) -> int:
    """Return the numbers that a kernel merges at once: seldom others where only the batch is another."""
    return max(64, triton.next_power_of_2(pieces))


def _pool_mix(
    x: Tensor, scale: Tensor, drop: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, width: int,
    sum_dtype: torch.dtype, norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the sum and its norm, (B, H * W, dim) as x, and the mean and 1 / deviation of x and of the sum, (B, 4)."""
    x = x.contiguous()
    batch, positions, channels = x.shape
    size, launch = positions * channels, LAUNCH["statistics"]
    out = torch.empty(x.shape, dtype=sum_dtype, device=x.device)
    norm = torch.empty(x.shape, dtype=norm_dtype, device=x.device)
    statistics = torch.empty(batch, 4, dtype=torch.float32, device=x.device)
    if not x.numel():
        return out, norm, statistics
    height = positions // width
    # At most 256 pieces an image, for each program after this one merges them.
    tiles = max(launch.length, triton.cdiv(size, 256 * launch.elements))
    chunk = tiles * launch.elements
    pieces = triton.cdiv(size, chunk)
    mix, apply = (_tiles(name, batch, height, width, channels) for name in ("mix", "apply"))
    parts = torch.empty(batch * (pieces + mix.pieces) * 2, dtype=torch.float32, device=x.device)
    sums = parts[batch * pieces * 2 :]
    _statistics[batch * pieces,](x, parts, pieces, tiles, size, launch.elements, num_warps=launch.warps)
    _mix[mix.programs,](
        x, scale, drop, parts, out, sums, statistics, height, width, mix.step, mix.strips, pieces, chunk, eps,
        PIECES=_block(pieces), **mix.constants,
    )  # fmt: skip
    _apply[apply.programs,](
        out, weight, bias, sums, statistics, norm, positions, mix.pieces, apply.ranks, apply.step, eps,
        PIECES=_block(mix.pieces), **apply.constants,
    )  # fmt: skip
    return out, norm, statistics


def _fake(x, scale, drop, weight, bias, eps, width, sum_dtype, norm_dtype):
    out, norm = (torch.empty(x.shape, dtype=dtype, device=x.device) for dtype in (sum_dtype, norm_dtype))
    return out, norm, torch.empty((x.shape[0], 4), dtype=torch.float32, device=x.device)


def _pool_mix_backward(
    grad_out: Tensor, grad_norm: Tensor, x: Tensor, out: Tensor, scale: Tensor, drop: Tensor | None, weight: Tensor,
    statistics: Tensor, width: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, of scale, and in one tensor of the norm's weight and bias."""
    x, grad_out, grad_norm = x.contiguous(), grad_out.contiguous(), grad_norm.contiguous()
    batch, positions, channels = x.shape
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(scale), scale.new_zeros(2, channels)
    height = positions // width
    reduce, join, spread = (_tiles(name, batch, height, width, channels) for name in ("norm_sums", "join", "spread"))
    partial = torch.empty(batch * reduce.ranks, 2, channels, dtype=torch.float32, device=x.device)
    grad_scale = torch.empty(batch * join.ranks, channels, dtype=torch.float32, device=x.device)
    scalars = torch.empty(batch * (reduce.pieces * 2 + join.pieces), dtype=torch.float32, device=x.device)
    slopes = scalars[batch * reduce.pieces * 2 :]
    grad = torch.empty_like(out)
    _norm_sums[reduce.programs,](
        grad_norm, out, weight, statistics, partial, scalars, positions, reduce.ranks, reduce.step,
        **reduce.constants,
    )  # fmt: skip
    _join[join.programs,](
        grad_out, grad_norm, x, out, scale, drop, weight, statistics, scalars, grad, grad_scale, slopes,
        height, width, join.step, join.strips, reduce.pieces, PIECES=_block(reduce.pieces), **join.constants,
    )  # fmt: skip
    _spread[spread.programs,](
        grad, x, scale, drop, statistics, slopes, grad_x, height, width, spread.step, spread.strips, join.pieces,
        PIECES=_block(join.pieces), **spread.constants,
    )  # fmt: skip
    return grad_x, total(grad_scale), total(partial)


def _fake_backward(grad_out, grad_norm, x, out, scale, drop, weight, statistics, width):
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty_like(scale),
        scale.new_empty(2, x.shape[-1]),
    )


def _add_branch_backward(grad: Tensor, drop: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the gradients of the branch, in its dtype, and of its bias."""
    grad = grad.contiguous()
    batch, positions, channels = grad.shape
    grad_branch = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    if not grad.numel():
        return grad_branch, torch.zeros(channels, dtype=torch.float32, device=grad.device)
    tiles = _tiles("branch", batch, 1, positions, channels)
    partial = torch.empty(batch * tiles.ranks, channels, dtype=torch.float32, device=grad.device)
    _branch[tiles.programs,](grad, drop, grad_branch, partial, positions, tiles.ranks, tiles.step, **tiles.constants)
    return grad_branch, total(partial)


def _fake_add_branch_backward(grad, drop, dtype):
    grad_branch = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    return grad_branch, torch.empty(grad.shape[-1], dtype=torch.float32, device=grad.device)


_forward = define("pool_mix", _pool_mix, _fake)
_backward = define("pool_mix_backward", _pool_mix_backward, _fake_backward)


_branch_backward = define("add_branch_backward", _add_branch_backward, _fake_add_branch_backward)


class _PoolMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, bias, drop, next_weight, next_bias, eps, width, sum_dtype, norm_dtype):
        out, norm, statistics = _forward(x, scale, drop, next_weight, next_bias, eps, width, sum_dtype, norm_dtype)
        ctx.save_for_backward(x, out, scale, bias, drop, next_weight, statistics)
        ctx.has_next_bias, ctx.width = next_bias is not None, width
        return out, norm

    @staticmethod
    def backward(ctx, grad_out, grad_norm):
        x, out, scale, bias, drop, weight, statistics = ctx.saved_tensors
        grad_x, grad_scale, sums = _backward(grad_out, grad_norm, x, out, scale, drop, weight, statistics, ctx.width)
        # In torch 2.11 a `to` of the same dtype loses the gradient of a compiled function.
        sums = sums if sums.dtype == weight.dtype else sums.to(weight.dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        return grad_x, grad_scale, grad_bias, None, sums[0], sums[1] if ctx.has_next_bias else None, *4 * (None,)


def pool_mix_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, next_weight: Tensor, next_bias: Tensor | None, eps: float,
    layer_scale: Tensor | None, drop: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `densezoo.ops.pool_mix` with the kernels; arguments checked."""
    norm_dtype = autocast_dtype(x)
    sum_dtype = torch.float32 if norm_dtype else torch.promote_types(x.dtype, weight.dtype)
    # In float32: layer scales are below what float16 holds.
    scale = weight.float() if layer_scale is None else layer_scale.float() * weight.float()
    size = x.shape[1:3]
    # A compiler that lays out convolutions channels last moves all maps of four axes that a backward needs, these too.
    outs = _PoolMix.apply(
        x.flatten(1, 2), scale, bias, drop, next_weight, next_bias, eps, size[1], sum_dtype, norm_dtype or sum_dtype
    )
    return outs[0].unflatten(1, size), outs[1].unflatten(1, size)


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, bias, drop):
        ctx.save_for_backward(drop)
        ctx.dtypes = x.dtype, branch.dtype, bias.dtype
        branch = branch + bias
        return x + (branch if drop is None else branch * drop.flatten(1, 2))

    @staticmethod
    def backward(ctx, grad):
        (drop,) = ctx.saved_tensors
        dtype, branch_dtype, bias_dtype = ctx.dtypes
        grad_branch, grad_bias = _branch_backward(grad, drop, branch_dtype)
        grad = grad if grad.dtype == dtype else grad.to(dtype)
        grad_bias = grad_bias if grad_bias.dtype == bias_dtype else grad_bias.to(bias_dtype)
        return grad, grad_branch, grad_bias, None


def add_branch_triton(x: Tensor, branch: Tensor, bias: Tensor, drop: Tensor | None) -> Tensor:
    """Compute `densezoo.ops.pooling.add_branch` with the kernel; arguments checked."""
    out = _AddBranch.apply(x.flatten(1, 2), branch.flatten(1, 2), bias, drop)
    return out.unflatten(1, x.shape[1:3])
