"""Agent attention in Triton, forward and backward.

All agents of a head fit into one tile, so that scores between agents and a tile of tokens never leave the chip.

- `_forward`: a program owns one head of one image. It gathers the agents' values over the tokens by an online softmax,
  keeps them on the chip, and spreads them to the queries. Where images and heads are too few to fill the GPU, their
  tokens are split between programs: one launch writes partial (values, maximum, sum), a second one merges them on load.
- `_forward_held`, `_queries_held` and `_keys_held` do the same for few tokens of 16 bits: a program owns a head and
  takes images in turn, the next one's loads in flight while it computes. It loads its biases once, as float16, and sums
  their gradients in registers. Those hold one of the two gradients: the backward is two launches, the first of which
  leaves the second the sums over the queries.
- `_backward`: a program owns one head of a group of images, one image after another. Over the queries it sums the
  gradient of the agents' values, which the keys need; then it visits the keys. Split programs do that in two launches.
  Gradients of the biases are summed over the images of the group in memory that the program alone touches, and over
  groups by `partials.total`, which also adds up what split programs know of the agents: two deterministic stages.

Scores are kept in base 2, scaled by log2(e).
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.agent.reference import agent_attention_reference
from densezoo.ops.launch import Table
from densezoo.ops.partials import total
from densezoo.ops.products import product
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@triton.jit
def _tile(x, origin, stride_t, t, d, mask, INDEX: tl.constexpr):
    """Rows `t` of one head."""
    return tl.load(x + origin + (t.to(INDEX)[:, None] * stride_t + d[None, :]), mask=mask, other=0.0)


@triton.jit
def _bias(
    bias, head, a, t, stride_n, stride_a, stride_t, inside, seen, HAS_BIAS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Bias of agents `a` and tokens `t`, which broadcast, in base 2; -inf where not `seen`."""
    if HAS_BIAS:
        b = tl.load(bias + head * stride_n + a * stride_a + t * stride_t, mask=inside, other=0.0)
        b = tl.where(seen, b.to(tl.float32) * 1.4426950408889634, float("-inf"))
    else:
        b = tl.where(seen, 0.0, float("-inf"))
    return b.to(dtype)


@triton.jit
def _gather(agent, k, v, bias, scale, top, total, acc, PRECISION: tl.constexpr):
    """One step of the agents' online softmax over a tile of keys and values."""
    s = tl.dot(agent, k.T, input_precision=PRECISION) * (scale * 1.4426950408889634) + bias
    new = tl.maximum(top, tl.max(s, 1))
    # Biases may hide all tokens of a tile; -inf must not be subtracted from -inf.
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - safe[:, None])
    decay = tl.exp2(top - safe)
    return new, total * decay + tl.sum(p, 1), product(p, v, acc * decay[:, None], v.dtype, PRECISION)


@triton.jit
def _weights(q, agent, bias, scale, PRECISION: tl.constexpr):
    """Queries' weights of the agents, and the inverse of what they sum up to."""
    s = tl.dot(q, agent.T, input_precision=PRECISION) * (scale * 1.4426950408889634) + bias
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p, 1.0 / tl.sum(p, 1)


@triton.jit
def _spread(q, agent, value, bias, scale, PRECISION: tl.constexpr):
    """The output of a tile of queries."""
    p, inverse = _weights(q, agent, bias, scale, PRECISION)
    zero = tl.zeros(q.shape, tl.float32)
    return product(p, value, zero, q.dtype, PRECISION) * inverse[:, None]


@triton.jit
def _from_queries(q, grad_out, agent, value, bias, scale, grad_value, grad_agent, PRECISION: tl.constexpr):
    """Gradients of a tile of queries and of its scores, and those of agents and their values with its share."""
    p, inverse = _weights(q, agent, bias, scale, PRECISION)
    p *= inverse[:, None]
    dp = tl.dot(grad_out, value.T, input_precision=PRECISION)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None])
    grad_value = product(p.T, grad_out, grad_value, q.dtype, PRECISION)
    grad_agent = product(ds.T, q, grad_agent, q.dtype, PRECISION)
    zero = tl.zeros(q.shape, tl.float32)
    return product(ds, agent, zero, q.dtype, PRECISION) * scale, ds, grad_value, grad_agent


@triton.jit
def _from_keys(k, v, agent, bias, norm, delta, scale, grad_value, grad_agent, PRECISION: tl.constexpr):
    """Gradients of a tile of keys, of its values and of its scores, and that of the agents with its share."""
    s = tl.dot(k, agent.T, input_precision=PRECISION) * (scale * 1.4426950408889634) + bias
    p = tl.exp2(s - norm[None, :])
    zero = tl.zeros(k.shape, tl.float32)
    grad_v = product(p, grad_value, zero, k.dtype, PRECISION)
    dp = product(v, grad_value.T, tl.zeros(s.shape, tl.float32), k.dtype, PRECISION)
    ds = p * (dp - delta[None, :])
    grad_k = product(ds, agent, zero, k.dtype, PRECISION) * scale
    return grad_k, grad_v, ds, product(ds.T, k, grad_agent, k.dtype, PRECISION)


@triton.jit
def _unit(grad_value, dtype: tl.constexpr):
    """What gradients of the agents' values are in units of: sums over queries, which may leave the range of float16."""
    unit = 1.0
    if dtype == tl.float16:
        top = tl.max(tl.max(tl.abs(grad_value), 1), 0)
        unit = tl.where(top > 0, top, 1.0)
    return unit


@compiling.kernel(do_not_specialize=["runs"])
def _forward(
    q, k, v, agent, bias_a, bias_b, parts, part_norms, out, agent_value, lse, tokens, agents, run, runs, scale,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n,
    a_stride_b, a_stride_t, a_stride_n, ba_stride_n, ba_stride_a, ba_stride_t, bb_stride_n, bb_stride_t, bb_stride_a,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    AGENTS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    GATHER: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """With GATHER over the keys, with SPREAD over the queries of a run of tokens; with both, the run is all of them."""
    head = tl.program_id(0) % HEADS
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, tokens)
    a = tl.arange(0, AGENTS)
    d = tl.arange(0, BLOCK_DIM)
    a_inside = a < agents
    d_inside = d < DIM
    a_mask = a_inside[:, None] & d_inside[None, :]
    dtype: tl.constexpr = q.dtype.element_ty
    agent_tile = _tile(agent, image * a_stride_b + head * a_stride_n, a_stride_t, a, d, a_mask, INDEX)
    # (B, heads, agents), one row of dim each.
    row = (image * HEADS + head) * agents

    if GATHER:
        origin = image * k_stride_b + head * k_stride_n
        top = tl.full((AGENTS,), float("-inf"), tl.float32)
        total = tl.zeros((AGENTS,), tl.float32)
        acc = tl.zeros((AGENTS, BLOCK_DIM), tl.float32)
        for start in range(first, last, TOKENS):
            t = start + tl.arange(0, TOKENS)
            t_inside = t < last
            mask = t_inside[:, None] & d_inside[None, :]
            k_tile = _tile(k, origin, k_stride_t, t, d, mask, INDEX)
            v_tile = _tile(v, origin, k_stride_t, t, d, mask, INDEX)
            bias = _bias(
                bias_a, head, a[:, None], t[None, :], ba_stride_n, ba_stride_a, ba_stride_t,
                a_inside[:, None] & t_inside[None, :], t_inside[None, :], HAS_A, tl.float32,
            )  # fmt: skip
            top, total, acc = _gather(agent_tile, k_tile, v_tile, bias, scale, top, total, acc, PRECISION)
        if not SPREAD:
            part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * agents + row + a
            tl.store(parts + part[:, None] * DIM + d[None, :], acc, mask=a_mask)
            tl.store(part_norms + 2 * part, top, mask=a_inside)
            tl.store(part_norms + 2 * part + 1, total, mask=a_inside)
    else:
        top = tl.full((AGENTS,), float("-inf"), tl.float32)
        total = tl.zeros((AGENTS,), tl.float32)
        acc = tl.zeros((AGENTS, BLOCK_DIM), tl.float32)
        for i in range(runs):
            part = (tl.num_programs(0).to(tl.int64) * i) * agents + row + a
            part_acc = tl.load(parts + part[:, None] * DIM + d[None, :], mask=a_mask, other=0.0)
            part_top = tl.load(part_norms + 2 * part, mask=a_inside, other=0.0)
            part_total = tl.load(part_norms + 2 * part + 1, mask=a_inside, other=1.0)
            new = tl.maximum(top, part_top)
            safe = tl.where(new == float("-inf"), 0.0, new)
            decay = tl.exp2(top - safe)
            part_decay = tl.exp2(part_top - safe)
            total = total * decay + part_total * part_decay
            acc = acc * decay[:, None] + part_acc * part_decay[:, None]
            top = new

    if SPREAD:
        value = tl.where(a_inside[:, None], acc * (1.0 / total)[:, None], 0.0)
        if tl.program_id(1) == 0:
            tl.store(agent_value + (row + a)[:, None] * DIM + d[None, :], value.to(dtype), mask=a_mask)
            tl.store(lse + row + a, top + tl.log2(total), mask=a_inside)
        origin = image * q_stride_b + head * q_stride_n
        for start in range(first, last, TOKENS):
            t = start + tl.arange(0, TOKENS)
            t_inside = t < last
            mask = t_inside[:, None] & d_inside[None, :]
            q_tile = _tile(q, origin, q_stride_t, t, d, mask, INDEX)
            bias = _bias(
                bias_b, head, a[None, :], t[:, None], bb_stride_n, bb_stride_a, bb_stride_t,
                t_inside[:, None] & a_inside[None, :], a_inside[None, :], HAS_B, tl.float32,
            )  # fmt: skip
            o_tile = _spread(q_tile, agent_tile, value, bias, scale, PRECISION)
            offsets = t.to(INDEX)[:, None] * (HEADS * DIM) + d[None, :]
            tl.store(out + (image * tokens * HEADS + head) * DIM + offsets, o_tile.to(dtype), mask=mask)


@triton.jit
def _add(target, offsets, x, mask, is_later):
    """Write `x`, added to what an earlier image of this program wrote if there is one."""
    if is_later:
        x += tl.load(target + offsets, mask=mask, other=0.0)
    tl.store(target + offsets, x, mask=mask)


@compiling.kernel(do_not_specialize=["batch", "images"])
def _backward(
    q, k, v, agent, bias_a, bias_b, agent_value, lse, grad_out,
    grad_q, grad_k, grad_v, grad_value, grad_agent, grad_bias_a, grad_bias_b,
    batch, images, tokens, agents, run, scale,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n,
    a_stride_b, a_stride_t, a_stride_n, ba_stride_n, ba_stride_a, ba_stride_t, bb_stride_n, bb_stride_t, bb_stride_a,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    AGENTS: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """With QUERIES over the queries, with KEYS over the keys of a run of tokens; with both, the run is all of them."""
    head = tl.program_id(0) % HEADS
    group = tl.program_id(0) // HEADS
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, tokens)
    a = tl.arange(0, AGENTS)
    d = tl.arange(0, BLOCK_DIM)
    a_inside = a < agents
    d_inside = d < DIM
    a_mask = a_inside[:, None] & d_inside[None, :]
    dtype: tl.constexpr = q.dtype.element_ty
    # (groups, heads, agents, tokens) and (groups, heads, tokens, agents)
    table = (group.to(tl.int64) * HEADS + head) * agents * tokens
    start_image = group.to(tl.int64) * images
    for image in range(start_image, tl.minimum(start_image + images, batch)):
        row = (image * HEADS + head) * agents
        a_rows = (row + a)[:, None] * DIM + d[None, :]
        tile = _tile(agent, image * a_stride_b + head * a_stride_n, a_stride_t, a, d, a_mask, INDEX)
        value = tl.load(agent_value + a_rows, mask=a_mask, other=0.0)
        grad_tile = tl.zeros((AGENTS, BLOCK_DIM), tl.float32)
        part = tl.program_id(1).to(tl.int64) * batch * HEADS * agents * DIM
        o_origin = (image * tokens * HEADS + head) * DIM
        if QUERIES:
            grad_v_tile = tl.zeros((AGENTS, BLOCK_DIM), tl.float32)
            origin = image * q_stride_b + head * q_stride_n
            for start in range(first, last, TOKENS):
                t = start + tl.arange(0, TOKENS)
                t_inside = t < last
                mask = t_inside[:, None] & d_inside[None, :]
                q_tile = _tile(q, origin, q_stride_t, t, d, mask, INDEX)
                do_tile = _tile(grad_out, o_origin, HEADS * DIM, t, d, mask, INDEX)
                inside = t_inside[:, None] & a_inside[None, :]
                bias = _bias(
                    bias_b, head, a[None, :], t[:, None], bb_stride_n, bb_stride_a, bb_stride_t,
                    inside, a_inside[None, :], HAS_B, tl.float32,
                )  # fmt: skip
                grad, ds, grad_v_tile, grad_tile = _from_queries(
                    q_tile, do_tile, tile, value, bias, scale, grad_v_tile, grad_tile, PRECISION
                )
                offsets = t.to(INDEX)[:, None] * (HEADS * DIM) + d[None, :]
                tl.store(grad_q + o_origin + offsets, grad.to(dtype), mask=mask)
                if HAS_B:
                    offsets = t[:, None] * agents + a[None, :]
                    _add(grad_bias_b + table, offsets, ds, inside, image > start_image)
            if not KEYS:
                tl.store(grad_value + part + a_rows, grad_v_tile, mask=a_mask)
        else:
            grad_v_tile = tl.load(grad_value + a_rows, mask=a_mask, other=0.0)
        if KEYS:
            # What follows is in units of the largest.
            unit = _unit(grad_v_tile, dtype)
            grad_v_tile /= unit
            grad_tile /= unit
            norm = tl.load(lse + row + a, mask=a_inside, other=0.0)
            delta = tl.sum(grad_v_tile * value.to(tl.float32), 1)
            origin = image * k_stride_b + head * k_stride_n
            for start in range(first, last, TOKENS):
                t = start + tl.arange(0, TOKENS)
                t_inside = t < last
                mask = t_inside[:, None] & d_inside[None, :]
                k_tile = _tile(k, origin, k_stride_t, t, d, mask, INDEX)
                v_tile = _tile(v, origin, k_stride_t, t, d, mask, INDEX)
                inside = t_inside[:, None] & a_inside[None, :]
                bias = _bias(
                    bias_a, head, a[None, :], t[:, None], ba_stride_n, ba_stride_a, ba_stride_t,
                    inside, inside, HAS_A, tl.float32,
                )  # fmt: skip
                grad, grad_values, ds, grad_tile = _from_keys(
                    k_tile, v_tile, tile, bias, norm, delta, scale, grad_v_tile, grad_tile, PRECISION
                )
                offsets = t.to(INDEX)[:, None] * (HEADS * DIM) + d[None, :]
                tl.store(grad_v + o_origin + offsets, (grad_values * unit).to(dtype), mask=mask)
                tl.store(grad_k + o_origin + offsets, (grad * unit).to(dtype), mask=mask)
                if HAS_A:
                    offsets = a[None, :] * tokens + t[:, None]
                    _add(grad_bias_a + table, offsets, ds * unit, inside, image > start_image)
            grad_tile *= unit
        part = (tl.program_id(1) + (0 if QUERIES else tl.num_programs(1))).to(tl.int64) * batch * agents * HEADS * DIM
        # (parts, B, agents, heads, dim)
        rows = ((image * agents + a) * HEADS + head)[:, None] * DIM + d[None, :]
        tl.store(grad_agent + part + rows, (grad_tile * scale).to(grad_agent.dtype.element_ty), mask=a_mask)
        # The next image adds to what other threads of the program may have written.
        tl.debug_barrier()


@triton.jit
def _held_biases(
    bias, head, tokens, agents, stride_n, stride_a, stride_t, SEEN_BY: tl.constexpr,
    HAS_BIAS: tl.constexpr, AGENTS: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A head's whole bias by tiles of tokens, as (agents, tokens) for agents to see tokens, else (tokens, agents)."""
    biases = ()
    for i in tl.static_range(TILES):
        if SEEN_BY == "agents":
            a = tl.arange(0, AGENTS)[:, None]
            t = i * TOKENS + tl.arange(0, TOKENS)[None, :]
            seen = t < tokens
        else:
            a = tl.arange(0, AGENTS)[None, :]
            t = i * TOKENS + tl.arange(0, TOKENS)[:, None]
            seen = a < agents if SEEN_BY == "tokens" else (a < agents) & (t < tokens)
        inside = (a < agents) & (t < tokens)
        tile = _bias(bias, head, a, t, stride_n, stride_a, stride_t, inside, seen, HAS_BIAS, tl.float16)
        biases = biases + (tile,)
    return biases


@triton.jit
def _store_held(target, tiles, tokens, agents, stride_a, stride_t, TILES: tl.constexpr):
    """Write a program's table of a bias gradient from tiles of (tokens, agents)."""
    target += tl.program_id(0).to(tl.int64) * agents * tokens
    for i in tl.static_range(TILES):
        a = tl.arange(0, tiles[i].shape[1])[None, :]
        t = i * tiles[i].shape[0] + tl.arange(0, tiles[i].shape[0])[:, None]
        tl.store(target + (a * stride_a + t * stride_t), tiles[i], mask=(a < agents) & (t < tokens))


@compiling.kernel(do_not_specialize=["batch"])
def _forward_held(
    q, k, v, agent, bias_a, bias_b, out, agent_value, lse, batch, tokens, agents, scale,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n,
    a_stride_b, a_stride_t, a_stride_n, ba_stride_n, ba_stride_a, ba_stride_t, bb_stride_n, bb_stride_t, bb_stride_a,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    AGENTS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    dtype: tl.constexpr = q.dtype.element_ty
    biases_a = _held_biases(
        bias_a, head, tokens, agents, ba_stride_n, ba_stride_a, ba_stride_t, "agents", HAS_A, AGENTS, TOKENS, TILES,
    )  # fmt: skip
    biases_b = _held_biases(
        bias_b, head, tokens, agents, bb_stride_n, bb_stride_a, bb_stride_t, "tokens", HAS_B, AGENTS, TOKENS, TILES,
    )  # fmt: skip
    a = tl.arange(0, AGENTS)
    d = tl.arange(0, BLOCK_DIM)
    a_mask = (a < agents)[:, None] & (d < DIM)[None, :]
    for number in range(tl.program_id(0) // HEADS, batch, tl.num_programs(0) // HEADS):
        image = tl.cast(number, tl.int64)
        agent_tile = _tile(agent, image * a_stride_b + head * a_stride_n, a_stride_t, a, d, a_mask, INDEX)
        row = (image * HEADS + head) * agents
        origin = image * k_stride_b + head * k_stride_n
        top = tl.full((AGENTS,), float("-inf"), tl.float32)
        total = tl.zeros((AGENTS,), tl.float32)
        acc = tl.zeros((AGENTS, BLOCK_DIM), tl.float32)
        for i in tl.static_range(TILES):
            t = i * TOKENS + tl.arange(0, TOKENS)
            mask = (t < tokens)[:, None] & (d < DIM)[None, :]
            k_tile = _tile(k, origin, k_stride_t, t, d, mask, INDEX)
            v_tile = _tile(v, origin, k_stride_t, t, d, mask, INDEX)
            top, total, acc = _gather(agent_tile, k_tile, v_tile, biases_a[i], scale, top, total, acc, PRECISION)
        value = tl.where((a < agents)[:, None], acc * (1.0 / total)[:, None], 0.0)
        tl.store(agent_value + (row + a)[:, None] * DIM + d[None, :], value.to(dtype), mask=a_mask)
        tl.store(lse + row + a, top + tl.log2(total), mask=a < agents)
        origin = image * q_stride_b + head * q_stride_n
        for i in tl.static_range(TILES):
            t = i * TOKENS + tl.arange(0, TOKENS)
            mask = (t < tokens)[:, None] & (d < DIM)[None, :]
            q_tile = _tile(q, origin, q_stride_t, t, d, mask, INDEX)
            o_tile = _spread(q_tile, agent_tile, value, biases_b[i], scale, PRECISION)
            offsets = t.to(INDEX)[:, None] * (HEADS * DIM) + d[None, :]
            tl.store(out + (image * tokens * HEADS + head) * DIM + offsets, o_tile.to(dtype), mask=mask)


@compiling.kernel(do_not_specialize=["batch"])
def _queries_held(
    q, agent, bias_b, agent_value, grad_out, grad_q, grad_value, grad_agent, grad_bias_b, batch, tokens, agents, scale,
    q_stride_b, q_stride_t, q_stride_n, a_stride_b, a_stride_t, a_stride_n, bb_stride_n, bb_stride_t, bb_stride_a,
    HAS_B: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    AGENTS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    dtype: tl.constexpr = q.dtype.element_ty
    biases = _held_biases(
        bias_b, head, tokens, agents, bb_stride_n, bb_stride_a, bb_stride_t, "tokens", HAS_B,
        AGENTS, TOKENS, TILES,
    )  # fmt: skip
    grads = ()
    for _ in tl.static_range(TILES):
        grads = grads + (tl.zeros((TOKENS, AGENTS), tl.float32),)
    a = tl.arange(0, AGENTS)
    d = tl.arange(0, BLOCK_DIM)
    a_mask = (a < agents)[:, None] & (d < DIM)[None, :]
    for number in range(tl.program_id(0) // HEADS, batch, tl.num_programs(0) // HEADS):
        image = tl.cast(number, tl.int64)
        a_rows = ((image * HEADS + head) * agents + a)[:, None] * DIM + d[None, :]
        tile = _tile(agent, image * a_stride_b + head * a_stride_n, a_stride_t, a, d, a_mask, INDEX)
        value = tl.load(agent_value + a_rows, mask=a_mask, other=0.0)
        grad_tile = tl.zeros((AGENTS, BLOCK_DIM), tl.float32)
        grad_v_tile = tl.zeros((AGENTS, BLOCK_DIM), tl.float32)
        origin = image * q_stride_b + head * q_stride_n
        o_origin = (image * tokens * HEADS + head) * DIM
        later = ()
        for i in tl.static_range(TILES):
            t = i * TOKENS + tl.arange(0, TOKENS)
            mask = (t < tokens)[:, None] & (d < DIM)[None, :]
            q_tile = _tile(q, origin, q_stride_t, t, d, mask, INDEX)
            do_tile = _tile(grad_out, o_origin, HEADS * DIM, t, d, mask, INDEX)
            grad, ds, grad_v_tile, grad_tile = _from_queries(
                q_tile, do_tile, tile, value, biases[i], scale, grad_v_tile, grad_tile, PRECISION
            )
            offsets = t.to(INDEX)[:, None] * (HEADS * DIM) + d[None, :]
            tl.store(grad_q + o_origin + offsets, grad.to(dtype), mask=mask)
            later = later + (grads[i] + ds,)
        grads = later
        tl.store(grad_value + a_rows, grad_v_tile, mask=a_mask)
        tl.store(grad_agent + a_rows, grad_tile, mask=a_mask)
    if HAS_B:
        _store_held(grad_bias_b, grads, tokens, agents, 1, agents, TILES)


@compiling.kernel(do_not_specialize=["batch"])
def _keys_held(
    k, v, agent, bias_a, agent_value, lse, grad_k, grad_v, grad_value, from_queries, grad_agent, grad_bias_a,
    batch, tokens, agents, scale,
    k_stride_b, k_stride_t, k_stride_n, a_stride_b, a_stride_t, a_stride_n, ba_stride_n, ba_stride_a, ba_stride_t,
    HAS_A: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    AGENTS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    dtype: tl.constexpr = k.dtype.element_ty
    biases = _held_biases(
        bias_a, head, tokens, agents, ba_stride_n, ba_stride_a, ba_stride_t, "both", HAS_A,
        AGENTS, TOKENS, TILES,
    )  # fmt: skip
    grads = ()
    for _ in tl.static_range(TILES):
        grads = grads + (tl.zeros((TOKENS, AGENTS), tl.float32),)
    a = tl.arange(0, AGENTS)
    d = tl.arange(0, BLOCK_DIM)
    a_mask = (a < agents)[:, None] & (d < DIM)[None, :]
    for number in range(tl.program_id(0) // HEADS, batch, tl.num_programs(0) // HEADS):
        image = tl.cast(number, tl.int64)
        row = (image * HEADS + head) * agents
        a_rows = (row + a)[:, None] * DIM + d[None, :]
        tile = _tile(agent, image * a_stride_b + head * a_stride_n, a_stride_t, a, d, a_mask, INDEX)
        value = tl.load(agent_value + a_rows, mask=a_mask, other=0.0)
        grad_v_tile = tl.load(grad_value + a_rows, mask=a_mask, other=0.0)
        norm = tl.load(lse + row + a, mask=a < agents, other=0.0)
        # What follows is in units of the largest.
        unit = _unit(grad_v_tile, dtype)
        grad_v_tile /= unit
        delta = tl.sum(grad_v_tile * value.to(tl.float32), 1)
        grad_tile = tl.zeros((AGENTS, BLOCK_DIM), tl.float32)
        origin = image * k_stride_b + head * k_stride_n
        o_origin = (image * tokens * HEADS + head) * DIM
        later = ()
        for i in tl.static_range(TILES):
            t = i * TOKENS + tl.arange(0, TOKENS)
            mask = (t < tokens)[:, None] & (d < DIM)[None, :]
            k_tile = _tile(k, origin, k_stride_t, t, d, mask, INDEX)
            v_tile = _tile(v, origin, k_stride_t, t, d, mask, INDEX)
            grad, grad_values, ds, grad_tile = _from_keys(
                k_tile, v_tile, tile, biases[i], norm, delta, scale, grad_v_tile, grad_tile, PRECISION
            )
            offsets = t.to(INDEX)[:, None] * (HEADS * DIM) + d[None, :]
            tl.store(grad_v + o_origin + offsets, (grad_values * unit).to(dtype), mask=mask)
            tl.store(grad_k + o_origin + offsets, (grad * unit).to(dtype), mask=mask)
            later = later + (grads[i] + ds * unit,)
        grads = later
        grad_tile = grad_tile * unit + tl.load(from_queries + a_rows, mask=a_mask, other=0.0)
        # (B, agents, heads, dim)
        rows = ((image * agents + a) * HEADS + head)[:, None] * DIM + d[None, :]
        tl.store(grad_agent + rows, (grad_tile * scale).to(dtype), mask=a_mask)
    if HAS_A:
        _store_held(grad_bias_a, grads, tokens, agents, tokens, 1, TILES)


class _Launch(NamedTuple):
    """Tokens a tile, warps a program, loads in flight, and the most registers of a thread."""

    tokens: int
    warps: int
    stages: int
    registers: int | None = None


class _Held(NamedTuple):
    """Programs in all, warps a program and loads in flight."""

    programs: int
    warps: int
    stages: int


# By kernel, the most agents of a tile, and the channels of a tile; held are the biases of 16-bit tokens of a few tiles,
# by the tokens of a tile. Measured on an H200. Never one warp with loads in flight: Triton 3.6 then leaves out the
# barrier after an asynchronous copy.
LAUNCH = {
    ("forward", 16, 32): _Launch(64, 4, 2),
    ("forward", 16, 64): _Launch(64, 4, 2),
    ("forward", 16, 128): _Launch(64, 8, 2),
    ("forward", 64, 32): _Launch(64, 4, 2, 168),
    ("forward", 64, 64): _Launch(64, 4, 1, 168),
    ("forward", 64, 128): _Launch(64, 8, 2),
    ("backward", 16, 32): _Launch(64, 4, 1),
    ("backward", 16, 64): _Launch(64, 4, 1),
    ("backward", 16, 128): _Launch(64, 8, 1),
    ("backward", 64, 32): _Launch(32, 4, 1, 168),
    ("backward", 64, 64): _Launch(32, 4, 1),
    ("backward", 64, 128): _Launch(32, 8, 1),
    ("held", 64): _Held(264, 4, 2),
    ("held", 128): _Held(132, 8, 2),
}
LAUNCH = Table("agent_attention", LAUNCH)
# Programs that fill the GPU: fewer are split into runs of at least RUN tokens, more take several images each.
PROGRAMS = 384
RUN = 512
# What kernels that hold biases take of a multiprocessor's shared memory at most, with the next image's tokens.
HELD_BYTES = 220 * 1024


@cache
def _shared_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 2**20


class _Plan:
    """How the kernels are launched on inputs of one layout."""

    def __init__(self, shape, agents: int, strides, bias_strides, itemsize: int, tf32: bool, shared_bytes: int):
        self.batch, self.tokens, self.heads, self.dim = shape
        self.agents = agents
        self.query, self.key, self.agent = (stride[:3] for stride in strides)
        # Of a missing bias nothing is read.
        self.bias_a, self.bias_b = (stride or (0, 0, 0) for stride in bias_strides)
        self.strides = (*self.query, *self.key, *self.agent, *self.bias_a, *self.bias_b)
        self.has_a, self.has_b = ({f"HAS_{x}": s is not None} for x, s in zip("AB", bias_strides, strict=True))
        largest = max(sum((n - 1) * s for n, s in zip(shape[1:], stride[1:], strict=True)) for stride in strides[:2])
        self.constants = {
            "HEADS": self.heads,
            "DIM": self.dim,
            "BLOCK_DIM": max(16, triton.next_power_of_2(self.dim)),
            "AGENTS": max(16, triton.next_power_of_2(agents)),
            "PRECISION": "tf32" if tf32 else "ieee",
            # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
            "INDEX": tl.int32 if max(largest, self.tokens * self.heads * self.dim) < 2**31 else tl.int64,
        }
        programs = self.batch * self.heads
        runs = 1 if programs >= PROGRAMS else max(1, min(self.tokens // RUN, 2 * PROGRAMS // programs))
        self.run = triton.cdiv(triton.cdiv(self.tokens, runs), 64) * 64
        self.runs = triton.cdiv(self.tokens, self.run)
        self.images = 1 << (max(1, programs * self.runs // PROGRAMS).bit_length() - 1)
        self.groups = triton.cdiv(self.batch, self.images)
        # More channels leave room for one tile.
        most = {16: 256, 32: 256, 64: 64}.get(self.constants["BLOCK_DIM"], 0)
        self.holds = itemsize == 2 and self.tokens <= most
        self.holds = self.holds and bias_strides != (None, None) and shared_bytes >= HELD_BYTES
        if self.holds:
            self.forward_groups, self.forward = self._held("forward")
            self.groups, self.backward = self._held("backward")
        else:
            self.forward, self.backward = self._launch("forward"), self._launch("backward")

    def _launch(self, kernel: str) -> dict:
        """Return the constants of a kernel."""
        agents = 16 if self.constants["AGENTS"] == 16 else 64
        launch = LAUNCH[kernel, agents, max(32, self.constants["BLOCK_DIM"])]
        options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers}
        return {**self.constants, **self.has_a, **self.has_b, "TOKENS": launch.tokens, **options}

    def _held(self, kernel: str) -> tuple[int, dict]:
        """Return into how many groups the images are split, and the constants of a kernel that holds its biases."""
        tile = 64 if kernel == "forward" or self.tokens <= 64 else 128
        launch = LAUNCH["held", tile]
        images = triton.cdiv(self.batch, max(1, launch.programs // self.heads))
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        tiles = {"TOKENS": tile, "TILES": triton.cdiv(self.tokens, tile)}
        return triton.cdiv(self.batch, images), {**self.constants, **tiles, **options}


_plan = lru_cache(maxsize=1024)(_Plan)


def _prepare(query, key, value, agent, bias_a, bias_b) -> tuple[_Plan, tuple[Tensor, ...]]:
    """Return the plan, and the tensors that all kernels read."""
    if query.stride(3) != 1:
        query = query.contiguous()
    if key.stride() != value.stride() or key.stride(3) != 1:
        key, value = key.contiguous(), value.contiguous()
    if agent.stride(3) != 1:
        agent = agent.contiguous()
    tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    strides = (query.stride(), key.stride(), agent.stride())
    bias_strides = (None if bias_a is None else bias_a.stride(), None if bias_b is None else bias_b.stride())
    shared_bytes = _shared_bytes(query.device)
    plan = _plan(query.shape, agent.shape[1], strides, bias_strides, query.itemsize, tf32, shared_bytes)
    # Kernels have no use for a missing bias, but need a pointer.
    return plan, (query, key, value, agent, query if bias_a is None else bias_a, query if bias_b is None else bias_b)


def _agent(
    query: Tensor, key: Tensor, value: Tensor, agent: Tensor,
    aggregation_bias: Tensor | None, broadcast_bias: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    plan, tensors = _prepare(query, key, value, agent, aggregation_bias, broadcast_bias)
    batch, tokens, heads, dim = query.shape
    agents, runs = plan.agents, plan.runs
    out = query.new_empty(query.shape)
    agent_value = query.new_empty((batch, heads, agents, dim))
    lse = torch.empty((batch, heads, agents), dtype=torch.float32, device=query.device)
    if plan.holds:
        _forward_held[plan.forward_groups * heads,](
            *tensors, out, agent_value, lse, batch, tokens, agents, scale, *plan.strides,
            **plan.forward, **plan.has_a, **plan.has_b,
        )  # fmt: skip
        return out, agent_value, lse
    parts = part_norms = lse
    if runs > 1:
        rows = runs * batch * heads * agents
        parts, part_norms = torch.empty(rows * (dim + 2), dtype=torch.float32, device=query.device).split(
            (rows * dim, rows * 2)
        )

    def launch(gather: bool, spread: bool) -> None:
        _forward[batch * heads, runs](
            *tensors, parts, part_norms, out, agent_value, lse, tokens, agents, plan.run, runs, scale,
            *plan.strides, **plan.forward, GATHER=gather, SPREAD=spread,
        )  # fmt: skip

    launch(True, runs == 1)
    if runs > 1:
        launch(False, True)
    return out, agent_value, lse


def _agent_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, agent: Tensor,
    aggregation_bias: Tensor | None, broadcast_bias: Tensor | None, out: Tensor, agent_value: Tensor, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    biases = (aggregation_bias, broadcast_bias)
    plan, tensors = _prepare(query, key, value, agent, *biases)
    batch, tokens, heads, dim = query.shape
    agents, runs, groups = plan.agents, plan.runs, plan.groups
    grad_out = grad_out.contiguous()
    grad_q, grad_k, grad_v = torch.empty_like(out), torch.empty_like(out), torch.empty_like(out)
    # Of a missing bias nothing is written.
    tables = [
        lse if bias is None else torch.empty((groups, *bias.shape), dtype=torch.float32, device=query.device)
        for bias in biases
    ]
    if plan.holds:
        grad_agent = agent.new_empty(agent.shape)
        grad_value, share = torch.empty((2, *agent_value.shape), dtype=torch.float32, device=query.device).unbind()
        query, key, value, agent, bias_a, bias_b = tensors
        sizes = batch, tokens, agents, scale
        _queries_held[groups * heads,](
            query, agent, bias_b, agent_value, grad_out, grad_q, grad_value, share, tables[1],
            *sizes, *plan.query, *plan.agent, *plan.bias_b, **plan.backward, **plan.has_b,
        )  # fmt: skip
        _keys_held[groups * heads,](
            key, value, agent, bias_a, agent_value, lse, grad_k, grad_v, grad_value, share, grad_agent, tables[0],
            *sizes, *plan.key, *plan.agent, *plan.bias_a, **plan.backward, **plan.has_a,
        )  # fmt: skip
    else:
        shape, dtype = (batch, agents, heads, dim), agent.dtype
        if runs > 1:
            shape, dtype = (2 * runs, *shape), torch.float32
        grad_agent = torch.empty(shape, dtype=dtype, device=query.device)

        def launch(grad_value: Tensor, queries: bool, keys: bool) -> None:
            _backward[groups * heads, runs](
                *tensors, agent_value, lse, grad_out, grad_q, grad_k, grad_v, grad_value, grad_agent, *tables,
                batch, plan.images, tokens, agents, plan.run, scale, *plan.strides,
                **plan.backward, QUERIES=queries, KEYS=keys,
            )  # fmt: skip

        if runs == 1:
            launch(lse, True, True)
        else:
            grad_values = torch.empty((runs, *agent_value.shape), dtype=torch.float32, device=query.device)
            launch(grad_values, True, False)
            launch(total(grad_values), False, True)
            grad_agent = total(grad_agent, dtype=agent.dtype)
    grad_biases = (
        query.new_empty(0) if bias is None else total(table, dtype=bias.dtype)
        for table, bias in zip(tables, biases, strict=True)
    )
    return grad_q, grad_k, grad_v, grad_agent, *grad_biases


def _fake(query, key, value, agent, aggregation_bias, broadcast_bias, scale):
    batch, _, heads, dim = query.shape
    agents = agent.shape[1]
    return (
        query.new_empty(query.shape),
        query.new_empty((batch, heads, agents, dim)),
        query.new_empty((batch, heads, agents), dtype=torch.float32),
    )


def _fake_backward(grad_out, query, key, value, agent, aggregation_bias, broadcast_bias, *others):
    grads = (t.new_empty(t.shape) for t in (query, key, value, agent))
    biases = (aggregation_bias, broadcast_bias)
    return *grads, *(query.new_empty(0) if bias is None else bias.new_empty(bias.shape) for bias in biases)


_call = register("agent_attention", _agent, _fake, _agent_backward, _fake_backward, agent_attention_reference)


@register_flop_formula(torch.ops.densezoo.agent_attention)
def _(query, key, value, agent, *args, **kwargs) -> int:
    batch, tokens, heads, dim = query
    # Scores and weighted sums of both steps.
    return 8 * batch * tokens * heads * dim * agent[1]


@register_flop_formula(torch.ops.densezoo.agent_attention_backward)
def _(grad_out, query, key, value, agent, *args, **kwargs) -> int:
    batch, tokens, heads, dim = query
    # Of each step the scores once more, and the gradients of its four factors.
    return 20 * batch * tokens * heads * dim * agent[1]


def agent_attention_triton(query, key, value, agent, aggregation_bias, broadcast_bias, scale) -> Tensor:
    """Compute `densezoo.ops.agent_attention` with the kernels; arguments checked."""
    return _call(query, key, value, agent, aggregation_bias, broadcast_bias, scale)
