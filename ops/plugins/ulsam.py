"""Ultra-lightweight subspace attention module."""

import torch.nn.functional as F
from densezoo.ops.shapes import positive
from torch import Tensor, nn


class ULSAM(nn.Module):
    """ULSAM (arXiv 2006.15102): x * (1 + attention), one softmax over the positions for each group of channels.

    Args:
        channels: C.
        groups: Subspaces, a divisor of C.

    Raises:
        ValueError: `groups` does not divide `channels`.
    """

    def __init__(self, channels: int, groups: int = 4, *, device=None, dtype=None):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        if positive("channels", channels) % positive("groups", groups):
            raise ValueError(f"groups: got {groups} for {channels} channels, expected a divisor of the channels")
        # The released code has these of each subspace apart; its norms keep a tenth of their running statistics.
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels, **factory)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=0.9, **factory)
        self.conv_point = nn.Conv2d(channels, groups, 1, groups=groups, **factory)
        self.bn_point = nn.BatchNorm2d(groups, momentum=0.9, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        y = F.max_pool2d(self.bn_dws(self.conv_dws(x)).relu(), 3, stride=1, padding=1)
        y = self.bn_point(self.conv_point(y)).relu()
        attention = y.flatten(2).softmax(2).view_as(y)
        width = x.shape[1] // attention.shape[1]
        return x * (1 + attention.repeat_interleave(width, 1).to(x.dtype))
