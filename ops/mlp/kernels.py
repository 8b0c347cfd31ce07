"""A narrow MLP in one Triton kernel, for inference, and the first half of a wide one in a product of cuBLAS.

A program of `_whole` owns ROWS rows, whose input it reads once. It makes COLS hidden channels at a time, and multiplies
them by the second layer's weights while they are in registers: the hidden map, which is several times as wide as input
and output, never reaches memory. The weights come from the L2 cache. Wide MLPs have more arithmetic than traffic, and
leave it to cuBLAS, which applies the GELU before it writes.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from densezoo.ops.backend import fall_back
from densezoo.ops.gelu import normal
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


@triton.jit(do_not_specialize=["rows"])
def _whole(
    x, weight1, bias1, weight2, bias2, out, rows, DIM: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr,
    TANH: tl.constexpr,
):  # fmt: skip
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
        act = (z * _below(z, NARROW, TANH)).to(x.dtype.element_ty)
        acc = tl.dot(act, weight2_tile, acc)
    acc += tl.load(bias2 + width, width < OUT, 0.0).to(tl.float32)[None, :]
    at_out = out + first * OUT + row[:, None] * OUT + width[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), exist if OUT == WIDTH else exist & (width < OUT)[None, :])


class _Launch(NamedTuple):
    """Rows a program, hidden channels at a time, warps a program, loads in flight, and registers a thread at most."""

    rows: int
    cols: int
    warps: int
    stages: int
    registers: int | None


# By the most channels of input and output; measured on an H200.
LAUNCH = Table("mlp", {64: _Launch(64, 64, 4, 3, None), 128: _Launch(128, 64, 8, 2, 128)})
# The interpreter takes no instructions of the GPU's own.
HAS_PTX = torch.version.hip is None and not triton.knobs.runtime.interpret


def _block(channels: int) -> int:
    """Return how wide a tile is that holds all channels."""
    return max(16, triton.next_power_of_2(channels))


@lru_cache(maxsize=1024)
def _constants(dim: int, hidden: int, out: int, dtype: torch.dtype, approximate: str) -> dict:
    """Return the kernel's constants."""
    launch = LAUNCH[64 if max(dim, out) <= 64 else 128]
    constants = {
        "DIM": dim,
        "HIDDEN": hidden,
        "OUT": out,
        "ROWS": launch.rows,
        "COLS": min(launch.cols, _block(hidden)),
        "DEPTH": _block(dim),
        "WIDTH": _block(out),
        "NARROW": HAS_PTX and dtype == torch.bfloat16,
        "TANH": approximate == "tanh",
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
    return constants | ({"maxnreg": launch.registers} if launch.registers else {})


def _narrow(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, approximate: str) -> Tensor:
    """Return the MLP of (rows, dim), with (hidden, dim), (hidden,), (out, hidden) and (out,)."""
    x, weight1, bias1, weight2, bias2 = (t.contiguous() for t in (x, weight1, bias1, weight2, bias2))
    constants = _constants(x.shape[1], weight1.shape[0], weight2.shape[0], x.dtype, approximate)
    out = x.new_empty(x.shape[0], weight2.shape[0])
    programs = triton.cdiv(x.shape[0], constants["ROWS"])
    if programs:
        try:
            _whole[programs,](x, weight1, bias1, weight2, bias2, out, x.shape[0], **constants)
        except OutOfResources as error:
            fall_back("mlp", str(error))
            out = F.linear(F.gelu(F.linear(x, weight1, bias1), approximate=approximate), weight2, bias2)
    return out


def _hidden(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the GELU of x @ weight^T + bias, of (rows, dim), (hidden, dim) and (hidden,) in bfloat16."""
    # cuBLAS has the GELU by tanh in its products, which bfloat16 cannot tell from the exact one.
    return torch.ops.aten._addmm_activation(bias.contiguous(), x, weight.t(), use_gelu=True)


def _fake_narrow(x, weight1, bias1, weight2, bias2, approximate):
    return x.new_empty(x.shape[0], weight2.shape[0])


def _fake_hidden(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


mlp_narrow = define("mlp_narrow", _narrow, _fake_narrow)
# The compiler would take a product with a GELU apart again.
mlp_hidden = define("mlp_hidden", _hidden, _fake_hidden)


@register_flop_formula(torch.ops.densezoo.mlp_narrow)
def _(x, weight1, bias1, weight2, *args, **kwargs) -> int:
    return 2 * x[0] * weight1[0] * (x[1] + weight2[0])


@register_flop_formula(torch.ops.densezoo.mlp_hidden)
def _(x, weight, *args, **kwargs) -> int:
    return 2 * x[0] * x[1] * weight[0]
