"""Neighbourhood attention in Triton, forward and backward.

Work is cut into tiles of TILE_H x TILE_W positions of one dilation group, of one head. The keys that a tile of queries
can see lie in one small rectangle (its halo); a program scores its tile against the halo in chunks of ROWS x COLS keys
with the tensor cores and masks what lies outside of each query's window. The score tile never leaves the chip.

- `_forward`: a program owns one query tile, or a run of tiles that see alike (RUNS), for some images in turn: mask and
  bias are the same for all of them. Tiles below one another see alike where neither border is near, and with dilation
  at the same place of groups of one length, one position apart. Where the halo is one chunk or two (HOIST), mask and
  bias are gathered from the table once; the last chunk has LAST rows. Runs come first, being longest.
- `_backward_query`: the same tiles. It writes the gradient of the queries, and sum(out * grad_out) per query for the
  next kernel. The gradient of the bias is summed over the program's tiles and images in registers, folded along the
  diagonals of equal (key - query) by products with ones, and written as one partial table a program; the next kernel
  sums those: two deterministic stages. Of a halo of more chunks the sums have no room beside the queries' gradient: a
  second launch makes them, with one chunk a program.
- `_backward_key`: a program owns a run of key tiles likewise, and visits the chunks of queries that can see a tile:
  with HOIST as above, or whatever their number. Its first programs sum the partial tables instead. Keys near a
  border are seen from further away, those in the middle of a short axis from both of its ends: there tiles start `pad`
  positions before the map, so that none holds keys of both halves.

Gradients of query, key and value are three tensors, or where the inputs came as one tensor, one like it (GRADS is 3).
Positions outside of the map or the group are clamped to its last member and masked, so that loads need no bounds.
Scores are kept in base 2, scaled by log2(e).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.launch import Table
from densezoo.ops.neighborhood.reference import na2d_qkv_reference, na2d_reference
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LOG2E = 1.4426950408889634
# What may differ from one stage of a model to the next, so that one kernel serves all.
UNSPECIALIZED = ["tiles_w", "before", "stop", "run", "images", "batch", "height", "width", "heads"]


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
def _tile_of(tile, size, pad, DILATION: tl.constexpr, TILE: tl.constexpr):
    """Dilation group, its length and the tile's first rank, from the tile's number on this axis."""
    tiles = tl.cdiv(tl.cdiv(size, DILATION) + pad, TILE)
    group = tile // tiles
    return group, tl.cdiv(size - group, DILATION), tile % tiles * TILE - pad


@triton.jit
def _run_of(slot, size, before, stop, run, pad, DILATION: tl.constexpr, TILE: tl.constexpr, RUNS: tl.constexpr):
    """First tile of a run of up to `run` on an axis, and how many it has; `_runs` says which runs there are."""
    if not RUNS:
        return slot, 1
    if DILATION > 1:
        longer = size % DILATION
        runs_longer = tl.cdiv(longer, run)
        runs = runs_longer + tl.cdiv(DILATION - longer, run)
        place = slot % runs
        group = tl.where(place < runs_longer, place * run, longer + (place - runs_longer) * run)
        count = tl.minimum(run, tl.where(place < runs_longer, longer, DILATION) - group)
        return group * tl.cdiv(tl.cdiv(size, DILATION) + pad, TILE) + slot // runs, count
    tile = before + slot * run
    single = slot - tl.cdiv(stop - before, run)
    alone = tl.where(single < before, single, single - before + stop)
    return tl.where(single < 0, tile, alone), tl.where(single < 0, tl.minimum(run, stop - tile), 1)


@triton.jit
def _turn(turn, first_image, count, STEP: tl.constexpr):
    """Image of a program's turn, and how many rows after the run's first tile its tile lies."""
    # turn // count, without a division each turn; turns and tiles of a run are few.
    images = turn * tl.cdiv(65536, count) >> 16
    return tl.cast(first_image + images, tl.int64), tl.cast((turn - images * count) * STEP, tl.int64)


@triton.jit
def _bias(
    rpb, rank_h, rank_w, exists, key_h, key_w, length_h, length_w,
    K_H: tl.constexpr, K_W: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, C_H: tl.constexpr, C_W: tl.constexpr,
    HAS_RPB: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Bias of each (query, key) pair, -inf where the query does not see the key or does not exist.

    Ranks of queries and of keys broadcast against each other.
    """
    start_h, stop_h = _window(rank_h, length_h, K_H, S_H, C_H)
    start_w, stop_w = _window(rank_w, length_w, K_W, S_W, C_W)
    # One comparison an axis: what lies before the window is a large number without a sign.
    size_h, size_w = tl.where(exists, stop_h - start_h, 0).to(tl.uint32), (stop_w - start_w).to(tl.uint32)
    seen = ((key_h - start_h).to(tl.uint32) < size_h) & ((key_w - start_w).to(tl.uint32) < size_w)
    if HAS_RPB:
        at_key = (key_h + K_H - 1) * (2 * K_W - 1) + key_w + K_W - 1
        entry = at_key - (rank_h * (2 * K_W - 1) + rank_w)
        return (tl.load(rpb + entry, mask=seen, other=float("-inf")).to(tl.float32) * 1.4426950408889634).to(dtype)
    return tl.where(seen, 0.0, float("-inf")).to(dtype)


@triton.jit
def _rows(
    rank_h, rank_w, group_h, group_w, stride_h, stride_w, D_H: tl.constexpr, D_W: tl.constexpr, INDEX: tl.constexpr
):
    """Offsets within an image of positions given by their ranks."""
    return (group_h + rank_h * D_H).to(INDEX) * stride_h + (group_w + rank_w * D_W).to(INDEX) * stride_w


@triton.jit
def _chunk(first_h, first_w, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Ranks of a chunk of ROWS x COLS positions."""
    n = tl.arange(0, ROWS * COLS)
    return first_h + n // COLS, first_w + n % COLS


@triton.jit
def _query_bias(
    rpb, rank_h, rank_w, inside, first_h, first_w, length_h, length_w,
    K_H: tl.constexpr, K_W: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, C_H: tl.constexpr, C_W: tl.constexpr,
    HAS_RPB: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Bias (queries, keys) of a chunk of keys; -inf for queries that are not `inside`."""
    key_h, key_w = _chunk(first_h, first_w, ROWS, COLS)
    # A query beyond the map repeats the last one: it must not count twice in the bias' gradient.
    return _bias(
        rpb, rank_h[:, None], rank_w[:, None], inside[:, None], key_h[None, :], key_w[None, :], length_h, length_w,
        K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, dtype,
    )  # fmt: skip


@triton.jit
def _offsets(
    rank_h, rank_w, length_h, length_w, group_h, group_w, stride_h, stride_w,
    D_H: tl.constexpr, D_W: tl.constexpr, BLOCK_DIM: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Offsets within an image of a chunk's elements, those beyond the group at its last member."""
    rows = _rows(
        tl.minimum(rank_h, length_h - 1), tl.minimum(rank_w, length_w - 1),
        group_h, group_w, stride_h, stride_w, D_H, D_W, INDEX,
    )  # fmt: skip
    return rows[:, None] + tl.arange(0, BLOCK_DIM)[None, :]


@triton.jit
def _forward_chunk(q_tile, k, v, k_rows, bias, top, total, acc, DIM: tl.constexpr, PRECISION: tl.constexpr):
    """Add a chunk of keys to a tile's softmax: its maxima, its sums and its weighted values."""
    d_inside = (tl.arange(0, acc.shape[1]) < DIM)[None, :]
    k_tile = tl.load(k + k_rows, mask=d_inside, other=0.0)
    v_tile = tl.load(v + k_rows, mask=d_inside, other=0.0)
    s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) + bias
    new = tl.maximum(top, tl.max(s, 1))
    # A query may see nothing of the first chunks; -inf must not be subtracted from -inf.
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - safe[:, None])
    decay = tl.exp2(top - safe)
    total = total * decay + tl.sum(p, 1)
    acc = acc * decay[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    return new, total, acc


@compiling.kernel(do_not_specialize=UNSPECIALIZED)
def _forward(
    q, k, v, rpb, out, lse, tiles_w, before, stop, run, images, batch, height, width, heads, scale,
    stride_b, stride_h, stride_w, stride_n,
    K_H: tl.constexpr, K_W: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, D_H: tl.constexpr, D_W: tl.constexpr,
    C_H: tl.constexpr, C_W: tl.constexpr, HAS_RPB: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr,
    LAST: tl.constexpr, HOIST: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    tile_h, count = _run_of(slot // tiles_w, height, before, stop, run, 0, D_H, TILE_H, RUNS)
    group_h, length_h, first_h = _tile_of(tile_h, height, 0, D_H, TILE_H)
    group_w, length_w, first_w = _tile_of(slot % tiles_w, width, 0, D_W, TILE_W)
    if (first_h >= length_h) | (first_w >= length_w):
        return

    m = tl.arange(0, TILE_H * TILE_W)
    inside = (first_h + m // TILE_W < length_h) & (first_w + m % TILE_W < length_w)
    rank_h = tl.minimum(first_h + m // TILE_W, length_h - 1)
    rank_w = tl.minimum(first_w + m % TILE_W, length_w - 1)
    base_h, _ = _window(first_h, length_h, K_H, S_H, C_H)
    base_w, _ = _window(first_w, length_w, K_W, S_W, C_W)
    d = tl.arange(0, BLOCK_DIM)
    d_inside = d < DIM

    dtype = q.dtype.element_ty
    bias_dtype: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    rpb += head * (2 * K_H - 1) * (2 * K_W - 1)
    if HOIST:
        k_rows = ()
        bias = ()
        for c in tl.static_range(CHUNKS):
            key_h, key_w = _chunk(base_h + c * ROWS, base_w, ROWS if c < CHUNKS - 1 else LAST, COLS)
            k_rows += (
                _offsets(
                    key_h, key_w, length_h, length_w, group_h, group_w, stride_h, stride_w, D_H, D_W, BLOCK_DIM, INDEX
                ),
            )
            bias += (
                _query_bias(
                    rpb, rank_h, rank_w, inside, base_h + c * ROWS, base_w, length_h, length_w,
                    K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, ROWS if c < CHUNKS - 1 else LAST, COLS, bias_dtype,
                ),
            )  # fmt: skip

    q_rows = _rows(rank_h, rank_w, group_h, group_w, stride_h, stride_w, D_H, D_W, INDEX)
    token = _rows(rank_h, rank_w, group_h, group_w, width, 1, D_H, D_W, INDEX)
    o_rows = (token * heads * DIM)[:, None] + d[None, :]
    first_image = tl.program_id(1) * images
    for turn in range(tl.minimum(images, batch - first_image) * count):
        image, moved = _turn(turn, first_image, count, TILE_H if D_H == 1 else 1)
        origin = image * stride_b + moved * stride_h + head * stride_n
        q_tile = tl.load(q + origin + (q_rows[:, None] + d[None, :]), mask=d_inside[None, :], other=0.0)
        q_tile = (q_tile * (scale * 1.4426950408889634)).to(dtype)
        top = tl.full((TILE_H * TILE_W,), float("-inf"), tl.float32)
        total = tl.zeros((TILE_H * TILE_W,), tl.float32)
        acc = tl.zeros((TILE_H * TILE_W, BLOCK_DIM), tl.float32)
        if HOIST:
            for c in tl.static_range(CHUNKS):
                top, total, acc = _forward_chunk(
                    q_tile, k + origin, v + origin, k_rows[c], bias[c], top, total, acc, DIM, PRECISION
                )
        else:
            for c in range(CHUNKS):
                key_h, key_w = _chunk(base_h + c * ROWS, base_w, ROWS, COLS)
                k_rows = _offsets(
                    key_h, key_w, length_h, length_w, group_h, group_w, stride_h, stride_w, D_H, D_W, BLOCK_DIM, INDEX
                )
                bias = _query_bias(
                    rpb, rank_h, rank_w, inside, base_h + c * ROWS, base_w, length_h, length_w,
                    K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, ROWS, COLS, bias_dtype,
                )  # fmt: skip
                top, total, acc = _forward_chunk(
                    q_tile, k + origin, v + origin, k_rows, bias, top, total, acc, DIM, PRECISION
                )
        acc *= (1 / total)[:, None]
        first = (image * height + moved) * width * heads + head
        tl.store(out + first * DIM + o_rows, acc.to(dtype), mask=inside[:, None] & d_inside[None, :])
        tl.store(lse + first + token * heads, top + tl.log2(total), mask=inside)


@triton.jit
def _query_chunk(
    q_tile, do_tile, k, v, k_rows, bias, norm, row_delta, acc,
    DIM: tl.constexpr, GRAD_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a tile's scores with a chunk of keys; add its part to the gradient of the queries."""
    d_inside = (tl.arange(0, acc.shape[1]) < DIM)[None, :]
    k_tile = tl.load(k + k_rows, mask=d_inside, other=0.0)
    v_tile = tl.load(v + k_rows, mask=d_inside, other=0.0)
    s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) + bias
    p = tl.exp2(s - norm[:, None])
    dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
    ds = p * (dp - row_delta[:, None])
    if GRAD_Q:
        acc += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    return ds, acc


@triton.jit
def _sums(x, members, EXACT: tl.constexpr):
    """Return x @ members, where they are ones and zeros; not EXACT to 16 bits or more."""
    if EXACT:
        return tl.dot(x, members.to(tl.float32), input_precision="ieee")
    members = members.to(tl.bfloat16)
    high = x.to(tl.bfloat16)
    return tl.dot((x - high.to(tl.float32)).to(tl.bfloat16), members, tl.dot(high, members))


@triton.jit
def _fold(
    grad_bias, shift_h, shift_w, TILE_H: tl.constexpr, TILE_W: tl.constexpr, COLS: tl.constexpr,
    BINS_H: tl.constexpr, BINS_W: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sum gradients of scores (queries, keys) along diagonals, to entries (BINS_W, BINS_H) of the table.

    The entry of the first query and the first key is (shift_h, shift_w).
    """
    ROWS: tl.constexpr = grad_bias.shape[1] // COLS
    pairs = tl.permute(grad_bias.reshape(TILE_H, TILE_W, ROWS, COLS), 0, 2, 1, 3)
    n = tl.arange(0, TILE_W * COLS)
    entry = n % COLS - n // COLS + shift_w
    pairs = _sums(pairs.reshape(TILE_H * ROWS, TILE_W * COLS), entry[:, None] == tl.arange(0, BINS_W)[None, :], EXACT).T
    n = tl.arange(0, TILE_H * ROWS)
    here = (n % ROWS - n // ROWS + shift_h)[:, None] == tl.arange(0, BINS_H)[None, :]
    # Too few for a product.
    if TILE_H * ROWS < 16:
        folded = tl.sum(tl.where(here[None, :, :], pairs[:, :, None], 0.0), 1)
    else:
        folded = _sums(pairs, here, EXACT)
    return folded


@compiling.kernel(do_not_specialize=UNSPECIALIZED)
def _backward_query(
    q, k, v, rpb, out, lse, grad_out, delta, grad_q, partial, tiles_w, before, stop, run, images,
    batch, height, width, heads, scale, stride_b, stride_h, stride_w, stride_n,
    K_H: tl.constexpr, K_W: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, D_H: tl.constexpr, D_W: tl.constexpr,
    C_H: tl.constexpr, C_W: tl.constexpr, HAS_RPB: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr,
    LAST: tl.constexpr, HOIST: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, GRADS: tl.constexpr, GRAD_Q: tl.constexpr, GRAD_RPB: tl.constexpr, BINS_H: tl.constexpr,
    BINS_W: tl.constexpr,
):  # fmt: skip
    """With GRAD_Q over all chunks from that of program axis 2; with GRAD_RPB too only where they are hoisted."""
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    tile_h, count = _run_of(slot // tiles_w, height, before, stop, run, 0, D_H, TILE_H, RUNS)
    group_h, length_h, first_h = _tile_of(tile_h, height, 0, D_H, TILE_H)
    group_w, length_w, first_w = _tile_of(slot % tiles_w, width, 0, D_W, TILE_W)
    bin_h, bin_w = tl.arange(0, BINS_H)[None, :], tl.arange(0, BINS_W)[:, None]
    entry = bin_h * (2 * K_W - 1) + bin_w
    is_entry = (bin_h < 2 * K_H - 1) & (bin_w < 2 * K_W - 1)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    partial += program * ((2 * K_H - 1) * (2 * K_W - 1))
    if (first_h >= length_h) | (first_w >= length_w):
        if GRAD_RPB:
            tl.store(partial + entry, tl.zeros((BINS_W, BINS_H), tl.float32), mask=is_entry)
        return

    m = tl.arange(0, TILE_H * TILE_W)
    inside = (first_h + m // TILE_W < length_h) & (first_w + m % TILE_W < length_w)
    rank_h = tl.minimum(first_h + m // TILE_W, length_h - 1)
    rank_w = tl.minimum(first_w + m % TILE_W, length_w - 1)
    base_h, _ = _window(first_h, length_h, K_H, S_H, C_H)
    base_w, _ = _window(first_w, length_w, K_W, S_W, C_W)
    base_h += tl.program_id(2) * ROWS
    d = tl.arange(0, BLOCK_DIM)
    d_inside = d < DIM

    dtype = q.dtype.element_ty
    bias_dtype: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    rpb += head * (2 * K_H - 1) * (2 * K_W - 1)
    if HOIST:
        k_rows = ()
        bias = ()
        grad_bias = ()
        for c in tl.static_range(CHUNKS):
            key_h, key_w = _chunk(base_h + c * ROWS, base_w, ROWS if c < CHUNKS - 1 else LAST, COLS)
            k_rows += (
                _offsets(
                    key_h, key_w, length_h, length_w, group_h, group_w, stride_h, stride_w, D_H, D_W, BLOCK_DIM, INDEX
                ),
            )
            bias += (
                _query_bias(
                    rpb, rank_h, rank_w, inside, base_h + c * ROWS, base_w, length_h, length_w,
                    K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, ROWS if c < CHUNKS - 1 else LAST, COLS, bias_dtype,
                ),
            )  # fmt: skip
            grad_bias += (tl.zeros((TILE_H * TILE_W, (ROWS if c < CHUNKS - 1 else LAST) * COLS), tl.float32),)

    q_rows = _rows(rank_h, rank_w, group_h, group_w, stride_h, stride_w, D_H, D_W, INDEX)
    token = _rows(rank_h, rank_w, group_h, group_w, width, 1, D_H, D_W, INDEX)
    o_rows = (token * heads * DIM)[:, None] + d[None, :]
    g_rows = (token * GRADS * heads * DIM)[:, None] + d[None, :]
    first_image = tl.program_id(1) * images
    for turn in range(tl.minimum(images, batch - first_image) * count):
        image, moved = _turn(turn, first_image, count, TILE_H if D_H == 1 else 1)
        origin = image * stride_b + moved * stride_h + head * stride_n
        first = (image * height + moved) * width * heads + head
        first_grad = ((image * height + moved) * width * GRADS * heads + head) * DIM
        q_tile = tl.load(q + origin + (q_rows[:, None] + d[None, :]), mask=d_inside[None, :], other=0.0)
        q_tile = (q_tile * (scale * 1.4426950408889634)).to(dtype)
        do_tile = tl.load(grad_out + first * DIM + o_rows, mask=d_inside[None, :], other=0.0)
        norm = tl.load(lse + first + token * heads)
        if GRAD_Q:
            o_tile = tl.load(out + first * DIM + o_rows, mask=d_inside[None, :], other=0.0)
            row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
            tl.store(delta + first + token * heads, row_delta, mask=inside)
        else:
            row_delta = tl.load(delta + first + token * heads)
        acc = tl.zeros((TILE_H * TILE_W, BLOCK_DIM), tl.float32)
        if HOIST:
            summed = ()
            for c in tl.static_range(CHUNKS):
                ds, acc = _query_chunk(
                    q_tile, do_tile, k + origin, v + origin, k_rows[c], bias[c], norm, row_delta, acc,
                    DIM, GRAD_Q, PRECISION,
                )  # fmt: skip
                summed += (grad_bias[c] + ds,)
            grad_bias = summed
        else:
            for c in range(CHUNKS):
                key_h, key_w = _chunk(base_h + c * ROWS, base_w, ROWS, COLS)
                k_rows = _offsets(
                    key_h, key_w, length_h, length_w, group_h, group_w, stride_h, stride_w, D_H, D_W, BLOCK_DIM, INDEX
                )
                bias = _query_bias(
                    rpb, rank_h, rank_w, inside, base_h + c * ROWS, base_w, length_h, length_w,
                    K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, ROWS, COLS, bias_dtype,
                )  # fmt: skip
                ds, acc = _query_chunk(
                    q_tile, do_tile, k + origin, v + origin, k_rows, bias, norm, row_delta, acc, DIM, GRAD_Q, PRECISION
                )
        if GRAD_Q:
            acc *= scale
            tl.store(grad_q + first_grad + g_rows, acc.to(dtype), mask=inside[:, None] & d_inside[None, :])

    if GRAD_RPB:
        folded = tl.zeros((BINS_W, BINS_H), tl.float32)
        for c in tl.static_range(CHUNKS):
            folded += _fold(
                grad_bias[c], base_h + c * ROWS - first_h + K_H - 1, base_w - first_w + K_W - 1,
                TILE_H, TILE_W, COLS, BINS_H, BINS_W, dtype == tl.float32,
            )  # fmt: skip
        tl.store(partial + entry, folded, mask=is_entry)


@triton.jit
def _sum_partial(partial, grad_rpb, columns, rows, COLUMNS: tl.constexpr):
    """Write the sum of the rows of partial tables, for the columns of program axis 0."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, rows, 32):
        row = first + tl.arange(0, 32)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.sum(tl.load(partial + (row[:, None] * columns + column[None, :]), mask=mask, other=0.0), 0)
    tl.store(grad_rpb + column, total.to(grad_rpb.dtype.element_ty), mask=column < columns)


@triton.jit
def _key_bias(
    rpb, low_h, low_w, key_h, key_w, length_h, length_w,
    K_H: tl.constexpr, K_W: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, C_H: tl.constexpr, C_W: tl.constexpr,
    HAS_RPB: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Bias (keys, queries) of a chunk of queries, rounded as the forward has it; -inf for queries that do not exist."""
    rank_h, rank_w = _chunk(low_h, low_w, ROWS, COLS)
    exists = (rank_h < length_h) & (rank_w < length_w)
    rank_h, rank_w = tl.minimum(rank_h, length_h - 1), tl.minimum(rank_w, length_w - 1)
    return _bias(
        rpb, rank_h[None, :], rank_w[None, :], exists[None, :], key_h[:, None], key_w[:, None], length_h, length_w,
        K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, dtype,
    )  # fmt: skip


@triton.jit
def _key_chunk(
    q, grad_out, lse, delta, rank_h, rank_w, bias, k_tile, v_tile, acc_k, acc_v,
    width, heads, length_h, length_w, group_h, group_w, stride_h, stride_w,
    D_H: tl.constexpr, D_W: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Add what a chunk of queries gives to the gradients of a tile of keys and values."""
    dtype = k_tile.dtype
    d = tl.arange(0, BLOCK_DIM)
    d_inside = (d < DIM)[None, :]
    rank_h, rank_w = tl.minimum(rank_h, length_h - 1), tl.minimum(rank_w, length_w - 1)
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


@compiling.kernel(do_not_specialize=["sums", "rows", "pad_h", "pad_w", *UNSPECIALIZED])
def _backward_key(
    q, k, v, rpb, lse, grad_out, delta, grad_k, grad_v, partial, grad_rpb, sums, rows, tiles_w, before, stop,
    run, images, batch, height, width, heads, scale, stride_b, stride_h, stride_w, stride_n, pad_h, pad_w,
    K_H: tl.constexpr, K_W: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, D_H: tl.constexpr, D_W: tl.constexpr,
    C_H: tl.constexpr, C_W: tl.constexpr, HAS_RPB: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr,
    LAST: tl.constexpr, HOIST: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, GRADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0) - sums
    if program < 0:
        if tl.program_id(1) == 0:
            _sum_partial(partial, grad_rpb, heads * ((2 * K_H - 1) * (2 * K_W - 1)), rows, COLUMNS)
        return
    head = program % heads
    slot = program // heads
    tile_h, count = _run_of(slot // tiles_w, height, before, stop, run, pad_h, D_H, TILE_H, RUNS)
    group_h, length_h, first_h = _tile_of(tile_h, height, pad_h, D_H, TILE_H)
    group_w, length_w, first_w = _tile_of(slot % tiles_w, width, pad_w, D_W, TILE_W)
    if (first_h >= length_h) | (first_w >= length_w):
        return

    m = tl.arange(0, TILE_H * TILE_W)
    key_h = tl.minimum(tl.maximum(first_h + m // TILE_W, 0), length_h - 1)
    key_w = tl.minimum(tl.maximum(first_w + m % TILE_W, 0), length_w - 1)
    inside = (first_h + m // TILE_W == key_h) & (first_w + m % TILE_W == key_w)
    last_h, last_w = tl.minimum(first_h + TILE_H, length_h) - 1, tl.minimum(first_w + TILE_W, length_w) - 1
    low_h, high_h = _queries_of(tl.maximum(first_h, 0), last_h, length_h, K_H, S_H, C_H)
    low_w, high_w = _queries_of(tl.maximum(first_w, 0), last_w, length_w, K_W, S_W, C_W)
    d = tl.arange(0, BLOCK_DIM)
    d_inside = d < DIM

    dtype = q.dtype.element_ty
    bias_dtype: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    rpb += head * (2 * K_H - 1) * (2 * K_W - 1)
    if HOIST:
        ranks = ()
        bias = ()
        for c in tl.static_range(CHUNKS):
            ranks += (_chunk(low_h + c * ROWS, low_w, ROWS if c < CHUNKS - 1 else LAST, COLS),)
            chunk_bias = tl.full((TILE_H * TILE_W, (ROWS if c < CHUNKS - 1 else LAST) * COLS), 0, bias_dtype)
            # Windows shift at the borders, so that more queries see the keys there than elsewhere.
            if c == 0 or low_h + c * ROWS <= high_h:
                chunk_bias = _key_bias(
                    rpb, low_h + c * ROWS, low_w, key_h, key_w, length_h, length_w,
                    K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, ROWS if c < CHUNKS - 1 else LAST, COLS, bias_dtype,
                )  # fmt: skip
            bias += (chunk_bias,)

    k_rows = _rows(key_h, key_w, group_h, group_w, stride_h, stride_w, D_H, D_W, INDEX)
    k_rows = k_rows[:, None] + d[None, :]
    token = _rows(key_h, key_w, group_h, group_w, width, 1, D_H, D_W, INDEX)
    g_rows = (token * GRADS * heads * DIM)[:, None] + d[None, :]
    chunks_w = tl.cdiv(high_w - low_w + 1, COLS)
    first_image = tl.program_id(1) * images
    for turn in range(tl.minimum(images, batch - first_image) * count):
        image, moved = _turn(turn, first_image, count, TILE_H if D_H == 1 else 1)
        origin = image * stride_b + moved * stride_h + head * stride_n
        first = (image * height + moved) * width * heads + head
        first_grad = ((image * height + moved) * width * GRADS * heads + head) * DIM
        k_tile = tl.load(k + origin + k_rows, mask=d_inside[None, :], other=0.0)
        k_tile = (k_tile * (scale * 1.4426950408889634)).to(dtype)
        v_tile = tl.load(v + origin + k_rows, mask=d_inside[None, :], other=0.0)
        acc_k = tl.zeros((TILE_H * TILE_W, BLOCK_DIM), tl.float32)
        acc_v = tl.zeros((TILE_H * TILE_W, BLOCK_DIM), tl.float32)
        if HOIST:
            for c in tl.static_range(CHUNKS):
                if c == 0 or low_h + c * ROWS <= high_h:
                    acc_k, acc_v = _key_chunk(
                        q + origin, grad_out + first * DIM, lse + first, delta + first, *ranks[c], bias[c],
                        k_tile, v_tile, acc_k, acc_v, width, heads, length_h, length_w, group_h, group_w,
                        stride_h, stride_w, D_H, D_W, DIM, BLOCK_DIM, PRECISION, INDEX,
                    )  # fmt: skip
        else:
            for c in range(tl.cdiv(high_h - low_h + 1, ROWS) * chunks_w):
                at_h, at_w = low_h + c // chunks_w * ROWS, low_w + c % chunks_w * COLS
                rank_h, rank_w = _chunk(at_h, at_w, ROWS, COLS)
                bias = _key_bias(
                    rpb, at_h, at_w, key_h, key_w, length_h, length_w,
                    K_H, K_W, S_H, S_W, C_H, C_W, HAS_RPB, ROWS, COLS, bias_dtype,
                )  # fmt: skip
                acc_k, acc_v = _key_chunk(
                    q + origin, grad_out + first * DIM, lse + first, delta + first, rank_h, rank_w, bias,
                    k_tile, v_tile, acc_k, acc_v, width, heads, length_h, length_w, group_h, group_w,
                    stride_h, stride_w, D_H, D_W, DIM, BLOCK_DIM, PRECISION, INDEX,
                )  # fmt: skip
        acc_k *= scale
        tl.store(grad_k + first_grad + g_rows, acc_k.to(dtype), mask=inside[:, None] & d_inside[None, :])
        tl.store(grad_v + first_grad + g_rows, acc_v.to(dtype), mask=inside[:, None] & d_inside[None, :])


class _Launch(NamedTuple):
    """A program's tile, positions a chunk, images at most, programs at least; warps, loads in flight, registers.

    Tiles that see alike, up to `run`, take the place of images, where this leaves as many programs.
    """

    tile: tuple[int, int]
    chunk: int
    batch: int
    programs: int
    warps: int
    stages: int
    registers: int | None = None
    run: int = 4


# By kernel and by the shape of a dilation group: at most 8x8, at most 16 wide, or another; measured on an H200. Filling
# the GPU with programs comes before many images a program, which share what is gathered. Never one warp with loads in
# flight: Triton 3.6 then leaves out the barrier after an asynchronous copy, and the warp reads what has not arrived.
LAUNCH = {
    "forward": (_Launch((8, 8), 64, 32, 512, 4, 3), *2 * [_Launch((2, 8), 128, 16, 512, 2, 2, 128)]),
    "backward_query": (_Launch((8, 8), 64, 64, 256, 4, 3), *2 * [_Launch((2, 8), 128, 32, 256, 2, 3)]),
    "backward_key": (
        _Launch((8, 8), 64, 64, 256, 4, 3),
        _Launch((4, 16), 128, 32, 256, 4, 2),
        _Launch((2, 8), 128, 8, 512, 2, 3),
    ),
}
LAUNCH = Table("na2d", LAUNCH)
# For keys that more queries see than the chunks of one program hold.
LAUNCH_MANY = _Launch((2, 8), 64, 1, 1, 2, 3)
# Entries of the bias' gradient that a program sums.
COLUMNS = 64


def _most_queries(size: int, dilation: int, tile: int, kernel_size: int, stride: int, is_causal: bool, pad: int) -> int:
    """Return how many ranks the queries that see a tile of keys span on an axis at most; `_queries_of` says which."""
    most = 0
    for length in {size // dilation, triton.cdiv(size, dilation)}:
        for start in range(-pad, length, tile):
            first, last = max(start, 0), min(start + tile, length) - 1
            if is_causal:
                low, high = first, last + kernel_size - 1
            else:
                low = 0 if first < kernel_size else first - (kernel_size - 1) // 2 - (stride - 1)
                high = length if last >= length - kernel_size else last + kernel_size // 2 + stride - 1
            most = max(most, min(high, length - 1) - max(low, 0) + 1)
    return most


class _Tiling(NamedTuple):
    """A launch.

    `tiles` are its runs of tiles times heads, `groups` those of images; `places` the tiles of the width, how many runs
    lie on the height from which tile to which, and how many tiles and images a program takes at most.
    """

    tiles: int
    groups: int
    places: tuple[int, ...]
    constants: dict


def _padded(size: int, dilation: int, tile: int, *window: int) -> tuple[int, int]:
    """Return how far before an axis its first tile of keys starts, and the span of queries that see a tile."""
    length = triton.cdiv(size, dilation)
    pads = 0, -length % tile // 2
    return min(((pad, _most_queries(size, dilation, tile, *window, pad)) for pad in pads), key=lambda pair: pair[::-1])


def _runs(size: int, dilation: int, tile: int, pad: int, edge: int, seen: int, run: int) -> tuple[int, int, int]:
    """Return how many runs of at most `run` tiles an axis has, and the first and one past the last tile of those.

    A tile is part of a run where it is at least `edge` positions from both borders, and the `seen` positions from its
    first are on the map. Others are runs of one, which come last. With dilation, runs are of groups.
    """
    tiles = triton.cdiv(triton.cdiv(size, dilation) + pad, tile)
    if dilation > 1:
        return tiles * sum(triton.cdiv(n, run) for n in (size % dilation, dilation - size % dilation)), 0, 0
    before = min(triton.cdiv(edge + pad, tile), tiles)
    stop = max((size - max(seen, edge + tile) + pad) // tile + 1, before)
    return before + triton.cdiv(stop - before, run) + tiles - stop, before, stop


def _tiling(
    launch: _Launch, sizes: tuple[int, ...], dilation: tuple[int, int], spans: tuple[int, int],
    alike: tuple[int, int] | None, pads: tuple[int, int] = (0, 0),
) -> _Tiling:  # fmt: skip
    """Return the launch for `sizes`: batch, height, width, heads and bytes of a head; a tile sees `spans` positions.

    Tiles at least alike[0] positions from the upper and lower borders see alike, from alike[1] rows before them on;
    with None, those at the same place of dilated groups alone.
    """
    batch, height, width, heads, nbytes = sizes
    tiles = [
        triton.cdiv(triton.cdiv(size, d) + pad, tile) * d
        for size, d, tile, pad in zip((height, width), dilation, launch.tile, pads, strict=True)
    ]
    programs = heads * tiles[0] * tiles[1]
    cols = max(triton.next_power_of_2(spans[1]), 8)
    # A chunk of keys and one of values lie on the chip: fewer rows where the head is wide or the dtype is.
    most = max(min(launch.chunk, 16384 // nbytes) // cols, 16 // cols, 1)
    rows = max(triton.next_power_of_2(spans[0]), 16 // cols)
    if rows > most or spans[0] * 4 < rows * 3:
        rows = min(most, max(rows // 2, 16 // cols))
    chunks = triton.cdiv(spans[0], rows)
    last = max(triton.next_power_of_2(spans[0] - (chunks - 1) * rows), 16 // cols)
    groups = triton.cdiv(batch, max(min(launch.batch, batch, batch * programs // launch.programs), 1))
    images = max(triton.cdiv(batch, max(groups, 1)), 1)
    run = 1
    if chunks <= 2 and (dilation[0] > 1 or alike is not None):
        run = max(min(launch.batch // images, groups * programs // launch.programs, launch.run), 1)
    edge, before = alike or (0, 0)
    seen = (chunks - 1) * rows + last - before
    runs, *place = _runs(height, dilation[0], launch.tile[0], pads[0], edge, seen, run)
    constants = {
        "TILE_H": launch.tile[0], "TILE_W": launch.tile[1], "ROWS": rows, "COLS": cols, "CHUNKS": chunks, "LAST": last,
        "HOIST": chunks <= 2, "RUNS": run > 1,
        "num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers,
    }  # fmt: skip
    return _Tiling(heads * runs * tiles[1], groups, (tiles[1], *place, run, images), constants)


class _Problem(NamedTuple):
    """What the kernels of a problem share, and the launch of each."""

    constants: dict
    forward: _Tiling
    backward_query: _Tiling
    backward_key: _Tiling


@lru_cache(maxsize=512)
def _problem(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, has_rpb: bool, tf32: bool,
    kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], is_causal: tuple[bool, bool],
) -> _Problem:  # fmt: skip
    batch, height, width, heads, dim = shape
    block_dim = max(16, triton.next_power_of_2(dim))
    extent = sum((size - 1) * step for size, step in zip(shape[1:], strides[1:], strict=True))
    # Three products in tf32 are as accurate as one in float32, and faster on the tensor cores; measured of these heads.
    threefold = dtype == torch.float32 and not tf32 and block_dim == 32
    constants = {
        **dict(zip(("K_H", "K_W", "S_H", "S_W", "D_H", "D_W"), (*kernel_size, *stride, *dilation), strict=True)),
        **dict(zip(("C_H", "C_W"), is_causal, strict=True)),
        "HAS_RPB": has_rpb,
        "DIM": dim,
        "BLOCK_DIM": block_dim,
        "PRECISION": "tf32x3" if threefold else "tf32" if tf32 and dtype == torch.float32 else "ieee",
        # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
        "INDEX": tl.int32 if max(extent, 3 * height * width * heads * dim) < 2**31 else tl.int64,
    }
    lengths = tuple(triton.cdiv(size, d) for size, d in zip((height, width), dilation, strict=True))
    sizes = (batch, height, width, heads, block_dim * dtype.itemsize)
    # Of wide heads only a small tile lies on the chip.
    form = 2 if sizes[-1] > 128 else 0 if max(lengths) <= 8 else 1 if lengths[1] <= 16 else 2

    def fitting(launch: _Launch) -> _Launch:
        # They take the registers of more warps.
        return launch._replace(warps=4, stages=2, registers=None) if threefold else launch

    def spans(launch: _Launch) -> tuple[int, ...]:
        axes = zip(launch.tile, kernel_size, stride, lengths, strict=True)
        return tuple(min(tile + kernel + step - 2, length) for tile, kernel, step, length in axes)

    sees_alike = stride[0] == 1 and not is_causal[0]
    by_query = [fitting(LAUNCH[name, form]) for name in ("forward", "backward_query")]
    alike = (kernel_size[0] // 2, kernel_size[0] // 2) if sees_alike else None
    forward, backward_query = (_tiling(launch, sizes, dilation, spans(launch), alike) for launch in by_query)
    launch = fitting(LAUNCH["backward_key", form])
    axes = zip((height, width), dilation, launch.tile, kernel_size, stride, is_causal, strict=True)
    pads, most = zip(*(_padded(*axis) for axis in axes), strict=True)
    # Queries this far from a border have their windows in the middle.
    alike = (kernel_size[0], (kernel_size[0] - 1) // 2) if sees_alike else None
    backward_key = _tiling(launch, sizes, dilation, most, alike, pads)
    if not backward_key.constants["HOIST"]:
        pads = 0, 0
        backward_key = _tiling(fitting(LAUNCH_MANY), sizes, dilation, spans(LAUNCH_MANY), None)
        backward_key.constants["HOIST"] = False
    backward_key.constants.update(zip(("pad_h", "pad_w"), pads, strict=True))
    return _Problem(constants, forward, backward_query, backward_key)


def _prepare(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, options: tuple) -> tuple:
    """Return the inputs with one set of strides, dense in the last axis, the kernels' sizes, and the problem.

    Views of one qkv tensor pass as they are.
    """
    strides = query.stride()
    if not strides == key.stride() == value.stride() or strides[-1] != 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        strides = query.stride()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    problem = _problem(tuple(query.shape), strides, query.dtype, rpb is not None, tf32, *map(tuple, options))
    return query, key, value, query if rpb is None else rpb.contiguous(), strides[:4], problem


def _na2d(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = (kernel_size, stride, dilation, is_causal)
    query, key, value, table, strides, problem = _prepare(query, key, value, rpb, options)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:4], dtype=torch.float32, device=query.device)
    tiles, groups, places, constants = problem.forward
    _forward[(tiles, groups)](
        query, key, value, table, out, lse, *places, *query.shape[:4], scale, *strides, **problem.constants, **constants
    )
    return out, lse


def _backward(
    grads: tuple[Tensor, ...], packed: int, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor,
    rpb: Tensor | None, out: Tensor, lse: Tensor, options: tuple, scale: float,
) -> Tensor:  # fmt: skip
    """Write the gradients of query, key and value, `packed` of which lie in one tensor; return that of the bias."""
    query, key, value, table, strides, problem = _prepare(query, key, value, rpb, options)
    grad_q, grad_k, grad_v = grads
    grad_out = grad_out.contiguous()
    delta = torch.empty_like(lse)
    sizes = (*query.shape[:4], scale, *strides)

    tiles, groups, places, constants = problem.backward_query
    heads = query.shape[3]
    kernel_size = options[0]
    parts = 1 if constants["HOIST"] else constants["CHUNKS"]
    has_rpb = rpb is not None
    rows = parts * groups * (tiles // heads)
    entries = [2 * k - 1 for k in kernel_size]
    partial = torch.empty((rows, heads, *entries) if has_rpb else 0, dtype=torch.float32, device=query.device)
    bins = [triton.next_power_of_2(n) for n in entries]

    def backward_query(chunks: int, grad_q_too: bool, grad_rpb_too: bool, constants: dict) -> None:
        _backward_query[(tiles, groups, chunks)](
            query, key, value, table, out, lse, grad_out, delta, grad_q, partial, *places, *sizes,
            **problem.constants, **constants,
            GRADS=packed, GRAD_Q=grad_q_too, GRAD_RPB=grad_rpb_too, BINS_H=bins[0], BINS_W=bins[1],
        )  # fmt: skip

    backward_query(1, True, has_rpb and constants["HOIST"], constants)
    if has_rpb and not constants["HOIST"]:
        one_chunk = {"HOIST": True, "CHUNKS": 1, "LAST": constants["ROWS"]}
        backward_query(constants["CHUNKS"], False, True, constants | one_chunk)

    tiles, groups, places, constants = problem.backward_key
    sums = triton.cdiv(heads * entries[0] * entries[1], COLUMNS) if has_rpb else 0
    grad_rpb = torch.empty(partial.shape[1:], dtype=rpb.dtype, device=rpb.device) if has_rpb else partial
    # Of no images too, the sums are written.
    _backward_key[(sums + tiles, max(groups, 1))](
        query, key, value, table, lse, grad_out, delta, grad_k, grad_v, partial, grad_rpb, sums, rows, *places, *sizes,
        **problem.constants, **constants, GRADS=packed, COLUMNS=COLUMNS,
    )  # fmt: skip
    return grad_rpb


def _na2d_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, out: Tensor, lse: Tensor,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = tuple(torch.empty_like(out) for _ in range(3))
    options = (kernel_size, stride, dilation, is_causal)
    return *grads, _backward(grads, 1, grad_out, query, key, value, rpb, out, lse, options, scale)


def _fake(query, key, value, rpb, *options):
    return query.new_empty(query.shape), query.new_empty(query.shape[:4], dtype=torch.float32)


def _fake_backward(grad_out, query, key, value, rpb, *others):
    return *(query.new_empty(query.shape) for _ in range(3)), _fake_grad_rpb(query, rpb)


def _fake_grad_rpb(query, rpb):
    return query.new_empty(0, dtype=torch.float32) if rpb is None else rpb.new_empty(rpb.shape)


_call = register("na2d", _na2d, _fake, _na2d_backward, _fake_backward, na2d_reference)


def _na2d_qkv(
    qkv: Tensor, rpb: Tensor | None,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _na2d(*qkv.unbind(3), rpb, kernel_size, stride, dilation, is_causal, scale)


def _na2d_qkv_backward(
    grad_out: Tensor, qkv: Tensor, rpb: Tensor | None, out: Tensor, lse: Tensor,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    options = (kernel_size, stride, dilation, is_causal)
    return grad_qkv, _backward(grad_qkv.unbind(3), 3, grad_out, *qkv.unbind(3), rpb, out, lse, options, scale)


def _fake_qkv(qkv, rpb, *options):
    return _fake(*qkv.unbind(3), rpb, *options)


def _fake_qkv_backward(grad_out, qkv, rpb, *others):
    return qkv.new_empty(qkv.shape), _fake_grad_rpb(qkv, rpb)


_call_qkv = register(
    "na2d_qkv", _na2d_qkv, _fake_qkv, _na2d_qkv_backward, _fake_qkv_backward, na2d_qkv_reference
)  # fmt: skip


@register_flop_formula(torch.ops.densezoo.na2d)
def _flops(query, key, value, rpb, kernel_size, *args, **kwargs) -> int:
    batch, height, width, heads, dim = query
    # The products with the keys and with the values, each a multiplication and an addition.
    return 4 * batch * height * width * heads * dim * kernel_size[0] * kernel_size[1]


@register_flop_formula(torch.ops.densezoo.na2d_backward)
def _flops_backward(grad_out, query, key, value, rpb, out, lse, kernel_size, *args, **kwargs) -> int:
    batch, height, width, heads, dim = query
    # Five products: the scores once more, and the gradients of query, key, value and weights.
    return 10 * batch * height * width * heads * dim * kernel_size[0] * kernel_size[1]


@register_flop_formula(torch.ops.densezoo.na2d_qkv)
def _(qkv, rpb, kernel_size, *args, **kwargs) -> int:
    return _flops((*qkv[:3], *qkv[4:]), None, None, rpb, kernel_size)


@register_flop_formula(torch.ops.densezoo.na2d_qkv_backward)
def _(grad_out, qkv, rpb, out, lse, kernel_size, *args, **kwargs) -> int:
    return _flops_backward(grad_out, (*qkv[:3], *qkv[4:]), None, None, rpb, out, lse, kernel_size)


def na2d_triton(query, key, value, rpb, kernel_size, stride, dilation, is_causal, scale) -> Tensor:
    """Compute `densezoo.ops.na2d` with the kernels; arguments checked, one entry per axis."""
    return _call(query, key, value, rpb, list(kernel_size), list(stride), list(dilation), list(is_causal), scale)


def na2d_qkv_triton(qkv, rpb, kernel_size, stride, dilation, is_causal, scale) -> Tensor:
    """Compute `densezoo.ops.na2d_qkv` with the kernels; arguments checked, one entry per axis."""
    return _call_qkv(qkv, rpb, list(kernel_size), list(stride), list(dilation), list(is_causal), scale)
