"""QuadTree attention of type B in Triton, forward and backward.

Level 0 is the finest. The queries and keys of the coarser levels, means of quads, are in float32 in the forward, so
that keys are chosen by the scores that the reference chooses by: a third of the tokens in all. The forward leaves for
the backward what is chosen, 4 bytes a kept key, numbered over images, heads and levels, the normalisers, and the output
of the coarsest level. The backward, which chooses nothing, makes the coarser levels anew in the inputs' dtype.

- `_coarsen` takes queries and keys, and in the backward the gradient of the output, to the next coarser level.
- `_all_forward`, `_all_backward_query`, `_all_backward_key`: dense attention at the coarsest level, in tiles of queries
  against chunks of keys, or of keys against chunks of queries. `_all_backward` does all of the backward where a program
  holds a whole map.
- `_children_forward`, `_children_backward_query`: a program owns the queries of PARENTS neighbouring parents of a head.
  A parent has 4 queries and its own 4 * topk candidates, too few for the tensor cores: the products take 16 queries
  against the candidates of all parents, and what belongs to another parent is masked. The candidates are gathered from
  the maps as they are; nothing gathered is stored. A program visits TILES such tiles, and may gather for the next while
  it computes. The forward takes scores of 32-bit numbers STEP channels at a time, for the registers' sake.
- `_keep` chooses the topk keys of ROWS queries, one after the other, from scores that the forward kernels left in
  float32: over some hundred candidates a partial sort takes twice as long.
- `_children_backward_key`: a program owns the children of up to 4 keys, and visits the parents that kept one of them:
  those lie next to each other once the kept keys are sorted by number, stably, and so are summed in one order. 4
  queries of each; what belongs to another of its keys is masked.

Gradients go from coarse to fine: a level's gradients of queries and keys take their share of those of the means. What
is `added` to the output of a coarser level has the gradient of that output.
Scores are in base 2, scaled by log2(e). `begin` is where the level's normalisers begin in `lse`, `first` the number of
the first key of the coarser level.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.launch import Table
from densezoo.ops.quadtree.reference import quadtree_attention_reference
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LOG2E = 1.4426950408889634


@triton.jit
def _place(x, row, column, stride_h, stride_w, d, INDEX: tl.constexpr):
    """Pointers (positions, dim) to positions of an image's head at `x`."""
    return x + (row.to(INDEX) * stride_h + column.to(INDEX) * stride_w)[:, None] + d[None, :]


@triton.jit
def _share(row, column, height, width):
    """What a position is given of its quad's mean: a last position where a side is odd stands twice."""
    twice = tl.where(row == height - 1, 2 - row % 2, 1) * tl.where(column == width - 1, 2 - column % 2, 1)
    return 0.25 * twice.to(tl.float32)


@triton.jit
def _quads(
    x, out, row, column, out_at, height, width, stride_h, stride_w, mask, d,
    SUM: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Write the means of quads, where the last positions of an odd side stand twice, or the sums of what is there."""
    acc = tl.zeros(mask.shape, tl.float32)
    for i in tl.static_range(4):
        child_row = 2 * row + i // 2
        child_column = 2 * column + i % 2
        if SUM:
            here = mask & ((child_row < height) & (child_column < width))[:, None]
        else:
            child_row = tl.minimum(child_row, height - 1)
            child_column = tl.minimum(child_column, width - 1)
            here = mask
        acc += tl.load(_place(x, child_row, child_column, stride_h, stride_w, d, INDEX), mask=here, other=0.0)
    if not SUM:
        acc *= 0.25
    tl.store(out + out_at, acc, mask=mask)


@compiling.kernel(do_not_specialize=["height", "width", "heads"])
def _coarsen(
    q, k, grad, q_out, k_out, grad_out, height, width, heads, q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, GRAD: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    rows = (height + 1) // 2
    columns = (width + 1) // 2
    head = tl.program_id(0) % heads
    image = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    row = position // columns
    column = position % columns
    d = tl.arange(0, BLOCK_DIM)
    mask = (position < rows * columns)[:, None] & (d < DIM)[None, :]
    out_at = ((image * rows * columns + position) * heads + head)[:, None] * DIM + d[None, :]
    _quads(
        q + image * q_b + head * q_n, q_out, row, column, out_at, height, width, q_h, q_w, mask, d, False, INDEX
    )  # fmt: skip
    _quads(
        k + image * k_b + head * k_n, k_out, row, column, out_at, height, width, k_h, k_w, mask, d, False, INDEX
    )  # fmt: skip
    if GRAD:
        grad += image * height * width * heads * DIM + head * DIM
        _quads(
            grad, grad_out, row, column, out_at, height, width, width * heads * DIM, heads * DIM, mask, d, True, INDEX
        )


@triton.jit
def _tokens(x, position, width, image, head, b, h, w, n, d, INDEX: tl.constexpr):
    """Pointers (positions, dim) to positions of a map, given by their number."""
    return _place(x + image * b + head * n, position // width, position % width, h, w, d, INDEX)


@compiling.kernel(do_not_specialize=["begin", "height", "width", "heads"])
def _all_forward(
    q, k, v, added, out, lse, scores, begin, height, width, heads, scale,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w, v_n,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    KEEP: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, SCORES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    image = tl.program_id(1).to(tl.int64)
    count = height * width
    m = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_DIM)
    inside = (m < count)[:, None] & (d < DIM)[None, :]
    dtype = q.dtype.element_ty
    q_tile = tl.load(_tokens(q, m, width, image, head, q_b, q_h, q_w, q_n, d, INDEX), mask=inside, other=0.0)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_DIM), tl.float32)
    first = begin + (image * heads + head) * count
    for start in range(0, count, CHUNK):
        n = start + tl.arange(0, CHUNK)
        here = (n < count)[:, None] & (d < DIM)[None, :]
        k_tile = tl.load(_tokens(k, n, width, image, head, k_b, k_h, k_w, k_n, d, INDEX), mask=here, other=0.0)
        v_tile = tl.load(_tokens(v, n, width, image, head, v_b, v_h, v_w, v_n, d, INDEX), mask=here, other=0.0)
        s = tl.dot(q_tile, k_tile.T, input_precision=SCORES) * (scale * 1.4426950408889634)
        if KEEP:
            place = (first - begin + m)[:, None] * count + n[None, :]
            tl.store(scores + place, s, mask=(m < count)[:, None] & (n < count)[None, :])
        s = tl.where((n < count)[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        decay = tl.exp2(top - new)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None] + tl.dot(p.to(dtype), v_tile.to(dtype), input_precision=PRECISION)
        top = new
    acc /= total[:, None]
    rows = ((image * count + m) * heads + head)[:, None] * DIM + d[None, :]
    if ADD:
        acc += tl.load(added + rows, mask=inside, other=0.0)
    tl.store(out + rows, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + first + m, top + tl.log2(total), mask=m < count)


@compiling.kernel(do_not_specialize=["begin", "height", "width", "heads"])
def _all_backward_query(
    q, k, v, added, out, lse, grad, delta, grad_q, begin, height, width, heads, scale,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w, v_n,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, SCORES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    image = tl.program_id(1).to(tl.int64)
    count = height * width
    m = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_DIM)
    inside = (m < count)[:, None] & (d < DIM)[None, :]
    dtype = q.dtype.element_ty
    rows = ((image * count + m) * heads + head)[:, None] * DIM + d[None, :]
    first = begin + (image * heads + head) * count
    q_tile = tl.load(_tokens(q, m, width, image, head, q_b, q_h, q_w, q_n, d, INDEX), mask=inside, other=0.0)
    g_tile = tl.load(grad + rows, mask=inside, other=0.0)
    norm = tl.load(lse + first + m, mask=m < count, other=0.0)
    own = tl.load(out + rows, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        own -= tl.load(added + rows, mask=inside, other=0.0)
    row_delta = tl.sum(own * g_tile, 1)
    g_tile = g_tile.to(dtype)
    acc = tl.zeros((BLOCK, BLOCK_DIM), tl.float32)
    for start in range(0, count, CHUNK):
        n = start + tl.arange(0, CHUNK)
        here = (n < count)[:, None] & (d < DIM)[None, :]
        k_tile = tl.load(_tokens(k, n, width, image, head, k_b, k_h, k_w, k_n, d, INDEX), mask=here, other=0.0)
        v_tile = tl.load(_tokens(v, n, width, image, head, v_b, v_h, v_w, v_n, d, INDEX), mask=here, other=0.0)
        s = tl.dot(q_tile, k_tile.T, input_precision=SCORES) * (scale * 1.4426950408889634)
        p = tl.where((n < count)[None, :], tl.exp2(s - norm[:, None]), 0.0)
        dp = tl.dot(g_tile, v_tile.to(dtype).T, input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        acc += tl.dot(ds.to(dtype), k_tile, input_precision=PRECISION)
    acc *= scale
    tl.store(grad_q + rows, acc.to(grad_q.dtype.element_ty), mask=inside)
    tl.store(delta + first + m, row_delta, mask=m < count)


@compiling.kernel(do_not_specialize=["begin", "height", "width", "heads"])
def _all_backward_key(
    q, k, v, lse, grad, delta, grad_k, grad_v, begin, height, width, heads, scale,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w, v_n,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, SCORES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    image = tl.program_id(1).to(tl.int64)
    count = height * width
    n = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_DIM)
    inside = (n < count)[:, None] & (d < DIM)[None, :]
    dtype = q.dtype.element_ty
    first = begin + (image * heads + head) * count
    k_tile = tl.load(_tokens(k, n, width, image, head, k_b, k_h, k_w, k_n, d, INDEX), mask=inside, other=0.0)
    v_tile = tl.load(_tokens(v, n, width, image, head, v_b, v_h, v_w, v_n, d, INDEX), mask=inside, other=0.0)
    acc_k = tl.zeros((BLOCK, BLOCK_DIM), tl.float32)
    acc_v = tl.zeros((BLOCK, BLOCK_DIM), tl.float32)
    for start in range(0, count, CHUNK):
        m = start + tl.arange(0, CHUNK)
        here = (m < count)[:, None] & (d < DIM)[None, :]
        rows = ((image * count + m) * heads + head)[:, None] * DIM + d[None, :]
        q_tile = tl.load(_tokens(q, m, width, image, head, q_b, q_h, q_w, q_n, d, INDEX), mask=here, other=0.0)
        g_tile = tl.load(grad + rows, mask=here, other=0.0).to(dtype)
        norm = tl.load(lse + first + m, mask=m < count, other=0.0)
        row_delta = tl.load(delta + first + m, mask=m < count, other=0.0)
        s = tl.dot(k_tile, q_tile.T, input_precision=SCORES) * (scale * 1.4426950408889634)
        p = tl.where((m < count)[None, :], tl.exp2(s - norm[None, :]), 0.0)
        acc_v += tl.dot(p.to(dtype), g_tile, input_precision=PRECISION)
        dp = tl.dot(v_tile.to(dtype), g_tile.T, input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        acc_k += tl.dot(ds.to(dtype), q_tile, input_precision=PRECISION)
    acc_k *= scale
    rows = ((image * count + n) * heads + head)[:, None] * DIM + d[None, :]
    tl.store(grad_k + rows, acc_k.to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + rows, acc_v.to(grad_v.dtype.element_ty), mask=inside)


@compiling.kernel(do_not_specialize=["begin", "height", "width", "heads"])
def _all_backward(
    q, k, v, lse, grad, grad_q, grad_k, grad_v, begin, height, width, heads, scale,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w, v_n,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, SCORES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    count = height * width
    m = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_DIM)
    exists = m < count
    inside = exists[:, None] & (d < DIM)[None, :]
    dtype = q.dtype.element_ty
    rows = ((image * count + m) * heads + head)[:, None] * DIM + d[None, :]
    q_tile = tl.load(_tokens(q, m, width, image, head, q_b, q_h, q_w, q_n, d, INDEX), mask=inside, other=0.0)
    k_tile = tl.load(_tokens(k, m, width, image, head, k_b, k_h, k_w, k_n, d, INDEX), mask=inside, other=0.0)
    v_tile = tl.load(_tokens(v, m, width, image, head, v_b, v_h, v_w, v_n, d, INDEX), mask=inside, other=0.0)
    g_tile = tl.load(grad + rows, mask=inside, other=0.0).to(dtype)
    norm = tl.load(lse + begin + (image * heads + head) * count + m, mask=exists, other=0.0)
    s = tl.dot(q_tile, k_tile.T, input_precision=SCORES) * (scale * 1.4426950408889634)
    p = tl.where(exists[:, None] & exists[None, :], tl.exp2(s - norm[:, None]), 0.0)
    acc = tl.dot(p.to(dtype).T, g_tile, input_precision=PRECISION)
    tl.store(grad_v + rows, acc.to(grad_v.dtype.element_ty), mask=inside)
    dp = tl.dot(g_tile, v_tile.T, input_precision=PRECISION)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(dtype)
    acc = tl.dot(ds, k_tile, input_precision=PRECISION)
    tl.store(grad_q + rows, acc.to(grad_q.dtype.element_ty), mask=inside)
    acc = tl.dot(ds.T, q_tile, input_precision=PRECISION)
    tl.store(grad_k + rows, acc.to(grad_k.dtype.element_ty), mask=inside)


@compiling.kernel(do_not_specialize=["height", "width", "first", "first_coarser", "outside", "count", "queries"])
def _keep(
    scores, kept, height, width, first, first_coarser, outside, count, queries,
    TOPK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COARSEST: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = query < queries
    positions = height * width
    map_of = query // positions
    j = tl.arange(0, BLOCK)
    here = inside[:, None] & (j < count)[None, :]
    s = tl.load(scores + query[:, None].to(tl.int64) * count + j[None, :], mask=here, other=float("-inf"))
    if COARSEST:
        key = tl.broadcast_to(j[None, :], s.shape)
    else:
        rows = (height + 1) // 2
        columns = (width + 1) // 2
        position = query % positions
        parent = map_of * rows * columns + position // width // 2 * columns + position % width // 2
        slot = (first_coarser + parent.to(tl.int64))[:, None] * TOPK + (j // 4)[None, :]
        key = tl.load(kept + slot, mask=here & (j // 4 < TOPK)[None, :], other=0)
        key -= first_coarser + (map_of * rows * columns)[:, None]
        key = (key // columns * 2 + (j % 4 // 2)[None, :]) * width + key % columns * 2 + (j % 2)[None, :]
    # What lies outside of the map has the score -inf.
    key = tl.where(s > float("-inf"), key + first + (map_of * positions)[:, None], outside)
    # Integers of the floats' order, below which there is one for what has been chosen.
    bits = s.to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    rank = tl.full((ROWS, BLOCK), TOPK, tl.int32)
    for r in range(TOPK):
        best = tl.max(bits, 1)
        place = tl.min(tl.where(bits == best[:, None], j[None, :], BLOCK), 1)
        hit = j[None, :] == place[:, None]
        rank = tl.where(hit, r, rank)
        bits = tl.where(hit, -2147483648, bits)
    place = (first + query.to(tl.int64))[:, None] * TOPK + rank
    tl.store(kept + place, key, mask=inside[:, None] & (rank < TOPK))


@triton.jit
def _family(tile, rows, columns, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Queries of a tile's parents, 16 of them at least: parent's number in the tile, place, and whether it exists."""
    tiles_w = tl.cdiv(columns, TILE_W)
    m = tl.arange(0, 16)
    parent = m // 4
    parent_row = tile // tiles_w * TILE_H + parent // TILE_W
    parent_column = tile % tiles_w * TILE_W + parent % TILE_W
    row = 2 * parent_row + m % 4 // 2
    column = 2 * parent_column + m % 2
    exists = (parent < TILE_H * TILE_W) & (parent_row < rows) & (parent_column < columns)
    exists = exists & (row < height) & (column < width)
    return parent, row, column, exists


@triton.jit
def _candidates(
    kept, tile, first, rows, columns, height, width,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TOPK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Candidates of a tile's parents: the parent's number in the tile, the key's place, and whether it exists.

    `kept` is that of the head, `first` its first key's number.
    """
    tiles_w = tl.cdiv(columns, TILE_W)
    n = tl.arange(0, TILE_H * TILE_W * CANDIDATES)
    parent = n // CANDIDATES
    parent_row = tile // tiles_w * TILE_H + parent // TILE_W
    parent_column = tile % tiles_w * TILE_W + parent % TILE_W
    slot = n % CANDIDATES // 4
    exists = (parent_row < rows) & (parent_column < columns) & (slot < TOPK)
    key = tl.load(kept + (parent_row * columns + parent_column) * TOPK + slot, mask=exists, other=2147483647) - first
    row = 2 * (key // columns) + n % 4 // 2
    column = 2 * (key % columns) + n % 2
    exists = exists & (key < rows * columns) & (row < height) & (column < width)
    return parent, row, column, exists


@compiling.kernel(do_not_specialize=["begin", "first", "height", "width", "heads"])
def _children_forward(
    q, k, v, added, kept, coarser, out, lse, scores, begin, first, height, width, heads, scale,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w, v_n,
    TOPK: tl.constexpr, CANDIDATES: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILES: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, STEP: tl.constexpr, KEEP: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, SCORES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    rows = (height + 1) // 2
    columns = (width + 1) // 2
    head = tl.program_id(0) % heads
    begin_tile = tl.program_id(0) // heads * TILES
    end_tile = tl.minimum(begin_tile + TILES, tl.cdiv(rows, TILE_H) * tl.cdiv(columns, TILE_W))
    image = tl.program_id(1).to(tl.int64)
    map_of = image * heads + head
    q += image * q_b + head * q_n
    k += image * k_b + head * k_n
    v += image * v_b + head * v_n
    lse += begin + map_of * height * width
    scores += map_of * height * width * (TOPK * 4)
    added += (image * height * width * heads + head) * DIM
    out += (image * height * width * heads + head) * DIM
    coarser += (image * rows * columns * heads + head) * DIM
    first += map_of * rows * columns
    d = tl.arange(0, BLOCK_DIM)
    dtype = q.dtype.element_ty
    for tile in range(begin_tile, end_tile):
        parent, row, column, exists = _family(tile, rows, columns, height, width, TILE_H, TILE_W)
        owner, key_row, key_column, seen = _candidates(
            kept + first * TOPK, tile, first.to(tl.int32), rows, columns, height, width,
            TILE_H, TILE_W, TOPK, CANDIDATES,
        )  # fmt: skip
        inside = exists[:, None] & (d < DIM)[None, :]
        here = seen[:, None] & (d < DIM)[None, :]
        v_tile = tl.load(_place(v, key_row, key_column, v_h, v_w, d, INDEX), mask=here, other=0.0)
        s = tl.zeros((16, TILE_H * TILE_W * CANDIDATES), tl.float32)
        for begin_dim in tl.static_range(0, BLOCK_DIM, STEP):
            c = begin_dim + tl.arange(0, STEP)
            some = (c < DIM)[None, :]
            k_tile = tl.load(_place(k, key_row, key_column, k_h, k_w, c, INDEX), mask=seen[:, None] & some, other=0.0)
            q_tile = tl.load(_place(q, row, column, q_h, q_w, c, INDEX), mask=exists[:, None] & some, other=0.0)
            s = tl.dot(q_tile, k_tile.T, s, input_precision=SCORES)
        s *= scale * 1.4426950408889634
        own = exists[:, None] & (parent[:, None] == owner[None, :])
        s = tl.where(own & seen[None, :], s, float("-inf"))
        query = row * width + column
        if KEEP:
            place = tl.arange(0, TILE_H * TILE_W * CANDIDATES) % CANDIDATES
            tl.store(
                scores + query.to(tl.int64)[:, None] * (TOPK * 4) + place[None, :], s,
                mask=own & (place < TOPK * 4)[None, :],
            )  # fmt: skip
        # Rows of no query see nothing; -inf must not be subtracted from -inf.
        top = tl.where(exists, tl.max(s, 1), 0.0)
        p = tl.exp2(s - top[:, None])
        total = tl.where(exists, tl.sum(p, 1), 1.0)
        acc = tl.dot(p.to(dtype), v_tile.to(dtype), input_precision=PRECISION) / total[:, None]
        above = ((row // 2 * columns + column // 2).to(INDEX) * (heads * DIM))[:, None] + d[None, :]
        acc += tl.load(coarser + above, mask=inside, other=0.0)
        here = (query.to(INDEX) * (heads * DIM))[:, None] + d[None, :]
        if ADD:
            acc += tl.load(added + here, mask=inside, other=0.0)
        tl.store(out + here, acc.to(out.dtype.element_ty), mask=inside)
        tl.store(lse + query, top + tl.log2(total), mask=exists)


@compiling.kernel(do_not_specialize=["begin", "first", "height", "width", "heads"])
def _children_backward_query(
    q, k, v, kept, lse, grad, delta, coarser, grad_q, begin, first, height, width, heads, scale,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w, v_n,
    TOPK: tl.constexpr, CANDIDATES: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILES: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr, SCORES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    rows = (height + 1) // 2
    columns = (width + 1) // 2
    head = tl.program_id(0) % heads
    begin_tile = tl.program_id(0) // heads * TILES
    end_tile = tl.minimum(begin_tile + TILES, tl.cdiv(rows, TILE_H) * tl.cdiv(columns, TILE_W))
    image = tl.program_id(1).to(tl.int64)
    map_of = image * heads + head
    q += image * q_b + head * q_n
    k += image * k_b + head * k_n
    v += image * v_b + head * v_n
    lse += begin + map_of * height * width
    delta += begin + map_of * height * width
    grad += (image * height * width * heads + head) * DIM
    grad_q += (image * height * width * heads + head) * DIM
    coarser += (image * rows * columns * heads + head) * DIM
    first += map_of * rows * columns
    d = tl.arange(0, BLOCK_DIM)
    dtype = q.dtype.element_ty
    for tile in range(begin_tile, end_tile):
        parent, row, column, exists = _family(tile, rows, columns, height, width, TILE_H, TILE_W)
        owner, key_row, key_column, seen = _candidates(
            kept + first * TOPK, tile, first.to(tl.int32), rows, columns, height, width,
            TILE_H, TILE_W, TOPK, CANDIDATES,
        )  # fmt: skip
        inside = exists[:, None] & (d < DIM)[None, :]
        here = seen[:, None] & (d < DIM)[None, :]
        k_tile = tl.load(_place(k, key_row, key_column, k_h, k_w, d, INDEX), mask=here, other=0.0)
        v_tile = tl.load(_place(v, key_row, key_column, v_h, v_w, d, INDEX), mask=here, other=0.0)
        q_tile = tl.load(_place(q, row, column, q_h, q_w, d, INDEX), mask=inside, other=0.0)
        here = ((row * width + column).to(INDEX) * (heads * DIM))[:, None] + d[None, :]
        g_tile = tl.load(grad + here, mask=inside, other=0.0).to(dtype)
        query = row * width + column
        norm = tl.load(lse + query, mask=exists, other=0.0)
        s = tl.dot(q_tile, k_tile.T, input_precision=SCORES) * (scale * 1.4426950408889634)
        own = exists[:, None] & (parent[:, None] == owner[None, :]) & seen[None, :]
        p = tl.where(own, tl.exp2(s - norm[:, None]), 0.0)
        dp = tl.dot(g_tile, v_tile.to(dtype).T, input_precision=PRECISION)
        row_delta = tl.sum(p * dp, 1)
        ds = p * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(dtype), k_tile, input_precision=PRECISION) * scale
        above = ((row // 2 * columns + column // 2).to(INDEX) * (heads * DIM))[:, None] + d[None, :]
        acc += tl.load(coarser + above, mask=inside, other=0.0) * _share(row, column, height, width)[:, None]
        tl.store(grad_q + here, acc.to(grad_q.dtype.element_ty), mask=inside)
        tl.store(delta + query, row_delta, mask=exists)


@compiling.kernel(do_not_specialize=["begin", "first", "height", "width", "heads"])
def _children_backward_key(
    q, k, v, starts, order, lse, grad, delta, coarser, grad_k, grad_v, begin, first, height, width, heads, scale,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w, v_n,
    TOPK: tl.constexpr, KEYS: tl.constexpr, PARENTS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr, SCORES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    rows = (height + 1) // 2
    columns = (width + 1) // 2
    head = tl.program_id(0) % heads
    image = tl.program_id(1).to(tl.int64)
    map_of = image * heads + head
    d = tl.arange(0, BLOCK_DIM)
    # The children of up to 4 keys: rows for as many as the tensor cores take at least.
    quad_of = tl.program_id(0) // heads * KEYS
    c = tl.arange(0, 16)
    quad = quad_of + c // 4
    key_row = 2 * (quad // columns) + c % 4 // 2
    key_column = 2 * (quad % columns) + c % 2
    exists = (c // 4 < KEYS) & (key_row < height) & (key_column < width)
    inside = exists[:, None] & (d < DIM)[None, :]
    dtype = q.dtype.element_ty
    k_tile = tl.load(_place(k + image * k_b + head * k_n, key_row, key_column, k_h, k_w, d, INDEX), inside, 0.0)
    v_tile = tl.load(_place(v + image * v_b + head * v_n, key_row, key_column, v_h, v_w, d, INDEX), inside, 0.0)
    v_tile = v_tile.to(dtype)
    acc_k = tl.zeros((16, BLOCK_DIM), tl.float32)
    acc_v = tl.zeros((16, BLOCK_DIM), tl.float32)

    q += image * q_b + head * q_n
    grad += image * height * width * heads * DIM + head * DIM
    lse += begin + map_of * height * width
    delta += begin + map_of * height * width
    i = tl.arange(0, 4 * PARENTS)
    first += map_of * rows * columns
    starts += first
    start = tl.load(starts + quad, mask=exists, other=0)
    end = tl.load(starts + quad + 1, mask=exists, other=0)
    last = tl.load(starts + tl.minimum(quad_of + KEYS, rows * columns))
    for at in range(tl.load(starts + quad_of), last, PARENTS):
        entry = at + i // 4
        own = (entry[None, :] >= start[:, None]) & (entry[None, :] < end[:, None])
        listed = entry < last
        parent = tl.load(order + entry, mask=listed, other=0).to(tl.int32) // TOPK
        parent = tl.where(listed, parent - first, 0).to(tl.int32)
        row = 2 * (parent // columns) + i % 4 // 2
        column = 2 * (parent % columns) + i % 2
        listed = listed & (row < height) & (column < width)
        here = listed[:, None] & (d < DIM)[None, :]
        q_tile = tl.load(_place(q, row, column, q_h, q_w, d, INDEX), mask=here, other=0.0)
        g_tile = tl.load(_place(grad, row, column, width * heads * DIM, heads * DIM, d, INDEX), mask=here, other=0.0)
        g_tile = g_tile.to(dtype)
        norm = tl.load(lse + row * width + column, mask=listed, other=0.0)
        row_delta = tl.load(delta + row * width + column, mask=listed, other=0.0)
        s = tl.dot(k_tile, q_tile.T, input_precision=SCORES) * (scale * 1.4426950408889634)
        p = tl.where(own & listed[None, :], tl.exp2(s - norm[None, :]), 0.0)
        acc_v += tl.dot(p.to(dtype), g_tile, input_precision=PRECISION)
        dp = tl.dot(v_tile, g_tile.T, input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        acc_k += tl.dot(ds.to(dtype), q_tile, input_precision=PRECISION)
    above = ((image * rows * columns + quad) * heads + head)[:, None] * DIM + d[None, :]
    acc_k *= scale
    acc_k += tl.load(coarser + above, mask=inside, other=0.0) * _share(key_row, key_column, height, width)[:, None]
    here = ((image * height * width + key_row * width + key_column) * heads + head)[:, None] * DIM + d[None, :]
    tl.store(grad_k + here, acc_k.to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + here, acc_v.to(grad_v.dtype.element_ty), mask=inside)


class _Launch(NamedTuple):
    """Rows a program owns, what it visits at once, warps a program and loads in flight.

    Where either number follows from topk it is 0.
    """

    block: int
    chunk: int
    warps: int
    stages: int


# By kernel, for maps of 16-bit numbers up to 32 channels and of more, measured on an H200, and of 32-bit numbers.
LAUNCH = {
    "coarsen": (_Launch(16, 0, 4, 1), _Launch(16, 0, 4, 1), _Launch(16, 0, 4, 1)),
    "all_forward": (_Launch(32, 64, 4, 2), _Launch(64, 64, 4, 3), _Launch(32, 64, 4, 3)),
    "all_backward": (_Launch(64, 0, 4, 1), _Launch(64, 0, 4, 1), _Launch(0, 0, 4, 1)),
    "all_backward_query": (_Launch(32, 64, 4, 1), _Launch(64, 64, 4, 3), _Launch(16, 32, 4, 1)),
    "all_backward_key": (_Launch(32, 64, 4, 1), _Launch(64, 64, 4, 2), _Launch(16, 32, 4, 1)),
    "children_forward": (_Launch(1, 128, 4, 1), _Launch(8, 32, 1, 2), _Launch(4, 64, 2, 2)),
    "children_backward_query": (_Launch(1, 128, 4, 1), _Launch(1, 32, 1, 1), _Launch(1, 128, 8, 1)),
    "children_backward_key": (_Launch(4, 4, 1, 1), _Launch(4, 8, 4, 2), _Launch(4, 8, 2, 1)),
}
LAUNCH = Table("quadtree_attention", LAUNCH)
# Scores that a program of `_keep` holds.
KEEP_TILE = 2048
# Channels of 32-bit queries and keys that `_children_forward` holds at once.
STEP = 32


class _Map(NamedTuple):
    """The sides of a level, and where its part of `kept` and of its keys' numbers begins."""

    height: int
    width: int
    first: int


def _maps(shape: torch.Size, levels: int) -> tuple[list[_Map], int]:
    """Return the levels, the finest first, and how many keys there are at all levels but the finest."""
    batch, height, width, heads, _ = shape
    maps, first = [], 0
    for level in range(levels):
        maps.append(_Map(height, width, first))
        if level:
            first += batch * heads * height * width
        height, width = (height + 1) // 2, (width + 1) // 2
    return maps, first


class _Problem:
    """How the kernels are launched at each level, the finest first; the same for all calls alike.

    `strides` are those of the query, of the key and of the values of each level.
    """

    def __init__(self, shape, strides, itemsize: int, topk: int, scale: float, tf32: bool):
        self.batch, _, _, self.heads, dim = shape
        self.topk, self.scale, self.itemsize = topk, scale, itemsize
        last = len(strides) - 3
        self.maps, self.coarse_keys = _maps(shape, last + 1)
        self.shapes = [(self.batch, m.height, m.width, self.heads, dim) for m in self.maps]
        extents = [
            max(sum((n - 1) * s for n, s in zip(map_shape[1:], stride[1:], strict=True)), math.prod(map_shape[1:]))
            for map_shape, stride in zip((shape, shape, *self.shapes), strides, strict=True)
        ]
        self.constants = {
            "DIM": dim,
            "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),
            # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
            "INDEX": tl.int32 if max(extents) < 2**31 else tl.int64,
        }
        # Keys are chosen by scores of full precision, whatever the rest may be.
        self.precision = {"PRECISION": "tf32" if tf32 else "ieee", "SCORES": "tf32x3" if tf32 else "ieee"}
        self.family = {"TOPK": topk, "CANDIDATES": triton.next_power_of_2(4 * topk)}

        # Queries and keys of the coarser levels are dense.
        dense = [(h * w * n * d, w * n * d, n * d, d) for _, h, w, n, d in self.shapes]
        inputs = [stride[:4] for stride in strides]
        self.queries, self.keys = [inputs[0], *dense[1:]], [inputs[1], *dense[1:]]
        self.arguments = [self._arguments(level, inputs[2 + level]) for level in range(last + 1)]
        self.coarsen = [self._coarsen(level) for level in range(last)]
        self.keep = [self._keep(level) for level in range(last + 1)]
        self.forward = [self._children("children_forward", level, KEEP=level > 0) for level in range(last)]
        self.forward.append(self._all("all_forward", last, KEEP=last > 0))
        self.backward_query = [self._children("children_backward_query", level) for level in range(last)]
        self.backward_query.append(self._all("all_backward_query", last))
        self.backward_key = [self._quads("children_backward_key", level) for level in range(last)]
        self.backward_key.append(self._all("all_backward_key", last))
        self.backward_at_once = self._at_once(last)

    def _itemsize(self, kernel: str, level: int) -> int:
        """Return the bytes of a number of the maps that a kernel reads."""
        return self.itemsize if level == 0 or "backward" in kernel else 4

    def _launch(self, kernel: str, level: int) -> _Launch:
        """Return a kernel's settings at a level."""
        if self._itemsize(kernel, level) == 4:
            return LAUNCH[kernel, 2]
        return LAUNCH[kernel, int(self.constants["BLOCK_DIM"] > 32)]

    def _arguments(self, level: int, value_strides: tuple) -> tuple:
        """Return the arguments that follow a level's tensors."""
        height, width, first = self.maps[level]
        # Normalisers of the finest level come last, so that those of others lie where the numbers of their keys say.
        first = (first if level else self.coarse_keys,)
        if level + 1 < len(self.maps):
            first += (self.maps[level + 1].first,)
        return *first, height, width, self.heads, self.scale, *self.queries[level], *self.keys[level], *value_strides

    def _coarsen(self, level: int) -> tuple[tuple[int, int], tuple, dict]:
        """Return the grid, the arguments and the constants of the kernel that makes the level above."""
        launch, (height, width, _) = self._launch("coarsen", level), self.maps[level]
        tiles = triton.cdiv(self.maps[level + 1].height * self.maps[level + 1].width, launch.block)
        arguments = height, width, self.heads, *self.queries[level], *self.keys[level]
        constants = {**self.constants, "BLOCK": launch.block, "num_warps": launch.warps}
        return (tiles * self.heads, self.batch), arguments, constants

    def _keep(self, level: int) -> tuple[tuple[int], tuple, dict]:
        """Return the grid, the arguments and the constants of the kernel that chooses what queries keep."""
        height, width, first = self.maps[level]
        coarsest = level == len(self.maps) - 1
        queries, count = self.batch * self.heads * height * width, height * width if coarsest else 4 * self.topk
        # A map of fewer keys than are kept is filled up with what lies outside.
        block = triton.next_power_of_2(max(count, self.topk))
        rows = max(1, KEEP_TILE // block)
        first_coarser = first if coarsest else self.maps[level + 1].first
        constants = {"TOPK": self.topk, "BLOCK": block, "ROWS": rows, "COARSEST": coarsest, "num_warps": 4}
        arguments = height, width, first, first_coarser, self.coarse_keys, count, queries
        return (triton.cdiv(queries, rows),), arguments, constants

    def _all(self, kernel: str, level: int, **flags) -> tuple[tuple[int, int], dict]:
        """Return the grid and the constants of a kernel over all pairs."""
        launch, (height, width, _) = self._launch(kernel, level), self.maps[level]
        # Less at once where the map is small, the head wide or the dtype is.
        most = 16384 // (self.constants["BLOCK_DIM"] * self._itemsize(kernel, level))
        chunk = max(16, min(launch.chunk, most, triton.next_power_of_2(height * width)))
        return (triton.cdiv(height * width, launch.block) * self.heads, self.batch), {
            **self.constants, **self.precision, "BLOCK": launch.block, "CHUNK": chunk,
            "num_warps": launch.warps, "num_stages": launch.stages, **flags,
        }  # fmt: skip

    def _at_once(self, level: int) -> tuple[tuple[int, int], dict] | None:
        """Return the grid and the constants of the kernel that holds a whole map, or None where it is too large."""
        launch, (height, width, _) = self._launch("all_backward", level), self.maps[level]
        # Of float32 none would fit into the registers.
        if height * width > launch.block:
            return None
        return (self.heads, self.batch), {
            **self.constants, **self.precision, "BLOCK": max(16, triton.next_power_of_2(height * width)),
            "num_warps": launch.warps, "num_stages": launch.stages,
        }  # fmt: skip

    def _children(self, kernel: str, level: int, **flags) -> tuple[tuple[int, int], dict]:
        """Return the grid and the constants of a kernel over the parents of a level's queries."""
        launch, (height, width, _) = self._launch(kernel, level), self.maps[level + 1]
        parents = min(4, max(1, launch.chunk // self.family["CANDIDATES"]))
        tile_h, tile_w = {1: (1, 1), 2: (1, 2), 4: (2, 2)}[parents]
        tiles = triton.cdiv(height, tile_h) * triton.cdiv(width, tile_w)
        if kernel == "children_forward":
            dim = self.constants["BLOCK_DIM"]
            flags["STEP"] = min(dim, STEP) if self._itemsize(kernel, level) == 4 else dim
        return (triton.cdiv(tiles, launch.block) * self.heads, self.batch), {
            **self.constants, **self.precision, **self.family, "TILE_H": tile_h, "TILE_W": tile_w,
            "TILES": launch.block,
            "num_warps": launch.warps, "num_stages": launch.stages, **flags,
        }  # fmt: skip

    def _quads(self, kernel: str, level: int) -> tuple[tuple[int, int], dict]:
        """Return the grid and the constants of a kernel over the keys above a level's."""
        launch, (height, width, _) = self._launch(kernel, level), self.maps[level + 1]
        return (triton.cdiv(height * width, launch.block) * self.heads, self.batch), {
            **self.constants, **self.precision, "TOPK": self.topk, "KEYS": launch.block, "PARENTS": launch.chunk,
            "num_warps": launch.warps, "num_stages": launch.stages,
        }  # fmt: skip


_problem = lru_cache(maxsize=1024)(_Problem)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _prepare(query, key, values, topk: int, scale: float) -> tuple[_Problem, Tensor, Tensor, list[Tensor]]:
    """Return how the kernels are launched, and the maps as they read them."""
    query, key, *values = (_dense(x) for x in (query, key, *values) if x is not None)
    tf32 = query.dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    strides = tuple(x.stride() for x in (query, key, *values))
    problem = _problem(query.shape, strides, query.itemsize, topk, scale, tf32)
    return problem, query, key, values


def _with_coarser(problem: _Problem, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return a map and an empty one for each coarser level."""
    return [x, *(torch.empty(shape, dtype=dtype, device=x.device) for shape in problem.shapes[1:])]


def _quadtree(
    query: Tensor, key: Tensor, value: Tensor, value1: Tensor | None, value2: Tensor | None, value3: Tensor | None,
    added1: Tensor | None, added2: Tensor | None, added3: Tensor | None, topk: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem, query, key, values = _prepare(query, key, (value, value1, value2, value3), topk, scale)
    queries, keys = (_with_coarser(problem, x, torch.float32) for x in (query, key))
    for level, (grid, arguments, constants) in enumerate(problem.coarsen):
        q, k = queries[level], keys[level]
        # Without gradients there is nothing to read or write, but the kernel needs pointers.
        _coarsen[grid](q, k, q, queries[level + 1], keys[level + 1], q, *arguments, **constants, GRAD=False)
    out, lse, kept, coarsest = _fake(query, key, value, value1, value2, value3, added1, added2, added3, topk, scale)
    added = _added(added1, added2, added3)
    coarser = None
    for level in reversed(range(len(values))):
        result, scores = out, lse
        if level:
            _, (*_, count, number), _ = problem.keep[level]
            result = coarsest
            if coarser is not None:
                result = torch.empty(problem.shapes[level], dtype=torch.float32, device=query.device)
            scores = torch.empty((number, count), dtype=torch.float32, device=query.device)
        grid, constants = problem.forward[level]
        add = added[level] is not None
        inputs = queries[level], keys[level], values[level], added[level] if add else query
        if coarser is None:
            _all_forward[grid](*inputs, result, lse, scores, *problem.arguments[level], **constants, ADD=add)
        else:
            _children_forward[grid](
                *inputs, kept, coarser, result, lse, scores, *problem.arguments[level], **constants, ADD=add
            )
        if level:
            grid, arguments, constants = problem.keep[level]
            _keep[grid](scores, kept, *arguments, **constants)
        coarser = result
    return out, lse, kept, coarsest


def _added(*coarser: Tensor | None) -> list[Tensor | None]:
    """Return what is added to the outputs of the levels, as the kernels read it: to the finest nothing here."""
    return [None, *(t if t is None else t.contiguous() for t in coarser)]


def _quadtree_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, value1: Tensor | None, value2: Tensor | None,
    value3: Tensor | None, added1: Tensor | None, added2: Tensor | None, added3: Tensor | None,
    out: Tensor, lse: Tensor, kept: Tensor, coarsest: Tensor, topk: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem, query, key, values = _prepare(query, key, (value, value1, value2, value3), topk, scale)
    levels = len(values)
    # Queries, keys and the gradients of the outputs of all levels. What to keep is known: no need for float32.
    queries, keys, grads = (_with_coarser(problem, x, query.dtype) for x in (query, key, grad_out.contiguous()))
    for level, (grid, arguments, constants) in enumerate(problem.coarsen):
        maps = (x[i] for i in (level, level + 1) for x in (queries, keys, grads))
        _coarsen[grid](*maps, *arguments, **constants, GRAD=True)
    # What is added to a level's output has the same gradient.
    pairs = zip((added1, added2, added3), grads[1:], strict=False)
    grad_added = [query.new_empty(0) if t is None else grad for t, grad in pairs]
    delta = torch.empty_like(lse)
    order = starts = kept
    if levels > 1:
        # For each key, where it stands in `kept`. Numbers of 16 bits are sorted in half as many passes.
        lowest, dtype = (-32768, torch.int16) if problem.coarse_keys < 65536 else (0, torch.int32)
        numbers, order = torch.add(kept, lowest, out=torch.empty_like(kept, dtype=dtype)).sort(stable=True)
        keys_of_all = torch.arange(lowest, lowest + problem.coarse_keys + 1, device=kept.device, dtype=dtype)
        starts = torch.searchsorted(numbers, keys_of_all, out_int32=True)
        del numbers, keys_of_all
    grad_values = []
    above_q = above_k = None
    for level in reversed(range(levels)):
        # A level's maps are in memory until its gradients are there.
        inputs = queries.pop(), keys.pop(), values[level]
        saved = lse, grads.pop(), delta
        shape, arguments = problem.shapes[level], problem.arguments[level]
        (query_grid, query_constants), (key_grid, key_constants) = (
            problem.backward_query[level],
            problem.backward_key[level],
        )
        grad_q = query.new_empty(shape)
        if level < levels - 1:
            _children_backward_query[query_grid](*inputs, kept, *saved, above_q, grad_q, *arguments, **query_constants)
            # Freed before there are more.
            above_q = None
            grad_k, grad_v = query.new_empty(shape), query.new_empty(shape)
            _children_backward_key[key_grid](
                *inputs, starts, order, *saved, above_k, grad_k, grad_v, *arguments, **key_constants
            )
        else:
            grad_k, grad_v = query.new_empty(shape), query.new_empty(shape)
            if problem.backward_at_once:
                grid, constants = problem.backward_at_once
                _all_backward[grid](*inputs, *saved[:2], grad_q, grad_k, grad_v, *arguments, **constants)
            else:
                add = _added(added1, added2, added3)[level]
                own = query if add is None else add, coarsest if level else out
                _all_backward_query[query_grid](
                    *inputs, *own, *saved, grad_q, *arguments, **query_constants, ADD=add is not None
                )
                _all_backward_key[key_grid](*inputs, *saved, grad_k, grad_v, *arguments, **key_constants)
        grad_values.insert(0, grad_v)
        above_q, above_k = grad_q, grad_k
    none = [query.new_empty(0) for _ in range(2 * (4 - levels))]
    return grad_q, grad_k, *grad_values, *none[: 4 - levels], *grad_added, *none[4 - levels :]


def _fake(query, key, value, value1, value2, value3, added1, added2, added3, topk, scale):
    batch, height, width, heads, _ = query.shape
    coarse_keys = _maps(query.shape, 1 + sum(v is not None for v in (value1, value2, value3)))[1]
    out = query.new_empty(query.shape)
    lse = query.new_empty(coarse_keys + batch * heads * height * width, dtype=torch.float32)
    kept = query.new_empty(coarse_keys * topk, dtype=torch.int32)
    # The output of the coarsest level, if it is another than the finest.
    coarsest = next((v for v in (value3, value2, value1) if v is not None), None)
    shape = (0,) if coarsest is None else coarsest.shape
    return out, lse, kept, query.new_empty(shape, dtype=torch.float32)


def _fake_backward(grad_out, query, key, *others):
    tensors = (query, key, *others[:7])
    return tuple(query.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


def _reference(query, key, value, value1, value2, value3, added1, added2, added3, topk, scale):
    values = [v for v in (value, value1, value2, value3) if v is not None]
    added = [t for t in (added1, added2, added3) if t is not None]
    encoding = [torch.zeros_like(value), *added] if added else None
    return quadtree_attention_reference(query, key, values, topk, "B", scale, encoding)


_call = register("quadtree_attention", _quadtree, _fake, _quadtree_backward, _fake_backward, _reference)


def _products(query, values, topk: int) -> int:
    """Return the products of a query and a key, over all levels."""
    batch, _, _, heads, dim = query
    positions = [v[1] * v[2] for v in values if v is not None]
    pairs = sum(4 * topk * n for n in positions[:-1]) + positions[-1] ** 2
    return batch * heads * dim * pairs


@register_flop_formula(torch.ops.densezoo.quadtree_attention)
def _(query, key, value, value1, value2, value3, added1, added2, added3, topk, *args, **kwargs) -> int:
    # The products with the keys and with the values, each a multiplication and an addition.
    return 4 * _products(query, (value, value1, value2, value3), topk)


@register_flop_formula(torch.ops.densezoo.quadtree_attention_backward)
def _(
    grad_out, query, key, value, value1, value2, value3, added1, added2, added3, out, lse, kept, coarsest, topk,
    *args, **kwargs,
) -> int:  # fmt: skip
    # Five products: the scores once more, and the gradients of query, key, value and weights.
    return 10 * _products(query, (value, value1, value2, value3), topk)


def quadtree_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Sequence[Tensor],
    topk: int,
    scale: float,
    encoding: Sequence[Tensor] | None = None,
) -> Tensor:
    """Compute `densezoo.ops.quadtree_attention` of type B with the kernels; arguments checked, at most 4 levels."""
    none = [None] * (4 - len(value))
    if encoding is None:
        return _call(query, key, *value, *none, None, None, None, topk, scale)
    # Where compiled, adding to the finest level is one with what comes next.
    finest, *added = encoding
    return _call(query, key, *value, *none, *added, *none, topk, scale) + finest
