"""What several necks share."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from densezoo.ops.backend import is_exporting
from densezoo.ops.shapes import positive
from torch import Tensor, nn

NORMS = (None, "bn", "gn")


def check_levels(levels: int, num_outs: int | None, start_level: int) -> int:
    """Return the number of outputs: `num_outs`, or as many as inputs are used; ValueError where there are too few."""
    if not isinstance(start_level, int) or start_level not in range(levels):
        raise ValueError(f"start_level: got {start_level!r}, expected 0 to {levels - 1} for {levels} levels")
    used = levels - start_level
    if num_outs is None:
        return used
    if positive("num_outs", num_outs) < used:
        raise ValueError(f"num_outs: got {num_outs}, expected {used} or more: the levels from start_level on")
    return num_outs


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    norm: str | None = None,
    act: nn.Module | None = None,
) -> nn.Sequential:
    """Return a convolution `conv` that keeps the size, its norm `bn` or `gn` and its activation, named as in mmcv.

    Raises:
        ValueError: There is no such norm, or it does not divide the width.
    """
    if norm not in NORMS:
        raise ValueError(f"norm: got {norm!r}, expected one of {', '.join(map(repr, NORMS))}")
    if norm == "gn" and out_channels % 32:
        raise ValueError(f"out_channels: got {out_channels}, expected a multiple of 32, the groups of norm='gn'")
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=norm is None)
    layers = OrderedDict(conv=conv)
    if norm:
        layers[norm] = nn.BatchNorm2d(out_channels) if norm == "bn" else nn.GroupNorm(32, out_channels)
    if act:
        layers["act"] = act
    return nn.Sequential(layers)


def init_xavier(module: nn.Module) -> None:
    """Start every convolution below uniformly by Xavier, with zero bias."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def halve(x: Tensor) -> Tensor:
    """Take the maximum of every 2x2 pixels of a map (B, C, H, W), of fewer at an odd last row or column."""
    if not is_exporting():
        return F.max_pool2d(x, 2, ceil_mode=True)
    # Rounding up asks for the size, and the answer would fix the exported sizes.
    height, width = x.shape[2:]
    return F.max_pool2d(F.pad(x, (0, width % 2, 0, height % 2), value=float("-inf")), 2)


def subsample(x: Tensor) -> Tensor:
    """Take every second row and column of a map (B, C, H, W), as max pooling of kernel 1 and stride 2 would."""
    if not is_exporting():
        return x[..., ::2, ::2].contiguous()
    # Export asks of a view whether it is contiguous, and the answer would fix the exported sizes.
    rows, columns = (torch.arange(0, size, 2, device=x.device) for size in x.shape[2:])
    return x.index_select(2, rows).index_select(3, columns)


def crop_to(x: Tensor, like: Tensor) -> Tensor:
    """Leave out the last row and column of a halved map where the backbone's next level has none for them."""
    return x[..., : like.shape[-2], : like.shape[-1]]


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Run torchvision's deformable convolution, in fp32 for the half precision that it has no kernel for."""
    dtype = x.dtype
    if dtype == torch.bfloat16 or (dtype == torch.float16 and not x.is_cuda):
        x, offset, weight = x.float(), offset.float(), weight.float()
        bias, mask = (None if t is None else t.float() for t in (bias, mask))
    else:
        offset, weight = offset.to(dtype), weight.to(dtype)
        bias, mask = (None if t is None else t.to(dtype) for t in (bias, mask))
    out = torchvision.ops.deform_conv2d(
        x, offset, weight, bias, stride=stride, padding=padding, dilation=dilation, mask=mask
    )
    return out.to(dtype)
