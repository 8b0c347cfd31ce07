"""Depthwise convolution over channels-last maps in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, gelu: bool) -> Tensor:
    """Compute `densezoo.ops.depthwise_conv`; arguments checked."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    y = y.permute(0, 2, 3, 1)
    y = x + y if residual else y
    return F.gelu(y) if gelu else y
