"""A map scaled by the sum of three gates, each made of its maxima and means over one axis, in Triton.

The three axes are treated alike, so a map is P x Q x R numbers in the order of memory: channels, rows and columns, or
rows, columns and channels.

- `_reduce` reduces the map over each axis: the forward to maximum and sum, the backward to the fraction of a maximum's
  gradient that each of the numbers that equal it gets, and to the sum of the products with the gradient, which is the
  gate's. A program is one warp, so that nothing waits at a barrier. Some walk over a share of P with a vector of
  positions, where all is elementwise; the others own a few planes Q x R, or a stretch of R of them, and walk over Q.
  They read the same numbers, and those of one image follow one another, so that the second reading finds them in L2.
- `_reduce_planes` does so for small planes, and reads the map once. A program owns a share of P of one image, some
  planes at a time, which it reads as they lie in memory, whatever a row's length. Numbers at the same places of them
  are reduced as they come; for Q and R the planes are gathered anew from shared memory, so that each thread has a
  column, or row, of its own.
- `_combine` reduces what programs know of a part of an axis, which they write in float32, always in the same order.
- `_apply` scales: the forward the map; the backward the gradient, to which it adds what comes through the maxima and
  means. A program owns a tile Q x R of one image and walks over a share of P, some planes at a time; its tiles are in
  the order Q, P, R.
- `_apply_planes` does so for small planes, which it reads as `_reduce_planes` does. What belongs to their rows and
  columns each number gathers from shared memory.

So the forward reads the map twice and writes it once, and the backward reads map and gradient twice and writes once.
For this the gradient of the map is computed in one place, `_Pool`, which knows it last: `_Scale` hands over to it all
that its own part takes.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.registration import define, is_watched
from torch import Tensor


class _Launch(NamedTuple):
    """How `_apply` is launched; the share of P is such that there are so many programs."""

    tile: int  # Numbers that a program holds at a time.
    warps: int
    stages: int
    programs: int = 4096


class _PlanesLaunch(NamedTuple):
    """How `_reduce_planes` and `_apply_planes` are launched; the share of P is such that there are so many programs."""

    tile: int  # The most numbers that a program of `_apply_planes` holds at a time.
    lines: int  # The most rows, or columns, that one of `_reduce_planes` does; 0 for `_apply_planes`.
    warps: int
    programs: int


class _ReduceLaunch(NamedTuple):
    """How `_reduce` is launched, on one warp, which must not load ahead: Triton 3.6 leaves out a barrier then."""

    tile: int  # Numbers that a program holds at a time.
    share: int  # Of P.


# Measured on an H200.
LAUNCH = {
    "pool": _ReduceLaunch(1024, 128),
    "scale": _Launch(2048, 4, 1),
    "sums": _ReduceLaunch(256, 64),
    "backward": _Launch(1024, 4, 1),
}
# With planes Q x R of at most SMALL numbers.
SMALL_LAUNCH = {
    "pool": _PlanesLaunch(0, 128, 4, 1024),
    "scale": _PlanesLaunch(2048, 0, 4, 4096),
    "sums": _PlanesLaunch(0, 128, 4, 2048),
    "backward": _PlanesLaunch(1024, 0, 4, 4096),
}
SMALL = 1024
# The most positions at which a program of `_reduce` walks over P, 8 a thread.
POSITIONS = 256


@triton.jit
def _store(out, tops, sums, inverse, place, size, exist, INVERT: tl.constexpr):
    if INVERT:
        # At least one number equals the maximum where there are any.
        tops = 1.0 / tl.maximum(tops, 1.0)
    tl.store(out + place, tops.to(out.dtype.element_ty), mask=exist)
    tl.store(out + size + place, (sums * inverse).to(out.dtype.element_ty), mask=exist)


@triton.jit
def _walk(x, grad, offsets, exist, top, steps, step, UNROLL: tl.constexpr, BACKWARD: tl.constexpr):
    """Reduce numbers along an axis, each thread its own: to maxima and sums, or what `_store` makes fractions of."""
    sums = tl.zeros(offsets.shape, tl.float32)
    tops = sums if BACKWARD else sums + float("-inf")
    for _ in tl.range(0, steps, num_stages=1, loop_unroll_factor=UNROLL):
        tile = tl.load(x + offsets, mask=exist, other=0.0).to(tl.float32)
        if BACKWARD:
            tops = tl.where(tile == top, tops + 1.0, tops)
            tile *= tl.load(grad + offsets, mask=exist, other=0.0).to(tl.float32)
            grad += step
        else:
            tops = tl.maximum(tops, tile)
        sums += tile
        x += step
    return tops, sums


@triton.jit
def _over_p(
    x, grad, pool, out, piece, tiles, p_size, qr_size, share, inverse,
    BACKWARD: tl.constexpr, INVERT: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    part, place = piece // tiles, piece % tiles * POSITIONS + tl.arange(0, POSITIONS)
    exist, top = place < qr_size, None
    x += part * share * qr_size
    if BACKWARD:
        grad += part * share * qr_size
        top = tl.load(pool + place, mask=exist, other=0.0).to(tl.float32)
    left = tl.minimum(share, p_size - part * share)
    tops, sums = _walk(x, grad, place, exist, top, left, qr_size, 8, BACKWARD)
    _store(out + part.to(tl.int64) * 2 * qr_size, tops, sums, inverse, place, qr_size, exist, INVERT)


@triton.jit
def _over_q_and_r(
    x, grad, pool_q, pool_r, out_q, out_r, piece, p_size, q_size, r_size, inverse_q, inverse_r,
    BACKWARD: tl.constexpr, INVERT_R: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    EVEN_P: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_R: tl.constexpr,
):  # fmt: skip
    r_parts = tl.cdiv(r_size, R)
    p, q = piece // r_parts * P + tl.arange(0, P), tl.arange(0, Q)
    r = piece % r_parts * R + tl.arange(0, R)
    p_exist, r_exist = (p < p_size) | EVEN_P, (r < r_size) | EVEN_R
    pr, pr_exist = p[:, None] * r_size + r[None, :], p_exist[:, None] & r_exist[None, :]
    pq = p[:, None] * q_size + q[None, :]
    offsets = (p[:, None] * (q_size * r_size))[:, :, None] + (q[:, None] * r_size + r[None, :])[None, :, :]
    out_r += (piece % r_parts).to(tl.int64) * 2 * p_size * q_size
    sums = tl.zeros((P, Q, R), tl.float32)
    if BACKWARD:
        tops = tl.zeros((P, Q, R), tl.float32)
        top_q = tl.load(pool_q + pr, mask=pr_exist, other=0.0).to(tl.float32)
    else:
        tops = tl.full((P, Q, R), float("-inf"), tl.float32)
    for start in tl.range(0, q_size, Q, num_stages=1):
        q_exist = (start + q < q_size) | EVEN_Q
        pq_exist, real = p_exist[:, None] & q_exist[None, :], q_exist[None, :, None] & r_exist[None, None, :]
        exist = p_exist[:, None, None] & real
        tile = tl.load(x + offsets, mask=exist, other=0.0).to(tl.float32)
        if BACKWARD:
            top_r = tl.load(pool_r + pq, mask=pq_exist, other=0.0).to(tl.float32)
            product = tile * tl.load(grad + offsets, mask=exist, other=0.0).to(tl.float32)
            # What does not exist along the other axis is not stored.
            tops = tl.where((tile == top_q[:, None, :]) & q_exist[None, :, None], tops + 1.0, tops)
            tops_r = tl.sum(tl.where((tile == top_r[:, :, None]) & r_exist[None, None, :], 1.0, 0.0), 2)
            pool_r += Q
            grad += Q * r_size
        else:
            product, tile = tile, tl.where(real, tile, float("-inf"))
            tops, tops_r = tl.maximum(tops, tile), tl.max(tile, 2)
        sums += product
        _store(out_r, tops_r, tl.sum(product, 2), inverse_r, pq, p_size * q_size, pq_exist, INVERT_R)
        out_r += Q
        x += Q * r_size
    tops = tl.sum(tops, 1) if BACKWARD else tl.max(tops, 1)
    _store(out_q, tops, tl.sum(sums, 1), inverse_q, pr, p_size * r_size, pr_exist, BACKWARD)


@compiling.kernel(do_not_specialize=["share"])
def _reduce(
    x, grad, pool_p, pool_q, pool_r, out_p, out_q, out_r, p_size, q_size, r_units, qr_units, share,
    inverse_p, inverse_q, inverse_r,
    BACKWARD: tl.constexpr, INVERT_P: tl.constexpr, INVERT_R: tl.constexpr, UNIT: tl.constexpr, QR_UNIT: tl.constexpr,
    POSITIONS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    EVEN_P: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_R: tl.constexpr,
):  # fmt: skip
    # Multiples of the units in the compiler's eyes: so many numbers are read at once.
    r_size, qr_size = r_units * UNIT, qr_units * QR_UNIT
    tiles, p_parts, r_parts = tl.cdiv(qr_size, POSITIONS), tl.cdiv(p_size, share), tl.cdiv(r_size, R)
    walks, qp_size, pr_size = tiles * p_parts, p_size * q_size, p_size * r_size
    programs = walks + tl.cdiv(p_size, P) * r_parts
    image, piece = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    x += image * p_size * qr_size
    if BACKWARD:
        grad += image * p_size * qr_size
        pool_p += image * 2 * qr_size
        pool_q += image * 2 * pr_size
        pool_r += image * 2 * qp_size
    if piece < walks:
        _over_p(
            x, grad, pool_p, out_p + image * p_parts * 2 * qr_size, piece, tiles, p_size, qr_size, share, inverse_p,
            BACKWARD, INVERT_P, POSITIONS,
        )  # fmt: skip
    else:
        _over_q_and_r(
            x, grad, pool_q, pool_r, out_q + image * 2 * pr_size, out_r + image * r_parts * 2 * qp_size, piece - walks,
            p_size, q_size, r_size, inverse_q, inverse_r, BACKWARD, INVERT_R, P, Q, R, EVEN_P, EVEN_Q, EVEN_R,
        )  # fmt: skip


@triton.jit
def _piece(p_size, q_size, r_size, share, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr):
    """A program's image, tile Q x R and share of P, how many there are of each, and its indices."""
    across, down, along = tl.cdiv(r_size, R), tl.cdiv(q_size, Q), tl.cdiv(p_size, share)
    image, piece = tl.program_id(0) // (across * down * along), tl.program_id(0) % (across * down * along)
    tiles, part = (across, down, along), (piece % across, piece // across % down, piece // (across * down))
    q, r = part[1] * Q + tl.arange(0, Q), part[0] * R + tl.arange(0, R)
    return image.to(tl.int64), tiles, part, tl.arange(0, P), q, r


@triton.jit
def _gathered(tile, place):
    """Numbers of a tile of one axis, at places of any shape."""
    return tl.reshape(tl.gather(tile, tl.reshape(place, [place.numel]), 0), place.shape)


@triton.jit
def _along(tile, grad, top, first, STEPS: tl.constexpr, STEP: tl.constexpr, BACKWARD: tl.constexpr):
    """Reduce the planes that a program holds along rows or columns, each thread its own."""
    step = tl.arange(0, triton.next_power_of_2(STEPS))
    real = (step < STEPS)[:, None]
    place = tl.minimum(step, STEPS - 1)[:, None] * STEP + first[None, :]
    numbers = _gathered(tile, place).to(tl.float32)
    if BACKWARD:
        tops = tl.sum(tl.where(real & (numbers == top[None, :]), 1.0, 0.0), 0)
        numbers *= _gathered(grad, place).to(tl.float32)
    else:
        tops = tl.max(tl.where(real, numbers, float("-inf")), 0)
    return tops, tl.sum(tl.where(real, numbers, 0.0), 0)


@compiling.kernel(do_not_specialize=["steps"])
def _reduce_planes(
    x, grad, pool_p, pool_q, pool_r, out_p, out_q, out_r, p_size, steps, inverse_p, inverse_q, inverse_r,
    BACKWARD: tl.constexpr, INVERT_P: tl.constexpr, INVERT_R: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    R: tl.constexpr, SLOTS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    parts, size = tl.cdiv(p_size, steps * P), p_size * (Q * R)
    image, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    first, left = part * steps * P, tl.minimum(steps * P, p_size - part * steps * P)
    slot, line = tl.arange(0, SLOTS), tl.arange(0, LINES)
    # Where lines begin.
    column = tl.minimum(line // R, P - 1) * (Q * R) + line % R
    row = tl.minimum(line, P * Q - 1) * R
    x += image * size + first * (Q * R)
    out_p += (image * parts + part) * (2 * Q * R)
    to_q, to_r = (image * 2 * p_size + first) * R, (image * 2 * p_size + first) * Q
    out_q, out_r = out_q + to_q, out_r + to_r
    sums = tl.zeros((SLOTS,), tl.float32)
    if BACKWARD:
        grad += image * size + first * (Q * R)
        pool_q, pool_r, tops = pool_q + to_q, pool_r + to_r, sums
        top_p = tl.load(pool_p + image * (2 * Q * R) + slot % (Q * R)).to(tl.float32)
    else:
        tops = sums + float("-inf")
    for start in tl.range(0, left, P, num_stages=1):
        planes = tl.minimum(P, left - start)
        exist, q_exist, r_exist = slot < planes * (Q * R), line < planes * R, line < planes * Q
        tile = tl.load(x + slot, mask=exist, other=0.0)
        numbers = tile.to(tl.float32)
        if BACKWARD:
            tile_grad = tl.load(grad + slot, mask=exist, other=0.0)
            top_q = tl.load(pool_q + line, mask=q_exist, other=0.0).to(tl.float32)
            top_r = tl.load(pool_r + line, mask=r_exist, other=0.0).to(tl.float32)
            tops = tl.where((numbers == top_p) & exist, tops + 1.0, tops)
            sums += numbers * tile_grad.to(tl.float32)
            grad, pool_q, pool_r = grad + P * Q * R, pool_q + P * R, pool_r + P * Q
        else:
            tile_grad, top_q, top_r = None, None, None
            tops = tl.maximum(tops, tl.where(exist, numbers, float("-inf")))
            sums += numbers
        tops_q, sums_q = _along(tile, tile_grad, top_q, column, Q, R, BACKWARD)
        tops_r, sums_r = _along(tile, tile_grad, top_r, row, R, 1, BACKWARD)
        _store(out_q, tops_q, sums_q, inverse_q, line, p_size * R, q_exist, BACKWARD)
        _store(out_r, tops_r, sums_r, inverse_r, line, p_size * Q, r_exist, INVERT_R)
        x, out_q, out_r = x + P * Q * R, out_q + P * R, out_r + P * Q
    position = tl.arange(0, triton.next_power_of_2(Q * R))
    plane = tl.arange(0, triton.next_power_of_2(P))[:, None]
    place = tl.minimum(plane * (Q * R) + position[None, :], SLOTS - 1)
    tops, sums = _gathered(tops, place), tl.sum(tl.where(plane < P, _gathered(sums, place), 0.0), 0)
    if BACKWARD:
        tops = tl.sum(tl.where(plane < P, tops, 0.0), 0)
    else:
        tops = tl.max(tl.where(plane < P, tops, float("-inf")), 0)
    _store(out_p, tops, sums, inverse_p, position, Q * R, position < Q * R, INVERT_P)


@compiling.kernel(do_not_specialize=["parts"])
def _combine(
    partial, out, parts, size, inverse, BACKWARD: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    image, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exist = place < size
    outside = 0.0 if BACKWARD else float("-inf")
    sums = tl.zeros((PARTS, BLOCK), tl.float32)
    tops = tl.full((PARTS, BLOCK), outside, tl.float32)
    partial += image * parts * 2 * size
    for start in range(0, parts, PARTS):
        real = (start + part < parts)[:, None] & exist[None, :]
        offsets = (start + part)[:, None] * (2 * size) + place[None, :]
        top = tl.load(partial + offsets, mask=real, other=outside)
        tops = tops + top if BACKWARD else tl.maximum(tops, top)
        sums += tl.load(partial + size + offsets, mask=real, other=0.0)
    tops = tl.sum(tops, 0) if BACKWARD else tl.max(tops, 0)
    _store(out + image * 2 * size, tops, tl.sum(sums, 0), inverse, place, size, exist, BACKWARD)


@triton.jit
def _load_pool(pool, fractions, grad, place, size, exist):
    """The maxima over an axis, the fractions of their gradients, these gradients, and the means'.

    The first of two maps is that of the maxima.
    """
    top = tl.load(pool + place, mask=exist, other=0.0)
    fraction = tl.load(fractions + place, mask=exist, other=0.0)
    top_grad = tl.load(grad + place, mask=exist, other=0.0)
    return top, fraction, top_grad, tl.load(grad + size + place, mask=exist, other=0.0)


@triton.jit
def _shares(pool, inverse):
    """The maximum over an axis, what each number that equals it gets of its gradient, and all get of the mean's."""
    top, fraction, top_grad, mean_grad = pool
    return top.to(tl.float32), top_grad.to(tl.float32) * fraction.to(tl.float32), mean_grad.to(tl.float32) * inverse


@triton.jit
def _through_pool(pool, fractions, grad, place, size, exist, inverse):
    """What `_shares` says of what `_load_pool` reads."""
    return _shares(_load_pool(pool, fractions, grad, place, size, exist), inverse)


@compiling.kernel(do_not_specialize=["share"])
def _apply(
    x, grad, out, gate_p, gate_q, gate_r, pool_p, pool_q, pool_r, fractions_p, fractions_q, fractions_r,
    grad_p, grad_q, grad_r, p_size, q_size, r_units, share, inverse_p, inverse_q, inverse_r,
    BACKWARD: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr,
    EVEN_P: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    r_size = r_units * UNIT
    image, _, part, p, q, r = _piece(p_size, q_size, r_size, share, P, Q, R)
    first = part[2] * share
    left = tl.minimum(share, p_size - first)
    qp_size, pr_size, qr_size = p_size * q_size, p_size * r_size, q_size * r_size
    q_exist, r_exist = (q < q_size) | EVEN_Q, (r < r_size) | EVEN_R
    qr, qr_exist = q[:, None] * r_size + r[None, :], q_exist[:, None] & r_exist[None, :]
    pr, qp = p[:, None] * r_size + r[None, :], q[:, None] + p[None, :] * q_size
    offsets = qr[:, None, :] + (p * qr_size)[None, :, None]
    scale_p = tl.load(gate_p + image * qr_size + qr, mask=qr_exist, other=0.0).to(tl.float32)
    gate_q += image * pr_size + first * r_size
    gate_r += image * qp_size + first * q_size
    x += image * p_size * qr_size + first * qr_size
    out += image * p_size * qr_size + first * qr_size
    if BACKWARD:
        grad += image * p_size * qr_size + first * qr_size
        pool_q, pool_r = pool_q + image * 2 * pr_size, pool_r + image * 2 * qp_size
        fractions_q, fractions_r = fractions_q + image * 2 * pr_size, fractions_r + image * 2 * qp_size
        grad_q, grad_r = grad_q + image * 2 * pr_size, grad_r + image * 2 * qp_size
        pr_first, qp_first = first * r_size + pr, first * q_size + qp
        top_p, top_grad_p, mean_grad_p = _through_pool(
            pool_p, fractions_p, grad_p, image * 2 * qr_size + qr, qr_size, qr_exist, inverse_p
        )  # fmt: skip
    for start in tl.range(0, left, P, num_stages=STAGES):
        # A condition that EVEN makes true is none to the compiler.
        p_exist = (start + p < left) | EVEN_P
        pr_exist, qp_exist = p_exist[:, None] & r_exist[None, :], q_exist[:, None] & p_exist[None, :]
        exist = qr_exist[:, None, :] & p_exist[None, :, None]
        tile = tl.load(x + offsets, mask=exist, other=0.0)
        scale_q = tl.load(gate_q + pr, mask=pr_exist, other=0.0)
        scale_r = tl.load(gate_r + qp, mask=qp_exist, other=0.0)
        if BACKWARD:
            result = tl.load(grad + offsets, mask=exist, other=0.0)
            of_q = _load_pool(pool_q, fractions_q, grad_q, pr_first, pr_size, pr_exist)
            of_r = _load_pool(pool_r, fractions_r, grad_r, qp_first, qp_size, qp_exist)
        # All that is read is waited for at once; else the compiler, to save registers, waits for one after another.
        tl.debug_barrier()
        tile = tile.to(tl.float32)
        scale = scale_p[:, None, :] + scale_q.to(tl.float32)[None, :, :] + scale_r.to(tl.float32)[:, :, None]
        if BACKWARD:
            result = result.to(tl.float32) * scale
            top_q, top_grad_q, mean_grad_q = _shares(of_q, inverse_q)
            top_r, top_grad_r, mean_grad_r = _shares(of_r, inverse_r)
            result += mean_grad_p[:, None, :] + mean_grad_q[None, :, :] + mean_grad_r[:, :, None]
            result = tl.where(tile == top_p[:, None, :], result + top_grad_p[:, None, :], result)
            result = tl.where(tile == top_q[None, :, :], result + top_grad_q[None, :, :], result)
            result = tl.where(tile == top_r[:, :, None], result + top_grad_r[:, :, None], result)
            grad += P * qr_size
            pr_first += P * r_size
            qp_first += P * q_size
        else:
            result = tile * scale
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=exist)
        x, out, gate_q, gate_r = x + P * qr_size, out + P * qr_size, gate_q + P * r_size, gate_r + P * q_size


@compiling.kernel(do_not_specialize=["steps"])
def _apply_planes(
    x, grad, out, gate_p, gate_q, gate_r, pool_p, pool_q, pool_r, fractions_p, fractions_q, fractions_r,
    grad_p, grad_q, grad_r, p_size, steps, inverse_p, inverse_q, inverse_r,
    BACKWARD: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    parts, size, plane_size = tl.cdiv(p_size, steps * P), p_size * (Q * R), Q * R
    # In reverse, so that L2 holds what `_reduce_planes` has read last.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, part = (program // parts).to(tl.int64), program % parts
    first, left = part * steps * P, tl.minimum(steps * P, p_size - part * steps * P)
    slot, line = tl.arange(0, SLOTS), tl.arange(0, LINES)
    # Of numbers of a unit the compiler sees that they are neighbours.
    UNIT: tl.constexpr = 4 if R % 4 == 0 else 2 if R % 2 == 0 else 1
    unit, place = tl.minimum(slot // UNIT, P * plane_size // UNIT - 1), slot % plane_size
    row = unit // (R // UNIT)
    column = row // Q * R + unit % (R // UNIT) * UNIT + slot % UNIT
    offset, to_q, to_r = image * size + first * plane_size, first * R, first * Q
    x, out = x + offset, out + offset
    gate_q, gate_r = gate_q + image * p_size * R + to_q, gate_r + image * p_size * Q + to_r
    scale_p = tl.load(gate_p + image * plane_size + place).to(tl.float32)
    if BACKWARD:
        grad += offset
        q_maps, r_maps = image * 2 * p_size * R + to_q, image * 2 * p_size * Q + to_r
        pool_q, fractions_q, grad_q = pool_q + q_maps, fractions_q + q_maps, grad_q + q_maps
        pool_r, fractions_r, grad_r = pool_r + r_maps, fractions_r + r_maps, grad_r + r_maps
        top_p, top_grad_p, mean_grad_p = _through_pool(
            pool_p, fractions_p, grad_p, image * 2 * plane_size + place, plane_size, slot >= 0, inverse_p
        )  # fmt: skip
    for start in tl.range(0, left, P, num_stages=1):
        planes = tl.minimum(P, left - start)
        exist, q_exist, r_exist = slot < planes * plane_size, line < planes * R, line < planes * Q
        tile = tl.load(x + slot, mask=exist, other=0.0)
        scale_q = tl.load(gate_q + line, mask=q_exist, other=0.0)
        scale_r = tl.load(gate_r + line, mask=r_exist, other=0.0)
        if BACKWARD:
            result = tl.load(grad + slot, mask=exist, other=0.0)
            of_q = _load_pool(pool_q, fractions_q, grad_q, line, p_size * R, q_exist)
            of_r = _load_pool(pool_r, fractions_r, grad_r, line, p_size * Q, r_exist)
        scale_q, scale_r = _gathered(scale_q.to(tl.float32), column), _gathered(scale_r.to(tl.float32), row)
        tile, scale = tile.to(tl.float32), scale_p + scale_q + scale_r
        if BACKWARD:
            top_q, top_grad_q, mean_grad_q = _shares(of_q, inverse_q)
            top_r, top_grad_r, mean_grad_r = _shares(of_r, inverse_r)
            result = result.to(tl.float32) * scale + mean_grad_p
            result += _gathered(mean_grad_q, column) + _gathered(mean_grad_r, row)
            result = tl.where(tile == top_p, result + top_grad_p, result)
            result = tl.where(tile == _gathered(top_q, column), result + _gathered(top_grad_q, column), result)
            result = tl.where(tile == _gathered(top_r, row), result + _gathered(top_grad_r, row), result)
            grad += P * plane_size
            pool_q, fractions_q, grad_q = pool_q + P * R, fractions_q + P * R, grad_q + P * R
            pool_r, fractions_r, grad_r = pool_r + P * Q, fractions_r + P * Q, grad_r + P * Q
        else:
            result = tile * scale
        tl.store(out + slot, result.to(out.dtype.element_ty), mask=exist)
        x, out = x + P * plane_size, out + P * plane_size
        gate_q, gate_r = gate_q + P * R, gate_r + P * Q


def _unit(size: int) -> int:
    return next(n for n in (8, 4, 2, 1) if size % n == 0)


def _maps(x: Tensor, channels: int) -> list[list[int]]:
    """Return the shapes of maps over each axis of x."""
    batch, *sizes = x.shape
    return [[batch, channels, *sizes[:axis], *sizes[axis + 1 :]] for axis in range(3)]


def _is_small(x: Tensor) -> bool:
    return x.shape[2] * x.shape[3] <= SMALL


def _evens(x: Tensor, *tile: int) -> dict:
    return {f"EVEN_{axis}": size % n == 0 for axis, size, n in zip("PQR", x.shape[1:], tile, strict=True)}


def _tiling(x: Tensor, kind: str) -> tuple[int, tuple[int, int, int], list[int], dict]:
    """Return the number of programs, the parts of each axis, the kernels' sizes, and their constants."""
    (batch, p_size, q_size, r_size), launch = x.shape, LAUNCH[kind]
    p_most, q_most, r_most = (triton.next_power_of_2(size) for size in (p_size, q_size, r_size))
    q_tile = min(q_most, max(1, launch.tile // 256))
    r_tile = min(r_most, launch.tile // q_tile)
    p_tile = min(p_most, launch.tile // (q_tile * r_tile))
    down, across = triton.cdiv(q_size, q_tile), triton.cdiv(r_size, r_tile)
    shares = max(1, launch.programs // (batch * down * across))
    share = triton.cdiv(triton.cdiv(p_size, shares), p_tile) * p_tile
    parts, unit = (triton.cdiv(p_size, share), down, across), _unit(r_size)
    constants = {"P": p_tile, "Q": q_tile, "R": r_tile, "UNIT": unit, **_evens(x, p_tile, q_tile, r_tile)}
    constants |= {"STAGES": launch.stages, "num_warps": launch.warps}
    return batch * math.prod(parts), parts, [p_size, q_size, r_size // unit, share], constants


def _walks(x: Tensor, kind: str) -> tuple[int, tuple[int, int, int], list[int], dict]:
    """Return the same for `_reduce`."""
    (batch, p_size, q_size, r_size), launch = x.shape, LAUNCH[kind]
    positions = min(POSITIONS, triton.next_power_of_2(q_size * r_size))
    r_tile = min(launch.tile, triton.next_power_of_2(r_size))
    q_tile = min(launch.tile // r_tile, triton.next_power_of_2(q_size))
    if q_size % q_tile and q_size % (q_tile // 2) == 0:
        q_tile //= 2
    p_tile = min(launch.tile // (q_tile * r_tile), triton.next_power_of_2(p_size))
    share = min(launch.share, triton.next_power_of_2(p_size))
    parts = triton.cdiv(p_size, share), 1, triton.cdiv(r_size, r_tile)
    programs = triton.cdiv(q_size * r_size, positions) * parts[0] + triton.cdiv(p_size, p_tile) * parts[2]
    unit, qr_unit = _unit(r_size), _unit(q_size * r_size)
    constants = {"POSITIONS": positions, "P": p_tile, "Q": q_tile, "R": r_tile, "UNIT": unit, "QR_UNIT": qr_unit}
    constants |= {"num_warps": 1, "num_stages": 1}
    sizes = [p_size, q_size, r_size // unit, q_size * r_size // qr_unit, share]
    return batch * programs, parts, sizes, constants | _evens(x, p_tile, q_tile, r_tile)


def _planes(x: Tensor, kind: str) -> tuple[int, tuple[int, int, int], list[int], dict]:
    """Return the same for `_reduce_planes` and `_apply_planes`."""
    (batch, p_size, q_size, r_size), launch = x.shape, SMALL_LAUNCH[kind]
    plane, longest = q_size * r_size, max(q_size, r_size)
    p_tile = min(p_size, max(1, launch.lines // longest if launch.lines else launch.tile // plane))
    # Of 4 numbers read at once, none is another program's.
    p_tile -= p_tile % (4 // math.gcd(plane, 4)) if p_tile >= 8 else 0
    steps = triton.cdiv(triton.cdiv(p_size, p_tile), max(1, launch.programs // batch))
    constants = {"SLOTS": triton.next_power_of_2(p_tile * plane), "LINES": triton.next_power_of_2(p_tile * longest)}
    constants |= {"P": p_tile, "Q": q_size, "R": r_size, "num_warps": launch.warps}
    parts = triton.cdiv(p_size, steps * p_tile)
    return batch * parts, (parts, 1, 1), [p_size, steps], constants


def _partial(x: Tensor, parts: int, *shape: int) -> Tensor:
    """Return memory for what is known of the parts of a side; of a single part that is final."""
    return x.new_empty(x.shape[0], parts, *shape, dtype=x.dtype if parts == 1 else torch.float32)


def _combined(x: Tensor, partial: Tensor, inverse: float, backward: bool) -> Tensor:
    """Reduce (B, parts, 2, ...) to (B, 2, ...) in the dtype of x."""
    batch, parts, _, *shape = partial.shape
    if parts == 1:
        return partial[:, 0]
    out, size = x.new_empty(batch, 2, *shape), math.prod(shape)
    constants = {"PARTS": min(16, triton.next_power_of_2(parts)), "BLOCK": 128}
    _combine[batch, triton.cdiv(size, 128)](partial, out, parts, size, inverse, BACKWARD=backward, **constants)
    return out


def _reductions(x: Tensor, grad: Tensor | None, pools: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    backward = grad is not None
    function, tiling = (_reduce_planes, _planes) if _is_small(x) else (_reduce, _walks)
    programs, parts, sizes, constants = tiling(x, "sums" if backward else "pool")
    outs = [_partial(x, n, *shape[1:]) for n, shape in zip(parts, _maps(x, 2), strict=True)]
    inverses = [1.0 if backward else 1 / size for size in x.shape[1:]]
    early = [inverse if n == 1 else 1.0 for inverse, n in zip(inverses, parts, strict=True)]
    inverts = {"INVERT_P": backward and parts[0] == 1, "INVERT_R": backward and parts[2] == 1}
    function[(programs,)](x, grad, *pools, *outs, *sizes, *early, BACKWARD=backward, **inverts, **constants)
    return tuple(_combined(x, out, inverse, backward) for out, inverse in zip(outs, inverses, strict=True))


def _launch_apply(kind: str, x: Tensor, grad: Tensor | None, *maps: Tensor | None) -> Tensor:
    function, tiling = (_apply_planes, _planes) if _is_small(x) else (_apply, _tiling)
    out, (programs, _, sizes, constants) = torch.empty_like(x), tiling(x, kind)
    inverses = [1 / size for size in x.shape[1:]]
    function[(programs,)](x, grad, out, *maps, *sizes, *inverses, BACKWARD=grad is not None, **constants)
    return out


def _pool_axes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _reductions(x.contiguous(), None, [None] * 3)


def _gate_axes(x: Tensor, gates: Sequence[Tensor]) -> Tensor:
    x = x.contiguous()
    maps = *(gate.contiguous() for gate in gates), *[None] * 9
    return _launch_apply("scale", x, None, *maps)


def _gate_axes_sums(grad_out: Tensor, x: Tensor, pools: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return _reductions(x.contiguous(), grad_out.contiguous(), [pool.contiguous() for pool in pools])


def _gate_axes_backward(
    grad_out: Tensor, x: Tensor, gates: Sequence[Tensor], pools: Sequence[Tensor], fractions: Sequence[Tensor],
    grad_pools: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    x = x.contiguous()
    maps = [t.contiguous() for t in (*gates, *pools, *fractions, *grad_pools)]
    return _launch_apply("backward", x, grad_out.contiguous(), *maps)


def _register(function: Callable, fake: Callable) -> Callable:
    """Return the function, called as the operator `densezoo::<its name>` where somebody watches."""
    operator = define(function.__name__[1:], function, fake)

    def call(first: Tensor, *args):
        return (operator if is_watched(first) else function)(first, *args)

    return call


def _fake_pools(x, *_) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(shape) for shape in _maps(x, 2))


def _fake_map(x, *_) -> Tensor:
    return x.new_empty(x.shape)


_pool = _register(_pool_axes, _fake_pools)
_gate = _register(_gate_axes, _fake_map)
_sums = _register(_gate_axes_sums, _fake_pools)
_backward = _register(_gate_axes_backward, _fake_map)


class _Pool(torch.autograd.Function):
    """The maxima and means over each axis, then what `_Scale` takes: x, and empty tensors.

    Their gradients are none: they are what `_Scale` hands over, the gradient of its output, gates, and reductions.
    """

    @staticmethod
    def forward(ctx, x):
        pools = _pool(x)
        ctx.save_for_backward(x, *pools)
        empty = [x.new_empty(()).expand(shape) for channels in (1, 2) for shape in _maps(x, channels)]
        return *pools, x.view_as(x), *empty

    @staticmethod
    def backward(ctx, *grads):
        x, *pools = ctx.saved_tensors
        grad_pools, grad_out, gates, fractions = grads[:3], grads[3], grads[4:7], grads[7:]
        return _backward(grad_out, x, gates, pools, fractions, grad_pools)


class _Scale(torch.autograd.Function):
    """The product of x with the sum of the gates; `pools`, and what `_Pool` gives beside them."""

    @staticmethod
    def forward(ctx, x, *args):
        pools, gates = args[6:9], args[9:]
        ctx.save_for_backward(x, *pools, *gates)
        return _gate(x, gates)

    @staticmethod
    def backward(ctx, grad_out):
        x, *maps = ctx.saved_tensors
        pools, gates = maps[:3], maps[3:]
        sums = _sums(grad_out, x, pools)
        grad_gates = [s[:, 1:] for s in sums]
        return grad_out, *gates, *sums, None, None, None, *grad_gates


def gate_axes_triton(x: Tensor, gates: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Scale x (B, C, H, W) by the sum of three gates.

    Args:
        x: float32, float16 or bfloat16; channels-last memory stays so, other memory becomes contiguous.
        gates: Takes the maxima and means over C (B, 2, H, W), over H (B, 2, C, W) and over W (B, 2, C, H) to gates
            (B, 1, H, W), (B, 1, C, W) and (B, 1, C, H).
    """
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        pools = over_c, over_h, over_w, *rest = _Pool.apply(x)
        return _Scale.apply(*rest, *pools[:3], *gates(over_c, over_h, over_w))
    # In the order of memory the first axis is H and the last C.
    pools = over_h, over_w, over_c, *rest = _Pool.apply(x.permute(0, 2, 3, 1))
    of_hw, of_cw, of_ch = gates(over_c, over_h.mT, over_w.mT)
    return _Scale.apply(*rest, *pools[:3], of_cw.mT, of_ch.mT, of_hw).permute(0, 3, 1, 2)
