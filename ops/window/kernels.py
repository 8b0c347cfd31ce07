"""Window attention in Triton, forward and backward.

Queries, keys and values are read where the projection left them, and no window is ever laid out in memory.

A window of few positions is one tile (`_forward_whole`, `_backward_whole`): scores and softmax stay on the chip from
the first product to the last. A program owns a head and takes windows of all images in turn, the next one's loads in
flight while it computes; the bias is gathered from its table once for all of them. The backward computes the softmax
anew, which costs less than to keep anything of the forward, and writes the gradients of query, key and value as they
were read. It sums the gradient of the bias over its windows in registers, folds it along the diagonals of equal
(key - query) into one partial table a program, and `partials.total` sums those: two deterministic stages.

A larger window is cut into tiles (`_forward_tiles`, `_backward_query`, `_backward_key`, `_backward_bias`): a program
owns a tile of queries, or of keys, and visits the window's other tiles; for the gradient of the bias it owns a pair of
tiles, of windows of all images in turn. The forward keeps each query's normaliser.

Positions beyond the window, which fill up its tile, and beyond the map are seen by no query that counts. As queries
they see every key, so that no softmax is empty; their results are dropped. Scores are in base 2, scaled by log2(e).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.launch import Table, multiprocessors
from densezoo.ops.partials import total
from densezoo.ops.registration import register
from densezoo.ops.window.reference import window_attention_reference
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Sizes differ from map to map and batch to batch: no kernel is compiled anew for one that happens to divide by 16.
SIZES = (
    "batch", "height", "width", "heads", "windows_h", "windows_w", "window_h", "window_w", "shift_h", "shift_w",
    "table_n", "table_h", "table_w",
)  # fmt: skip


@triton.jit
def _rolled_back(number, place, windows, window, shift, GRID: tl.constexpr):
    """Position on one axis of a window's place; beyond the map's last window is behind the seam of the shift."""
    if GRID:
        return place * windows + number
    return number * window + place + shift


@triton.jit
def _positions(
    item, place_h, place_w, height, width, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
    GRID: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Row and column of each place of a window, and the run of positions it belongs to: -1 for none of the map."""
    number = item % (windows_h * windows_w)
    row = _rolled_back(number // windows_w, place_h, windows_h, window_h, shift_h, GRID)
    col = _rolled_back(number % windows_w, place_w, windows_w, window_w, shift_w, GRID)
    run = tl.where(place_h < window_h, 0, -1)
    if MASKED:
        row_behind = row >= windows_h * window_h
        col_behind = col >= windows_w * window_w
        row = tl.where(row_behind, row - windows_h * window_h, row)
        col = tl.where(col_behind, col - windows_w * window_w, col)
        run = 2 * row_behind.to(tl.int32) + col_behind.to(tl.int32)
        run = tl.where((place_h < window_h) & (row < height) & (col < width), run, -1)
    return row, col, run


@triton.jit
def _is_at_border(
    item, height, width, windows_h, windows_w, window_h, window_w, shift_h, shift_w, GRID: tl.constexpr
):  # fmt: skip
    """Whether a window has a seam or positions beyond the map."""
    number = item % (windows_h * windows_w)
    row = _rolled_back(number // windows_w, window_h - 1, windows_h, window_h, shift_h, GRID)
    col = _rolled_back(number % windows_w, window_w - 1, windows_w, window_w, shift_w, GRID)
    return (row >= height) | (col >= width)


@triton.jit
def _bias(
    table, table_h, table_w, query_h, query_w, key_h, key_w, window_h, window_w,
    HAS_BIAS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Bias of each (query, key) pair, -inf where the key is beyond the window. Places broadcast against each other."""
    if HAS_BIAS:
        seen = (query_h < window_h) & (key_h < window_h)
        row = key_h - query_h + window_h - 1
        col = key_w - query_w + window_w - 1
        bias = tl.load(table + row * table_h + col * table_w, mask=seen, other=0.0).to(tl.float32) * 1.4426950408889634
        bias = tl.where(key_h < window_h, bias, float("-inf")).to(dtype)
    else:
        bias = tl.where(key_h < window_h, 0.0, float("-inf"))
    return bias


@triton.jit
def _mask(s, query_run, key_run, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Scores, far down where the key is in another run than the query, or beyond the map.

    The product of what a query does not see with what a key is: the tensor cores take runs from where rows are loaded,
    while each thread would have to hold those of all its scores.
    """
    kind = tl.arange(0, 16)[None, :] - 1
    hidden = tl.where((query_run[:, None] >= 0) & (query_run[:, None] != kind), 32768.0, 0.0).to(dtype)
    is_kind = tl.where(key_run[:, None] == kind, -32768.0, 0.0).to(dtype)
    return tl.dot(hidden, is_kind.T, s, input_precision=PRECISION)


@triton.jit
def _load(base, rows, inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Load a tile of rows, zero where not inside and beyond DIM."""
    d = tl.arange(0, BLOCK_DIM)
    return tl.load(base + (rows[:, None] + d[None, :]), mask=inside[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _store(base, rows, tile, inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Store a tile of rows, where inside and within DIM."""
    d = tl.arange(0, BLOCK_DIM)
    mask = inside[:, None] & (d < DIM)[None, :]
    tl.store(base + (rows[:, None] + d[None, :]), tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _store_folded(partial, grad_bias, query, key, window_h, window_w, TILE: tl.constexpr, BINS: tl.constexpr):
    """Sum along the diagonals of equal (key - query) and store the table; the tile begins at places query and key."""
    m = query + tl.arange(0, TILE)[:, None]
    across = 2 * window_w - 1
    entries = (2 * window_h - 1) * across
    for first in range(0, entries, BINS):
        entry = first + tl.arange(0, BINS)
        key_h = m // window_w + (entry // across)[None, :] - (window_h - 1)
        key_w = m % window_w + (entry % across)[None, :] - (window_w - 1)
        place = key_h * window_w + key_w - key
        here = (m < window_h * window_w) & (key_h >= 0) & (key_h < window_h) & (key_w >= 0) & (key_w < window_w)
        here = here & (place >= 0) & (place < TILE)
        folded = tl.gather(grad_bias, tl.where(here, place, 0), 1)
        tl.store(partial + entry, tl.sum(tl.where(here, folded, 0.0), 0), mask=entry < entries)


@compiling.kernel(do_not_specialize=SIZES)
def _forward_whole(
    qkv, table, out, batch, height, width, heads, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
    table_n, table_h, table_w, scale, stride_b, stride_h, stride_w,
    HAS_BIAS: tl.constexpr, GRID: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    m = tl.arange(0, BLOCK)
    place_h = m // window_w
    place_w = m % window_w
    dtype = qkv.dtype.element_ty
    bias = _bias(
        table + head * table_n, table_h, table_w, place_h[:, None], place_w[:, None], place_h[None, :],
        place_w[None, :], window_h, window_w, HAS_BIAS, tl.float32 if dtype == tl.float32 else tl.float16,
    )  # fmt: skip
    qkv += head * DIM
    out += head * DIM
    windows = windows_h * windows_w
    for item in range(tl.program_id(0) // heads, batch * windows, tl.num_programs(0) // heads):
        row, col, run = _positions(
            item, place_h, place_w, height, width, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
            GRID, MASKED,
        )  # fmt: skip
        inside = run >= 0
        image = (item // windows).to(tl.int64)
        rows = row.to(INDEX) * stride_h + col * stride_w
        base = qkv + image * stride_b
        q = _load(base, rows, inside, DIM, BLOCK_DIM)
        k = _load(base + heads * DIM, rows, inside, DIM, BLOCK_DIM)
        v = _load(base + 2 * heads * DIM, rows, inside, DIM, BLOCK_DIM)
        s = tl.dot(q, k.T, input_precision=PRECISION) * (scale * 1.4426950408889634) + bias
        if MASKED:
            if _is_at_border(item, height, width, windows_h, windows_w, window_h, window_w, shift_h, shift_w, GRID):
                s = _mask(s, run, run, dtype, PRECISION)
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        acc = tl.dot(p.to(dtype), v, input_precision=PRECISION) * (1.0 / tl.sum(p, 1))[:, None]
        token = (row * width + col).to(INDEX)
        _store(out + image * height * width * heads * DIM, token * heads * DIM, acc, inside, DIM, BLOCK_DIM)


@compiling.kernel(do_not_specialize=SIZES)
def _backward_whole(
    qkv, table, grad_out, grad_qkv, partial,
    batch, height, width, heads, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
    table_n, table_h, table_w, scale, stride_b, stride_h, stride_w, grad_b, grad_h, grad_w,
    HAS_BIAS: tl.constexpr, GRID: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    m = tl.arange(0, BLOCK)
    place_h = m // window_w
    place_w = m % window_w
    dtype = qkv.dtype.element_ty
    bias = _bias(
        table + head * table_n, table_h, table_w, place_h[:, None], place_w[:, None], place_h[None, :],
        place_w[None, :], window_h, window_w, HAS_BIAS, tl.float32 if dtype == tl.float32 else tl.float16,
    )  # fmt: skip
    if HAS_BIAS:
        grad_bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    qkv += head * DIM
    grad_out += head * DIM
    grad_qkv += head * DIM
    windows = windows_h * windows_w
    for item in range(tl.program_id(0) // heads, batch * windows, tl.num_programs(0) // heads):
        row, col, run = _positions(
            item, place_h, place_w, height, width, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
            GRID, MASKED,
        )  # fmt: skip
        inside = run >= 0
        image = (item // windows).to(tl.int64)
        rows = row.to(INDEX) * stride_h + col * stride_w
        base = qkv + image * stride_b
        q = _load(base, rows, inside, DIM, BLOCK_DIM)
        k = _load(base + heads * DIM, rows, inside, DIM, BLOCK_DIM)
        v = _load(base + 2 * heads * DIM, rows, inside, DIM, BLOCK_DIM)
        token = (row * width + col).to(INDEX)
        first = image * height * width * heads * DIM
        if DENSE:
            do = _load(grad_out + first, token * heads * DIM, inside, DIM, BLOCK_DIM)
        else:
            do = _load(grad_out + image * grad_b, row.to(INDEX) * grad_h + col * grad_w, inside, DIM, BLOCK_DIM)

        s = tl.dot(q, k.T, input_precision=PRECISION) * (scale * 1.4426950408889634) + bias
        if MASKED:
            if _is_at_border(item, height, width, windows_h, windows_w, window_h, window_w, shift_h, shift_w, GRID):
                s = _mask(s, run, run, dtype, PRECISION)
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        p *= (1.0 / tl.sum(p, 1))[:, None]
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        # The whole row of keys is here: the sum of out * grad_out needs no out.
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if HAS_BIAS:
            grad_bias += ds
        grads = grad_qkv + 3 * first
        token *= 3 * heads * DIM
        dv = tl.dot(p.to(dtype).T, do, input_precision=PRECISION)
        _store(grads + 2 * heads * DIM, token, dv, inside, DIM, BLOCK_DIM)
        ds = ds.to(dtype)
        dk = tl.dot(ds.T, q, input_precision=PRECISION) * scale
        _store(grads + heads * DIM, token, dk, inside, DIM, BLOCK_DIM)
        dq = tl.dot(ds, k, input_precision=PRECISION) * scale
        _store(grads, token, dq, inside, DIM, BLOCK_DIM)

    if HAS_BIAS:
        partial += tl.program_id(0) * (2 * window_h - 1) * (2 * window_w - 1)
        _store_folded(partial, grad_bias, 0, 0, window_h, window_w, BLOCK, BINS)


@compiling.kernel(do_not_specialize=SIZES)
def _forward_tiles(
    qkv, table, out, lse, batch, height, width, heads, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
    table_n, table_h, table_w, scale, stride_b, stride_h, stride_w,
    HAS_BIAS: tl.constexpr, GRID: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(window_h * window_w, TILE)
    head = tl.program_id(0) % heads
    item = tl.program_id(0) // heads // tiles
    m = tl.program_id(0) // heads % tiles * TILE + tl.arange(0, TILE)
    row, col, run = _positions(
        item, m // window_w, m % window_w, height, width, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
        GRID, MASKED,
    )  # fmt: skip
    inside = run >= 0
    dtype = qkv.dtype.element_ty
    image = (item // (windows_h * windows_w)).to(tl.int64)
    base = qkv + image * stride_b + head * DIM
    q = _load(base, row.to(INDEX) * stride_h + col * stride_w, inside, DIM, BLOCK_DIM)
    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, BLOCK_DIM), tl.float32)
    for tile in range(tiles):
        n = tile * TILE + tl.arange(0, TILE)
        key_row, key_col, key_run = _positions(
            item, n // window_w, n % window_w, height, width, windows_h, windows_w, window_h, window_w,
            shift_h, shift_w, GRID, MASKED,
        )  # fmt: skip
        key_rows = key_row.to(INDEX) * stride_h + key_col * stride_w
        k = _load(base + heads * DIM, key_rows, key_run >= 0, DIM, BLOCK_DIM)
        v = _load(base + 2 * heads * DIM, key_rows, key_run >= 0, DIM, BLOCK_DIM)
        s = tl.dot(q, k.T, input_precision=PRECISION) * (scale * 1.4426950408889634) + _bias(
            table + head * table_n, table_h, table_w, (m // window_w)[:, None], (m % window_w)[:, None],
            (n // window_w)[None, :], (n % window_w)[None, :], window_h, window_w, HAS_BIAS, tl.float32,
        )  # fmt: skip
        if MASKED:
            s = _mask(s, run, key_run, dtype, PRECISION)
        new = tl.maximum(top, tl.max(s, 1))
        # A query may see nothing of the first tiles; -inf must not be subtracted from -inf.
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[:, None])
        decay = tl.exp2(top - safe)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None] + tl.dot(p.to(dtype), v, input_precision=PRECISION)
        top = new
    token = (row * width + col).to(INDEX)
    first = image * height * width * heads + head
    _store(out + first * DIM, token * heads * DIM, acc / total[:, None], inside, DIM, BLOCK_DIM)
    tl.store(lse + first + token * heads, top + tl.log2(total), mask=inside)


@compiling.kernel(do_not_specialize=SIZES)
def _backward_query(
    qkv, table, out, lse, grad_out, delta, grad_qkv,
    batch, height, width, heads, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
    table_n, table_h, table_w, scale, stride_b, stride_h, stride_w, grad_b, grad_h, grad_w,
    HAS_BIAS: tl.constexpr, GRID: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, and the sum of out * grad_out of each for the kernels that follow."""
    tiles = tl.cdiv(window_h * window_w, TILE)
    head = tl.program_id(0) % heads
    item = tl.program_id(0) // heads // tiles
    m = tl.program_id(0) // heads % tiles * TILE + tl.arange(0, TILE)
    row, col, run = _positions(
        item, m // window_w, m % window_w, height, width, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
        GRID, MASKED,
    )  # fmt: skip
    inside = run >= 0
    dtype = qkv.dtype.element_ty
    image = (item // (windows_h * windows_w)).to(tl.int64)
    base = qkv + image * stride_b + head * DIM
    q = _load(base, row.to(INDEX) * stride_h + col * stride_w, inside, DIM, BLOCK_DIM)
    token = (row * width + col).to(INDEX)
    first = image * height * width * heads + head
    o = _load(out + first * DIM, token * heads * DIM, inside, DIM, BLOCK_DIM)
    grads = grad_out + image * grad_b + head * DIM
    do = _load(grads, row.to(INDEX) * grad_h + col * grad_w, inside, DIM, BLOCK_DIM)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + first + token * heads, row_delta, mask=inside)
    # What is beyond the map weighs nothing.
    norm = tl.load(lse + first + token * heads, mask=inside, other=float("inf"))
    acc = tl.zeros((TILE, BLOCK_DIM), tl.float32)
    for tile in range(tiles):
        n = tile * TILE + tl.arange(0, TILE)
        key_row, key_col, key_run = _positions(
            item, n // window_w, n % window_w, height, width, windows_h, windows_w, window_h, window_w,
            shift_h, shift_w, GRID, MASKED,
        )  # fmt: skip
        key_rows = key_row.to(INDEX) * stride_h + key_col * stride_w
        k = _load(base + heads * DIM, key_rows, key_run >= 0, DIM, BLOCK_DIM)
        v = _load(base + 2 * heads * DIM, key_rows, key_run >= 0, DIM, BLOCK_DIM)
        s = tl.dot(q, k.T, input_precision=PRECISION) * (scale * 1.4426950408889634) + _bias(
            table + head * table_n, table_h, table_w, (m // window_w)[:, None], (m % window_w)[:, None],
            (n // window_w)[None, :], (n % window_w)[None, :], window_h, window_w, HAS_BIAS, tl.float32,
        )  # fmt: skip
        if MASKED:
            s = _mask(s, run, key_run, dtype, PRECISION)
        p = tl.exp2(s - norm[:, None])
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        acc += tl.dot(ds.to(dtype), k, input_precision=PRECISION)
    grads = grad_qkv + image * height * width * 3 * heads * DIM + head * DIM
    _store(grads, token * 3 * heads * DIM, acc * scale, inside, DIM, BLOCK_DIM)


@compiling.kernel(do_not_specialize=SIZES)
def _backward_key(
    qkv, table, lse, grad_out, delta, grad_qkv,
    batch, height, width, heads, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
    table_n, table_h, table_w, scale, stride_b, stride_h, stride_w, grad_b, grad_h, grad_w,
    HAS_BIAS: tl.constexpr, GRID: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and of its values."""
    tiles = tl.cdiv(window_h * window_w, TILE)
    head = tl.program_id(0) % heads
    item = tl.program_id(0) // heads // tiles
    n = tl.program_id(0) // heads % tiles * TILE + tl.arange(0, TILE)
    row, col, run = _positions(
        item, n // window_w, n % window_w, height, width, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
        GRID, MASKED,
    )  # fmt: skip
    inside = run >= 0
    dtype = qkv.dtype.element_ty
    image = (item // (windows_h * windows_w)).to(tl.int64)
    base = qkv + image * stride_b + head * DIM
    rows = row.to(INDEX) * stride_h + col * stride_w
    k = _load(base + heads * DIM, rows, inside, DIM, BLOCK_DIM)
    v = _load(base + 2 * heads * DIM, rows, inside, DIM, BLOCK_DIM)
    first = image * height * width * heads + head
    acc_k = tl.zeros((TILE, BLOCK_DIM), tl.float32)
    acc_v = tl.zeros((TILE, BLOCK_DIM), tl.float32)
    for tile in range(tiles):
        m = tile * TILE + tl.arange(0, TILE)
        query_row, query_col, query_run = _positions(
            item, m // window_w, m % window_w, height, width, windows_h, windows_w, window_h, window_w,
            shift_h, shift_w, GRID, MASKED,
        )  # fmt: skip
        exists = query_run >= 0
        q = _load(base, query_row.to(INDEX) * stride_h + query_col * stride_w, exists, DIM, BLOCK_DIM)
        token = (query_row * width + query_col).to(INDEX) * heads
        grad_rows = query_row.to(INDEX) * grad_h + query_col * grad_w
        do = _load(grad_out + image * grad_b + head * DIM, grad_rows, exists, DIM, BLOCK_DIM)
        norm = tl.load(lse + first + token, mask=exists, other=float("inf"))
        row_delta = tl.load(delta + first + token, mask=exists, other=0.0)
        s = tl.dot(k, q.T, input_precision=PRECISION) * (scale * 1.4426950408889634)
        s += _bias(
            table + head * table_n, table_h, table_w, (m // window_w)[None, :], (m % window_w)[None, :],
            (n // window_w)[:, None], (n % window_w)[:, None], window_h, window_w, HAS_BIAS, tl.float32,
        )  # fmt: skip
        if MASKED:
            s = _mask(s.T, query_run, run, dtype, PRECISION).T
        p = tl.exp2(s - norm[None, :])
        acc_v += tl.dot(p.to(dtype), do, input_precision=PRECISION)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        acc_k += tl.dot(ds.to(dtype), q, input_precision=PRECISION)
    grads = grad_qkv + image * height * width * 3 * heads * DIM + head * DIM
    token = (row * width + col).to(INDEX) * 3 * heads * DIM
    _store(grads + heads * DIM, token, acc_k * scale, inside, DIM, BLOCK_DIM)
    _store(grads + 2 * heads * DIM, token, acc_v, inside, DIM, BLOCK_DIM)


@compiling.kernel(do_not_specialize=SIZES)
def _backward_bias(
    qkv, table, lse, grad_out, delta, partial,
    batch, height, width, heads, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
    table_n, table_h, table_w, scale, stride_b, stride_h, stride_w, grad_b, grad_h, grad_w,
    HAS_BIAS: tl.constexpr, GRID: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Gradient of the bias of a tile of queries and a tile of keys, of the windows that the program takes in turn."""
    tiles = tl.cdiv(window_h * window_w, TILE)
    owners = heads * tiles * tiles
    head = tl.program_id(0) % heads
    query = tl.program_id(0) // heads % tiles * TILE
    key = tl.program_id(0) // heads // tiles % tiles * TILE
    m = query + tl.arange(0, TILE)
    n = key + tl.arange(0, TILE)
    place_h = m // window_w
    place_w = m % window_w
    key_h = n // window_w
    key_w = n % window_w
    bias = _bias(
        table + head * table_n, table_h, table_w, place_h[:, None], place_w[:, None], key_h[None, :], key_w[None, :],
        window_h, window_w, HAS_BIAS, tl.float32,
    )  # fmt: skip
    grad_bias = tl.zeros((TILE, TILE), tl.float32)
    dtype = qkv.dtype.element_ty
    windows = windows_h * windows_w
    for item in range(tl.program_id(0) // owners, batch * windows, tl.num_programs(0) // owners):
        row, col, run = _positions(
            item, place_h, place_w, height, width, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
            GRID, MASKED,
        )  # fmt: skip
        key_row, key_col, key_run = _positions(
            item, key_h, key_w, height, width, windows_h, windows_w, window_h, window_w, shift_h, shift_w,
            GRID, MASKED,
        )  # fmt: skip
        inside = run >= 0
        image = (item // windows).to(tl.int64)
        base = qkv + image * stride_b + head * DIM
        key_rows = key_row.to(INDEX) * stride_h + key_col * stride_w
        token = (row * width + col).to(INDEX) * heads
        first = image * height * width * heads + head
        q = _load(base, row.to(INDEX) * stride_h + col * stride_w, inside, DIM, BLOCK_DIM)
        k = _load(base + heads * DIM, key_rows, key_run >= 0, DIM, BLOCK_DIM)
        v = _load(base + 2 * heads * DIM, key_rows, key_run >= 0, DIM, BLOCK_DIM)
        rows = row.to(INDEX) * grad_h + col * grad_w
        do = _load(grad_out + image * grad_b + head * DIM, rows, inside, DIM, BLOCK_DIM)
        norm = tl.load(lse + first + token, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + first + token, mask=inside, other=0.0)
        s = tl.dot(q, k.T, input_precision=PRECISION) * (scale * 1.4426950408889634) + bias
        if MASKED:
            s = _mask(s, run, key_run, dtype, PRECISION)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        grad_bias += tl.exp2(s - norm[:, None]) * (dp - row_delta[:, None])
    partial += tl.program_id(0).to(tl.int64) * (2 * window_h - 1) * (2 * window_w - 1)
    _store_folded(partial, grad_bias, query, key, window_h, window_w, TILE, BINS)


class _Launch(NamedTuple):
    """Warps a program, loads in flight at most, programs for each multiprocessor, and registers a thread at most."""

    warps: int
    stages: int
    programs: int = 1
    registers: int | None = None


# By kernel, for tiles of 64 positions, measured on an H200; larger ones take twice the warps. Never one warp with loads
# in flight: Triton 3.6 then leaves out the barrier after an asynchronous copy, and the warp reads what has not arrived.
LAUNCH = {
    "forward_whole": _Launch(4, 3, 4, 128),
    "backward_whole": _Launch(4, 2, 3, 168),
    "tiles": _Launch(4, 2),
    "backward_bias": _Launch(4, 2, 3),
}
LAUNCH = Table("window_attention", LAUNCH)
# What one tile of queries may take on the chip, in bytes: three to four lie there, and the next ones that are loaded.
TILE_BYTES = 2**14
# Entries of a bias table that are folded at a time.
BINS = 64


def _tile(dim: int, dtype: torch.dtype, has_bias: bool, rows: int, cols: int) -> tuple[int, bool]:
    """Return the positions of a tile, and whether it holds a whole window of `rows` x `cols`."""
    most = TILE_BYTES // (_block_dim(dim) * dtype.itemsize)
    # The bias and its gradient take the place of scores on the chip.
    for block in (16, 32, 64) if has_bias else (16, 32, 64, 128):
        if rows * cols <= block <= most:
            return block, True
    return min(64, most), False


def _block_dim(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


class _Problem:
    """How the kernels are launched; the same for all calls alike."""

    def __init__(
        self, shape, strides, dtype, device, table_strides, num_heads, window_size, shift, grid, scale, tf32: bool
    ):
        batch, height, width, channels = shape
        dim = channels // (3 * num_heads)
        windows = [-(-size // window) for size, window in zip((height, width), window_size, strict=True)]
        self.items, self.device, self.itemsize = batch * windows[0] * windows[1], device, dtype.itemsize
        self.tile, self.is_whole = _tile(dim, dtype, table_strides is not None, *window_size)
        tiles = -(-window_size[0] * window_size[1] // self.tile)
        self.arguments = (
            batch, height, width, num_heads, *windows, *window_size, *shift, *(table_strides or (0, 0, 0)),
            scale, *strides[:3],
        )  # fmt: skip
        extent = (height - 1) * strides[1] + (width - 1) * strides[2] + channels
        self.constants = {
            "HAS_BIAS": table_strides is not None,
            "GRID": grid,
            "MASKED": any(shift) or (windows[0] * window_size[0], windows[1] * window_size[1]) != (height, width),
            "DIM": dim,
            "BLOCK_DIM": _block_dim(dim),
            # Three products in tf32 are as accurate as one in float32, and faster on the tensor cores.
            "PRECISION": "tf32" if tf32 else "tf32x3",
            # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
            "INDEX": tl.int32 if max(extent, height * width * channels) < 2**31 else tl.int64,
        }
        # The shapes of the output, of the normalisers and of the bias gradient's partial tables.
        self.out_shape = (batch, height * width, channels // 3)
        self.lse_shape = 0 if self.is_whole else (batch, height * width, num_heads)
        # Tiles are the same programs forward and backward, but for the gradient of the bias.
        name, owners = ("backward_whole", 1) if self.is_whole else ("backward_bias", tiles**2)
        groups = self._groups(name, owners * num_heads) * owners
        self.partial_shape = (groups, num_heads, 2 * window_size[0] - 1, 2 * window_size[1] - 1)
        self.sums_grid, self.sums = (groups * num_heads,), {**self._launch(name), "BINS": BINS}
        programs = self._groups("forward_whole", num_heads) if self.is_whole else self.items * tiles
        self.grid = (programs * num_heads,)
        self.forward = self._launch("forward_whole" if self.is_whole else "tiles")

    def _launch(self, name: str) -> dict:
        """Return a kernel's constants with its warps and the loads in flight that fit on the chip."""
        launch = LAUNCH[name]
        fit = TILE_BYTES // (self.tile * self.constants["BLOCK_DIM"] * self.itemsize)
        return {
            **self.constants,
            "BLOCK" if self.is_whole else "TILE": self.tile,
            "num_warps": launch.warps * 2 if self.tile > 64 else launch.warps,
            "num_stages": min(launch.stages, fit),
            # Settled for small tiles; larger ones need what there is.
            "maxnreg": launch.registers if fit >= 4 else None,
        }

    def _groups(self, name: str, owners: int) -> int:
        """Return how many programs share the windows of each owner, so that all have the same number but one."""
        most = max(1, LAUNCH[name].programs * multiprocessors(self.device) // owners)
        return -(-self.items // max(1, -(-self.items // most)))


_problem = lru_cache(maxsize=1024)(_Problem)


def _problem_of(
    qkv: Tensor, rel_pos_bias: Tensor | None, sides, num_heads: int, window_size, shift, grid: bool, scale: float
) -> tuple[_Problem, Tensor, Tensor]:
    """Return how the kernels are launched, and the inputs that they read: qkv with its channels side by side."""
    qkv = (qkv if qkv.stride(-1) == 1 else qkv.contiguous()).unflatten(1, sides)
    tf32 = qkv.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    # Kernels have no use for a missing bias, but need a pointer.
    bias, strides = (qkv, None) if rel_pos_bias is None else (rel_pos_bias, rel_pos_bias.stride())
    problem = _problem(
        qkv.shape, qkv.stride(), qkv.dtype, qkv.device, strides,
        num_heads, tuple(window_size), tuple(shift), grid, scale, tf32,
    )  # fmt: skip
    return problem, qkv, bias


def _window_attention(
    qkv: Tensor, rel_pos_bias: Tensor | None,
    sides: list[int], num_heads: int, window_size: list[int], shift: list[int], grid: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem, *inputs = _problem_of(qkv, rel_pos_bias, sides, num_heads, window_size, shift, grid, scale)
    out = qkv.new_empty(problem.out_shape)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=qkv.device)
    if problem.is_whole:
        _forward_whole[problem.grid](*inputs, out, *problem.arguments, **problem.forward)
    else:
        _forward_tiles[problem.grid](*inputs, out, lse, *problem.arguments, **problem.forward)
    return out, lse


def _window_attention_backward(
    grad_out: Tensor, qkv: Tensor, rel_pos_bias: Tensor | None, out: Tensor, lse: Tensor,
    sides: list[int], num_heads: int, window_size: list[int], shift: list[int], grid: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem, *inputs = _problem_of(qkv, rel_pos_bias, sides, num_heads, window_size, shift, grid, scale)
    grad_out = grad_out.unflatten(1, sides)
    # As it comes, such as a part of a map's channels, if offsets within an image fit 32 bits.
    if grad_out.stride(-1) != 1 or grad_out.stride(1) * grad_out.shape[1] >= 2**31:
        grad_out = grad_out.contiguous()
    grad_strides = grad_out.stride()[:3]
    grad_qkv = qkv.new_empty(qkv.shape)
    shape = 0 if rel_pos_bias is None else problem.partial_shape
    partial = torch.empty(shape, dtype=torch.float32, device=qkv.device)
    if problem.is_whole:
        # Offsets that the gradient shares with what is written need no registers of their own: spills otherwise.
        _backward_whole[problem.sums_grid](
            *inputs, grad_out, grad_qkv, partial, *problem.arguments, *grad_strides, **problem.sums,
            DENSE=grad_out.is_contiguous(),
        )  # fmt: skip
    else:
        delta = torch.empty_like(lse)
        _backward_query[problem.grid](
            *inputs, out, lse, grad_out, delta, grad_qkv, *problem.arguments, *grad_strides, **problem.forward
        )
        _backward_key[problem.grid](
            *inputs, lse, grad_out, delta, grad_qkv, *problem.arguments, *grad_strides, **problem.forward
        )
        if rel_pos_bias is not None:
            _backward_bias[problem.sums_grid](
                *inputs, lse, grad_out, delta, partial, *problem.arguments, *grad_strides, **problem.sums
            )
    return grad_qkv, partial if rel_pos_bias is None else total(partial, dtype=rel_pos_bias.dtype)


def _fake(qkv, rel_pos_bias, sides, num_heads, window_size, *options):
    _, is_whole = _tile(qkv.shape[2] // (3 * num_heads), qkv.dtype, rel_pos_bias is not None, *window_size)
    lse = qkv.new_empty(0 if is_whole else (*qkv.shape[:2], num_heads), dtype=torch.float32)
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3)), lse


def _fake_backward(grad_out, qkv, rel_pos_bias, *others):
    grad_bias = (
        qkv.new_empty(0, dtype=torch.float32) if rel_pos_bias is None else rel_pos_bias.new_empty(rel_pos_bias.shape)
    )
    return qkv.new_empty(qkv.shape), grad_bias


def _reference(qkv, rel_pos_bias, sides, *options):
    return window_attention_reference(qkv.unflatten(1, sides), rel_pos_bias, *options).flatten(1, 2)


_call = register(
    "window_attention", _window_attention, _fake, _window_attention_backward, _fake_backward, _reference
)  # fmt: skip


@register_flop_formula(torch.ops.densezoo.window_attention)
def _(qkv, rel_pos_bias, sides, num_heads, window_size, *args, **kwargs) -> int:
    batch, positions, channels = qkv
    # The products with the keys and with the values, each a multiplication and an addition.
    return 4 * batch * positions * (channels // 3) * window_size[0] * window_size[1]


@register_flop_formula(torch.ops.densezoo.window_attention_backward)
def _(grad_out, qkv, rel_pos_bias, out, lse, sides, num_heads, window_size, *args, **kwargs) -> int:
    batch, positions, channels = qkv
    # Five products: the scores once more, and the gradients of query, key, value and weights.
    return 10 * batch * positions * (channels // 3) * window_size[0] * window_size[1]


def window_attention_triton(qkv, rel_pos_bias, num_heads, window_size, shift, grid, scale) -> Tensor:
    """Compute `densezoo.ops.window_attention` with the kernels; arguments checked, one entry per axis."""
    sides = qkv.shape[1:3]
    # torch.compile would store what has four axes for the backward as it likes convolutions to, rows innermost.
    out = _call(qkv.flatten(1, 2), rel_pos_bias, list(sides), num_heads, list(window_size), list(shift), grid, scale)
    return out.unflatten(1, sides)
