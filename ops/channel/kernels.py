"""Channel attention in Triton, forward and backward.

Weights are (dim, dim) matrices that all positions determine together, so everything is done in two passes over the
positions: one that sums a product of two tensors, and one that applies a matrix to every position. A program owns some
heads of one image, held as one block of channels: the products of channels of different heads are masked.

- Where there are enough images and heads to fill the GPU, `_forward` and `_backward` do both passes.
- Else the positions are split: `_sums` writes the product of each piece, `partials.total` adds them up, and each
  program of the second pass applies the result to its piece.

The forward reads and writes every tensor once, and so does the backward but for `grad_out`, which both passes read. The
weights are kept for the backward where they are small beside the query. Elsewhere maps are so small that the backward
computes them again from what its caches hold.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.channel.reference import channel_attention_qkv_reference, channel_attention_reference
from densezoo.ops.launch import Table
from densezoo.ops.partials import total
from densezoo.ops.registration import register
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@triton.jit
def _heads_of(program, heads, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Image and first head of a program."""
    groups = tl.cdiv(heads, BLOCK // BLOCK_DIM)
    return (program // groups).to(tl.int64), program % groups * (BLOCK // BLOCK_DIM)


@triton.jit
def _channels(head, heads, stride_n, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of a block's channels within a position, and which of them exist."""
    c = tl.arange(0, BLOCK)
    return (head + c // BLOCK_DIM) * stride_n + c % BLOCK_DIM, (c % BLOCK_DIM < DIM) & (head + c // BLOCK_DIM < heads)


@triton.jit
def _entries(head, heads, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of a block's entries in (heads, DIM, DIM), and which of them exist."""
    c = tl.arange(0, BLOCK)
    i, j = c[:, None], c[None, :]
    offsets = ((head + i // BLOCK_DIM) * DIM + i % BLOCK_DIM) * DIM + j % BLOCK_DIM
    exist = (i // BLOCK_DIM == j // BLOCK_DIM) & (i % BLOCK_DIM < DIM) & (j % BLOCK_DIM < DIM)
    return offsets, exist & (head + i // BLOCK_DIM < heads)


@triton.jit
def _product(
    a, b, a_stride, b_stride, a_channels, b_channels, exist, first, last,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Sum of the outer products of a's and b's channels over the positions from first to last, in float32."""
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(first, last, TOKENS):
        n = start + tl.arange(0, TOKENS)
        mask = (n < last)[:, None] & exist[None, :]
        n = n.to(INDEX)[:, None]
        a_tile = tl.load(a + (n * a_stride + a_channels[None, :]), mask=mask, other=0.0)
        b_tile = tl.load(b + (n * b_stride + b_channels[None, :]), mask=mask, other=0.0)
        acc = tl.dot(a_tile.T, b_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _apply(
    x, matrix, factor, out, x_stride, out_stride, x_channels, out_channels, exist, first, last,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Write x @ matrix * factor for the positions from first to last."""
    for start in range(first, last, TOKENS):
        n = start + tl.arange(0, TOKENS)
        mask = (n < last)[:, None] & exist[None, :]
        n = n.to(INDEX)[:, None]
        tile = tl.load(x + (n * x_stride + x_channels[None, :]), mask=mask, other=0.0)
        tile = tl.dot(tile, matrix, input_precision=PRECISION) * factor
        tl.store(out + (n * out_stride + out_channels[None, :]), tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _softmax(scores, scale, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Softmax of each row within its head; rows that do not exist are finite."""
    c = tl.arange(0, BLOCK)
    seen = (c[:, None] // BLOCK_DIM == c[None, :] // BLOCK_DIM) & (c[None, :] % BLOCK_DIM < DIM)
    scores = tl.where(seen, scores * (scale * 1.4426950408889634), float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@compiling.kernel(do_not_specialize=["splits", "chunk"])
def _sums(
    a, b, partial, tokens, heads, splits, chunk, a_stride_b, a_stride_t, a_stride_n, b_stride_b, b_stride_t, b_stride_n,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    image, head = _heads_of(tl.program_id(0), heads, BLOCK_DIM, BLOCK)
    a_channels, exist = _channels(head, heads, a_stride_n, DIM, BLOCK_DIM, BLOCK)
    b_channels, _ = _channels(head, heads, b_stride_n, DIM, BLOCK_DIM, BLOCK)
    first = tl.program_id(1) * chunk
    acc = _product(
        a + image * a_stride_b, b + image * b_stride_b, a_stride_t, b_stride_t, a_channels, b_channels, exist,
        first, tl.minimum(first + chunk, tokens), BLOCK, TOKENS, PRECISION, INDEX,
    )  # fmt: skip
    entries, exist = _entries(head, heads, DIM, BLOCK_DIM, BLOCK)
    partial += (image * splits + tl.program_id(1)) * heads * DIM * DIM
    tl.store(partial + entries, acc, mask=exist)


@compiling.kernel(do_not_specialize=["chunk"])
def _forward(
    q, k, v, product, weights, out, tokens, heads, chunk, scale, stride_b, stride_t, stride_n,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, SPLIT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    image, head = _heads_of(tl.program_id(0), heads, BLOCK_DIM, BLOCK)
    channels, exist = _channels(head, heads, stride_n, DIM, BLOCK_DIM, BLOCK)
    out_channels, _ = _channels(head, heads, DIM, DIM, BLOCK_DIM, BLOCK)
    entries, entries_exist = _entries(head, heads, DIM, BLOCK_DIM, BLOCK)
    origin = image * stride_b
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, tokens)
    if SPLIT:
        scores = tl.load(product + image * heads * DIM * DIM + entries, mask=entries_exist, other=0.0)
    else:
        scores = _product(
            q + origin, k + origin, stride_t, stride_t, channels, channels, exist, first, last,
            BLOCK, TOKENS, PRECISION, INDEX,
        )  # fmt: skip
    mix = _softmax(scores, scale, DIM, BLOCK_DIM, BLOCK)
    if SAVE:
        # Every piece computes the same weights.
        tl.store(weights + image * heads * DIM * DIM + entries, mix, mask=entries_exist & (first == 0))
    _apply(
        v + origin, mix.to(v.dtype.element_ty).T, 1.0, out + image * tokens * heads * DIM,
        stride_t, heads * DIM, channels, out_channels, exist, first, last, TOKENS, PRECISION, INDEX,
    )  # fmt: skip


@compiling.kernel(do_not_specialize=["chunk"])
def _backward(
    q, k, v, grad_out, product, weights, grad_q, grad_k, grad_v, tokens, heads, chunk, scale,
    stride_b, stride_t, stride_n,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, SPLIT: tl.constexpr, SAVED: tl.constexpr, GRADS: tl.constexpr,
):  # fmt: skip
    image, head = _heads_of(tl.program_id(0), heads, BLOCK_DIM, BLOCK)
    channels, exist = _channels(head, heads, stride_n, DIM, BLOCK_DIM, BLOCK)
    out_channels, _ = _channels(head, heads, DIM, DIM, BLOCK_DIM, BLOCK)
    entries, entries_exist = _entries(head, heads, DIM, BLOCK_DIM, BLOCK)
    origin, out_origin = image * stride_b, image * tokens * heads * DIM
    # Where the inputs came as one tensor, so do their gradients.
    grad_origin, grad_stride = out_origin * GRADS, GRADS * heads * DIM
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, tokens)
    if SAVED:
        mix = tl.load(weights + image * heads * DIM * DIM + entries, mask=entries_exist, other=0.0)
    else:
        scores = _product(
            q + origin, k + origin, stride_t, stride_t, channels, channels, exist, first, last,
            BLOCK, TOKENS, PRECISION, INDEX,
        )  # fmt: skip
        mix = _softmax(scores, scale, DIM, BLOCK_DIM, BLOCK)
    if SPLIT:
        grad_mix = tl.load(product + image * heads * DIM * DIM + entries, mask=entries_exist, other=0.0)
    else:
        grad_mix = _product(
            grad_out + out_origin, v + origin, heads * DIM, stride_t, out_channels, channels, exist, first, last,
            BLOCK, TOKENS, PRECISION, INDEX,
        )  # fmt: skip
    grad_scores = mix * (grad_mix - tl.sum(mix * grad_mix, 1)[:, None]) * scale
    # Sums over a whole map leave the range of float16.
    peak = tl.max(tl.max(tl.abs(grad_scores), 1), 0)
    peak = tl.where(peak == 0, 1.0, peak)
    dtype = v.dtype.element_ty
    grad_scores = (grad_scores / peak).to(dtype)
    _apply(
        k + origin, grad_scores.T, peak, grad_q + grad_origin, stride_t, grad_stride, channels, out_channels, exist,
        first, last, TOKENS, PRECISION, INDEX,
    )  # fmt: skip
    _apply(
        q + origin, grad_scores, peak, grad_k + grad_origin, stride_t, grad_stride, channels, out_channels, exist,
        first, last, TOKENS, PRECISION, INDEX,
    )  # fmt: skip
    _apply(
        grad_out + out_origin, mix.to(dtype), 1.0, grad_v + grad_origin, heads * DIM, grad_stride,
        out_channels, out_channels, exist, first, last, TOKENS, PRECISION, INDEX,
    )  # fmt: skip


class _Launch(NamedTuple):
    """Channels and positions a block at most, warps a program and loads in flight."""

    channels: int
    tokens: int
    warps: int
    stages: int


# Never one warp with loads in flight: Triton 3.6 then leaves out the barrier after an asynchronous copy.
LAUNCH = {"forward": _Launch(64, 64, 4, 3), "backward": _Launch(64, 64, 4, 3), "sums": _Launch(64, 64, 4, 3)}
LAUNCH = Table("channel_attention", LAUNCH)
# Fewer programs than this leave a large GPU idle: positions are split then.
PROGRAMS = 256


def _step(shape: tuple, strides: tuple) -> int | None:
    """Return how far apart neighbouring positions lie in (B, positions..., heads, dim), or None where it varies."""
    step = reach = None
    for size, stride in zip(reversed(shape[1:-2]), reversed(strides[1:-2]), strict=True):
        if size > 1:
            if step is None:
                step = reach = stride
            elif stride != reach:
                return None
            reach *= size
    return step or 0


class _Problem:
    """How a call is cut into programs, and what the kernels share; the same for all calls alike."""

    def __init__(self, shape: torch.Size, strides: tuple | None, itemsize: int, allows_tf32: bool):
        self.batch, (self.heads, self.dim) = shape[0], shape[-2:]
        self.tokens = shape[1:-2].numel()
        self.itemsize = itemsize
        self.out_strides = (self.tokens * self.heads * self.dim, self.heads * self.dim, self.dim)
        step = None if strides is None or strides[-1] != 1 else _step(shape, strides)
        # Inputs of other layouts than the kernels can read are copied.
        self.copies = step is None
        self.strides = self.out_strides if self.copies else (strides[0], step, strides[-2])
        self.block_dim = max(16, triton.next_power_of_2(self.dim))
        extent = (self.tokens - 1) * self.strides[1] + (self.heads - 1) * self.strides[2] + self.dim
        self.constants = {
            "DIM": self.dim,
            "BLOCK_DIM": self.block_dim,
            "PRECISION": "tf32" if itemsize == 4 and allows_tf32 else "ieee",
            # 32-bit offsets within an image halve the registers of addresses; images themselves are 64 bits apart.
            "INDEX": tl.int32 if max(extent, 3 * self.out_strides[0]) < 2**31 else tl.int64,
        }
        # Splitting a map pays where its pieces are several blocks long.
        pairs = self.batch * self.heads
        self.splits = 1
        if 0 < pairs < PROGRAMS and self.tokens >= 8 * self.dim:
            self.splits = max(1, min(2 * PROGRAMS // pairs, self.tokens // 256))
        self.chunk = triton.cdiv(triton.cdiv(self.tokens, self.splits), 128) * 128
        self.splits = triton.cdiv(self.tokens, max(self.chunk, 1))
        self.weights_shape = _weights_shape(shape)
        split, saves = {"SPLIT": self.splits > 1}, len(self.weights_shape) > 1
        self.sums = self._tiling("sums")
        self.forward = self._tiling("forward", **split, SAVE=saves)
        self.backward = self._tiling("backward", **split, SAVED=saves)

    def _tiling(self, name: str, **flags) -> tuple[tuple[int, int], dict]:
        """Return the grid and the constants of the kernel called `name`."""
        launch = LAUNCH[name]
        block = max(self.block_dim, min(launch.channels, self.block_dim * triton.next_power_of_2(self.heads)))
        # Wide heads and wide numbers take fewer positions a block, and more warps.
        most = (16384 if self.itemsize == 2 else 8192) // (block * self.itemsize)
        tokens = max(16, min(launch.tokens, most, triton.next_power_of_2(self.tokens)))
        warps = max(launch.warps, block * self.itemsize // 32)
        # A loop that ends after one block has nothing to load ahead.
        stages = min(launch.stages, 2) if self.tokens <= tokens else launch.stages
        grid = (self.batch * triton.cdiv(self.heads, block // self.block_dim), max(self.splits, 1))
        constants = {"BLOCK": block, "TOKENS": tokens, "num_warps": warps, "num_stages": stages}
        return grid, self.constants | constants | flags


_problem = lru_cache(maxsize=1024)(_Problem)


def _prepare(query: Tensor, key: Tensor, value: Tensor) -> tuple[_Problem, Tensor, Tensor, Tensor]:
    """Return how the kernels are launched, and the inputs with one set of strides, dense in the last axis."""
    strides = query.stride()
    if not strides == key.stride() == value.stride():
        strides = None
    problem = _problem(query.shape, strides, query.itemsize, torch.backends.cuda.matmul.allow_tf32)
    if problem.copies:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return problem, query, key, value


def _weights_shape(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape of the weights kept for the backward: none where they are not small beside the query."""
    return (shape[0], *shape[-2:], shape[-1]) if shape[1:-2].numel() >= 8 * shape[-1] else (0,)


def _product_of_pieces(problem: _Problem, a: Tensor, b: Tensor, a_strides: tuple, b_strides: tuple) -> Tensor:
    """Return the product over all positions; any tensor where they are not split."""
    if problem.splits <= 1:
        return a
    shape = (problem.batch, problem.splits, problem.heads, problem.dim, problem.dim)
    partial = torch.empty(shape, dtype=torch.float32, device=a.device)
    grid, constants = problem.sums
    _sums[grid](
        a, b, partial, problem.tokens, problem.heads, problem.splits, problem.chunk, *a_strides, *b_strides, **constants
    )
    return total(partial, 1)


def _channel_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    problem, query, key, value = _prepare(query, key, value)
    out = query.new_empty(query.shape)
    weights = torch.empty(problem.weights_shape, dtype=torch.float32, device=query.device)
    product = _product_of_pieces(problem, query, key, problem.strides, problem.strides)
    grid, constants = problem.forward
    _forward[grid](
        query, key, value, product, weights, out, problem.tokens, problem.heads, problem.chunk, scale,
        *problem.strides, **constants,
    )  # fmt: skip
    return out, weights


def _write_gradients(
    grads: Sequence[Tensor], packed: int, grad_out: Tensor, inputs: Sequence[Tensor], weights: Tensor, scale: float
) -> None:
    """Write the gradients of query, key and value, `packed` of which lie in one tensor."""
    problem, query, key, value = _prepare(*inputs)
    grad_out = grad_out.contiguous()
    product = _product_of_pieces(problem, grad_out, value, problem.out_strides, problem.strides)
    grid, constants = problem.backward
    _backward[grid](
        query, key, value, grad_out, product, weights, *grads,
        problem.tokens, problem.heads, problem.chunk, scale, *problem.strides, **constants, GRADS=packed,
    )  # fmt: skip


def _channel_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(out), torch.empty_like(out), torch.empty_like(out)
    _write_gradients(grads, 1, grad_out, (query, key, value), weights, scale)
    return grads


def _fake(query, key, value, scale):
    return query.new_empty(query.shape), query.new_empty(_weights_shape(query.shape), dtype=torch.float32)


def _fake_backward(grad_out, query, key, value, *others):
    return tuple(query.new_empty(query.shape) for _ in range(3))


_call = register(
    "channel_attention", _channel_attention, _fake, _channel_attention_backward, _fake_backward,
    channel_attention_reference,
)  # fmt: skip


def _packed(qkv: Tensor, roles: Sequence[int]) -> list[Tensor]:
    """Return query, key and value of a packed tensor."""
    parts = qkv.unbind(-3)
    return [parts[role] for role in roles]


def _channel_attention_qkv(qkv: Tensor, roles: list[int], scale: float) -> tuple[Tensor, Tensor]:
    return _channel_attention(*_packed(qkv, roles), scale)


def _channel_attention_qkv_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, weights: Tensor, roles: list[int], scale: float
) -> Tensor:
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _write_gradients(_packed(grad_qkv, roles), 3, grad_out, _packed(qkv, roles), weights, scale)
    return grad_qkv


def _fake_qkv(qkv, roles, scale):
    return _fake(*qkv.unbind(-3), scale)


def _fake_qkv_backward(grad_out, qkv, *others):
    return qkv.new_empty(qkv.shape)


_call_qkv = register(
    "channel_attention_qkv", _channel_attention_qkv, _fake_qkv, _channel_attention_qkv_backward, _fake_qkv_backward,
    channel_attention_qkv_reference,
)  # fmt: skip


@register_flop_formula(torch.ops.densezoo.channel_attention)
def _(query, *args, **kwargs) -> int:
    # The products that make the weights and that apply them, each a multiplication and an addition.
    return 4 * query.numel() * query[-1]


@register_flop_formula(torch.ops.densezoo.channel_attention_backward)
def _(grad_out, query, *args, **kwargs) -> int:
    # Four products: the gradients of query, key, value and weights.
    return 8 * query.numel() * query[-1]


@register_flop_formula(torch.ops.densezoo.channel_attention_qkv)
def _(qkv, *args, **kwargs) -> int:
    return 4 * qkv.numel() // 3 * qkv[-1]


@register_flop_formula(torch.ops.densezoo.channel_attention_qkv_backward)
def _(grad_out, qkv, *args, **kwargs) -> int:
    return 8 * qkv.numel() // 3 * qkv[-1]


def channel_attention_qkv_triton(qkv: Tensor, roles: Sequence[int], scale: float) -> Tensor:
    """Compute `densezoo.ops.channel_attention_qkv` with the kernels; arguments checked."""
    return _call_qkv(qkv, list(roles), scale)


def channel_attention_triton(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute `densezoo.ops.channel_attention` with the kernels; arguments checked."""
    return _call(query, key, value, scale)
