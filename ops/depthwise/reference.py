"""Depthwise convolution over channels-last maps in plain PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Sequence[int | None], residual: bool, gelu: bool
) -> Tensor:
    """Compute `densezoo.ops.depthwise_conv`; arguments checked."""
    y, reach, positions = x, weight.shape[-1] // 2, {}
    for axis, side in enumerate(window, start=1):
        if side is not None:
            # Lines of zeros after each window keep it from the next.
            size = x.shape[axis]
            position = torch.arange(size, device=x.device)
            positions[axis] = position = position + position // side * reach
            shape = list(y.shape)
            shape[axis] = size + (size - 1) // side * reach
            y = y.new_zeros(shape).index_copy(axis, position, y)
    y = F.conv2d(y.permute(0, 3, 1, 2), weight, bias, padding=reach, groups=len(weight)).permute(0, 2, 3, 1)
    for axis, position in positions.items():
        y = y.index_select(axis, position)
    y = x + y if residual else y
    return F.gelu(y) if gelu else y
