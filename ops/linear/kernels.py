"""Focused linear attention in Triton, forward and backward.

With a = x / |x| the features of a token over all heads (x as in `focused_linear_attention`) and w = a ** p / |a ** p|,
phi(x) = |x| w. The two norms of a token are all that its heads share: once they are known, heads are independent.

- `_norms`: a program owns a few tokens of query or key, all heads; writes 1 / |x| and 1 / |a ** p|. A head alone has
  them at hand.
- `_forward`: a program owns one head of one image. It sums the state mean(phi(k)^T [v, 1]) over the tokens, keeps it on
  the chip, and visits the queries. Where programs are too few to fill the GPU, the tokens are split between them: one
  launch writes partial states, and a second one sums them up and visits the queries.
- `_delta`: a program owns a few tokens, all heads: the sum over heads of out . grad_out over the normaliser, which is
  the gradient of a query along itself.
- `_backward_query`: a program owns one head of one image or of a run of its tokens. Sums the state again, or loads it;
  writes the gradient of the queries and (partial) gradients of the state and of the feature scale.
- `_backward_key`: a program owns one head of one image or of a run of its tokens. The gradient of a key along itself is
  a sum over heads: of several, programs are launched twice, first for the gradient of the values and heads' shares.

Gradients of parameters are partial sums that `partials.total` adds up: two deterministic stages.

Norms, powers and means leave the range of float16: its products take operands scaled to LARGEST. One number is enough
for phi(k), the largest so far. But a feature that keys hardly have makes its row of the state tiny, and that of the
state's gradient huge. So rows of the state are divided by the sum of phi(k), which leaves averages of the values; w
over the normaliser is multiplied by it, which leaves at most 1; and rows of the state's gradient are divided by their
largest number.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.launch import Table
from densezoo.ops.linear.reference import focused_linear_attention_reference
from densezoo.ops.partials import total
from densezoo.ops.products import product
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# What float16 operands are scaled to: they keep all digits down to 2e-9 of it.
LARGEST = tl.constexpr(2.0**15)


@triton.jit
def _power(a, P: tl.constexpr):
    """A ** P for a >= 0."""
    if P == 0:
        out = a * 0.0 + 1.0
    elif P == 1:
        out = a
    elif P == 2:
        out = a * a
    elif P == 3:
        out = a * a * a
    elif P == 4:
        out = (a * a) * (a * a)
    else:
        out = tl.exp2(tl.log2(a) * P)
    return out


@triton.jit
def _features(x, inverse_scale):
    """(relu(x) + eps) / feature_scale; 0 where `inverse_scale` is, past the last channel."""
    return (tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + 1e-6) * inverse_scale


@triton.jit
def _inverse_scale(scale, head, d, d_inside, DIM: tl.constexpr):
    loaded = tl.load(scale + head * DIM + d, mask=d_inside, other=1.0).to(tl.float32)
    return tl.where(d_inside, 1.0 / loaded, 0.0)


@triton.jit
def _load(x, origin, stride_t, t, d, mask, INDEX: tl.constexpr):
    """Rows `t` of one head, as float32."""
    offsets = t.to(INDEX)[:, None] * stride_t + d[None, :]
    return tl.load(x + origin + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row_norms(
    x, pos, scale, norms, image, tile, tokens, stride_b, stride_t, stride_n, heads,
    HAS_POS: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr,
    TOKENS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    t = tile * TOKENS + tl.arange(0, TOKENS)
    c = tl.arange(0, BLOCK_C)
    c_inside = c < heads * DIM
    mask = (t < tokens)[:, None] & c_inside[None, :]
    offsets = t.to(INDEX)[:, None] * stride_t + (c // DIM * stride_n + c % DIM)[None, :]
    u = tl.load(x + image * stride_b + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_POS:
        offsets = t.to(INDEX)[:, None] * (heads * DIM) + c[None, :]
        u += tl.load(pos + offsets, mask=mask, other=0.0).to(tl.float32)
    u = _features(u, _inverse_scale(scale, 0, c, c_inside, DIM)[None, :])
    inverse = 1.0 / tl.sqrt(tl.sum(u * u, 1))
    power = _power(u * inverse[:, None], P)
    row = image * tokens + t
    tl.store(norms + 2 * row, inverse, mask=t < tokens)
    tl.store(norms + 2 * row + 1, 1.0 / tl.sqrt(tl.sum(power * power, 1)), mask=t < tokens)


@compiling.kernel(do_not_specialize=["tokens", "heads"])
def _norms(
    q, k, pos, scale, norms_q, norms_k, tokens,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n, heads,
    HAS_POS: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr,
    TOKENS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, TOKENS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tl.program_id(1) == 0:
        _row_norms(
            q, pos, scale, norms_q, image, tile, tokens, q_stride_b, q_stride_t, q_stride_n,
            heads, False, DIM, P, BLOCK_C, TOKENS, INDEX,
        )  # fmt: skip
    else:
        _row_norms(
            k, pos, scale, norms_k, image, tile, tokens, k_stride_b, k_stride_t, k_stride_n,
            heads, HAS_POS, DIM, P, BLOCK_C, TOKENS, INDEX,
        )  # fmt: skip


@triton.jit
def _unit(
    x, pos, norms, origin, stride_t, row, head, heads, t, t_inside, d, inverse_scale, mask,
    HAS_POS: tl.constexpr, SINGLE: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """What tokens `t` of one head enter as: x, the unit vector a of its features, 1 / |x| and 1 / |a ** p|."""
    x = _load(x, origin, stride_t, t, d, mask, INDEX)
    if HAS_POS:
        x += _load(pos, head * DIM, heads * DIM, t, d, mask, INDEX)
    a = _features(x, inverse_scale[None, :])
    if SINGLE:
        inverse = 1.0 / tl.sqrt(tl.sum(a * a, 1))
        a *= inverse[:, None]
        power = _power(a, P)
        inverse_power = tl.where(t_inside, 1.0 / tl.sqrt(tl.sum(power * power, 1)), 0.0)
    else:
        inverse = tl.load(norms + 2 * (row + t), mask=t_inside, other=1.0)
        inverse_power = tl.load(norms + 2 * (row + t) + 1, mask=t_inside, other=0.0)
        a *= inverse[:, None]
    return x, a, inverse, inverse_power


@triton.jit
def _state(
    k, v, pos, norms_k, k_origin, k_stride_t, row, head, heads, first, last, tokens, d, d_inside, inverse_scale,
    HAS_POS: tl.constexpr, SINGLE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    P: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The sums of phi(k)^T v and of phi(k) over tokens `first` to `last`, over the number of all tokens."""
    dtype: tl.constexpr = k.dtype.element_ty
    key_value = tl.zeros((BLOCK_DIM, BLOCK_DIM), tl.float32)
    key_sum = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
    largest = 1e-30
    for start in range(first, last, TOKENS):
        t = start + tl.arange(0, TOKENS)
        t_inside = t < last
        mask = t_inside[:, None] & d_inside[None, :]
        _, a, inverse, inverse_power = _unit(
            k, pos, norms_k, k_origin, k_stride_t, row, head, heads, t, t_inside, d, inverse_scale, mask,
            HAS_POS, SINGLE, DIM, P, INDEX,
        )  # fmt: skip
        phi = _power(a, P) * (inverse_power / inverse)[:, None]
        v_tile = _load(v, k_origin, k_stride_t, t, d, mask, INDEX)
        if dtype == tl.float16:
            tile_largest = tl.max(phi)
            if tile_largest > largest:
                key_value *= largest / tile_largest
                largest = tile_largest
            key_value = product((phi * (1.0 / largest * LARGEST)).T, v_tile, key_value, dtype, PRECISION)
        else:
            key_value = product(phi.T, v_tile, key_value, dtype, PRECISION)
        key_sum += phi
    if dtype == tl.float16:
        key_value *= largest / (tokens * LARGEST)
    else:
        key_value /= tokens
    return key_value, tl.sum(key_sum, 0) / tokens


@triton.jit
def _averages(key_value, key_sum, dtype: tl.constexpr):
    """The state as products take it, and its unit: for float16 the average of the values by each feature."""
    unit = 1.0
    if dtype == tl.float16:
        key_value *= (1.0 / tl.maximum(key_sum, 1e-30))[:, None]
        unit = tl.maximum(tl.max(tl.abs(key_value)), 1e-30) * (1.0 / LARGEST)
        key_value *= 1.0 / unit
    return key_value, unit


@triton.jit
def _store_state(state, key_value, key_sum, d, d_inside, DIM: tl.constexpr):
    """Write (DIM, DIM) sums, and a row of DIM."""
    mask = d_inside[:, None] & d_inside[None, :]
    tl.store(state + d[:, None] * DIM + d[None, :], key_value, mask=mask)
    tl.store(state + DIM * DIM + d, key_sum, mask=d_inside)


@triton.jit
def _load_state(state, stride, parts, d, d_inside, DIM: tl.constexpr):
    """The sum of `parts` states."""
    offsets = d[:, None] * DIM + d[None, :]
    mask = d_inside[:, None] & d_inside[None, :]
    key_value = tl.load(state + offsets, mask=mask, other=0.0)
    key_sum = tl.load(state + DIM * DIM + d, mask=d_inside, other=0.0)
    for _ in range(1, parts):
        state += stride
        key_value += tl.load(state + offsets, mask=mask, other=0.0)
        key_sum += tl.load(state + DIM * DIM + d, mask=d_inside, other=0.0)
    return key_value, key_sum


@compiling.kernel(do_not_specialize=["tokens", "run", "parts", "heads"])
def _forward(
    q, k, v, pos, scale, norms_q, norms_k, partial, state, out, normaliser, tokens, run, parts,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n, heads,
    HAS_POS: tl.constexpr, SINGLE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    P: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    SUM: tl.constexpr, ATTEND: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """With SUM over the keys, with ATTEND over the queries of a run of tokens; with both, the run is all of them.

    With SAVE the sums are written.
    """
    head = tl.program_id(0) % heads
    image = (tl.program_id(0) // heads).to(tl.int64)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, tokens)
    row = image * tokens
    d = tl.arange(0, BLOCK_DIM)
    d_inside = d < DIM
    dtype: tl.constexpr = q.dtype.element_ty
    inverse_scale = _inverse_scale(scale, head, d, d_inside, DIM)
    size: tl.constexpr = DIM * DIM + DIM
    program = tl.program_id(0).to(tl.int64)
    stride = tl.num_programs(0).to(tl.int64) * size
    if SUM:
        key_value, key_sum = _state(
            k, v, pos, norms_k, image * k_stride_b + head * k_stride_n, k_stride_t, row, head, heads, first, last,
            tokens, d, d_inside, inverse_scale, HAS_POS, SINGLE, DIM, BLOCK_DIM, P, TOKENS, PRECISION, INDEX,
        )  # fmt: skip
    else:
        key_value, key_sum = _load_state(partial + program * size, stride, parts, d, d_inside, DIM)
    if SAVE:
        # Sums of a part of the tokens, or of all.
        sums = state if ATTEND else partial + tl.program_id(1) * stride
        if not ATTEND or tl.program_id(1) == 0:
            _store_state(sums + program * size, key_value, key_sum, d, d_inside, DIM)
    if ATTEND:
        key_value, unit = _averages(key_value, key_sum, dtype)
        for start in range(first, last, TOKENS):
            t = start + tl.arange(0, TOKENS)
            t_inside = t < last
            mask = t_inside[:, None] & d_inside[None, :]
            _, a, inverse, inverse_power = _unit(
                q, pos, norms_q, image * q_stride_b + head * q_stride_n, q_stride_t, row, head, heads, t, t_inside, d,
                inverse_scale, mask, False, SINGLE, DIM, P, INDEX,
            )  # fmt: skip
            w = _power(a, P) * inverse_power[:, None]
            terms = w * key_sum[None, :]
            total = tl.sum(terms, 1) + 1e-6 * inverse
            zero = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
            if dtype == tl.float16:
                terms *= (1.0 / total * LARGEST)[:, None]
                o_tile = product(terms, key_value, zero, dtype, PRECISION) * (unit * (1.0 / LARGEST))
            else:
                o_tile = product(w, key_value, zero, dtype, PRECISION) * (1.0 / total)[:, None]
            offsets = t.to(INDEX)[:, None] * (heads * DIM) + d[None, :]
            tl.store(out + (row * heads + head) * DIM + offsets, o_tile.to(dtype), mask=mask)
            if not SINGLE:
                tl.store(normaliser + (row + t) * heads + head, total, mask=t_inside)


@compiling.kernel(do_not_specialize=["rows", "heads"])
def _delta(
    out, grad_out, normaliser, norms_q, delta, rows, heads,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_DIM)
    mask = (row < rows)[:, None] & (head < heads)[None, :]
    item = row[:, None] * heads + head[None, :]
    offsets = item[:, :, None] * DIM + d[None, None, :]
    inside = mask[:, :, None] & (d < DIM)[None, None, :]
    o_tile = tl.load(out + offsets, mask=inside, other=0.0).to(tl.float32)
    do_tile = tl.load(grad_out + offsets, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(normaliser + item, mask=mask, other=1.0)
    share = tl.sum(o_tile * do_tile, 2) / total
    inverse = tl.load(norms_q + 2 * row, mask=row < rows, other=0.0)
    # Only the epsilon of the normaliser keeps the result from being the same for any length of a query.
    tl.store(delta + row, 1e-6 * inverse * tl.sum(share, 1), mask=row < rows)


@compiling.kernel(do_not_specialize=["tokens", "run", "heads"])
def _backward_query(
    q, k, v, pos, scale, norms_q, norms_k, state, normaliser, delta, grad_out,
    grad_q, grad_state, grad_scale, tokens, run,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n, heads,
    HAS_POS: tl.constexpr, SINGLE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    P: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    image = (tl.program_id(0) // heads).to(tl.int64)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, tokens)
    row = image * tokens
    d = tl.arange(0, BLOCK_DIM)
    d_inside = d < DIM
    dtype: tl.constexpr = q.dtype.element_ty
    size: tl.constexpr = DIM * DIM + DIM
    inverse_scale = _inverse_scale(scale, head, d, d_inside, DIM)
    if SUM:
        key_value, key_sum = _state(
            k, v, pos, norms_k, image * k_stride_b + head * k_stride_n, k_stride_t, row, head, heads, 0, tokens,
            tokens, d, d_inside, inverse_scale, HAS_POS, SINGLE, DIM, BLOCK_DIM, P, TOKENS, PRECISION, INDEX,
        )  # fmt: skip
    else:
        key_value, key_sum = _load_state(state + tl.program_id(0).to(tl.int64) * size, 0, 1, d, d_inside, DIM)
    key_value, unit = _averages(key_value, key_sum, dtype)

    grad_key_value = tl.zeros((BLOCK_DIM, BLOCK_DIM), tl.float32)
    grad_key_sum = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
    scale_sum = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
    for start in range(first, last, TOKENS):
        t = start + tl.arange(0, TOKENS)
        t_inside = t < last
        mask = t_inside[:, None] & d_inside[None, :]
        x, a, inverse, inverse_power = _unit(
            q, pos, norms_q, image * q_stride_b + head * q_stride_n, q_stride_t, row, head, heads, t, t_inside, d,
            inverse_scale, mask, False, SINGLE, DIM, P, INDEX,
        )  # fmt: skip
        slope = _power(a, P - 1) * inverse_power[:, None]
        w = slope * a
        zero = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
        do_tile = _load(grad_out, (row * heads + head) * DIM, heads * DIM, t, d, mask, INDEX)
        if SINGLE:
            total = tl.sum(w * key_sum[None, :], 1) + 1e-6 * inverse
        else:
            total = tl.load(normaliser + (row + t) * heads + head, mask=t_inside, other=1.0)
        # The gradient of the output enters products as it is: scaled, it would be rounded.
        by_total = (1.0 / total)[:, None]
        grad = product(do_tile, key_value.T, zero, dtype, PRECISION) * by_total
        if dtype == tl.float16:
            grad *= unit * key_sum[None, :]
        # That is out . grad_out over the normaliser, with the errors of `grad`, from which it is subtracted.
        share = tl.sum(w * grad, 1) / total
        grad -= share[:, None] * key_sum[None, :]
        by_normaliser = w * by_total
        if dtype == tl.float16:
            by_normaliser *= key_sum[None, :] * LARGEST
        if SINGLE:
            along = 1e-6 * inverse * share
        else:
            along = tl.load(delta + row + t, mask=t_inside, other=0.0)
        grad_key_value = product(by_normaliser.T, do_tile, grad_key_value, dtype, PRECISION)
        grad_key_sum -= share[:, None] * w
        # The gradient of the features, over their norm.
        grad = P * slope * (grad - along[:, None] * w) + along[:, None] * a
        scale_sum += tl.where(t_inside[:, None], grad * a, 0.0)
        grad = tl.where(x > 0, grad * inverse[:, None] * inverse_scale[None, :], 0.0)
        offsets = t.to(INDEX)[:, None] * (heads * DIM) + d[None, :]
        tl.store(grad_q + (row * heads + head) * DIM + offsets, grad.to(dtype), mask=mask)

    if dtype == tl.float16:
        grad_key_value *= (1.0 / (tl.maximum(key_sum, 1e-30) * LARGEST))[:, None]
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    _store_state(grad_state + program * size, grad_key_value, tl.sum(grad_key_sum, 0), d, d_inside, DIM)
    tl.store(grad_scale + program * DIM + d, -tl.sum(scale_sum, 0) * inverse_scale, mask=d_inside)


@compiling.kernel(do_not_specialize=["tokens", "run", "parts", "heads"])
def _backward_key(
    k, v, pos, scale, norms_k, grad_state, shares, grad_k, grad_v, grad_scale, tokens, run, parts,
    k_stride_b, k_stride_t, k_stride_n, heads,
    HAS_POS: tl.constexpr, SINGLE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, P: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    VALUES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """With VALUES writes their gradient and each head's share in that of the keys, with KEYS the gradient of these."""
    head = tl.program_id(0) % heads
    image = (tl.program_id(0) // heads).to(tl.int64)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, tokens)
    row = image * tokens
    d = tl.arange(0, BLOCK_DIM)
    d_inside = d < DIM
    dtype: tl.constexpr = k.dtype.element_ty
    size: tl.constexpr = DIM * DIM + DIM
    inverse_scale = _inverse_scale(scale, head, d, d_inside, DIM)
    part = grad_state + tl.program_id(0).to(tl.int64) * size
    stride = tl.num_programs(0).to(tl.int64) * size
    grad_key_value, grad_key_sum = _load_state(part, stride, parts, d, d_inside, DIM)
    grad_key_value /= tokens
    grad_key_sum /= tokens
    if dtype == tl.float16:
        unit = tl.maximum(tl.max(tl.abs(grad_key_value), 1), 1e-30) * (1.0 / LARGEST)
        grad_key_value *= (1.0 / unit)[:, None]
    origin = image * k_stride_b + head * k_stride_n
    scale_sum = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
    for start in range(first, last, TOKENS):
        t = start + tl.arange(0, TOKENS)
        t_inside = t < last
        mask = t_inside[:, None] & d_inside[None, :]
        x, a, inverse, inverse_power = _unit(
            k, pos, norms_k, origin, k_stride_t, row, head, heads, t, t_inside, d, inverse_scale, mask,
            HAS_POS, SINGLE, DIM, P, INDEX,
        )  # fmt: skip
        norm = 1.0 / inverse
        slope = _power(a, P - 1) * inverse_power[:, None]
        w = slope * a
        v_tile = _load(v, origin, k_stride_t, t, d, mask, INDEX)
        target = (row * heads + head) * DIM + t.to(INDEX)[:, None] * (heads * DIM) + d[None, :]
        zero = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
        if VALUES:
            if dtype == tl.float16:
                scaled = w * unit[None, :]
                largest = tl.maximum(tl.max(scaled, 1), 1e-30) * (1.0 / LARGEST)
                grad = product(scaled * (1.0 / largest)[:, None], grad_key_value, zero, dtype, PRECISION)
                grad *= largest[:, None]
            else:
                grad = product(w, grad_key_value, zero, dtype, PRECISION)
            tl.store(grad_v + target, (grad * norm[:, None]).to(dtype), mask=mask)
            if not KEYS:
                share = tl.sum(grad * v_tile + w * grad_key_sum[None, :], 1)
                tl.store(shares + (row + t) * heads + head, share, mask=t_inside)
        if KEYS:
            grad = product(v_tile, grad_key_value.T, zero, dtype, PRECISION)
            grad = (grad * unit[None, :] if dtype == tl.float16 else grad) + grad_key_sum[None, :]
            if VALUES:
                along = tl.sum(w * grad, 1)
            else:
                h = tl.arange(0, BLOCK_HEADS)
                at_shares = shares + (row + t)[:, None] * heads + h[None, :]
                along = tl.sum(tl.load(at_shares, mask=t_inside[:, None] & (h < heads)[None, :], other=0.0), 1)
            grad = P * slope * (grad - along[:, None] * w) + along[:, None] * a
            scale_sum += tl.where(t_inside[:, None], grad * a * norm[:, None], 0.0)
            grad = tl.where(x > 0, grad * inverse_scale[None, :], 0.0)
            tl.store(grad_k + target, grad.to(dtype), mask=mask)
    if KEYS:
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(grad_scale + program * DIM + d, -tl.sum(scale_sum, 0) * inverse_scale, mask=d_inside)


class _Launch(NamedTuple):
    """Tokens a tile, warps a program, loads in flight, and the most registers of a thread."""

    tokens: int
    warps: int
    stages: int
    registers: int | None = None


# By kernel and the channels of a tile, measured on an H200. Never one warp with loads in flight: Triton 3.6 then leaves
# out the barrier after an asynchronous copy.
LAUNCH = {
    ("forward", 32): _Launch(64, 4, 3),
    ("forward", 64): _Launch(32, 4, 3, 128),
    ("forward", 128): _Launch(32, 8, 3, 128),
    ("backward_query", 32): _Launch(64, 4, 2, 168),
    ("backward_query", 64): _Launch(32, 4, 1),
    ("backward_query", 128): _Launch(16, 8, 2),
    ("backward_key", 32): _Launch(64, 4, 1, 168),
    ("backward_key", 64): _Launch(32, 4, 1, 168),
    ("backward_key", 128): _Launch(32, 8, 2),
}
LAUNCH = Table("focused_linear_attention", LAUNCH)
# Programs that fill the GPU. Fewer are split into runs of at least so many tokens; with fewer tokens, the state of a
# head is not much smaller than its keys and values, and is computed again instead of saved.
PROGRAMS = 384
RUN = 256
# Entries of a tile of `_norms` and `_delta`.
TILE = 2048


def _sizes(batch: int, tokens: int, heads: int, dim: int) -> tuple[int, ...]:
    """Return the entries saved for the backward: states, norms of queries and of keys, normalisers."""
    # A head alone has the norms of its tokens at hand.
    rows = batch * tokens if heads > 1 else 0
    state = batch * heads * dim * (dim + 1) if tokens >= RUN else 0
    return state, 2 * rows, 2 * rows, rows * heads


class _Plan:
    """How the kernels are launched on inputs of one layout."""

    def __init__(self, shape, query_stride, key_stride, has_pos: bool, factor: float, tf32: bool):
        batch, tokens, heads, dim = shape
        self.strides = (*query_stride[:3], *key_stride[:3])
        self.sizes = _sizes(*shape)
        self.saves_state = tokens >= RUN
        strides = (query_stride, key_stride)
        largest = max(sum((n - 1) * s for n, s in zip(shape[1:], stride[1:], strict=True)) for stride in strides)
        features = {
            "HAS_POS": has_pos,
            "heads": heads,
            "DIM": dim,
            "P": int(factor) if factor.is_integer() else factor,
            # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
            "INDEX": tl.int32 if max(largest, tokens * heads * dim) < 2**31 else tl.int64,
        }
        block_dim = max(16, triton.next_power_of_2(dim))

        def constants(kernel: str) -> dict:
            launch = LAUNCH[kernel, max(32, block_dim)]
            if kernel == "forward" and tokens <= 64:
                # Of a window there is no next tile to load.
                launch = launch._replace(stages=1, registers=128)
            tile = {"BLOCK_DIM": block_dim, "TOKENS": launch.tokens, "PRECISION": "tf32" if tf32 else "ieee"}
            options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers}
            return features | {"SINGLE": heads == 1} | tile | options

        self.forward = constants("forward")
        self.backward_query = constants("backward_query") | {"SUM": not self.saves_state}
        self.backward_key = constants("backward_key")
        programs = batch * heads
        runs = 1 if programs >= PROGRAMS else max(1, min(tokens // RUN, 2 * PROGRAMS // programs))
        self.run = triton.cdiv(triton.cdiv(tokens, runs), 64) * 64
        self.runs = triton.cdiv(tokens, self.run)
        self.grid = (programs, self.runs)
        self.state = batch * heads * dim * (dim + 1)

        block_c = triton.next_power_of_2(heads * dim)
        rows = max(1, TILE // block_c)
        self.norms = {**features, "BLOCK_C": block_c, "TOKENS": rows, "num_warps": 4}
        self.norms_grid = (batch * triton.cdiv(tokens, rows), 2)
        self.block_heads = triton.next_power_of_2(heads)
        rows = max(1, TILE // (block_dim * self.block_heads))
        blocks = {"BLOCK_DIM": block_dim, "BLOCK_HEADS": self.block_heads}
        self.delta = {"heads": heads, "DIM": dim, **blocks, "ROWS": rows, "num_warps": 4}
        self.delta_grid = (triton.cdiv(batch * tokens, rows),)
        # Gradients of the feature scale of each program, by queries and by keys.
        self.scales = (2, self.runs * batch, heads, dim)


_plan = lru_cache(maxsize=1024)(_Plan)


def _prepare(query, key, value, scale, pos, factor) -> tuple:
    if query.stride(3) != 1:
        query = query.contiguous()
    if key.stride() != value.stride() or key.stride(3) != 1:
        key, value = key.contiguous(), value.contiguous()
    tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    plan = _plan(query.shape, query.stride(), key.stride(), pos is not None, factor, tf32)
    # Kernels have no use for a missing encoding, but need a pointer.
    return plan, query, key, value, scale.contiguous(), query if pos is None else pos.contiguous()


def _linear(
    query: Tensor, key: Tensor, value: Tensor, feature_scale: Tensor, positional_encoding: Tensor | None, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan, query, key, value, scale, pos = _prepare(query, key, value, feature_scale, positional_encoding, factor)
    _, tokens, heads, _ = query.shape
    out = query.new_empty(query.shape)
    saved = [torch.empty(size, dtype=torch.float32, device=query.device) for size in plan.sizes]
    state, norms_q, norms_k, normaliser = saved
    if heads > 1:
        _norms[plan.norms_grid](query, key, pos, scale, norms_q, norms_k, tokens, *plan.strides, **plan.norms)
    partial = state
    if plan.runs > 1:
        partial = torch.empty(plan.runs * plan.state, dtype=torch.float32, device=query.device)

    def launch(**flags) -> None:
        _forward[plan.grid](
            query, key, value, pos, scale, norms_q, norms_k, partial, state, out, normaliser,
            tokens, plan.run, plan.runs, *plan.strides, **plan.forward, **flags,
        )  # fmt: skip

    if plan.runs == 1:
        launch(SUM=True, ATTEND=True, SAVE=plan.saves_state)
    else:
        launch(SUM=True, ATTEND=False, SAVE=True)
        launch(SUM=False, ATTEND=True, SAVE=plan.saves_state)
    return out, *saved


def _linear_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, feature_scale: Tensor,
    positional_encoding: Tensor | None, out: Tensor, state: Tensor, norms_q: Tensor, norms_k: Tensor,
    normaliser: Tensor, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan, query, key, value, scale, pos = _prepare(query, key, value, feature_scale, positional_encoding, factor)
    batch, tokens, heads, _ = query.shape
    grad_out = grad_out.contiguous()
    grad_q, grad_k, grad_v = torch.empty_like(out), torch.empty_like(out), torch.empty_like(out)
    grad_state = torch.empty(plan.runs * plan.state, dtype=torch.float32, device=query.device)
    grad_scales = torch.empty(plan.scales, dtype=torch.float32, device=query.device)
    by_queries, by_keys = grad_scales.unbind()
    shares = along = normaliser
    if heads > 1:
        shares = torch.empty_like(normaliser)
        along = torch.empty(batch * tokens, dtype=torch.float32, device=query.device)
        _delta[plan.delta_grid](out, grad_out, normaliser, norms_q, along, batch * tokens, **plan.delta)
    _backward_query[plan.grid](
        query, key, value, pos, scale, norms_q, norms_k, state, normaliser, along, grad_out,
        grad_q, grad_state, by_queries, tokens, plan.run, *plan.strides, **plan.backward_query,
    )  # fmt: skip

    def launch(**flags) -> None:
        _backward_key[plan.grid](
            key, value, pos, scale, norms_k, grad_state, shares, grad_k, grad_v, by_keys,
            tokens, plan.run, plan.runs, *plan.strides[3:], **plan.backward_key, **flags,
        )  # fmt: skip

    if heads == 1:
        launch(VALUES=True, KEYS=True, BLOCK_HEADS=1)
    else:
        launch(VALUES=True, KEYS=False, BLOCK_HEADS=1)
        launch(VALUES=False, KEYS=True, BLOCK_HEADS=plan.block_heads)
    grad_scale = total(grad_scales.flatten(0, 1), dtype=feature_scale.dtype)
    if positional_encoding is None:
        return grad_q, grad_k, grad_v, grad_scale, grad_q.new_empty(0)
    return grad_q, grad_k, grad_v, grad_scale, total(grad_k, dtype=positional_encoding.dtype)


def _fake(query, key, value, feature_scale, positional_encoding, factor):
    saved = (query.new_empty(size, dtype=torch.float32) for size in _sizes(*query.shape))
    return query.new_empty(query.shape), *saved


def _fake_backward(grad_out, query, key, value, feature_scale, positional_encoding, *others):
    grads = (query.new_empty(query.shape) for _ in range(3))
    grad_pos = query.new_empty(0)
    if positional_encoding is not None:
        grad_pos = positional_encoding.new_empty(positional_encoding.shape)
    return *grads, feature_scale.new_empty(feature_scale.shape), grad_pos


_call = register(
    "focused_linear_attention", _linear, _fake, _linear_backward, _fake_backward, focused_linear_attention_reference
)


@register_flop_formula(torch.ops.densezoo.focused_linear_attention)
def _(query, *args, **kwargs) -> int:
    batch, tokens, heads, dim = query
    # The state, and its product with the queries.
    return 4 * batch * tokens * heads * dim * dim


@register_flop_formula(torch.ops.densezoo.focused_linear_attention_backward)
def _(grad_out, *args, **kwargs) -> int:
    batch, tokens, heads, dim = grad_out
    # The gradients of query, state, value and key.
    return 8 * batch * tokens * heads * dim * dim


def focused_linear_attention_triton(query, key, value, feature_scale, positional_encoding, factor) -> Tensor:
    """Compute `densezoo.ops.focused_linear_attention` with the kernels; arguments checked."""
    return _call(query, key, value, feature_scale, positional_encoding, float(factor))
