"""A map scaled by the sum of three gates, each made of its maxima and means over one axis, in Triton.

The three axes are treated alike, so a map is P x Q x R numbers in the order of memory: channels, rows and columns, or
rows, columns and channels. A program owns a tile Q x R of one image, all of both axes where they are short, and walks
over a share of P. Q and R are reduced at every step, P at the end. What a program knows of a part of an axis it writes
in float32, and `_combine` reduces the parts, always in the same order.

- `_reduce` reads the map once and reduces it over each axis: the forward to maximum and sum, the backward to the number
  of maxima, among which their gradient is shared, and the sum of the products with the gradient, which is the gate's.
- `_apply` scales: the forward the map; the backward the gradient, to which it adds what comes through the maxima and
  means.

So the forward reads the map twice and writes it once, and the backward reads map and gradient twice and writes once.
For this the gradient of the map is computed in one place, `_Pool`, which knows it last: `_Scale` hands over to it all
that its own part takes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops.registration import define, is_watched
from torch import Tensor


class _Launch(NamedTuple):
    """How a kernel is launched; the share of P is such that there are so many programs."""

    tile: int  # Elements that a program holds at a time.
    warps: int
    stages: int
    programs: int = 1024


# Measured on an H200.
LAUNCH = {
    "pool": _Launch(4096, 4, 2),
    "scale": _Launch(2048, 8, 1, 4096),
    "sums": _Launch(4096, 8, 2, 512),
    "backward": _Launch(2048, 8, 1, 4096),
}


@triton.jit
def _tile(q_size, r_size, share, Q: tl.constexpr, R: tl.constexpr):
    """A program's share of P, and its tile of Q and R, with their indices among all."""
    across, down = tl.cdiv(r_size, R), tl.cdiv(q_size, Q)
    piece = tl.program_id(1)
    q_tile, r_tile = piece // across % down, piece % across
    return piece // (across * down), q_tile, r_tile, q_tile * Q + tl.arange(0, Q), r_tile * R + tl.arange(0, R)


@triton.jit
def _pair(a, b, a_size, b_size):
    """Places in a map of two axes, and which of them exist."""
    return a[:, None] * b_size + b[None, :], (a < a_size)[:, None] & (b < b_size)[None, :]


@triton.jit
def _store(out, tops, sums, place, size, exist):
    tl.store(out + place, tops.to(out.dtype.element_ty), mask=exist)
    tl.store(out + size + place, sums.to(out.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["share"])
def _reduce(
    x, grad, pool_p, pool_q, pool_r, out_p, out_q, out_r, p_size, q_size, r_units, share,
    inverse_p, inverse_q, inverse_r,
    BACKWARD: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # A multiple of UNIT in the compiler's eyes: so many numbers are read at once.
    r_size = r_units * UNIT
    image = tl.program_id(0).to(tl.int64)
    p_part, q_tile, r_tile, q, r = _tile(q_size, r_size, share, Q, R)
    p_end = tl.minimum((p_part + 1) * share, p_size)
    p_parts, q_parts, r_parts = tl.cdiv(p_size, share), tl.cdiv(q_size, Q), tl.cdiv(r_size, R)
    qp_size, pr_size, qr_size = p_size * q_size, p_size * r_size, q_size * r_size
    x += image * p_size * qr_size
    out_p += (image * p_parts + p_part) * 2 * qr_size
    out_q += (image * q_parts + q_tile) * 2 * pr_size
    out_r += (image * r_parts + r_tile) * 2 * qp_size
    qr, qr_exist = _pair(q, r, q_size, r_size)
    sums = tl.zeros((Q, P, R), tl.float32)
    if BACKWARD:
        grad += image * p_size * qr_size
        pool_q += image * 2 * pr_size
        pool_r += image * 2 * qp_size
        top_p = tl.load(pool_p + image * 2 * qr_size + qr, mask=qr_exist, other=0.0)
        tops = tl.zeros((Q, P, R), tl.float32)
    else:
        tops = tl.full((Q, P, R), float("-inf"), tl.float32)
    for start in tl.range(p_part * share, p_end, P, num_stages=STAGES):
        p = start + tl.arange(0, P)
        pr, pr_exist = _pair(p, r, p_end, r_size)
        qp, qp_exist = p[None, :] * q_size + q[:, None], (q < q_size)[:, None] & (p < p_end)[None, :]
        place, exist = p[None, :, None] * qr_size + qr[:, None, :], qr_exist[:, None, :] & (p < p_end)[None, :, None]
        tile = tl.load(x + place, mask=exist, other=0.0)
        if BACKWARD:
            product = tile.to(tl.float32) * tl.load(grad + place, mask=exist, other=0.0).to(tl.float32)
            top_q = tl.load(pool_q + pr, mask=pr_exist, other=0.0)
            top_r = tl.load(pool_r + qp, mask=qp_exist, other=0.0)
            tops += tl.where((tile == top_p[:, None, :]) & exist, 1.0, 0.0)
            tops_q = tl.sum(tl.where((tile == top_q[None, :, :]) & exist, 1.0, 0.0), 0)
            tops_r = tl.sum(tl.where((tile == top_r[:, :, None]) & exist, 1.0, 0.0), 2)
        else:
            product = tile.to(tl.float32)
            tile = tl.where(exist, product, float("-inf"))
            tops = tl.maximum(tops, tile)
            tops_q, tops_r = tl.max(tile, 0), tl.max(tile, 2)
        sums += product
        _store(out_q, tops_q, tl.sum(product, 0) * inverse_q, pr, pr_size, pr_exist)
        _store(out_r, tops_r, tl.sum(product, 2) * inverse_r, qp, qp_size, qp_exist)
    tops = tl.sum(tops, 1) if BACKWARD else tl.max(tops, 1)
    _store(out_p, tops, tl.sum(sums, 1) * inverse_p, qr, qr_size, qr_exist)


@triton.jit(do_not_specialize=["parts"])
def _combine(partial, out, parts, size, inverse, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exist = place < size
    sums = tl.zeros((BLOCK,), tl.float32)
    tops = tl.zeros((BLOCK,), tl.float32) if BACKWARD else tl.full((BLOCK,), float("-inf"), tl.float32)
    partial += image * parts * 2 * size + place
    for _ in range(parts):
        part = tl.load(partial, mask=exist, other=0.0)
        tops = tops + part if BACKWARD else tl.maximum(tops, part)
        sums += tl.load(partial + size, mask=exist, other=0.0)
        partial += 2 * size
    out += image * 2 * size + place
    tl.store(out, tops.to(out.dtype.element_ty), mask=exist)
    tl.store(out + size, (sums * inverse).to(out.dtype.element_ty), mask=exist)


@triton.jit
def _through_pool(pool, counts, grad, place, size, exist, length):
    """The maximum over an axis, what each number that equals it gets of its gradient, and what all get of the mean's.

    The first of two maps is that of the maxima.
    """
    top = tl.load(pool + place, mask=exist, other=0.0)
    count = tl.load(counts + place, mask=exist, other=1.0).to(tl.float32)
    top_grad = tl.load(grad + place, mask=exist, other=0.0).to(tl.float32) / count
    mean_grad = tl.load(grad + size + place, mask=exist, other=0.0).to(tl.float32) / length
    return top, top_grad, mean_grad


@triton.jit(do_not_specialize=["share"])
def _apply(
    x, grad, out, gate_p, gate_q, gate_r, pool_p, pool_q, pool_r, counts_p, counts_q, counts_r,
    grad_p, grad_q, grad_r, p_size, q_size, r_units, share,
    BACKWARD: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    r_size = r_units * UNIT
    image = tl.program_id(0).to(tl.int64)
    p_part, _, _, q, r = _tile(q_size, r_size, share, Q, R)
    p_end = tl.minimum((p_part + 1) * share, p_size)
    qp_size, pr_size, qr_size = p_size * q_size, p_size * r_size, q_size * r_size
    x += image * p_size * qr_size
    out += image * p_size * qr_size
    gate_q += image * pr_size
    gate_r += image * qp_size
    qr, qr_exist = _pair(q, r, q_size, r_size)
    scale_p = tl.load(gate_p + image * qr_size + qr, mask=qr_exist, other=0.0).to(tl.float32)
    if BACKWARD:
        grad += image * p_size * qr_size
        pool_q, pool_r = pool_q + image * 2 * pr_size, pool_r + image * 2 * qp_size
        counts_q, counts_r = counts_q + image * 2 * pr_size, counts_r + image * 2 * qp_size
        grad_q, grad_r = grad_q + image * 2 * pr_size, grad_r + image * 2 * qp_size
        top_p, top_grad_p, mean_grad_p = _through_pool(
            pool_p, counts_p, grad_p, image * 2 * qr_size + qr, qr_size, qr_exist, p_size
        )  # fmt: skip
    for start in tl.range(p_part * share, p_end, P, num_stages=STAGES):
        p = start + tl.arange(0, P)
        pr, pr_exist = _pair(p, r, p_end, r_size)
        qp, qp_exist = p[None, :] * q_size + q[:, None], (q < q_size)[:, None] & (p < p_end)[None, :]
        place, exist = p[None, :, None] * qr_size + qr[:, None, :], qr_exist[:, None, :] & (p < p_end)[None, :, None]
        tile = tl.load(x + place, mask=exist, other=0.0)
        scale_q = tl.load(gate_q + pr, mask=pr_exist, other=0.0).to(tl.float32)
        scale_r = tl.load(gate_r + qp, mask=qp_exist, other=0.0).to(tl.float32)
        scale = scale_p[:, None, :] + scale_q[None, :, :] + scale_r[:, :, None]
        if BACKWARD:
            result = tl.load(grad + place, mask=exist, other=0.0).to(tl.float32) * scale
            top_q, top_grad_q, mean_grad_q = _through_pool(pool_q, counts_q, grad_q, pr, pr_size, pr_exist, q_size)
            top_r, top_grad_r, mean_grad_r = _through_pool(pool_r, counts_r, grad_r, qp, qp_size, qp_exist, r_size)
            result += mean_grad_p[:, None, :] + mean_grad_q[None, :, :] + mean_grad_r[:, :, None]
            result += tl.where(tile == top_p[:, None, :], top_grad_p[:, None, :], 0.0)
            result += tl.where(tile == top_q[None, :, :], top_grad_q[None, :, :], 0.0)
            result += tl.where(tile == top_r[:, :, None], top_grad_r[:, :, None], 0.0)
        else:
            result = tile.to(tl.float32) * scale
        tl.store(out + place, result.to(out.dtype.element_ty), mask=exist)


def _tiling(x: Tensor, launch: _Launch) -> tuple[tuple[int, int], list[int], list[int], dict]:
    """Return the launch grid, the parts of each axis, the kernels' last arguments, and their constants."""
    batch, *sizes = x.shape
    p_most, q_most, r_most = (triton.next_power_of_2(size) for size in sizes)
    q_tile = min(64, q_most, launch.tile // min(64, r_most))
    r_tile = min(r_most, launch.tile // q_tile)
    p_tile = min(p_most, launch.tile // (q_tile * r_tile))
    q_parts, r_parts = triton.cdiv(sizes[1], q_tile), triton.cdiv(sizes[2], r_tile)
    shares = max(1, launch.programs // (batch * q_parts * r_parts))
    share = triton.cdiv(triton.cdiv(sizes[0], shares), p_tile) * p_tile
    p_parts = triton.cdiv(sizes[0], share)
    unit = next(n for n in (8, 4, 2, 1) if sizes[2] % n == 0)
    constants = {"P": p_tile, "Q": q_tile, "R": r_tile, "UNIT": unit, "STAGES": launch.stages}
    constants["num_warps"] = launch.warps
    arguments = [*sizes[:2], sizes[2] // unit, share]
    return (batch, p_parts * q_parts * r_parts), [p_parts, q_parts, r_parts], arguments, constants


def _maps(x: Tensor, channels: int) -> list[list[int]]:
    """Return the shapes of maps over each axis of x."""
    batch, *sizes = x.shape
    return [[batch, channels, *sizes[:axis], *sizes[axis + 1 :]] for axis in range(3)]


def _reductions(x: Tensor, grad: Tensor | None, pools: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    backward = grad is not None
    grid, parts, sizes, constants = _tiling(x, LAUNCH["sums" if backward else "pool"])
    # Means are known where a program knows the whole axis.
    outs = [
        x.new_empty(x.shape[0], n, *shape[1:], dtype=x.dtype if n == 1 else torch.float32)
        for n, shape in zip(parts, _maps(x, 2), strict=True)
    ]
    inverses = [1.0 if backward else 1 / size for size in x.shape[1:]]
    early = [inverse if n == 1 else 1.0 for inverse, n in zip(inverses, parts, strict=True)]
    _reduce[grid](x, grad, *pools, *outs, *sizes, *early, BACKWARD=backward, **constants)
    results = []
    for out, n, inverse in zip(outs, parts, inverses, strict=True):
        result = out[:, 0] if n == 1 else x.new_empty(out.shape[0], *out.shape[2:])
        if n > 1:
            size = out[0, 0, 0].numel()
            _combine[x.shape[0], triton.cdiv(size, 512)](out, result, n, size, inverse, BACKWARD=backward, BLOCK=512)
        results.append(result)
    return tuple(results)


def _pool_axes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _reductions(x.contiguous(), None, [None] * 3)


def _gate_axes(x: Tensor, gates: Sequence[Tensor]) -> Tensor:
    x = x.contiguous()
    out, (grid, _, sizes, constants) = torch.empty_like(x), _tiling(x, LAUNCH["scale"])
    unused = [None] * 9
    _apply[grid](x, None, out, *(g.contiguous() for g in gates), *unused, *sizes, BACKWARD=False, **constants)
    return out


def _gate_axes_sums(grad_out: Tensor, x: Tensor, pools: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return _reductions(x.contiguous(), grad_out.contiguous(), [pool.contiguous() for pool in pools])


def _gate_axes_backward(
    grad_out: Tensor, x: Tensor, gates: Sequence[Tensor], pools: Sequence[Tensor], counts: Sequence[Tensor],
    grad_pools: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    x = x.contiguous()
    out, (grid, _, sizes, constants) = torch.empty_like(x), _tiling(x, LAUNCH["backward"])
    maps = [t.contiguous() for t in (*gates, *pools, *counts, *grad_pools)]
    _apply[grid](x, grad_out.contiguous(), out, *maps, *sizes, BACKWARD=True, **constants)
    return out


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
        grad_pools, grad_out, gates, counts = grads[:3], grads[3], grads[4:7], grads[7:]
        return _backward(grad_out, x, gates, pools, counts, grad_pools)


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
