"""FPENet's decoder for real-time segmentation."""

from collections.abc import Sequence

import torch.nn.functional as F
from densezoo.ops.shapes import check_features, check_widths, positive
from torch import Tensor, nn


class MEU(nn.Module):
    """FPENet's mutual embedding upsample (arXiv 1909.08599): two levels weigh each other, and are added.

    The finer level's mean over channels weighs the positions of the coarser, and the coarser's mean over positions the
    channels of the finer.

    Args:
        high_channels: Width of the coarser level.
        low_channels: Width of the finer level.
        channels: Width of the result.

    Raises:
        ValueError: A width is not positive.
    """

    def __init__(self, high_channels: int, low_channels: int, channels: int):
        super().__init__()
        for name, value in dict(high_channels=high_channels, low_channels=low_channels, channels=channels).items():
            positive(name, value)
        self.high = nn.Sequential(nn.Conv2d(high_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.low = nn.Sequential(nn.Conv2d(low_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.channel = nn.Conv2d(channels, channels, 1, bias=False)
        self.position = nn.Conv2d(1, 1, 1, bias=False)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """Take levels (B, high_channels, h, w) and (B, low_channels, H, W) to (B, channels, H, W)."""
        high, low = self.high(high), self.low(low)
        channel = self.channel(high.mean((2, 3), keepdim=True)).relu().sigmoid()
        position = self.position(low.mean(1, keepdim=True)).sigmoid()
        high = F.interpolate(high, low.shape[2:], mode="bilinear", align_corners=True)
        return low * channel + high * position


class MEUDecoder(nn.Module):
    """FPENet's decoder (arXiv 1909.08599): mutual embedding upsamples from the coarsest level to the finest.

    Args:
        in_channels: Width of each level, finest first; at least two.
        channels: Width of the results.

    Raises:
        ValueError: There are fewer than two levels, a width is not positive, or the maps are others.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 64):
        super().__init__()
        self.in_channels = check_widths(in_channels, 2)
        *finer, coarsest = self.in_channels
        highs = [coarsest] + (len(finer) - 1) * [channels]
        self.blocks = nn.ModuleList(MEU(high, low, channels) for high, low in zip(highs, finer[::-1], strict=True))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Take levels (B, in_channels[i], H_i, W_i), finest first, to (B, channels, H_0, W_0)."""
        check_features(maps, self.in_channels, "maps")
        *finer, x = maps
        for block, low in zip(self.blocks, finer[::-1], strict=True):
            x = block(x, low)
        return x
