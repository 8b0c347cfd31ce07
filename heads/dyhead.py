"""Dynamic Head, between a feature pyramid and a detector's heads."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from densezoo.ops.backend import is_exporting
from densezoo.ops.shapes import check_features, positive
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DyHead(nn.Module):
    """Dynamic Head (arXiv 2106.08322): attention over scales, positions and channels of a pyramid's levels.

    Published at github.com/microsoft/DynamicHead (MIT); parameters are named and start as there. It comes after a
    feature pyramid, in front of any heads. mmdet's neck of this name is close, but has no biases in its deformable
    convolutions, so that published weights do not fit it. The deformable convolutions compute in float32.

    Args:
        in_channels: Width of the levels.
        out_channels: Width of the results, a multiple of 16.
        num_blocks: How many times scales, positions and channels are attended to.

    Raises:
        ValueError: An argument is out of its range, or the levels do not halve one another or have another width.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, num_blocks: int = 6):
        super().__init__()
        if positive("out_channels", out_channels) % 16:
            raise ValueError(
                f"out_channels: got {out_channels}, expected a positive multiple of 16, one for each group"
            )
        self.in_channels = positive("in_channels", in_channels)
        widths = [in_channels] + positive("num_blocks", num_blocks) * [out_channels]
        self.dyhead_tower = nn.Sequential(*(DyConv(*pair) for pair in pairwise(widths)))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Take levels (B, in_channels, H_i, W_i), finest first, to as many of `out_channels`.

        Each level is half as high and wide as the one before it, rounded up.
        """
        check_features(maps, max(len(maps), 1) * [self.in_channels], "maps")
        if not is_exporting():
            for i, (finer, coarser) in enumerate(pairwise(maps), 1):
                found, expected = tuple(coarser.shape[2:]), tuple((n + 1) // 2 for n in finer.shape[2:])
                if found != expected:
                    raise ValueError(
                        f"maps: level {i} is {found}, expected {expected}, half of level {i - 1} rounded up"
                    )
        return self.dyhead_tower(tuple(maps))


class DyConv(nn.Module):
    """One block of `DyHead`; it takes and returns a tuple of levels."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        # for the coarser, the same and the finer level
        self.DyConv = nn.ModuleList(DeformConvNorm(in_channels, out_channels, stride) for stride in (1, 1, 2))
        self.AttnConv = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(out_channels, 1, 1), nn.ReLU())
        self.relu = DyReLU(out_channels)
        self.offset = nn.Conv2d(in_channels, 27, 3, padding=1)
        nn.init.normal_(self.AttnConv[1].weight, std=0.01)
        nn.init.zeros_(self.AttnConv[1].bias)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Take levels (B, in_channels, H_i, W_i) to (B, out_channels, H_i, W_i)."""
        return tuple(self.level(maps, i) for i in range(len(maps)))

    def level(self, maps: tuple[Tensor, ...], i: int) -> Tensor:
        """Return the result of one level."""
        offset, mask = self.offset(maps[i]).split([18, 9], 1)
        mask = mask.sigmoid()
        same, last = maps[i], len(maps) - 1
        inputs = [self.DyConv[1](same, offset, mask)]
        if i > 0:
            inputs.append(self.DyConv[2](maps[i - 1], offset, mask))
        if i < last:
            coarser = maps[i + 1]
            # As published, the coarser map takes the numbers of this level's that come first in memory.
            first = [
                numbers.flatten(1).narrow(1, 0, numbers.shape[1] * coarser.shape[2] * coarser.shape[3])
                .unflatten(1, (numbers.shape[1], coarser.shape[2], coarser.shape[3]))
                for numbers in (offset, mask)
            ]  # fmt: skip
            coarser = self.DyConv[0](coarser, *first)
            inputs.append(F.interpolate(coarser, same.shape[2:], mode="bilinear", align_corners=True))
        return self.relu(sum(x * F.hardsigmoid(self.AttnConv(x)) for x in inputs) / len(inputs))


class DeformConvNorm(nn.Module):
    """A modulated deformable 3x3 convolution (arXiv 1811.11168) and a norm of 16 groups."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
        nn.init.zeros_(self.conv.bias)
        self.bn = nn.GroupNorm(16, out_channels)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Take a map (B, in_channels, H, W) to (B, out_channels, h, w), that of offset (B, 18, h, w) and mask."""
        conv = self.conv
        # torchvision has no kernel for bfloat16
        with torch.autocast(x.device.type, enabled=False):
            tensors = (t.float() for t in (x, offset, conv.weight, conv.bias, mask))
            inputs, offset, weight, bias, mask = tensors
            out = deform_conv2d(inputs, offset, weight, bias, conv.stride, conv.padding, mask=mask)
        return self.bn(out.to(x.dtype))


class DyReLU(nn.Module):
    """The larger of two lines of each channel, whose slopes and intercepts the whole map gives (arXiv 2003.10027)."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        hidden = channels // reduction
        self.fc = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        """Take a map (B, C, H, W) to the same shape."""
        numbers = F.hardsigmoid(self.fc(x.mean((2, 3)))) - 0.5
        slope1, bias1, slope2, bias2 = numbers[..., None, None].chunk(4, 1)
        return torch.maximum(x * (2 * slope1 + 1) + bias1, x * 2 * slope2 + bias2)
