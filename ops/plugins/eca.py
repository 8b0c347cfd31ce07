"""Efficient channel attention."""

import math

from densezoo.ops.plugins.parts import odd
from densezoo.ops.shapes import positive
from torch import Tensor, nn


def kernel_size_for(channels: int) -> int:
    """Return the paper's kernel size, the odd number nearest to log2(C) / 2 + 1 / 2."""
    # Of two odd numbers that are as near, the larger one, as in the released code.
    return int((math.log2(channels) + 1) / 2) | 1


class ECA(nn.Module):
    """Efficient channel attention (arXiv 1910.03151): scales each channel by the means of its neighbours.

    Args:
        channels: C.
        kernel_size: Neighbours that count, an odd number; by default the paper's, the odd number nearest to
            log2(C) / 2 + 1 / 2. The released ResNets have others: 3, 5, 5, 7 by stage in ResNet-50; 3, 5, 7, 7 in 18;
            3, 3, 5, 7 in 34, 101 and 152.

    Raises:
        ValueError: `channels` is no positive integer or `kernel_size` no odd one.
    """

    def __init__(self, channels: int, kernel_size: int | None = None, *, device=None, dtype=None):
        super().__init__()
        positive("channels", channels)
        kernel_size = kernel_size_for(channels) if kernel_size is None else odd("kernel_size", kernel_size)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        weight = self.conv(x.mean((2, 3))[:, None]).squeeze(1).sigmoid()
        return x * weight[..., None, None]
