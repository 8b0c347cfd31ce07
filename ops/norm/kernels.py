"""The backward of layer normalisation as a Triton kernel.

A program owns every `programs`-th tile of ROWS rows and all channels of them: it reads the output's gradient and the
input once, reduces each row for the input's gradient, and adds up, in registers, what its rows give to the gradients of
weight and bias. Those partial sums, two rows of channels a program, are added up by `partials.total`, always in the
same order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from densezoo.ops import compiling
from densezoo.ops.launch import Table, multiprocessors
from densezoo.ops.partials import total
from densezoo.ops.registration import define
from torch import Tensor


@compiling.kernel
def _backward(
    grad_out, x, weight, mean, rstd, grad_x, partial, rows,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.arange(0, BLOCK)
    exists = channel < CHANNELS
    w = tl.load(weight + channel, exists, 0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        valid = row < rows
        mask = valid[:, None] & exists[None, :]
        # There may be more than 2^31 elements.
        place = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        g = tl.load(grad_out + place, mask, 0.0).to(tl.float32)
        r = tl.load(rstd + row, valid, 0.0)[:, None]
        normed = (tl.load(x + place, mask, 0.0).to(tl.float32) - tl.load(mean + row, valid, 0.0)[:, None]) * r
        normed = tl.where(exists[None, :], normed, 0.0)
        grad_weight += g * normed
        grad_bias += g
        g *= w
        shift = tl.sum(g, 1)[:, None] / CHANNELS
        slope = tl.sum(g * normed, 1)[:, None] / CHANNELS
        tl.store(grad_x + place, ((g - shift - normed * slope) * r).to(grad_x.dtype.element_ty), mask)
    sums = partial + program * 2 * CHANNELS + channel
    tl.store(sums, tl.sum(grad_weight, 0), exists)
    tl.store(sums + CHANNELS, tl.sum(grad_bias, 0), exists)


class _Launch(NamedTuple):
    """Elements of a tile, warps a program, loads in flight, and programs for each multiprocessor."""

    elements: int
    warps: int
    stages: int
    programs: int


# Measured on an H200.
LAUNCH = Table("layer_norm", {"backward": _Launch(1024, 2, 2, 8)})


def _layer_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and in one tensor those of weight and bias."""
    launch, channels = LAUNCH["backward"], x.shape[-1]
    x, grad_out = x.contiguous(), grad_out.contiguous()
    rows, block = x.numel() // channels, triton.next_power_of_2(channels)
    tile = max(1, launch.elements // block)
    programs = max(1, min(triton.cdiv(rows, tile), launch.programs * multiprocessors(x.device)))
    grad_x = x.new_empty(x.shape)
    partial = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
    _backward[programs,](
        grad_out, x, weight, mean, rstd, grad_x, partial, rows, channels, block, tile,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return grad_x, total(partial)


def _fake(grad_out, x, weight, mean, rstd):
    return x.new_empty(x.shape), x.new_empty((2, x.shape[-1]), dtype=torch.float32)


layer_norm_backward = define("layer_norm_backward", _layer_norm_backward, _fake)
