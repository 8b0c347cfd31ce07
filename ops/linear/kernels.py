"""Focused linear attention in Triton, forward and backward.

With a = x / |x| the features of a token over all heads (x as in `focused_linear_attention`) and w = a ** p / |a ** p|,
phi(x) = |x| w. The two norms of a token are all that its heads share: once they are known, heads are independent.

- `_norms`: a program owns a few tokens of query or key, all heads; writes 1 / |x| and 1 / |a ** p|.
- `_forward`: a program owns one head of one image. It sums the state mean(phi(k)^T [v, 1]) over the tokens, keeps it on
  the chip, and visits the queries. Where images and heads are too few to fill the GPU, their tokens are split between
  programs: one launch writes partial states, PyTorch sums them, and a second launch visits the queries.
- `_delta`: a program owns a few tokens, all heads: out . grad_out of each head over its normaliser, and their sum,
  which is the gradient of a query along itself.
- `_backward_query`: split as the forward is. Sums the state again, or loads it; writes the gradient of the queries and
  (partial) gradients of the state and of the feature scale.
- `_backward_key`: a program owns a run of tokens, all heads. The gradient of a key along itself is a sum over heads: a
  first sweep over them writes the gradient of the values and each head's share, a second one that of the keys.

Gradients of parameters are partial sums that PyTorch adds up: two deterministic stages. Norms, powers and means leave
the range of float16: `product` scales its operands.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops.products import product
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


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
    x, pos, scale, norms, image, tile, tokens, stride_b, stride_t, stride_n,
    HAS_POS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr,
    TOKENS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    t = tile * TOKENS + tl.arange(0, TOKENS)
    c = tl.arange(0, BLOCK_C)
    c_inside = c < HEADS * DIM
    mask = (t < tokens)[:, None] & c_inside[None, :]
    offsets = t.to(INDEX)[:, None] * stride_t + (c // DIM * stride_n + c % DIM)[None, :]
    u = tl.load(x + image * stride_b + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_POS:
        offsets = t.to(INDEX)[:, None] * (HEADS * DIM) + c[None, :]
        u += tl.load(pos + offsets, mask=mask, other=0.0).to(tl.float32)
    u = _features(u, _inverse_scale(scale, 0, c, c_inside, DIM)[None, :])
    inverse = 1.0 / tl.sqrt(tl.sum(u * u, 1))
    power = _power(u * inverse[:, None], P)
    row = image * tokens + t
    tl.store(norms + 2 * row, inverse, mask=t < tokens)
    tl.store(norms + 2 * row + 1, 1.0 / tl.sqrt(tl.sum(power * power, 1)), mask=t < tokens)


@triton.jit
def _norms(
    q, k, pos, scale, norms_q, norms_k, tokens,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n,
    HAS_POS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr,
    TOKENS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, TOKENS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tl.program_id(1) == 0:
        _row_norms(
            q, pos, scale, norms_q, image, tile, tokens, q_stride_b, q_stride_t, q_stride_n,
            False, HEADS, DIM, P, BLOCK_C, TOKENS, INDEX,
        )  # fmt: skip
    else:
        _row_norms(
            k, pos, scale, norms_k, image, tile, tokens, k_stride_b, k_stride_t, k_stride_n,
            HAS_POS, HEADS, DIM, P, BLOCK_C, TOKENS, INDEX,
        )  # fmt: skip


@triton.jit
def _unit(
    x, pos, norms, origin, stride_t, row, head, t, t_inside, d, inverse_scale, mask,
    HAS_POS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """What tokens `t` of one head enter as: x, the unit vector a of its features, 1 / |x| and 1 / |a ** p|."""
    x = _load(x, origin, stride_t, t, d, mask, INDEX)
    if HAS_POS:
        x += _load(pos, head * DIM, HEADS * DIM, t, d, mask, INDEX)
    a = _features(x, inverse_scale[None, :])
    if HEADS == 1:
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
    k, v, pos, norms_k, k_origin, k_stride_t, row, head, first, last, tokens, d, d_inside, inverse_scale,
    HAS_POS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, P: tl.constexpr,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The sums of phi(k)^T v and of phi(k) over tokens `first` to `last`, over the number of all tokens."""
    dtype: tl.constexpr = k.dtype.element_ty
    key_value = tl.zeros((BLOCK_DIM, BLOCK_DIM), tl.float32)
    key_sum = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
    for start in range(first, last, TOKENS):
        t = start + tl.arange(0, TOKENS)
        t_inside = t < last
        mask = t_inside[:, None] & d_inside[None, :]
        _, a, inverse, inverse_power = _unit(
            k, pos, norms_k, k_origin, k_stride_t, row, head, t, t_inside, d, inverse_scale, mask,
            HAS_POS, HEADS, DIM, P, INDEX,
        )  # fmt: skip
        phi = _power(a, P) * (inverse_power / inverse)[:, None]
        v_tile = _load(v, k_origin, k_stride_t, t, d, mask, INDEX)
        key_value = product(phi.T, v_tile, key_value, dtype, PRECISION)
        key_sum += phi
    return key_value / tokens, tl.sum(key_sum, 0) / tokens


@triton.jit
def _store_state(state, key_value, key_sum, d, d_inside, DIM: tl.constexpr):
    offsets = d[:, None] * DIM + d[None, :]
    tl.store(state + offsets, key_value, mask=d_inside[:, None] & d_inside[None, :])
    tl.store(state + DIM * DIM + d, key_sum, mask=d_inside)


@triton.jit
def _load_state(state, d, d_inside, DIM: tl.constexpr):
    offsets = d[:, None] * DIM + d[None, :]
    key_value = tl.load(state + offsets, mask=d_inside[:, None] & d_inside[None, :], other=0.0)
    return key_value, tl.load(state + DIM * DIM + d, mask=d_inside, other=0.0)


@triton.jit
def _forward(
    q, k, v, pos, scale, norms_q, norms_k, state, out, normaliser, tokens, run,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n,
    HAS_POS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, P: tl.constexpr,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    SUM: tl.constexpr, ATTEND: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """With SUM over the keys, with ATTEND over the queries of a run of tokens; with both, the run is all of them.

    With SAVE the sums are written.
    """
    head = tl.program_id(0) % HEADS
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, tokens)
    row = image * tokens
    d = tl.arange(0, BLOCK_DIM)
    d_inside = d < DIM
    dtype: tl.constexpr = q.dtype.element_ty
    inverse_scale = _inverse_scale(scale, head, d, d_inside, DIM)
    if SUM:
        key_value, key_sum = _state(
            k, v, pos, norms_k, image * k_stride_b + head * k_stride_n, k_stride_t, row, head, first, last, tokens,
            d, d_inside, inverse_scale, HAS_POS, HEADS, DIM, BLOCK_DIM, P, TOKENS, PRECISION, INDEX,
        )  # fmt: skip
        if SAVE:
            part = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (DIM * DIM + DIM)
            _store_state(state + part, key_value, key_sum, d, d_inside, DIM)
    else:
        part = tl.program_id(0).to(tl.int64) * (DIM * DIM + DIM)
        key_value, key_sum = _load_state(state + part, d, d_inside, DIM)
    if ATTEND:
        for start in range(first, last, TOKENS):
            t = start + tl.arange(0, TOKENS)
            t_inside = t < last
            mask = t_inside[:, None] & d_inside[None, :]
            _, a, inverse, inverse_power = _unit(
                q, pos, norms_q, image * q_stride_b + head * q_stride_n, q_stride_t, row, head, t, t_inside, d,
                inverse_scale, mask, False, HEADS, DIM, P, INDEX,
            )  # fmt: skip
            w = _power(a, P) * inverse_power[:, None]
            total = tl.sum(w * key_sum[None, :], 1) + 1e-6 * inverse
            zero = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
            o_tile = product(w, key_value, zero, dtype, PRECISION) / total[:, None]
            offsets = t.to(INDEX)[:, None] * (HEADS * DIM) + d[None, :]
            tl.store(out + (row * HEADS + head) * DIM + offsets, o_tile.to(dtype), mask=mask)
            tl.store(normaliser + (row + t) * HEADS + head, total, mask=t_inside)


@triton.jit
def _delta(
    out, grad_out, normaliser, norms_q, deltas, delta, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_DIM)
    mask = (row < rows)[:, None] & (head < HEADS)[None, :]
    item = row[:, None] * HEADS + head[None, :]
    offsets = item[:, :, None] * DIM + d[None, None, :]
    inside = mask[:, :, None] & (d < DIM)[None, None, :]
    o_tile = tl.load(out + offsets, mask=inside, other=0.0).to(tl.float32)
    do_tile = tl.load(grad_out + offsets, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(normaliser + item, mask=mask, other=1.0)
    share = tl.sum(o_tile * do_tile, 2) / total
    tl.store(deltas + item, share, mask=mask)
    inverse = tl.load(norms_q + 2 * row, mask=row < rows, other=0.0)
    # Only the epsilon of the normaliser keeps the result from being the same for any length of a query.
    tl.store(delta + row, 1e-6 * inverse * tl.sum(share, 1), mask=row < rows)


@triton.jit
def _backward_query(
    q, k, v, pos, scale, norms_q, norms_k, state, normaliser, deltas, delta, grad_out,
    grad_q, grad_state, grad_scale, tokens, run,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n,
    HAS_POS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, P: tl.constexpr,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, tokens)
    row = image * tokens
    d = tl.arange(0, BLOCK_DIM)
    d_inside = d < DIM
    dtype: tl.constexpr = q.dtype.element_ty
    inverse_scale = _inverse_scale(scale, head, d, d_inside, DIM)
    if SUM:
        key_value, key_sum = _state(
            k, v, pos, norms_k, image * k_stride_b + head * k_stride_n, k_stride_t, row, head, 0, tokens, tokens,
            d, d_inside, inverse_scale, HAS_POS, HEADS, DIM, BLOCK_DIM, P, TOKENS, PRECISION, INDEX,
        )  # fmt: skip
    else:
        part = tl.program_id(0).to(tl.int64) * (DIM * DIM + DIM)
        key_value, key_sum = _load_state(state + part, d, d_inside, DIM)

    grad_key_value = tl.zeros((BLOCK_DIM, BLOCK_DIM), tl.float32)
    grad_key_sum = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
    scale_sum = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
    for start in range(first, last, TOKENS):
        t = start + tl.arange(0, TOKENS)
        t_inside = t < last
        mask = t_inside[:, None] & d_inside[None, :]
        x, a, inverse, inverse_power = _unit(
            q, pos, norms_q, image * q_stride_b + head * q_stride_n, q_stride_t, row, head, t, t_inside, d,
            inverse_scale, mask, False, HEADS, DIM, P, INDEX,
        )  # fmt: skip
        slope = _power(a, P - 1) * inverse_power[:, None]
        w = slope * a
        zero = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
        total = tl.load(normaliser + (row + t) * HEADS + head, mask=t_inside, other=1.0)
        do_tile = _load(grad_out, (row * HEADS + head) * DIM, HEADS * DIM, t, d, mask, INDEX)
        if HEADS == 1:
            share = tl.sum(product(w, key_value, zero, dtype, PRECISION) * do_tile, 1) / total / total
            along = 1e-6 * inverse * share
        else:
            share = tl.load(deltas + (row + t) * HEADS + head, mask=t_inside, other=0.0)
            along = tl.load(delta + row + t, mask=t_inside, other=0.0)
        grad = product(do_tile, key_value.T, zero, dtype, PRECISION) / total[:, None]
        grad -= share[:, None] * key_sum[None, :]
        grad_key_value = product((w / total[:, None]).T, do_tile, grad_key_value, dtype, PRECISION)
        grad_key_sum -= share[:, None] * w
        # The gradient of x, without 1 / feature_scale.
        grad = (P * slope * (grad - along[:, None] * w) + along[:, None] * a) * inverse[:, None]
        scale_sum += tl.where(t_inside[:, None], grad * a / inverse[:, None], 0.0)
        grad = tl.where(x > 0, grad * inverse_scale[None, :], 0.0)
        offsets = t.to(INDEX)[:, None] * (HEADS * DIM) + d[None, :]
        tl.store(grad_q + (row * HEADS + head) * DIM + offsets, grad.to(dtype), mask=mask)

    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    part = program * (DIM * DIM + DIM)
    _store_state(grad_state + part, grad_key_value, tl.sum(grad_key_sum, 0), d, d_inside, DIM)
    tl.store(grad_scale + program * DIM + d, -tl.sum(scale_sum, 0) * inverse_scale, mask=d_inside)


@triton.jit
def _backward_key(
    k, v, pos, scale, norms_k, grad_state, shares, grad_k, grad_v, grad_scale, tokens, run,
    k_stride_b, k_stride_t, k_stride_n,
    HAS_POS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    P: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, tokens)
    row = image * tokens
    d = tl.arange(0, BLOCK_DIM)
    d_inside = d < DIM
    dtype: tl.constexpr = k.dtype.element_ty
    for sweep in tl.static_range(1 if HEADS == 1 else 2):
        for head in range(HEADS):
            inverse_scale = _inverse_scale(scale, head, d, d_inside, DIM)
            part = (image * HEADS + head) * (DIM * DIM + DIM)
            grad_key_value, grad_key_sum = _load_state(grad_state + part, d, d_inside, DIM)
            grad_key_value /= tokens
            grad_key_sum /= tokens
            origin = image * k_stride_b + head * k_stride_n
            scale_sum = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
            for start in range(first, last, TOKENS):
                t = start + tl.arange(0, TOKENS)
                t_inside = t < last
                mask = t_inside[:, None] & d_inside[None, :]
                x, a, inverse, inverse_power = _unit(
                    k, pos, norms_k, origin, k_stride_t, row, head, t, t_inside, d, inverse_scale, mask,
                    HAS_POS, HEADS, DIM, P, INDEX,
                )  # fmt: skip
                slope = _power(a, P - 1) * inverse_power[:, None]
                w = slope * a
                v_tile = _load(v, origin, k_stride_t, t, d, mask, INDEX)
                target = (row * HEADS + head) * DIM + t.to(INDEX)[:, None] * (HEADS * DIM) + d[None, :]
                zero = tl.zeros((TOKENS, BLOCK_DIM), tl.float32)
                if sweep == 0:
                    grad = product(w, grad_key_value, zero, dtype, PRECISION)
                    tl.store(grad_v + target, (grad / inverse[:, None]).to(dtype), mask=mask)
                    along = tl.sum(grad * v_tile + w * grad_key_sum[None, :], 1)
                    if HEADS > 1:
                        tl.store(shares + (row + t) * HEADS + head, along, mask=t_inside)
                else:
                    h = tl.arange(0, BLOCK_HEADS)
                    others = shares + (row + t)[:, None] * HEADS + h[None, :]
                    along = tl.sum(tl.load(others, mask=t_inside[:, None] & (h < HEADS)[None, :], other=0.0), 1)
                if sweep == 1 or HEADS == 1:
                    grad = product(v_tile, grad_key_value.T, zero, dtype, PRECISION) + grad_key_sum[None, :]
                    grad = P * slope * (grad - along[:, None] * w) + along[:, None] * a
                    scale_sum += tl.where(t_inside[:, None], grad * a / inverse[:, None], 0.0)
                    grad = tl.where(x > 0, grad * inverse_scale[None, :], 0.0)
                    tl.store(grad_k + target, grad.to(dtype), mask=mask)
            if sweep == 1 or HEADS == 1:
                program = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * HEADS + head
                tl.store(grad_scale + program * DIM + d, -tl.sum(scale_sum, 0) * inverse_scale, mask=d_inside)
        # The second sweep reads what other threads of the program wrote in the first.
        tl.debug_barrier()


class _Launch(NamedTuple):
    """Tokens a tile at head dim 64, warps a program, loads in flight."""

    tokens: int
    warps: int
    stages: int


# By kernel; `_norms` and `_delta` have tiles of TILE entries. Never one warp with loads in flight: Triton 3.6 then
# leaves out the barrier after an asynchronous copy.
LAUNCH = {
    "forward": _Launch(64, 4, 2),
    "backward_query": _Launch(32, 4, 2),
    "backward_key": _Launch(32, 4, 2),
}
# Programs that fill the GPU. Fewer are split into runs of at least so many tokens; with fewer tokens, the state of a
# head is not much smaller than its keys and values, and is computed again instead of saved.
PROGRAMS = 384
RUN = 512
KEY_RUN = 128
TILE = 8192


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Return tensors with one set of strides, dense in the last axis; views of one projection pass as they are."""
    if all(t.stride() == tensors[0].stride() and t.stride(-1) == 1 for t in tensors):
        return list(tensors)
    return [t.contiguous() for t in tensors]


class _Problem:
    """The arguments that the kernels share, and how a launch is split."""

    def __init__(self, query: Tensor, key: Tensor, pos: Tensor | None, factor: float):
        self.batch, self.tokens, self.heads, self.dim = query.shape
        self.strides = (*query.stride()[:3], *key.stride()[:3])
        largest = max(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in (query, key))
        tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        self.sizes = {"HEADS": self.heads, "DIM": self.dim}
        self.shared = {
            **self.sizes,
            "HAS_POS": pos is not None,
            "P": int(factor) if factor.is_integer() else factor,
            # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
            "INDEX": tl.int32 if max(largest, query.shape[1:].numel()) < 2**31 else tl.int64,
        }
        self.block_dim = max(16, triton.next_power_of_2(self.dim))
        self.products = {**self.shared, "BLOCK_DIM": self.block_dim, "PRECISION": "tf32" if tf32 else "ieee"}

    def launch(self, kernel: str) -> dict:
        """Return the constants of a kernel's tile: as many entries for any head dim, more warps for large states."""
        launch = LAUNCH[kernel]
        tokens = max(16, min(64, launch.tokens * 64 // self.block_dim))
        warps = launch.warps * (2 if self.block_dim > 64 else 1)
        return {**self.products, "TOKENS": tokens, "num_warps": warps, "num_stages": launch.stages}

    @property
    def saves_state(self) -> bool:
        return self.tokens >= RUN

    def split(self, programs: int, run: int) -> tuple[int, int]:
        """Return how many runs of at least `run` tokens a head's tokens are cut into, and the tokens of a run."""
        runs = 1 if programs >= PROGRAMS else max(1, min(self.tokens // run, 2 * PROGRAMS // programs))
        run = triton.cdiv(triton.cdiv(self.tokens, runs), 64) * 64
        return triton.cdiv(self.tokens, run), run

    def empty_states(self, parts: int, like: Tensor) -> Tensor:
        """Return uninitialised states of all heads, `parts` of each."""
        size = (parts, self.batch, self.heads, self.dim + 1, self.dim)
        return torch.empty(size, dtype=torch.float32, device=like.device)


def _prepare(query, key, value, scale, pos, factor) -> tuple:
    (query,), (key, value) = _dense(query), _dense(key, value)
    # Kernels have no use for a missing encoding, but need a pointer.
    encoding = query if pos is None else pos.contiguous()
    return _Problem(query, key, pos, factor), query, key, value, scale.contiguous(), encoding


def _linear(
    query: Tensor, key: Tensor, value: Tensor, feature_scale: Tensor, positional_encoding: Tensor | None, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem, query, key, value, scale, pos = _prepare(query, key, value, feature_scale, positional_encoding, factor)
    batch, tokens, heads, dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    normaliser = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    norms = torch.empty((2, batch, tokens, 2) if heads > 1 else (2, 0, 0, 0), dtype=torch.float32, device=query.device)
    if heads > 1:
        block = triton.next_power_of_2(heads * dim)
        tile = max(1, TILE // block)
        _norms[(batch * triton.cdiv(tokens, tile), 2)](
            query, key, pos, scale, norms[0], norms[1], tokens, *problem.strides,
            **problem.shared, BLOCK_C=block, TOKENS=tile, num_warps=4,
        )  # fmt: skip
    runs, run = problem.split(batch * heads, RUN)
    parts = problem.empty_states(runs, query) if problem.saves_state else normaliser.new_empty(1, 0)

    def launch(state: Tensor, **flags) -> None:
        _forward[(batch * heads, runs)](
            query, key, value, pos, scale, norms[0], norms[1], state, out, normaliser, tokens, run,
            *problem.strides, **problem.launch("forward"), **flags,
        )  # fmt: skip

    launch(parts, SUM=True, ATTEND=runs == 1, SAVE=problem.saves_state)
    state = _sum(parts)
    if runs > 1:
        launch(state, SUM=False, ATTEND=True, SAVE=False)
    return out, normaliser, norms, state


def _linear_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, feature_scale: Tensor,
    positional_encoding: Tensor | None, out: Tensor, normaliser: Tensor, norms: Tensor, state: Tensor, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem, query, key, value, scale, pos = _prepare(query, key, value, feature_scale, positional_encoding, factor)
    batch, tokens, heads, dim = query.shape
    grad_out = grad_out.contiguous()
    grad_q, grad_k, grad_v = (torch.empty_like(out) for _ in range(3))
    # A head alone has its shares at hand.
    shares = torch.empty_like(normaliser) if heads > 1 else normaliser
    along = normaliser.new_empty(batch, tokens) if heads > 1 else normaliser
    if heads > 1:
        block_heads = triton.next_power_of_2(heads)
        rows = max(1, TILE // (block_heads * problem.block_dim))
        _delta[(triton.cdiv(batch * tokens, rows),)](
            out, grad_out, normaliser, norms[0], shares, along, batch * tokens,
            **problem.sizes, BLOCK_DIM=problem.block_dim, BLOCK_HEADS=block_heads, ROWS=rows, num_warps=4,
        )  # fmt: skip

    runs, run = problem.split(batch * heads, RUN)
    key_runs, key_run = problem.split(batch, KEY_RUN)
    grad_states = problem.empty_states(runs, query)
    grad_scales = torch.empty((runs + key_runs) * batch, heads, dim, dtype=torch.float32, device=query.device)
    _backward_query[(batch * heads, runs)](
        query, key, value, pos, scale, norms[0], norms[1], state, normaliser, shares, along, grad_out,
        grad_q, grad_states, grad_scales, tokens, run, *problem.strides,
        **problem.launch("backward_query"), SUM=not problem.saves_state,
    )  # fmt: skip
    _backward_key[(batch, key_runs)](
        key, value, pos, scale, norms[1], _sum(grad_states), shares, grad_k, grad_v, grad_scales[runs * batch :],
        tokens, key_run, *problem.strides[3:],
        **problem.launch("backward_key"), BLOCK_HEADS=triton.next_power_of_2(heads),
    )  # fmt: skip
    grad_scale = grad_scales.sum(0).to(feature_scale.dtype)
    if positional_encoding is None:
        return grad_q, grad_k, grad_v, grad_scale, grad_q.new_empty(0)
    return grad_q, grad_k, grad_v, grad_scale, grad_k.sum(0, dtype=torch.float32).to(positional_encoding.dtype)


def _sum(parts: Tensor) -> Tensor:
    return parts.sum(0) if len(parts) > 1 else parts[0]


def _fake(query, key, value, feature_scale, positional_encoding, factor):
    batch, tokens, heads, dim = query.shape
    return (
        query.new_empty(query.shape),
        query.new_empty((batch, tokens, heads), dtype=torch.float32),
        query.new_empty((2, batch, tokens, 2) if heads > 1 else (2, 0, 0, 0), dtype=torch.float32),
        query.new_empty((batch, heads, dim + 1, dim) if tokens >= RUN else 0, dtype=torch.float32),
    )


def _fake_backward(grad_out, query, key, value, feature_scale, positional_encoding, *others):
    grads = (query.new_empty(query.shape) for _ in range(3))
    grad_pos = query.new_empty(0)
    if positional_encoding is not None:
        grad_pos = positional_encoding.new_empty(positional_encoding.shape)
    return *grads, feature_scale.new_empty(feature_scale.shape), grad_pos


_call = register("focused_linear_attention", _linear, _fake, _linear_backward, _fake_backward)


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
