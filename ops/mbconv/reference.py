"""The middle of an inverted bottleneck in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, act: str) -> Tensor:
    """Apply the activation of a name."""
    return F.silu(x) if act == "silu" else F.gelu(x, approximate="tanh")


def activated_conv_reference(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], act: str
) -> Tensor:
    """Compute `densezoo.ops.mbconv.activated_conv`; arguments checked."""
    x = activate(x * scale + shift, act).permute(0, 3, 1, 2)
    bottom, right = (
        -(-side // stride) * stride + 3 - stride - side - before
        for side, before in zip(x.shape[2:], padding, strict=True)
    )
    x = F.pad(x, (padding[1], right, padding[0], bottom))
    return F.conv2d(x, weight, stride=stride, groups=len(weight)).permute(0, 2, 3, 1)
