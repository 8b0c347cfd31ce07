"""The gates that CBAM and Triplet attention make of two pooled maps each, in Triton, forward and backward.

A gate is a convolution of two maps to one, a norm over the batch, and a sigmoid. The maps are small and launches cost
time: each kernel takes all gates of a module, every gate in programs of its own.

With so few channels tensor cores have too little to share, but for this: COLUMNS numbers of a row depend on WINDOW
numbers of each row about it, so that each row of taps is a product with a banded matrix WINDOW x COLUMNS, whose
diagonals hold the taps.

A map of at most COLUMNS columns is all of a window, and the more rows there are, the fuller is a product. So one of as
few rows but more columns, WIDE, is convolved as its transpose, read where it lies, with the transposed weight.

- `_conv`: a program owns ROWS rows of COLUMNS numbers, of all channels. The forward has two channels in and one out,
  and the windows of both side by side, and writes what the norm must know of its numbers; the gradient of the input one
  in and two out, with the weights turned by 180 degrees.
- `_normalise`: a program owns a block of one image of a convolution, and makes the gate of it. Each adds up for itself
  what `_conv` has written, always in the same order.
- `_sums` and `_through_gate`: such programs sum up what the gradients through the norm have in common, and write them.
- `_weight_gradient`: a program owns the gradient of the banded matrices of up to TAPS rows of taps, and a share of all
  rows, over which it sums the products of input and gradient, which it reads for each row of taps from another row;
  then it sums the diagonals.
- `_add_up`: a program owns a weight, and adds up its gradient over all shares, always in the same order.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.precision import without_autocast
from densezoo.ops.registration import define, is_watched, register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# The most rows and the columns of a program, its warps, and its loads ahead from 2; then the most rows of a weight's
# gradient, of the map and of taps, and the programs over which the map's are shared out.
ROWS, COLUMNS, WARPS, STAGES = 128, 16, 4, 1
GRADIENT_ROWS, TAPS, PROGRAMS = 64, 8, 256
# The numbers of a program elsewhere, its warps, and what it adds up at a time of what programs have written.
BLOCK, BLOCK_WARPS, PARTS = 2048, 4, 512
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
def _pieces(batch, height, width, ROWS: tl.constexpr):
    return batch * tl.cdiv(width, _COLUMNS) * tl.cdiv(height, ROWS)


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


@compiling.kernel(do_not_specialize=["batch"])
def _conv(
    xs, weights, outs, partials, sizes, batch,
    IN: tl.constexpr, OUT: tl.constexpr, TURNED: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    begin = 0
    for i in tl.static_range(len(xs)):
        height, width, to_row, to_column = _sizes(sizes[i][0], sizes[i][1], TILES[i][0], TILES[i][3])
        pieces = _pieces(batch, height, width, TILES[i][1])
        piece = tl.program_id(0) - begin
        if (piece >= 0) & (piece < pieces):
            _conv_piece(
                xs[i], weights[i], outs[i], partials[i], piece, height, width, to_row, to_column,
                sizes[i][2], sizes[i][3], sizes[i][4], IN, OUT, TURNED, SIZE, TILES[i][1], TILES[i][2], STAGES,
            )  # fmt: skip
        begin += pieces


@triton.jit
def _conv_piece(
    x, weight, out, partial, piece, height, width, to_row, to_column, weight_channel, weight_row, weight_column,
    IN: tl.constexpr, OUT: tl.constexpr, TURNED: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    image, row, column = _place(piece, height, width, ROWS)
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
    result = sums.to(out.dtype.element_ty)
    tl.store(out + image * OUT * height * width + place, result, mask=exist)
    if partial is not None:
        # Of the numbers as they are stored: how many, their mean, and their squares about it.
        count = tl.sum(tl.sum(exist.to(tl.float32), 1), 0)
        result = result.to(tl.float32)
        mean = tl.sum(tl.sum(tl.where(exist, result, 0.0), 1), 0) / count
        result = tl.where(exist, result - mean, 0.0)
        partial += piece * 3
        tl.store(partial, count)
        tl.store(partial + 1, mean)
        tl.store(partial + 2, tl.sum(tl.sum(result * result, 1), 0))


@triton.jit
def _moments(partial, pieces, PARTS: tl.constexpr):
    """The number of all pieces' numbers, their mean and variance; squares are about the first piece's mean."""
    piece, shift = tl.arange(0, PARTS), tl.load(partial + 1)
    counts = tl.zeros((PARTS,), tl.float32)
    sums, squares = counts, counts
    for start in tl.range(0, pieces, PARTS, num_stages=1):
        exist, place = start + piece < pieces, partial + (start + piece) * 3
        count = tl.load(place, mask=exist, other=0.0)
        mean = tl.load(place + 1, mask=exist, other=0.0) - shift
        squares += tl.load(place + 2, mask=exist, other=0.0) + count * mean * mean
        counts += count
        sums += count * mean
    count = tl.sum(counts, 0)
    mean = tl.sum(sums, 0) / count
    return count, shift + mean, tl.maximum(tl.sum(squares, 0) / count - mean * mean, 0.0)


@triton.jit
def _block(piece, size, BLOCK: tl.constexpr):
    """The image of a piece of blocks of images of `size` numbers, and the numbers of its block."""
    blocks = tl.cdiv(size, BLOCK)
    place = piece % blocks * BLOCK + tl.arange(0, BLOCK)
    return (piece // blocks).to(tl.int64), place, place < size


@compiling.kernel(do_not_specialize=["batch"])
def _normalise(
    ys, partials, scales, shifts, means, variances, outs, stats, sizes, batch, share, eps,
    TILES: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    begin = 0
    for i in tl.static_range(len(ys)):
        height, width, _, _ = _sizes(sizes[i][0], sizes[i][1], TILES[i][0], TILES[i][3])
        size = height * width
        pieces = batch * tl.cdiv(size, BLOCK)
        piece = tl.program_id(0) - begin
        if (piece >= 0) & (piece < pieces):
            image, place, exist = _block(piece, size, BLOCK)
            y = tl.load(ys[i] + image * size + place, mask=exist, other=0.0)
            scale, shift = tl.load(scales[i]).to(tl.float32), tl.load(shifts[i]).to(tl.float32)
            if partials[i] is not None:
                count, mean, variance = _moments(partials[i], _pieces(batch, height, width, TILES[i][1]), PARTS)
            else:
                count = 2.0
                mean, variance = tl.load(means[i]).to(tl.float32), tl.load(variances[i]).to(tl.float32)
            deviation = 1 / tl.sqrt(variance + eps)
            gate = tl.sigmoid((y.to(tl.float32) - mean) * deviation * scale + shift) * share
            tl.store(outs[i] + image * size + place, gate.to(outs[i].dtype.element_ty), mask=exist)
            if piece == 0:
                tl.store(stats + i, mean)
                # As the running statistics take it.
                tl.store(stats + len(ys) + i, variance * (count / (count - 1)))
                tl.store(stats + 2 * len(ys) + i, deviation)
        begin += pieces


@triton.jit
def _through_sigmoid(grad, y, scale, shift, mean, deviation, to_image, image, place, size, exist, share):
    """The gradient of the norm's output in a block, and the normalised convolution."""
    mean, deviation = tl.load(mean), tl.load(deviation)
    scale, shift = tl.load(scale).to(tl.float32), tl.load(shift).to(tl.float32)
    y = tl.load(y + image * size + place, mask=exist, other=0.0).to(tl.float32)
    grad = tl.load(grad + image * to_image + place, mask=exist, other=0.0).to(tl.float32)
    normal = (y - mean) * deviation
    gate = tl.sigmoid(normal * scale + shift)
    return grad * (gate * (1 - gate) * share), normal, scale * deviation


@compiling.kernel(do_not_specialize=["batch"])
def _sums(grads, ys, scales, shifts, stats, partials, sizes, batch, share, BLOCK: tl.constexpr):
    begin = 0
    for i in tl.static_range(len(ys)):
        size = sizes[i][0]
        pieces = batch * tl.cdiv(size, BLOCK)
        piece = tl.program_id(0) - begin
        if (piece >= 0) & (piece < pieces):
            image, place, exist = _block(piece, size, BLOCK)
            grad, normal, _ = _through_sigmoid(
                grads[i], ys[i], scales[i], shifts[i], stats + i, stats + 2 * len(ys) + i, sizes[i][1], image, place,
                size, exist, share,
            )  # fmt: skip
            tl.store(partials[i] + piece * 2, tl.sum(grad, 0))
            tl.store(partials[i] + piece * 2 + 1, tl.sum(grad * normal, 0))
        begin += pieces


@triton.jit
def _totals(partial, pieces, PARTS: tl.constexpr):
    """The sums of what `_sums` has written."""
    part = tl.arange(0, PARTS)
    first = tl.zeros((PARTS,), tl.float32)
    second = first
    for start in tl.range(0, pieces, PARTS, num_stages=1):
        place, exist = partial + (start + part) * 2, start + part < pieces
        first += tl.load(place, mask=exist, other=0.0)
        second += tl.load(place + 1, mask=exist, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@compiling.kernel(do_not_specialize=["batch"])
def _through_gate(
    grads, ys, scales, shifts, stats, partials, outs, grad_scales, grad_shifts, sizes, batch, share,
    TRAINING: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    begin = 0
    for i in tl.static_range(len(ys)):
        size = sizes[i][0]
        pieces = batch * tl.cdiv(size, BLOCK)
        piece = tl.program_id(0) - begin
        if (piece >= 0) & (piece < pieces):
            image, place, exist = _block(piece, size, BLOCK)
            grad, normal, factor = _through_sigmoid(
                grads[i], ys[i], scales[i], shifts[i], stats + i, stats + 2 * len(ys) + i, sizes[i][1], image, place,
                size, exist, share,
            )  # fmt: skip
            all_grads, all_products = _totals(partials[i], pieces, PARTS)
            if piece == 0:
                tl.store(grad_shifts[i], all_grads.to(grad_shifts[i].dtype.element_ty))
                tl.store(grad_scales[i], all_products.to(grad_scales[i].dtype.element_ty))
            if TRAINING:
                inverse = 1 / (batch.to(tl.float32) * size)
                grad -= all_grads * inverse + normal * (all_products * inverse)
            tl.store(outs[i] + image * size + place, (grad * factor).to(outs[i].dtype.element_ty), mask=exist)
        begin += pieces


@compiling.kernel(do_not_specialize=["batch", "shares"])
def _weight_gradient(
    xs, grads, partials, sizes, batch, shares,
    SIZE: tl.constexpr, TAPS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(len(xs)):
        share = tl.program_id(0) - i * shares
        if (share >= 0) & (share < shares):
            height, width, to_row, to_column = _sizes(sizes[i][0], sizes[i][1], TILES[i][0], TILES[i][3])
            _weight_gradient_share(
                xs[i], grads[i], partials[i], batch, share, shares, height, width, to_row, to_column, SIZE, TAPS,
                TILES[i][1], TILES[i][2], STAGES,
            )  # fmt: skip


@triton.jit
def _weight_gradient_share(
    x, grad_out, partial, batch, share, shares, height, width, to_row, to_column,
    SIZE: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, TAPS * _COLUMNS)
    tap, column = tl.program_id(1) * TAPS + n // _COLUMNS, n % _COLUMNS
    sums = tl.zeros((2 * WINDOW, TAPS * _COLUMNS), tl.float32)
    for piece in tl.range(share, _pieces(batch, height, width, ROWS), shares, num_stages=STAGES):
        image, row, first = _place(piece, height, width, ROWS)
        window = _tile(
            x + image * 2 * height * width, row, first - (WINDOW - _COLUMNS) // 2, height, width, to_row, to_column,
            2, WINDOW,
        )  # fmt: skip
        # Row i of the taps takes a row to the gradient of the row SIZE // 2 - i further down.
        rows, columns = row[:, None] + (SIZE // 2 - tap)[None, :], first + column
        exist = (rows >= 0) & (rows < height) & ((tap < SIZE) & (columns < width))[None, :]
        place = rows * to_row + (columns * to_column)[None, :]
        grad = tl.load(grad_out + image * height * width + place, mask=exist, other=0.0)
        sums = tl.dot(tl.trans(window), grad, sums, input_precision="tf32x3")
    # A weight's gradient is the sum of a diagonal.
    LINE: tl.constexpr = triton.next_power_of_2(SIZE)
    weight, column = tl.arange(0, 2 * TAPS * LINE), tl.arange(0, _COLUMNS)[:, None]
    channel, i, j = weight // (TAPS * LINE), weight // LINE % TAPS, weight % LINE
    k = column + (WINDOW - _COLUMNS) // 2 + j[None, :] - SIZE // 2
    place = ((channel[None, :] * WINDOW + tl.minimum(tl.maximum(k, 0), WINDOW - 1)) * TAPS + i[None, :]) * _COLUMNS
    sums = tl.gather(tl.reshape(sums, [sums.numel]), tl.reshape(place + column, [place.numel]), 0)
    sums = tl.sum(tl.where((k >= 0) & (k < WINDOW), tl.reshape(sums, place.shape), 0.0), 0)
    partial += (share * tl.num_programs(1) + tl.program_id(1)) * (2 * TAPS * LINE)
    tl.store(partial + weight, sums)


@compiling.kernel(do_not_specialize=["shares"])
def _add_up(
    partials, outs, strides, shares, SIZE: tl.constexpr, TAPS: tl.constexpr, SHARES: tl.constexpr
):  # fmt: skip
    LINE: tl.constexpr = triton.next_power_of_2(SIZE)
    channel, i, j = tl.program_id(0) // SIZE // SIZE, tl.program_id(0) // SIZE % SIZE, tl.program_id(0) % SIZE
    for gate in tl.static_range(len(outs)):
        if tl.program_id(1) == gate:
            share, place = tl.arange(0, SHARES), ((i // TAPS * 2 + channel) * TAPS + i % TAPS) * LINE + j
            sums = tl.zeros((SHARES,), tl.float32)
            for start in range(0, shares, SHARES):
                offsets = (start + share) * (tl.cdiv(SIZE, TAPS) * 2 * TAPS * LINE) + place
                sums += tl.load(partials[gate] + offsets, mask=start + share < shares, other=0.0)
            out = outs[gate] + channel * SIZE * SIZE + i * strides[gate][0] + j * strides[gate][1]
            tl.store(out, tl.sum(sums, 0).to(out.dtype.element_ty))


def _is_wide(height: int, width: int) -> bool:
    return height <= COLUMNS < width


def _strides(weight: Tensor, wide: bool) -> tuple[int, ...]:
    """Return the distances of a weight's rows and of its columns, of the transpose for a wide map."""
    return (weight.mT if wide else weight).stride()[2:]


def _tiling(x: Tensor, weight: Tensor) -> tuple[int, tuple[int, ...], tuple]:
    """Return the number of pieces of maps (B, ..., H, W), the kernels' sizes, and WIDE, ROWS, WINDOW and UNIT."""
    batch, _, lines, line = x.shape
    size, unit, wide = weight.shape[-1], next(n for n in (8, 4, 2, 1) if line % n == 0), _is_wide(lines, line)
    height, width = (line, lines) if wide else (lines, line)
    rows = min(ROWS, max(16, triton.next_power_of_2(height)))
    # A map of a piece's columns is all of the window.
    window = COLUMNS if width <= COLUMNS else triton.next_power_of_2(COLUMNS + 2 * max(8, size // 2))
    pieces = batch * triton.cdiv(height, rows) * triton.cdiv(width, COLUMNS)
    return pieces, (lines, line // unit, weight.stride(1), *_strides(weight, wide)), (wide, rows, window, unit)


def _tilings(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[tuple, tuple, tuple]:
    """Return the same of several maps, each kind side by side."""
    return tuple(zip(*map(_tiling, maps, weights), strict=True))


def _convolve(
    xs: Sequence[Tensor], weights: Sequence[Tensor], outs: Sequence[Tensor], partials: Sequence, turned: bool = False
) -> None:
    pieces, sizes, tiles = _tilings(xs, weights)
    _conv[(sum(pieces),)](
        tuple(xs), tuple(weights), tuple(outs), tuple(partials), sizes, xs[0].shape[0],
        IN=xs[0].shape[1], OUT=outs[0].shape[1], TURNED=turned, SIZE=weights[0].shape[-1], TILES=tiles, STAGES=STAGES,
        num_warps=WARPS,
    )  # fmt: skip


def _convolve_backward(
    grads: Sequence[Tensor], maps: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of maps and of weights."""
    grad_maps, grad_weights = ([t.new_empty(t.shape) for t in ts] for ts in (maps, weights))
    _convolve(grads, weights, grad_maps, [None] * len(maps), True)
    pieces, sizes, tiles = _tilings(maps, weights)
    tiles = tuple((wide, min(rows, GRADIENT_ROWS), window, unit) for wide, rows, window, unit in tiles)
    size, shares = weights[0].shape[-1], min(PROGRAMS, max(pieces))
    line = triton.next_power_of_2(size)
    taps = min(TAPS, line)
    groups = triton.cdiv(size, taps)
    partials = tuple(maps[0].new_empty(shares, groups, 2, taps, line, dtype=torch.float32) for _ in maps)
    _weight_gradient[shares * len(maps), groups](
        tuple(maps), tuple(grads), partials, sizes, maps[0].shape[0], shares, SIZE=size, TAPS=taps, TILES=tiles,
        STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    strides = tuple(_strides(grad, wide) for grad, (wide, *_) in zip(grad_weights, tiles, strict=True))
    _add_up[2 * size * size, len(maps)](
        partials, tuple(grad_weights), strides, shares, SIZE=size, TAPS=taps, SHARES=512
    )
    return grad_maps, grad_weights


def _map_conv(x: Tensor, weight: Tensor) -> Tensor:
    out = _fake(x, weight)
    _convolve([x.contiguous()], [weight], [out], [None])
    return out


def _map_conv_backward(grad_out: Tensor, x: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    (grad_x,), (grad_weight,) = _convolve_backward([grad_out.contiguous()], [x.contiguous()], [weight])
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


def _map_gates(
    maps: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor],
    means: Sequence[Tensor], variances: Sequence[Tensor], share: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Return gates, convolutions, and the gates' means, unbiased variances and inverse deviations.

    Means and variances are those to normalise with, or none for the batch's.
    """
    maps = [x.contiguous() for x in maps]
    *outs, stats = _fake_gates(maps)
    gates, ys, blocks = outs[: len(maps)], outs[len(maps) :], _blocks(maps)
    pieces, sizes, tiles = _tilings(maps, weights)
    partials = tuple(None if means else stats.new_empty(n, 3) for n in pieces)
    running = (tuple(ts) or (None,) * len(maps) for ts in (means, variances))
    _convolve(maps, weights, ys, partials)
    _normalise[(blocks,)](
        tuple(ys), partials, tuple(scales), tuple(shifts), *running, tuple(gates), stats, sizes,
        maps[0].shape[0], share, eps, TILES=tiles, BLOCK=BLOCK, PARTS=PARTS, num_warps=BLOCK_WARPS,
    )  # fmt: skip
    return [*outs, stats]


def _map_gates_backward(
    grads: Sequence[Tensor], maps: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[Tensor],
    shifts: Sequence[Tensor], ys: Sequence[Tensor], stats: Tensor, training: bool, share: float,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of maps, of weights, of scales and of shifts."""
    maps = [x.contiguous() for x in maps]
    grads = [grad if grad[0].is_contiguous() else grad.contiguous() for grad in grads]
    sizes = tuple((y[0].numel(), grad.stride(0)) for y, grad in zip(ys, grads, strict=True))
    blocks, batch = _blocks(maps), maps[0].shape[0]
    partials = tuple(stats.new_empty(batch * triton.cdiv(size, BLOCK), 2) for size, _ in sizes)
    grad_ys, grad_scales, grad_shifts = ([t.new_empty(t.shape) for t in ts] for ts in (ys, scales, shifts))
    inputs = tuple(grads), tuple(ys), tuple(scales), tuple(shifts), stats, partials
    _sums[(blocks,)](*inputs, sizes, batch, share, BLOCK=BLOCK, num_warps=BLOCK_WARPS)
    outs = tuple(grad_ys), tuple(grad_scales), tuple(grad_shifts)
    _through_gate[(blocks,)](
        *inputs, *outs, sizes, batch, share, TRAINING=training, BLOCK=BLOCK, PARTS=PARTS, num_warps=BLOCK_WARPS
    )
    grad_maps, grad_weights = _convolve_backward(grad_ys, maps, weights)
    return [*grad_maps, *grad_weights, *grad_scales, *grad_shifts]


def _blocks(maps: Sequence[Tensor]) -> int:
    return sum(x.shape[0] * triton.cdiv(x[0, 0].numel(), BLOCK) for x in maps)


def _fake_gates(maps, *_):
    outs = [x.new_empty(x.shape[0], 1, *x.shape[2:]) for _ in range(2) for x in maps]
    return [*outs, maps[0].new_empty(3, len(maps), dtype=torch.float32)]


def _fake_gates_backward(grads, maps, weights, scales, shifts, *_):
    return [t.new_empty(t.shape) for t in (*maps, *weights, *scales, *shifts)]


_gates_operator = define("map_gates", _map_gates, _fake_gates)
_gates_backward_operator = define("map_gates_backward", _map_gates_backward, _fake_gates_backward)


@register_flop_formula(torch.ops.densezoo.map_gates)
def _(maps, weights, *args, **kwargs) -> int:
    return sum(2 * x[0] * x[2] * x[3] * weight[-1] ** 2 * x[1] for x, weight in zip(maps, weights, strict=True))


@register_flop_formula(torch.ops.densezoo.map_gates_backward)
def _(grads, maps, weights, *args, **kwargs) -> int:
    return sum(4 * x[0] * x[2] * x[3] * weight[-1] ** 2 * x[1] for x, weight in zip(maps, weights, strict=True))


class _Gates(torch.autograd.Function):
    """The gates of `count` maps, weights, scales and shifts, and means and variances or none; then statistics."""

    @staticmethod
    def forward(ctx, count, share, eps, *tensors):
        inputs = [tensors[i * count : (i + 1) * count] for i in range(6)]
        *outs, stats = (_gates_operator if is_watched(tensors[0]) else _map_gates)(*inputs, share, eps)
        ctx.count, ctx.share, ctx.inputs = count, share, len(tensors)
        ctx.save_for_backward(*tensors[: 4 * count], *outs[count:], stats)
        ctx.mark_non_differentiable(stats)
        return *outs[:count], stats

    @staticmethod
    def backward(ctx, *grads):
        *saved, stats = ctx.saved_tensors
        groups = [saved[i * ctx.count : (i + 1) * ctx.count] for i in range(5)]
        backward = _gates_backward_operator if is_watched(stats) else _map_gates_backward
        training = ctx.inputs == 4 * ctx.count
        results = backward(grads[:-1], *groups, stats, training, ctx.share)
        return None, None, None, *results, *[None] * (ctx.inputs - len(results))


def map_gates_triton(
    maps: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    share: float,
    eps: float,
) -> tuple[list[Tensor], Tensor]:
    """Convolve maps, normalise them over the batch, and take the sigmoid, times `share`.

    Args:
        maps: (B, 2, H, W) each, of other H and W.
        weights: Of the convolutions, (1, 2, k, k) each, k odd and the same.
        scales: Of the norms, (1,) each; `shifts`, too.
        means: To normalise with, (1,) each, beside `variances`; of neither any in training.
        share: A factor of the gates.
        eps: Of the norms.

    Returns:
        Gates (B, 1, H, W), and their means, unbiased variances and inverse deviations, float32 (3, gates).
    """
    # Rows that lie side by side in memory are read as columns.
    turned = [x.stride(-2) < x.stride(-1) for x in maps]
    maps, weights = ([t.mT if turn else t for t, turn in zip(ts, turned, strict=True)] for ts in (maps, weights))
    *gates, stats = _Gates.apply(len(maps), share, eps, *maps, *weights, *scales, *shifts, *means, *variances)
    return [gate.mT if turn else gate for gate, turn in zip(gates, turned, strict=True)], stats
