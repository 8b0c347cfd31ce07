"""An MLP in one Triton kernel, its backward in another, and the first half of a wide one in a product of cuBLAS.

- `_whole`: a program owns ROWS rows, whose input it reads once. It makes COLS hidden channels at a time, and multiplies
  them by the second layer's weights while they are in registers: the hidden map, which is several times as wide as
  input and output, reaches memory for the backward alone, where it does not make it again. The weights come from the
  L2 cache.
- `_backward`: a program owns ROWS rows and SPAN hidden channels, of which it makes COLS at a time: the gradient before
  the GELU, and the GELU itself again, from the saved map or from the input. Both it writes, for the gradients of the
  weights. With all hidden channels it adds up the gradient of the input meanwhile; else that is left to cuBLAS. What
  its rows give to the gradients of the biases it writes as a row of partial sums, which `partials.total` adds up,
  always in the same order.

Gradients of weights are sums over all rows, and products of cuBLAS. Wide MLPs have more arithmetic than traffic: in
inference they leave it to cuBLAS, which applies the GELU before it writes, but does not keep what the backward needs.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.backend import fall_back
from densezoo.ops.gelu import gelu_slope, normal
from densezoo.ops.launch import Table, multiprocessors
from densezoo.ops.partials import total
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


@compiling.kernel(do_not_specialize=["rows"])
def _whole(
    x, weight1, bias1, weight2, bias2, out, hidden, rows,
    DIM: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr, TANH: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """With SAVE the hidden map is written."""
    row, depth, width = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, WIDTH)
    first = tl.program_id(0) * ROWS
    exist = (row < rows - first)[:, None]
    # There may be more than 2^31 elements.
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
        z = tl.dot(x_tile, weight1_tile) + offset.to(tl.float32)[None, :]
        if SAVE:
            at_hidden = hidden + first * HIDDEN + row[:, None] * HIDDEN + col[None, :]
            tl.store(
                at_hidden, z.to(x.dtype.element_ty), exist if HIDDEN % COLS == 0 else exist & (col < HIDDEN)[None, :]
            )
        act = (z * _below(z, NARROW, TANH)).to(x.dtype.element_ty)
        acc = tl.dot(act, weight2_tile, acc)
    acc += tl.load(bias2 + width, width < OUT, 0.0).to(tl.float32)[None, :]
    at_out = out + first * OUT + row[:, None] * OUT + width[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), exist if OUT == WIDTH else exist & (width < OUT)[None, :])


@compiling.kernel(do_not_specialize=["rows"])
def _backward(
    grad_out, x, hidden, weight1, bias1, weight2, grad_x, grad_hidden, act, partial, rows,
    DIM: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SPAN: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    """With SAVED the hidden map is read, else made again."""
    row, depth, width = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, WIDTH)
    dtype: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    # There may be more than 2^31 elements.
    first = program * ROWS
    exist = (row < rows - first)[:, None]
    at_out = grad_out + first * OUT + row[:, None] * OUT + width[None, :]
    grad_tile = tl.load(at_out, exist if OUT == WIDTH else exist & (width < OUT)[None, :], 0.0)
    at_x = first * DIM + row[:, None] * DIM + depth[None, :]
    exist_x = exist if DIM == DEPTH else exist & (depth < DIM)[None, :]
    if not SAVED:
        x_tile = tl.load(x + at_x, exist_x, 0.0)
    sums = partial + program * (HIDDEN + OUT)
    if tl.program_id(1) == 0:
        tl.store(sums + HIDDEN + width, tl.sum(grad_tile.to(tl.float32), 0), width < OUT)
    acc = tl.zeros((ROWS, DEPTH), tl.float32)
    begin = tl.program_id(1) * SPAN
    for start in range(begin, min(begin + SPAN, HIDDEN), COLS):
        col = start + tl.arange(0, COLS)
        inner = col < HIDDEN
        at_1, at_2 = weight1 + col[:, None] * DIM + depth[None, :], weight2 + width[:, None] * HIDDEN + col[None, :]
        if DIM == DEPTH and OUT == WIDTH and HIDDEN % COLS == 0:
            weight1_tile, weight2_tile = tl.load(at_1), tl.load(at_2)
        else:
            weight1_tile = tl.load(at_1, inner[:, None] & (depth < DIM)[None, :], 0.0)
            weight2_tile = tl.load(at_2, (width < OUT)[:, None] & inner[None, :], 0.0)
        at_hidden = first * HIDDEN + row[:, None] * HIDDEN + col[None, :]
        exists = exist if HIDDEN % COLS == 0 else exist & inner[None, :]
        if SAVED:
            z = tl.load(hidden + at_hidden, exists, 0.0).to(tl.float32)
        else:
            z = tl.dot(x_tile, weight1_tile.T) + tl.load(bias1 + col, inner, 0.0).to(tl.float32)[None, :]
        below = normal(z, NARROW)
        tl.store(act + at_hidden, (z * below).to(dtype), exists)
        grad = tl.dot(grad_tile, weight2_tile) * gelu_slope(z, below)
        tl.store(sums + col, tl.sum(grad, 0), inner)
        tl.store(grad_hidden + at_hidden, grad.to(dtype), exists)
        if SPAN >= HIDDEN:
            acc = tl.dot(grad.to(dtype), weight1_tile, acc)
    if SPAN >= HIDDEN:
        tl.store(grad_x + at_x, acc.to(dtype), exist_x)


class _Launch(NamedTuple):
    """Rows a program, hidden channels at a time, warps a program, loads in flight, and registers a thread at most."""

    rows: int
    cols: int
    warps: int
    stages: int
    registers: int | None


class _BackwardLaunch(NamedTuple):
    """As the forward's, and the hidden channels of a program; 0 for all."""

    rows: int
    cols: int
    span: int
    warps: int
    stages: int
    registers: int | None


# By the most channels of input and output; measured on an H200.
LAUNCH = Table(
    "mlp",
    {
        ("inference", 64): _Launch(64, 64, 4, 3, None),
        ("inference", 128): _Launch(128, 64, 8, 2, 128),
        ("training", 64): _Launch(64, 32, 4, 3, None),
        ("training", 128): _Launch(64, 32, 4, 3, None),
        ("training", 256): _Launch(128, 64, 8, 2, None),
        # Of so few rows that not every multiprocessor would have a program.
        ("few", 256): _Launch(64, 64, 4, 2, None),
        ("backward", 64): _BackwardLaunch(64, 64, 0, 4, 2, 168),
        ("backward", 128): _BackwardLaunch(64, 64, 192, 4, 2, None),
        ("backward", 256): _BackwardLaunch(128, 64, 192, 8, 1, None),
    },
)
# The interpreter takes no instructions of the GPU's own.
HAS_PTX = torch.version.hip is None and not triton.knobs.runtime.interpret


def _block(channels: int) -> int:
    """Return how wide a tile is that holds all channels."""
    return max(16, triton.next_power_of_2(channels))


@lru_cache(maxsize=1024)
def _constants(kernel: str, dim: int, hidden: int, out: int, dtype: torch.dtype) -> dict:
    """Return the constants of a kernel, named as its settings are."""
    launch = LAUNCH[kernel, max(64, triton.next_power_of_2(max(dim, out)))]
    constants = {
        "DIM": dim,
        "HIDDEN": hidden,
        "OUT": out,
        "ROWS": launch.rows,
        "COLS": min(launch.cols, _block(hidden)),
        "DEPTH": _block(dim),
        "WIDTH": _block(out),
        "NARROW": HAS_PTX and dtype == torch.bfloat16,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
    if kernel == "backward":
        constants["SPAN"] = launch.span or hidden
    return constants | ({"maxnreg": launch.registers} if launch.registers else {})


def _narrow(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, approximate: str) -> Tensor:
    """Return the MLP of (rows, dim), with (hidden, dim), (hidden,), (out, hidden) and (out,)."""
    return _forward("inference", x, weight1, bias1, weight2, bias2, approximate)[0]


def _training(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the MLP with the exact GELU as `_narrow` does, and (rows, hidden) before the GELU."""
    return _forward("training", x, weight1, bias1, weight2, bias2, "none")


def _forward(kernel: str, x, weight1, bias1, weight2, bias2, approximate: str) -> tuple[Tensor, Tensor]:
    x, weight1, bias1, weight2, bias2 = (t.contiguous() for t in (x, weight1, bias1, weight2, bias2))
    saves, widths = kernel == "training", (x.shape[1], weight1.shape[0], weight2.shape[0])
    constants = _constants(kernel, *widths, x.dtype)
    is_wide = max(x.shape[1], weight2.shape[0]) > 128
    if saves and is_wide and x.shape[0] < constants["ROWS"] * multiprocessors(x.device):
        constants = _constants("few", *widths, x.dtype)
    out = x.new_empty(x.shape[0], weight2.shape[0])
    hidden = x.new_empty(x.shape[0], weight1.shape[0]) if saves else out
    programs = triton.cdiv(x.shape[0], constants["ROWS"])
    if programs:
        try:
            _whole[programs,](
                x, weight1, bias1, weight2, bias2, out, hidden, x.shape[0],
                TANH=approximate == "tanh", SAVE=saves, **constants,
            )  # fmt: skip
        except OutOfResources as error:
            fall_back("mlp", str(error))
            hidden = F.linear(x, weight1, bias1)
            out = F.linear(F.gelu(hidden, approximate=approximate), weight2, bias2)
    return out, hidden


def _hidden(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the GELU of x @ weight^T + bias, of (rows, dim), (hidden, dim) and (hidden,) in bfloat16."""
    # cuBLAS has the GELU by tanh in its products, which bfloat16 cannot tell from the exact one.
    return torch.ops.aten._addmm_activation(bias.contiguous(), x, weight.t(), use_gelu=True)


def _mlp_backward(
    grad_out: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take the gradient of (rows, out) back to the input, with the map before the GELU saved or not.

    Returns:
        The gradient of (rows, dim), that of (rows, hidden) before the GELU, the GELU (rows, hidden), and, in one tensor
        of hidden + out sums over the rows in float32, the gradients of the biases.
    """
    saved = hidden is not None
    grad_out, x, weight1, bias1, weight2 = (t.contiguous() for t in (grad_out, x, weight1, bias1, weight2))
    (rows, dim), (out, channels) = x.shape, weight2.shape
    constants = _constants("backward", dim, channels, out, x.dtype)
    grad_x, grad_hidden, act = torch.empty_like(x), x.new_empty(rows, channels), x.new_empty(rows, channels)
    programs = triton.cdiv(rows, constants["ROWS"])
    partial = torch.empty(programs, channels + out, dtype=torch.float32, device=x.device)
    if programs:
        try:
            _backward[programs, triton.cdiv(channels, constants["SPAN"])](
                grad_out, x, hidden.contiguous() if saved else x, weight1, bias1, weight2,
                grad_x, grad_hidden, act, partial, rows, SAVED=saved, **constants,
            )  # fmt: skip
        except OutOfResources as error:
            fall_back("mlp", str(error))
            hidden = hidden if saved else F.linear(x, weight1, bias1)
            grad_hidden, act = torch.ops.aten.gelu_backward(grad_out @ weight2, hidden), F.gelu(hidden)
            partial = torch.cat([grad_hidden, grad_out], 1).float()
            torch.mm(grad_hidden, weight1, out=grad_x)
    if constants["SPAN"] < channels:
        torch.mm(grad_hidden, weight1, out=grad_x)
    return grad_x, grad_hidden, act, total(partial)


def _fake_narrow(x, weight1, bias1, weight2, bias2, approximate):
    return x.new_empty(x.shape[0], weight2.shape[0])


def _fake_training(x, weight1, bias1, weight2, bias2):
    return x.new_empty(x.shape[0], weight2.shape[0]), x.new_empty(x.shape[0], weight1.shape[0])


def _fake_hidden(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_backward(grad_out, x, weight1, bias1, weight2, hidden):
    rows, (out, channels) = x.shape[0], weight2.shape
    wide = (x.new_empty(rows, channels) for _ in range(2))
    return x.new_empty(x.shape), *wide, x.new_empty(channels + out, dtype=torch.float32)


mlp_narrow = define("mlp_narrow", _narrow, _fake_narrow)
mlp_training = define("mlp_training", _training, _fake_training)
mlp_backward = define("mlp_backward", _mlp_backward, _fake_backward)
# The compiler would take a product with a GELU apart again.
mlp_hidden = define("mlp_hidden", _hidden, _fake_hidden)


@register_flop_formula([torch.ops.densezoo.mlp_narrow, torch.ops.densezoo.mlp_training])
def _(x, weight1, bias1, weight2, *args, **kwargs) -> int:
    return 2 * x[0] * weight1[0] * (x[1] + weight2[0])


@register_flop_formula(torch.ops.densezoo.mlp_backward)
def _(grad_out, x, weight1, bias1, weight2, hidden, **kwargs) -> int:
    # The gradients of the weights are products of their own.
    return 2 * x[0] * weight1[0] * (weight2[0] + x[1] * (1 if hidden else 2))


@register_flop_formula(torch.ops.densezoo.mlp_hidden)
def _(x, weight, *args, **kwargs) -> int:
    return 2 * x[0] * x[1] * weight[0]
