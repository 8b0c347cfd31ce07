"""The first layer of an MLP with its GELU in Triton, and the way back from the second layer's gradient through both.

The GELU costs no pass over memory: it is applied to tiles of a matrix product before they are written.

- `_forward` computes pre = x @ weight1^T + bias1 and act = GELU(pre); of the former a copy is kept for the backward.
- `_whole` computes the second layer too, where nothing is kept and the first and last widths are small: the hidden
  channels of a program's rows are made COLS at a time, and never leave the chip.
- `_backward` computes grad_pre = (grad_out @ weight2) * GELU'(pre), and what each program adds to the gradient of
  bias1, partial sums that torch adds up.

A program of the others owns every `programs`-th tile of ROWS rows and COLS hidden channels; neighbouring tiles share their rows, so
that these come from memory once, and the weights stay in the L2 cache.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from densezoo.ops.backend import fall_back
from densezoo.ops.gelu import gelu_slope, normal
from densezoo.ops.launch import Table
from densezoo.ops.registration import define
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.runtime.errors import OutOfResources


@triton.jit
def _below(z, NARROW: tl.constexpr, TANH: tl.constexpr):
    """What the GELU multiplies z by."""
    # In bfloat16 the two kinds of GELU cannot be told apart.
    if TANH and not NARROW:
        below = 1.0 / (1.0 + tl.exp2(z * (-2.302208198144325 - 0.10294324225134306 * z * z)))
    else:
        below = normal(z, NARROW)
    return below


@triton.jit
def _slope(z, NARROW: tl.constexpr, TANH: tl.constexpr):
    """Derivative of the GELU."""
    below = _below(z, NARROW, TANH)
    if TANH and not NARROW:
        slope = below + below * (1.0 - below) * z * (1.5957691216057308 + 0.2140644488178203 * z * z)
    else:
        slope = gelu_slope(z, below)
    return slope


@triton.jit
def _tile(tile, rows, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile's first row, its rows, which of them exist, its columns, and rows and columns to read."""
    blocks: tl.constexpr = (HIDDEN + COLS - 1) // COLS
    first = tile // blocks * ROWS
    row, col = tl.arange(0, ROWS), tile % blocks * COLS + tl.arange(0, COLS)
    # What lies beyond the edge is computed of what lies before it, and not written.
    inner_row = tl.minimum(row, rows - 1 - first)
    inner_col = col if HIDDEN % COLS == 0 else tl.minimum(col, HIDDEN - 1)
    # There may be more than 2^31 elements.
    return first.to(tl.int64), row, (row < rows - first)[:, None], col, inner_row, inner_col


@triton.jit
def _product(
    a, b, b_row, b_col, row, col, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Product of rows of `a`, dense in DIM, and columns of `b`, in float32."""
    depth = tl.arange(0, DEPTH)
    at_a = a + row[:, None] * DIM + depth[None, :]
    at_b = b + depth[:, None] * b_row + col[None, :] * b_col
    acc = tl.zeros((ROWS, COLS), tl.float32)
    if DIM <= DEPTH:
        if DIM == DEPTH:
            a_tile, b_tile = tl.load(at_a), tl.load(at_b)
        else:
            a_tile = tl.load(at_a, (depth < DIM)[None, :], 0.0)
            b_tile = tl.load(at_b, (depth < DIM)[:, None], 0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    else:
        for start in range(0, DIM, DEPTH):
            if DIM % DEPTH == 0:
                a_tile, b_tile = tl.load(at_a + start), tl.load(at_b + start * b_row)
            else:
                exist = depth < DIM - start
                a_tile = tl.load(at_a + start, exist[None, :], 0.0)
                b_tile = tl.load(at_b + start * b_row, exist[:, None], 0.0)
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, weight, bias, pre, act, rows, DIM: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, AHEAD: tl.constexpr, SAVE: tl.constexpr, NARROW: tl.constexpr, TANH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, ROWS) * ((HIDDEN + COLS - 1) // COLS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=AHEAD):
        first, row, exist, col, inner_row, inner_col = _tile(tile, rows, HIDDEN, ROWS, COLS)
        z = _product(x + first * DIM, weight, 1, DIM, inner_row, inner_col, DIM, ROWS, COLS, DEPTH, PRECISION)
        z += tl.load(bias + inner_col).to(tl.float32)[None, :]
        place = row[:, None] * HIDDEN + col[None, :]
        mask = exist if HIDDEN % COLS == 0 else exist & (col < HIDDEN)[None, :]
        if SAVE:
            tl.store(pre + first * HIDDEN + place, z.to(pre.dtype.element_ty), mask)
        tl.store(act + first * HIDDEN + place, (z * _below(z, NARROW, TANH)).to(act.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def _whole(
    x, weight1, bias1, weight2, bias2, out, rows, DIM: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr,
    TANH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, depth, width = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, WIDTH)
    first = tl.program_id(0) * ROWS
    exist = (row < rows - first)[:, None]
    first = first.to(tl.int64)
    at_x = x + first * DIM + row[:, None] * DIM + depth[None, :]
    x_tile = tl.load(at_x, exist if DIM == DEPTH else exist & (depth < DIM)[None, :], 0.0)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, HIDDEN, COLS):
        col = start + tl.arange(0, COLS)
        at_1, at_2 = weight1 + col[None, :] * DIM + depth[:, None], weight2 + width[None, :] * HIDDEN + col[:, None]
        if DIM == DEPTH and OUT == WIDTH and HIDDEN % COLS == 0:
            weight1_tile, weight2_tile, offset = tl.load(at_1), tl.load(at_2), tl.load(bias1 + col)
        else:
            inner = col < HIDDEN
            weight1_tile = tl.load(at_1, (depth < DIM)[:, None] & inner[None, :], 0.0)
            weight2_tile = tl.load(at_2, inner[:, None] & (width < OUT)[None, :], 0.0)
            offset = tl.load(bias1 + col, inner, 0.0)
        z = tl.dot(x_tile, weight1_tile, input_precision=PRECISION) + offset.to(tl.float32)[None, :]
        act = (z * _below(z, NARROW, TANH)).to(x.dtype.element_ty)
        acc = tl.dot(act, weight2_tile, acc, input_precision=PRECISION)
    acc += tl.load(bias2 + width, width < OUT, 0.0).to(tl.float32)[None, :]
    at_out = out + first * OUT + row[:, None] * OUT + width[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), exist if OUT == WIDTH else exist & (width < OUT)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad_out, weight, pre, grad_pre, partial, rows, DIM: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, DEPTH: tl.constexpr, AHEAD: tl.constexpr, NARROW: tl.constexpr, TANH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (HIDDEN + COLS - 1) // COLS
    sums = tl.zeros((COLS,), tl.float32)
    # The programs are a multiple of the blocks, so that all tiles of one have the same columns.
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * blocks, tl.num_programs(0), num_stages=AHEAD):
        first, row, exist, col, inner_row, inner_col = _tile(tile, rows, HIDDEN, ROWS, COLS)
        place = row[:, None] * HIDDEN + col[None, :]
        mask = exist if HIDDEN % COLS == 0 else exist & (col < HIDDEN)[None, :]
        # On its way while the product is computed.
        z = tl.load(pre + first * HIDDEN + place, mask, 0.0)
        grad = _product(
            grad_out + first * DIM, weight, HIDDEN, 1, inner_row, inner_col, DIM, ROWS, COLS, DEPTH, PRECISION
        )  # fmt: skip
        grad *= _slope(z.to(tl.float32), NARROW, TANH)
        tl.store(grad_pre + first * HIDDEN + place, grad.to(grad_pre.dtype.element_ty), mask)
        sums += tl.sum(tl.where(exist, grad, 0.0), 0)
    col = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    tl.store(partial + tl.program_id(0) // blocks * HIDDEN + col, sums, col < HIDDEN)


class _Launch(NamedTuple):
    """Rows, columns and depth of a tile, warps a program, loads in flight, programs a multiprocessor, registers.

    With 0 programs each tile has its own.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    programs: int
    registers: int | None = None


# By kernel and the most channels that it sums over.
LAUNCH = {
    ("forward", 64): _Launch(64, 64, 64, 4, 2, 0),
    ("forward", 4096): _Launch(128, 128, 64, 8, 3, 0, 128),
    ("backward", 64): _Launch(64, 64, 64, 4, 3, 3),
    ("backward", 128): _Launch(64, 64, 128, 4, 2, 0),
    ("backward", 4096): _Launch(128, 128, 64, 8, 3, 0),
    ("whole", 64): _Launch(128, 64, 64, 8, 3, 0),
    ("whole", 128): _Launch(128, 64, 128, 8, 2, 0),
}
LAUNCH = Table("mlp", LAUNCH)
# The interpreter takes no instructions of the GPU's own.
HAS_PTX = torch.version.hip is None and not triton.knobs.runtime.interpret


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _block(channels: int) -> int:
    """Return how many channels a tile has that holds all of them."""
    return max(16, triton.next_power_of_2(channels))


@lru_cache(maxsize=1024)
def _plan(name: str, dim: int, hidden: int, dtype: torch.dtype, approximate: str, allows_tf32: bool) -> tuple:
    """Return a kernel's launch settings and constants."""
    launch = LAUNCH[name, min((most for kernel, most in LAUNCH if kernel == name and dim <= most), default=4096)]
    if dtype == torch.float32:
        # Numbers twice as wide: half as many channels.
        launch = launch._replace(cols=launch.cols // 2, depth=min(launch.depth, 32))
    cols, depth = min(launch.cols, _block(hidden)), min(launch.depth, _block(dim))
    constants = {
        "DIM": dim,
        "HIDDEN": hidden,
        "ROWS": launch.rows,
        "COLS": cols,
        "DEPTH": depth,
        "NARROW": HAS_PTX and dtype == torch.bfloat16,
        "TANH": approximate == "tanh",
        "PRECISION": "tf32" if dtype == torch.float32 and allows_tf32 else "ieee",
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
    if name != "whole":
        # Where a tile takes one step, it is the next tile's that is on its way.
        constants["AHEAD"] = launch.stages if dim <= depth and launch.programs else 1
    if launch.registers:
        constants["maxnreg"] = launch.registers
    return launch.rows, triton.cdiv(hidden, cols), launch.programs, constants


def _launch(name: str, dim: int, hidden: int, example: Tensor, approximate: str) -> tuple[int, int, dict]:
    """Return how many programs of the kernel called `name` share the rows, how many the columns, and its constants."""
    allows_tf32 = torch.backends.cuda.matmul.allow_tf32
    rows, blocks, programs, constants = _plan(name, dim, hidden, example.dtype, approximate, allows_tf32)
    height = triton.cdiv(example.shape[0], rows)
    if programs:
        height = min(height, max(1, programs * _multiprocessors(example.device) // blocks))
    return height, blocks, constants


def _hidden(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Return x @ weight^T + bias and its GELU, of (rows, dim), (hidden, dim) and (hidden,)."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    pre, act = (x.new_empty(x.shape[0], weight.shape[0]) for _ in range(2))
    if x.shape[0]:
        height, blocks, constants = _launch("forward", x.shape[1], weight.shape[0], x, approximate)
        try:
            _forward[height * blocks,](x, weight, bias, pre, act, x.shape[0], SAVE=True, **constants)
        except OutOfResources as error:
            fall_back("mlp", str(error))
            pre = F.linear(x, weight, bias)
            act = F.gelu(pre, approximate=approximate)
    return pre, act


def _hidden_backward(grad_out: Tensor, weight: Tensor, pre: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Return the gradient of `pre`, and in float32 the sum of its rows, of (rows, dim) and (dim, hidden)."""
    grad_out, weight, pre = grad_out.contiguous(), weight.contiguous(), pre.contiguous()
    hidden = weight.shape[1]
    height, blocks, constants = _launch("backward", grad_out.shape[1], hidden, grad_out, approximate)
    grad_pre = torch.empty_like(pre)
    partial = torch.empty(height, hidden, dtype=torch.float32, device=pre.device)
    if height:
        try:
            _backward[height * blocks,](grad_out, weight, pre, grad_pre, partial, pre.shape[0], **constants)
        except OutOfResources as error:
            fall_back("mlp", str(error))
            grad_pre = torch.ops.aten.gelu_backward(grad_out @ weight, pre, approximate=approximate)
            return grad_pre, grad_pre.sum(0, dtype=torch.float32)
    return grad_pre, partial.sum(0)


def _activated(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """Return the GELU of x @ weight^T + bias alone."""
    if x.dtype == torch.bfloat16 and x.is_cuda:
        # cuBLAS has the other kind of GELU in its products, which bfloat16 cannot tell apart.
        return torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    act = x.new_empty(x.shape[0], weight.shape[0])
    if x.shape[0]:
        height, blocks, constants = _launch("forward", x.shape[1], weight.shape[0], x, approximate)
        try:
            _forward[height * blocks,](x, weight, bias, act, act, x.shape[0], SAVE=False, **constants)
        except OutOfResources as error:
            fall_back("mlp", str(error))
            act = F.gelu(F.linear(x, weight, bias), approximate=approximate)
    return act


def _through(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, approximate: str) -> Tensor:
    """Return the whole MLP of (rows, dim), (hidden, dim), (hidden,), (out, hidden) and (out,)."""
    x, *parameters = (t.contiguous() for t in (x, weight1, bias1, weight2, bias2))
    width, hidden = weight2.shape
    out = x.new_empty(x.shape[0], width)
    if x.shape[0]:
        height, _, constants = _launch("whole", max(x.shape[1], width), hidden, x, approximate)
        block = {"DEPTH": _block(x.shape[1]), "WIDTH": _block(width), "DIM": x.shape[1], "OUT": width}
        try:
            _whole[height,](x, *parameters, out, x.shape[0], **(constants | block))
        except OutOfResources as error:
            fall_back("mlp", str(error))
            out = F.linear(_activated(x, *parameters[:2], approximate), *parameters[2:])
    return out


def _fake_hidden(x, weight, bias, approximate):
    return tuple(x.new_empty(x.shape[0], weight.shape[0]) for _ in range(2))


def _fake_hidden_backward(grad_out, weight, pre, approximate):
    return pre.new_empty(pre.shape), pre.new_empty(pre.shape[1], dtype=torch.float32)


def _fake_activated(x, weight, bias, approximate):
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_through(x, weight1, bias1, weight2, bias2, approximate):
    return x.new_empty(x.shape[0], weight2.shape[0])


mlp_hidden = define("mlp_hidden", _hidden, _fake_hidden)
mlp_hidden_backward = define("mlp_hidden_backward", _hidden_backward, _fake_hidden_backward)
mlp_activated = define("mlp_activated", _activated, _fake_activated)
mlp_whole = define("mlp_whole", _through, _fake_through)


@register_flop_formula([torch.ops.densezoo.mlp_hidden, torch.ops.densezoo.mlp_activated])
def _(x, weight, *args, **kwargs) -> int:
    return 2 * x[0] * x[1] * weight[0]


@register_flop_formula(torch.ops.densezoo.mlp_hidden_backward)
def _(grad_out, weight, *args, **kwargs) -> int:
    return 2 * grad_out[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.densezoo.mlp_whole)
def _(x, weight1, bias1, weight2, *args, **kwargs) -> int:
    return 2 * x[0] * weight1[0] * (x[1] + weight2[0])
