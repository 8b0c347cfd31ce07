"""Neighbourhood attention in Triton, forward and backward.

Work is cut into tiles of TILE_H x TILE_W positions of one dilation group, of one head. The keys that a tile of queries
can see lie in one small rectangle (its halo); a program scores its tile against the halo in chunks of ROWS x COLS keys
with the tensor cores and masks what lies outside of each query's window. The score tile never leaves the chip.

- `_forward`: a program owns one query tile, for BATCH images in turn: mask and bias are the same for all of them and
  are gathered from the table once where the halo is one chunk.
- `_backward_query`: the same tiles. It writes the gradient of the queries, and sum(out * grad_out) per query for the
  next kernel. The gradient of the bias is summed over the program's images in registers, folded along the diagonals
  of equal (key - query), and written as one partial table a program; PyTorch sums those: two deterministic stages.
- `_backward_key`: a program owns one key tile, for BATCH images in turn, and visits the chunks of queries that can see
  it. Where there are two at most, CHUNKS of them, mask and bias are gathered once for all images; 0 stands for more.

Positions outside of the map or the group are clamped to its last member and masked, so that loads need no bounds.
Scores are kept in base 2, scaled by log2(e).
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LOG2E = 1.4426950408889634


@triton.jit
def _window(rank, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """First and one past the last key rank that the query at `rank` sees; `reference.window` says why."""
    leader = rank
    if STRIDE > 1:
        leader = rank // STRIDE * STRIDE + (STRIDE - 1 if CAUSAL else STRIDE // 2)
        leader = tl.minimum(leader, length - 1)
    if CAUSAL:
        start = tl.maximum(leader - KERNEL + 1, 0)
        stop = rank + 1
    else:
        start = tl.minimum(tl.maximum(leader - KERNEL // 2, 0), length - KERNEL)
        stop = start + KERNEL
    return start, stop


@triton.jit
def _queries_of(first, last, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """First and last rank of the queries that can see a key in [first, last] (a superset where STRIDE > 1)."""
    if CAUSAL:
        low = first
        high = tl.minimum(last + KERNEL - 1, length - 1)
    else:
        low = first - (KERNEL - 1) // 2 - (STRIDE - 1)
        low = tl.maximum(tl.where(first < KERNEL, 0, low), 0)
        high = last + KERNEL // 2 + (STRIDE - 1)
        high = tl.minimum(tl.where(last >= length - KERNEL, length - 1, high), length - 1)
    return low, high


@triton.jit
def _tile_of(tile, size, DILATION: tl.constexpr, TILE: tl.constexpr):
    """Dilation group, its length and the tile's first rank, from the tile's number on this axis."""
    tiles = tl.cdiv(tl.cdiv(size, DILATION), TILE)
    group = tile // tiles
    return group, tl.cdiv(size - group, DILATION), tile % tiles * TILE


@triton.jit
def _bias(
    rpb, rank_h, rank_w, key_h, key_w, length_h, length_w,
    K_H: tl.constexpr, K_W: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, C_H: tl.constexpr, C_W: tl.constexpr,
    HAS_RPB: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Bias of each (query, key) pair, -inf where the query does not see the key. Ranks broadcast against each other."""
    start_h, stop_h = _window(rank_h, length_h, K_H, S_H, C_H)
    start_w, stop_w = _window(rank_w, length_w, K_W, S_W, C_W)
    seen = (key_h >= start_h) & (key_h < stop_h) & (key_w >= start_w) & (key_w < stop_w)
    if HAS_RPB:
        entry = (key_h - rank_h + K_H - 1) * (2 * K_W - 1) + key_w - rank_w + K_W - 1
        bias = tl.load(rpb + entry, mask=seen, other=0.0).to(tl.float32) * 1.4426950408889634
    else:
        bias = tl.zeros(seen.shape, tl.float32)
    return tl.where(seen, bias, float("-inf")).to(dtype)


@triton.jit
def _rows(
    rank_h, rank_w, group_h, group_w, stride_h, stride_w, D_H: tl.constexpr, D_W: tl.constexpr, INDEX: tl.constexpr
):
    """Offsets within an image of positions given by their ranks."""
    return (group_h + rank_h * D_H).to(INDEX) * stride_h + (group_w + rank_w * D_W).to(INDEX) * stride_w


@triton.jit
def _forward(
    q, k, v, rpb, out, lse, batch, height, width, heads, scale, stride_b, stride_h, stride_w, stride_n,
    K_H: tl.constexpr, K_W: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, D_H: tl.constexpr, D_W: tl.constexpr,
    C_H: tl.constexpr, C_W: tl.constexpr, HAS_RPB: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr,
    BATCH: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    tiles_w = tl.cdiv(tl.cdiv(width, D_W), TILE_W) * D_W
    group_h, length_h, first_h = _tile_of(tile // tiles_w, height, D_H, TILE_H)
    group_w, length_w, first_w = _tile_of(tile % tiles_w, width, D_W, TILE_W)
    if (first_h >= length_h) | (first_w >= length_w):
        return

    m = tl.arange(0, TILE_H * TILE_W)
    inside = (first_h + m // TILE_W < length_h) & (first_w + m % TILE_W < length_w)
    rank_h = tl.minimum(first_h + m // TILE_W, length_h - 1)
    rank_w = tl.minimum(first_w + m % TILE_W, length_w - 1)
    base_h, _ = _window(first_h, length_h, K_H, S_H, C_H)
    base_w, _ = _window(first_w, length_w, K_W, S_W, C_W)
    n = tl.arange(0, ROWS * COLS)
    key_w = base_w + n % COLS
    d = tl.arange(0, BLOCK_DIM)
    d_inside = d < DIM

    dtype = q.dtype.element_ty
    bias_dtype: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    rpb += head * (2 * K_H - 1) * (2 * K_W - 1)
    if CHUNKS == 1:
        key_h = base_h + n // COLS
        bias = _bias(
            rpb, rank_h[:, None], rank_w[:, None], key_h[None, :], key_w[None, :], length_h, length_w,
            K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, bias_dtype,
        )  # fmt: skip

    q_rows = _rows(rank_h, rank_w, group_h, group_w, stride_h, stride_w, D_H, D_W, INDEX)
    token = _rows(rank_h, rank_w, group_h, group_w, width, 1, D_H, D_W, INDEX)
    o_rows = (token * heads * DIM)[:, None] + d[None, :]
    first_image = tl.program_id(1).to(tl.int64) * BATCH
    for image in range(first_image, tl.minimum(first_image + BATCH, batch)):
        origin = image * stride_b + head * stride_n
        q_tile = tl.load(q + origin + (q_rows[:, None] + d[None, :]), mask=d_inside[None, :], other=0.0)
        q_tile = (q_tile * (scale * 1.4426950408889634)).to(dtype)
        top = tl.full((TILE_H * TILE_W,), float("-inf"), tl.float32)
        total = tl.zeros((TILE_H * TILE_W,), tl.float32)
        acc = tl.zeros((TILE_H * TILE_W, BLOCK_DIM), tl.float32)
        for c in range(CHUNKS):
            key_h = base_h + c * ROWS + n // COLS
            k_rows = _rows(
                tl.minimum(key_h, length_h - 1), tl.minimum(key_w, length_w - 1),
                group_h, group_w, stride_h, stride_w, D_H, D_W, INDEX,
            )  # fmt: skip
            k_rows = k_rows[:, None] + d[None, :]
            k_tile = tl.load(k + origin + k_rows, mask=d_inside[None, :], other=0.0)
            v_tile = tl.load(v + origin + k_rows, mask=d_inside[None, :], other=0.0)
            if CHUNKS > 1:
                bias = _bias(
                    rpb, rank_h[:, None], rank_w[:, None], key_h[None, :], key_w[None, :], length_h, length_w,
                    K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, bias_dtype,
                )  # fmt: skip
            s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) + bias
            new = tl.maximum(top, tl.max(s, 1))
            # A query may see nothing of the first chunks; -inf must not be subtracted from -inf.
            safe = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s - safe[:, None])
            decay = tl.exp2(top - safe)
            total = total * decay + tl.sum(p, 1)
            acc = acc * decay[:, None] + tl.dot(p.to(dtype), v_tile, input_precision=PRECISION)
            top = new
        acc /= total[:, None]
        first = image * height * width * heads + head
        tl.store(out + first * DIM + o_rows, acc.to(dtype), mask=inside[:, None] & d_inside[None, :])
        tl.store(lse + first + token * heads, top + tl.log2(total), mask=inside)


@triton.jit
def _backward_query(
    q, k, v, rpb, out, lse, grad_out, delta, grad_q, partial, batch, height, width, heads, scale,
    stride_b, stride_h, stride_w, stride_n,
    K_H: tl.constexpr, K_W: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, D_H: tl.constexpr, D_W: tl.constexpr,
    C_H: tl.constexpr, C_W: tl.constexpr, HAS_RPB: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr,
    BATCH: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    GRAD_Q: tl.constexpr, GRAD_RPB: tl.constexpr, BINS_H: tl.constexpr, BINS_W: tl.constexpr,
):  # fmt: skip
    """With GRAD_Q over all chunks; with GRAD_RPB over the one chunk of program axis 2, both only where CHUNKS is 1."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    tiles_w = tl.cdiv(tl.cdiv(width, D_W), TILE_W) * D_W
    group_h, length_h, first_h = _tile_of(tile // tiles_w, height, D_H, TILE_H)
    group_w, length_w, first_w = _tile_of(tile % tiles_w, width, D_W, TILE_W)
    if (first_h >= length_h) | (first_w >= length_w):
        return

    m = tl.arange(0, TILE_H * TILE_W)
    inside = (first_h + m // TILE_W < length_h) & (first_w + m % TILE_W < length_w)
    rank_h = tl.minimum(first_h + m // TILE_W, length_h - 1)
    rank_w = tl.minimum(first_w + m % TILE_W, length_w - 1)
    base_h, _ = _window(first_h, length_h, K_H, S_H, C_H)
    base_w, _ = _window(first_w, length_w, K_W, S_W, C_W)
    n = tl.arange(0, ROWS * COLS)
    key_w = base_w + n % COLS
    d = tl.arange(0, BLOCK_DIM)
    d_inside = d < DIM

    dtype = q.dtype.element_ty
    bias_dtype: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    rpb += head * (2 * K_H - 1) * (2 * K_W - 1)
    chunk = tl.program_id(2)
    if GRAD_RPB:
        grad_bias = tl.zeros((TILE_H * TILE_W, ROWS * COLS), tl.float32)
        key_h = base_h + chunk * ROWS + n // COLS
        # A query beyond the map repeats the last one: it must not count twice in the bias' gradient.
        bias = _bias(
            rpb, rank_h[:, None], rank_w[:, None], key_h[None, :], key_w[None, :], length_h, length_w,
            K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, bias_dtype,
        )  # fmt: skip
        bias = tl.where(inside[:, None], bias, float("-inf")).to(bias_dtype)

    q_rows = _rows(rank_h, rank_w, group_h, group_w, stride_h, stride_w, D_H, D_W, INDEX)
    token = _rows(rank_h, rank_w, group_h, group_w, width, 1, D_H, D_W, INDEX)
    o_rows = (token * heads * DIM)[:, None] + d[None, :]
    first_image = tl.program_id(1).to(tl.int64) * BATCH
    for image in range(first_image, tl.minimum(first_image + BATCH, batch)):
        origin = image * stride_b + head * stride_n
        first = image * height * width * heads + head
        q_tile = tl.load(q + origin + (q_rows[:, None] + d[None, :]), mask=d_inside[None, :], other=0.0)
        q_tile = (q_tile * (scale * 1.4426950408889634)).to(dtype)
        do_tile = tl.load(grad_out + first * DIM + o_rows, mask=d_inside[None, :], other=0.0)
        norm = tl.load(lse + first + token * heads)
        if GRAD_Q:
            o_tile = tl.load(out + first * DIM + o_rows, mask=d_inside[None, :], other=0.0)
            row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
            tl.store(delta + first + token * heads, row_delta, mask=inside)
            acc = tl.zeros((TILE_H * TILE_W, BLOCK_DIM), tl.float32)
        else:
            row_delta = tl.load(delta + first + token * heads)
        for c in range(CHUNKS if GRAD_Q else 1):
            key_h = base_h + (c + chunk) * ROWS + n // COLS
            k_rows = _rows(
                tl.minimum(key_h, length_h - 1), tl.minimum(key_w, length_w - 1),
                group_h, group_w, stride_h, stride_w, D_H, D_W, INDEX,
            )  # fmt: skip
            k_rows = k_rows[:, None] + d[None, :]
            k_tile = tl.load(k + origin + k_rows, mask=d_inside[None, :], other=0.0)
            v_tile = tl.load(v + origin + k_rows, mask=d_inside[None, :], other=0.0)
            if not GRAD_RPB:
                bias = _bias(
                    rpb, rank_h[:, None], rank_w[:, None], key_h[None, :], key_w[None, :], length_h, length_w,
                    K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, bias_dtype,
                )  # fmt: skip
            s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) + bias
            p = tl.exp2(s - norm[:, None])
            dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
            ds = p * (dp - row_delta[:, None])
            if GRAD_RPB:
                grad_bias += ds
            if GRAD_Q:
                acc += tl.dot(ds.to(dtype), k_tile, input_precision=PRECISION)
        if GRAD_Q:
            acc *= scale
            tl.store(grad_q + first * DIM + o_rows, acc.to(dtype), mask=inside[:, None] & d_inside[None, :])

    if GRAD_RPB:
        # Fold along the diagonals: bin (a, b) of a query is its key at rank query + (a, b) - (kernel - 1).
        bins = tl.arange(0, BINS_H * BINS_W)
        row = rank_h[:, None] + (bins // BINS_W)[None, :] - (K_H - 1) - base_h - chunk * ROWS
        col = rank_w[:, None] + (bins % BINS_W)[None, :] - (K_W - 1) - base_w
        here = (row >= 0) & (row < ROWS) & (col >= 0) & (col < COLS)
        folded = tl.gather(grad_bias, tl.where(here, row * COLS + col, 0), 1)
        folded = tl.sum(tl.where(here, folded, 0.0), 0)
        program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial + program * (BINS_H * BINS_W) + bins, folded)


@triton.jit
def _queries(low_h, low_w, length_h, length_w, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Ranks of a chunk of queries, clamped to the group, and which of them exist."""
    n = tl.arange(0, ROWS * COLS)
    rank_h = low_h + n // COLS
    rank_w = low_w + n % COLS
    exists = (rank_h < length_h) & (rank_w < length_w)
    return tl.minimum(rank_h, length_h - 1), tl.minimum(rank_w, length_w - 1), exists


@triton.jit
def _key_bias(
    rpb, rank_h, rank_w, exists, key_h, key_w, length_h, length_w,
    K_H: tl.constexpr, K_W: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, C_H: tl.constexpr, C_W: tl.constexpr,
    HAS_RPB: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Bias (keys, queries), rounded as the forward has it; -inf where the query does not exist or see the key."""
    bias = _bias(
        rpb, rank_h[None, :], rank_w[None, :], key_h[:, None], key_w[:, None], length_h, length_w,
        K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, dtype,
    )  # fmt: skip
    return tl.where(exists[None, :], bias, float("-inf"))


@triton.jit
def _key_chunk(
    q, grad_out, lse, delta, rank_h, rank_w, bias, k_tile, v_tile, acc_k, acc_v,
    width, heads, group_h, group_w, stride_h, stride_w,
    D_H: tl.constexpr, D_W: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Add what a chunk of queries gives to the gradients of a tile of keys and values."""
    dtype = k_tile.dtype
    d = tl.arange(0, BLOCK_DIM)
    d_inside = (d < DIM)[None, :]
    q_rows = _rows(rank_h, rank_w, group_h, group_w, stride_h, stride_w, D_H, D_W, INDEX)
    token = _rows(rank_h, rank_w, group_h, group_w, width, 1, D_H, D_W, INDEX)
    q_tile = tl.load(q + (q_rows[:, None] + d[None, :]), mask=d_inside, other=0.0)
    do_tile = tl.load(grad_out + ((token * heads * DIM)[:, None] + d[None, :]), mask=d_inside, other=0.0)
    norm = tl.load(lse + token * heads)
    row_delta = tl.load(delta + token * heads)
    s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION) + bias
    p = tl.exp2(s - norm[None, :])
    acc_v += tl.dot(p.to(dtype), do_tile, input_precision=PRECISION)
    dp = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)
    ds = p * (dp - row_delta[None, :])
    acc_k += tl.dot(ds.to(dtype), q_tile, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit
def _backward_key(
    q, k, v, rpb, lse, grad_out, delta, grad_k, grad_v, batch, height, width, heads, scale,
    stride_b, stride_h, stride_w, stride_n,
    K_H: tl.constexpr, K_W: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, D_H: tl.constexpr, D_W: tl.constexpr,
    C_H: tl.constexpr, C_W: tl.constexpr, HAS_RPB: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr,
    BATCH: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    tiles_w = tl.cdiv(tl.cdiv(width, D_W), TILE_W) * D_W
    group_h, length_h, first_h = _tile_of(tile // tiles_w, height, D_H, TILE_H)
    group_w, length_w, first_w = _tile_of(tile % tiles_w, width, D_W, TILE_W)
    if (first_h >= length_h) | (first_w >= length_w):
        return

    m = tl.arange(0, TILE_H * TILE_W)
    inside = (first_h + m // TILE_W < length_h) & (first_w + m % TILE_W < length_w)
    key_h = tl.minimum(first_h + m // TILE_W, length_h - 1)
    key_w = tl.minimum(first_w + m % TILE_W, length_w - 1)
    low_h, high_h = _queries_of(first_h, tl.minimum(first_h + TILE_H, length_h) - 1, length_h, K_H, S_H, C_H)
    low_w, high_w = _queries_of(first_w, tl.minimum(first_w + TILE_W, length_w) - 1, length_w, K_W, S_W, C_W)
    d = tl.arange(0, BLOCK_DIM)
    d_inside = d < DIM

    dtype = q.dtype.element_ty
    bias_dtype: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    rpb += head * (2 * K_H - 1) * (2 * K_W - 1)
    if CHUNKS:
        rank_h0, rank_w0, exists0 = _queries(low_h, low_w, length_h, length_w, ROWS, COLS)
        bias0 = _key_bias(
            rpb, rank_h0, rank_w0, exists0, key_h, key_w, length_h, length_w,
            K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, bias_dtype,
        )  # fmt: skip
    if CHUNKS == 2:
        rank_h1, rank_w1, exists1 = _queries(low_h + ROWS, low_w, length_h, length_w, ROWS, COLS)
        bias1 = _key_bias(
            rpb, rank_h1, rank_w1, exists1, key_h, key_w, length_h, length_w,
            K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, bias_dtype,
        )  # fmt: skip

    k_rows = _rows(key_h, key_w, group_h, group_w, stride_h, stride_w, D_H, D_W, INDEX)
    k_rows = k_rows[:, None] + d[None, :]
    token = _rows(key_h, key_w, group_h, group_w, width, 1, D_H, D_W, INDEX)
    g_rows = (token * heads * DIM)[:, None] + d[None, :]
    chunks_w = tl.cdiv(high_w - low_w + 1, COLS)
    first_image = tl.program_id(1).to(tl.int64) * BATCH
    for image in range(first_image, tl.minimum(first_image + BATCH, batch)):
        origin = image * stride_b + head * stride_n
        first = image * height * width * heads + head
        k_tile = tl.load(k + origin + k_rows, mask=d_inside[None, :], other=0.0)
        k_tile = (k_tile * (scale * 1.4426950408889634)).to(dtype)
        v_tile = tl.load(v + origin + k_rows, mask=d_inside[None, :], other=0.0)
        acc_k = tl.zeros((TILE_H * TILE_W, BLOCK_DIM), tl.float32)
        acc_v = tl.zeros((TILE_H * TILE_W, BLOCK_DIM), tl.float32)
        if CHUNKS:
            acc_k, acc_v = _key_chunk(
                q + origin, grad_out + first * DIM, lse + first, delta + first, rank_h0, rank_w0, bias0,
                k_tile, v_tile, acc_k, acc_v, width, heads, group_h, group_w, stride_h, stride_w,
                D_H, D_W, DIM, BLOCK_DIM, PRECISION, INDEX,
            )  # fmt: skip
            if CHUNKS == 2:
                if high_h - low_h >= ROWS:
                    acc_k, acc_v = _key_chunk(
                        q + origin, grad_out + first * DIM, lse + first, delta + first, rank_h1, rank_w1, bias1,
                        k_tile, v_tile, acc_k, acc_v, width, heads, group_h, group_w, stride_h, stride_w,
                        D_H, D_W, DIM, BLOCK_DIM, PRECISION, INDEX,
                    )  # fmt: skip
        else:
            for c in range(tl.cdiv(high_h - low_h + 1, ROWS) * chunks_w):
                rank_h, rank_w, exists = _queries(
                    low_h + c // chunks_w * ROWS, low_w + c % chunks_w * COLS, length_h, length_w, ROWS, COLS
                )
                bias = _key_bias(
                    rpb, rank_h, rank_w, exists, key_h, key_w, length_h, length_w,
                    K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, bias_dtype,
                )  # fmt: skip
                acc_k, acc_v = _key_chunk(
                    q + origin, grad_out + first * DIM, lse + first, delta + first, rank_h, rank_w, bias,
                    k_tile, v_tile, acc_k, acc_v, width, heads, group_h, group_w, stride_h, stride_w,
                    D_H, D_W, DIM, BLOCK_DIM, PRECISION, INDEX,
                )  # fmt: skip
        acc_k *= scale
        tl.store(grad_k + first * DIM + g_rows, acc_k.to(dtype), mask=inside[:, None] & d_inside[None, :])
        tl.store(grad_v + first * DIM + g_rows, acc_v.to(dtype), mask=inside[:, None] & d_inside[None, :])


class _Launch(NamedTuple):
    """Tile of queries, keys a chunk at most, images a program at most, warps a program and loads in flight."""

    tile: tuple[int, int]
    chunk: int
    batch: int
    warps: int
    stages: int


# By kernel; measured on an H200. Never one warp with loads in flight: Triton 3.6 then leaves out the barrier after an
# asynchronous copy, and the warp reads what has not arrived.
LAUNCH = {
    "forward": _Launch((2, 8), 128, 8, 2, 3),
    "backward_query": _Launch((2, 8), 128, 8, 2, 3),
    "backward_key": _Launch((2, 8), 128, 8, 2, 2),
}
# Enough programs to fill the GPU come before many images a program.
PROGRAMS = 1024


@cache
def _most_queries(size: int, dilation: int, tile: int, kernel_size: int, stride: int, is_causal: bool) -> int:
    """Return how many ranks the queries that see a tile of keys span on an axis at most; `_queries_of` says which."""
    most = 0
    for length in {size // dilation, triton.cdiv(size, dilation)}:
        for first in range(0, length, tile):
            last = min(first + tile, length) - 1
            if is_causal:
                low, high = first, last + kernel_size - 1
            else:
                low = 0 if first < kernel_size else first - (kernel_size - 1) // 2 - (stride - 1)
                high = length if last >= length - kernel_size else last + kernel_size // 2 + stride - 1
            most = max(most, min(high, length - 1) - max(low, 0) + 1)
    return most


def _strided(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs with one set of strides, dense in the last axis; views of one qkv tensor pass as they are."""
    if query.stride() == key.stride() == value.stride() and query.stride(-1) == 1:
        return query, key, value
    return query.contiguous(), key.contiguous(), value.contiguous()


def _extent(query: Tensor) -> int:
    """Return the largest offset within an image."""
    return sum((size - 1) * stride for size, stride in zip(query.shape[1:], query.stride()[1:], strict=True))


class _Problem:
    """Arguments that the kernels share, and the grid of a launch."""

    def __init__(self, query: Tensor, rpb: Tensor | None, kernel_size, stride, dilation, is_causal, scale: float):
        self.batch, self.height, self.width, self.heads, self.dim = query.shape
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.itemsize = query.itemsize
        self.sizes = (self.height, self.width, self.heads, scale, *query.stride()[:4])
        tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        self.constants = {
            **dict(zip(("K_H", "K_W", "S_H", "S_W", "D_H", "D_W"), (*kernel_size, *stride, *dilation), strict=True)),
            **dict(zip(("C_H", "C_W"), is_causal, strict=True)),
            "HAS_RPB": rpb is not None,
            "DIM": self.dim,
            "BLOCK_DIM": max(16, triton.next_power_of_2(self.dim)),
            "PRECISION": "tf32" if tf32 else "ieee",
            # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
            "INDEX": tl.int32 if max(_extent(query), query.shape[1:].numel()) < 2**31 else tl.int64,
        }

    def tiling(self, launch: _Launch) -> tuple[int, dict]:
        """Return the number of tiles times heads, and the launch's constants with the halo's chunks."""
        tiles = self.heads
        for size, d, tile in zip((self.height, self.width), self.dilation, launch.tile, strict=True):
            tiles *= triton.cdiv(triton.cdiv(size, d), tile) * d
        span_h, span_w = (t + k + s - 2 for t, k, s in zip(launch.tile, self.kernel_size, self.stride, strict=True))
        cols = max(triton.next_power_of_2(span_w), 16)
        # A chunk of keys and one of values lie on the chip: fewer rows where the head is wide or the dtype is.
        chunk = min(launch.chunk, 16384 // (self.constants["BLOCK_DIM"] * self.itemsize))
        rows = min(triton.next_power_of_2(span_h), max(chunk // cols, 1))
        return tiles, {
            "TILE_H": launch.tile[0], "TILE_W": launch.tile[1], "ROWS": rows, "COLS": cols,
            "CHUNKS": triton.cdiv(span_h, rows), "num_warps": launch.warps, "num_stages": launch.stages,
        }  # fmt: skip

    def images(self, tiles: int, launch: _Launch) -> int:
        """Return how many images a program takes: a power of two, so that few kernels are compiled."""
        most = max(1, min(launch.batch, self.batch * tiles // PROGRAMS))
        return 1 << (most.bit_length() - 1)


def _na2d(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    query, key, value = _strided(query, key, value)
    problem = _Problem(query, rpb, kernel_size, stride, dilation, is_causal, scale)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:4], dtype=torch.float32, device=query.device)
    launch = LAUNCH["forward"]
    tiles, constants = problem.tiling(launch)
    images = problem.images(tiles, launch)
    _forward[(tiles, triton.cdiv(problem.batch, images))](
        query, key, value, query if rpb is None else rpb.contiguous(), out, lse,
        problem.batch, *problem.sizes, **problem.constants, **constants, BATCH=images,
    )  # fmt: skip
    return out, lse


def _na2d_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, out: Tensor, lse: Tensor,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, value = _strided(query, key, value)
    grad_out = grad_out.contiguous()
    table = query if rpb is None else rpb.contiguous()
    problem = _Problem(query, rpb, kernel_size, stride, dilation, is_causal, scale)
    grad_q, grad_k, grad_v = (torch.empty_like(out) for _ in range(3))
    delta = torch.empty_like(lse)

    launch = LAUNCH["backward_query"]
    tiles, constants = problem.tiling(launch)
    images = problem.images(tiles, launch)
    groups, chunks = triton.cdiv(problem.batch, images), constants["CHUNKS"]
    bins = [triton.next_power_of_2(2 * k - 1) for k in problem.kernel_size]
    partial = grad_q.new_zeros(0, dtype=torch.float32)
    if rpb is not None:
        # Programs whose group has no such tile write nothing.
        partial = torch.zeros(chunks * groups * (tiles // problem.heads), problem.heads, *bins, device=query.device)

    def backward_query(grid: tuple, grad_q_too: bool, grad_rpb_too: bool) -> None:
        _backward_query[grid](
            query, key, value, table, out, lse, grad_out, delta, grad_q, partial,
            problem.batch, *problem.sizes, **problem.constants, **constants, BATCH=images,
            GRAD_Q=grad_q_too, GRAD_RPB=grad_rpb_too, BINS_H=bins[0], BINS_W=bins[1],
        )  # fmt: skip

    backward_query((tiles, groups, 1), True, rpb is not None and chunks == 1)
    if rpb is not None and chunks > 1:
        backward_query((tiles, groups, chunks), False, True)

    launch = LAUNCH["backward_key"]
    tiles, constants = problem.tiling(launch)
    axes = zip((problem.height, problem.width), dilation, launch.tile, kernel_size, stride, is_causal, strict=True)
    rows, cols = (_most_queries(*axis) for axis in axes)
    chunks = triton.cdiv(rows, constants["ROWS"])
    constants["CHUNKS"] = chunks if chunks <= 2 and cols <= constants["COLS"] else 0
    images = problem.images(tiles, launch)
    _backward_key[(tiles, triton.cdiv(problem.batch, images))](
        query, key, value, table, lse, grad_out, delta, grad_k, grad_v,
        problem.batch, *problem.sizes, **problem.constants, **constants, BATCH=images,
    )  # fmt: skip
    if rpb is None:
        return grad_q, grad_k, grad_v, partial
    entries = tuple(slice(2 * k - 1) for k in problem.kernel_size)
    return grad_q, grad_k, grad_v, partial.sum(0)[(slice(None), *entries)].to(rpb.dtype).contiguous()


def _fake(query, key, value, rpb, *options):
    return query.new_empty(query.shape), query.new_empty(query.shape[:4], dtype=torch.float32)


def _fake_backward(grad_out, query, key, value, rpb, *others):
    grad_rpb = query.new_empty(0, dtype=torch.float32) if rpb is None else rpb.new_empty(rpb.shape)
    return *(query.new_empty(query.shape) for _ in range(3)), grad_rpb


_call = register("na2d", _na2d, _fake, _na2d_backward, _fake_backward)


@register_flop_formula(torch.ops.densezoo.na2d)
def _(query, key, value, rpb, kernel_size, *args, **kwargs) -> int:
    batch, height, width, heads, dim = query
    # The products with the keys and with the values, each a multiplication and an addition.
    return 4 * batch * height * width * heads * dim * kernel_size[0] * kernel_size[1]


@register_flop_formula(torch.ops.densezoo.na2d_backward)
def _(grad_out, query, key, value, rpb, out, lse, kernel_size, *args, **kwargs) -> int:
    batch, height, width, heads, dim = query
    # Five products: the scores once more, and the gradients of query, key, value and weights.
    return 10 * batch * height * width * heads * dim * kernel_size[0] * kernel_size[1]


def na2d_triton(query, key, value, rpb, kernel_size, stride, dilation, is_causal, scale) -> Tensor:
    """Compute `densezoo.ops.na2d` with the kernels; arguments checked, one entry per axis."""
    return _call(query, key, value, rpb, list(kernel_size), list(stride), list(dilation), list(is_causal), scale)
