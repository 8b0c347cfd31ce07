"""RCNet's reverse feature pyramid and cross-scale shift network."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from densezoo.necks.parts import (
    check_levels,
    conv_norm,
    crop_to,
    deform_conv2d,
    halve,
    init_xavier,
)
from densezoo.ops.backend import is_exporting
from densezoo.ops.shapes import check_features, check_widths, positive
from torch import Tensor, nn


class RCNet(nn.Module):
    """RCNet's neck (arXiv 2110.12130): a reverse feature pyramid (RevFP), then the cross-scale shift network (CSN).

    RevFP goes once over the levels, from the finest on: each is fused with the one above it as the backbone gave it,
    and with the finished one below it. CSN brings all levels to one size, exchanges a part of the channels between
    levels one and two apart, and adds what comes of it to each.

    As in the published code (github.com/TempleX98/RCNet), but for any number of levels from three on; a level whose
    backbone leaves out an odd last row or column works too.

    Args:
        in_channels: The widths of the inputs, finest first.
        out_channels: The width of all outputs, 16 at least for CSN.
        num_outs: Levels of the output, three or more; those beyond the inputs are a 1x1 convolution and a maximum each.
        start_level: The first of the inputs that is used.
        norm: 'bn', 'gn' (of 32 groups) or None, after the convolutions. Published: 'bn', with four images a GPU.
        deform: Whether the 3x3 convolutions of RevFP are modulated deformable ones (arXiv 1811.11168), of two groups.
        shift: Whether CSN follows.

    Raises:
        ValueError: An argument is out of its range; says what the range is.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_outs: int = 5,
        start_level: int = 0,
        norm: str | None = "bn",
        deform: bool = True,
        shift: bool = True,
    ):
        super().__init__()
        self.in_channels = check_widths(in_channels)
        self.num_outs = check_levels(len(self.in_channels), num_outs, start_level)
        self.start_level = start_level
        widths = self.in_channels[start_level:]
        positive("out_channels", out_channels)
        self.lateral_convs = nn.ModuleList(conv_norm(width, out_channels, 1, norm=norm) for width in widths)
        self.extra_convs = nn.ModuleList(
            conv_norm(out_channels, out_channels, 1, norm=norm) for _ in range(self.num_outs - len(widths))
        )
        init_xavier(self)
        self.revfp = RevFP(out_channels, self.num_outs, norm, deform)
        self.csn = CrossScaleShift(out_channels, self.num_outs, norm) if shift else None

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Take maps (B, in_channels[i], H_i, W_i) to `num_outs` maps (B, out_channels, H_i, W_i)."""
        check_features(features, self.in_channels)
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, features[self.start_level :], strict=True)]
        for conv in self.extra_convs:
            laterals.append(halve(conv(laterals[-1])))
        outs = self.revfp(laterals)
        return tuple(outs if self.csn is None else self.csn(outs))


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a map (B, C, H, W) bilinearly."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def pool(x: Tensor, size: Sequence[int], halvings: int) -> Tensor:
    """Take the maxima of a map (B, C, H, W) in as many windows as `size` says, of a level `halvings` steps coarser."""
    if not is_exporting():
        return F.adaptive_max_pool2d(x, size)
    # The operator fixes the exported sizes. No window is as long as two sides of a pixel of that level.
    for dim, number in zip((2, 3), size, strict=True):
        i, side = torch.arange(number, device=x.device), x.shape[dim]
        start, last = i * side // number, ((i + 1) * side + number - 1) // number - 1
        taps = (torch.minimum(start + k, last) for k in range(2 ** (halvings + 1)))
        x = functools.reduce(torch.maximum, (x.index_select(dim, tap) for tap in taps))
    return x


class RevFP(nn.Module):
    """Reverse feature pyramid: local bidirectional fusion, from the finest level to the coarsest.

    Args:
        channels: The width of all levels.
        num_levels: Their number, two or more.
        norm: See `RCNet`.
        deform: See `RCNet`.
    """

    def __init__(self, channels: int, num_levels: int = 5, norm: str | None = "bn", deform: bool = True):
        super().__init__()
        if num_levels < 2:
            raise ValueError(f"num_outs: got {num_levels}, expected 2 or more: levels are fused with their neighbours")
        self.nodes = nn.ModuleList(
            FusionNode(channels, i < num_levels - 1, i > 0, norm, deform) for i in range(num_levels)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Take maps (B, channels, H_i, W_i), finest first, to maps of the same shapes."""
        outs = []
        for i, (node, x) in enumerate(zip(self.nodes, features, strict=True)):
            outs.append(node(x, features[i + 1] if node.coarser else None, outs[-1] if node.finer else None))
        return outs


class FusionNode(nn.Module):
    """Fuses a level with the coarser and the finer one, weighted by two gates that see all their pixels.

    The coarser level is enlarged, and weighted at each position by a softmax over the positions.
    """

    def __init__(self, channels: int, coarser: bool, finer: bool, norm: str | None, deform: bool):
        super().__init__()
        self.coarser = coarser
        self.finer = finer
        self.weight = nn.ModuleList(nn.Conv2d(2 * channels, 1, 1) for _ in range(coarser + finer))
        if coarser:
            # The published biases of what a softmax takes do nothing.
            self.spatial_weight = nn.Conv2d(2 * channels, 1, 3, padding=1, bias=False)
            nn.init.zeros_(self.spatial_weight.weight)
            self.temp = nn.Parameter(torch.ones(1))
            self.scale = channels**-0.5
        for conv in self.weight:
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.pre_fusion = FusionConv(channels, norm, deform) if coarser and finer else None
        self.post_fusion = FusionConv(channels, norm, deform)

    def forward(self, x: Tensor, coarser: Tensor | None, finer: Tensor | None) -> Tensor:
        """Take maps (B, C, ...), the neighbours that the node was built for, to one of the size of `x`."""
        if self.coarser:
            other = enlarge(coarser, x.shape[2:])
            logits = self.temp * self.scale * self.spatial_weight(torch.cat([x, other], 1))
            x = gate(self.weight[0], x, other, spatial_weights(logits))
        if self.pre_fusion is not None:
            x = self.pre_fusion(x)
        if self.finer:
            x = gate(self.weight[-1], x, crop_to(halve(finer), x))
        return self.post_fusion(x)


def gate(conv: nn.Conv2d, x: Tensor, other: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mix two maps in the ratio that `conv` gives for their means; `weight` multiplies the other one after that."""
    means = torch.cat([x.mean((2, 3), keepdim=True), other.mean((2, 3), keepdim=True)], 1)
    ratio = conv(means).sigmoid()
    return ratio * x + (1 - ratio) * (weight * other)


def spatial_weights(logits: Tensor) -> Tensor:
    """Take logits (B, 1, H, W) to weights that are 1 on average over the positions."""
    weights = logits.flatten(2).softmax(2)
    return (weights * weights.shape[2]).unflatten(2, logits.shape[2:])


class FusionConv(nn.Module):
    """ReLU, a 3x3 convolution, modulated deformable with two groups or plain, and its norm."""

    def __init__(self, channels: int, norm: str | None, deform: bool):
        super().__init__()
        if deform and channels % 2:
            raise ValueError(f"out_channels: got {channels}, expected an even number, for two deformable groups")
        layers = conv_norm(channels, channels, 3, norm=norm)
        self.conv = layers.conv
        self.norm = layers.get_submodule(norm) if norm else nn.Identity()
        self.conv_offset = nn.Conv2d(channels, 2 * 3 * 9, 3, padding=1) if deform else None
        if deform:
            nn.init.zeros_(self.conv_offset.weight)
            nn.init.zeros_(self.conv_offset.bias)
        else:
            nn.init.xavier_uniform_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        x = x.relu()
        if self.conv_offset is None:
            return self.norm(self.conv(x))
        offset, mask = self.conv_offset(x).split([36, 18], 1)
        x = deform_conv2d(x, offset, self.conv.weight, self.conv.bias, padding=1, mask=mask.sigmoid())
        return self.norm(x)


class CrossScaleShift(nn.Module):
    """Cross-scale shift network (CSN): levels of one size exchange channels; two contexts of all levels are added.

    Args:
        channels: The width of all levels, 16 or more: a sixteenth goes each way.
        num_levels: Their number, three or more.
        norm: See `RCNet`.
    """

    def __init__(self, channels: int, num_levels: int = 5, norm: str | None = "bn"):
        super().__init__()
        if num_levels < 3:
            raise ValueError(f"num_outs: got {num_levels}, expected 3 or more, as levels two apart exchange channels")
        self.part = channels // 16
        if not self.part:
            raise ValueError(f"out_channels: got {channels}, expected 16 or more, a sixteenth of which is shifted")
        self.aggregation = nn.ModuleList(
            nn.Sequential(
                conv_norm(channels + 4 * self.part, channels, 1, norm=norm, act=nn.ReLU()),
                nn.Conv2d(channels, channels, 1),
            )
            for _ in range(num_levels)
        )
        self.spatial_context = Context(channels)
        self.scale_context = Context(channels)
        init_xavier(self)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Take maps (B, channels, H_i, W_i), finest first, to maps of the same shapes."""
        size = features[1].shape[2:]
        finest = pool(features[0], size, 1)
        # (B, levels, C, H, W)
        x = torch.stack([finest, *(enlarge(f, size) for f in features[1:])], 1)
        joined = torch.cat([self.shift(x), x], 2)
        x = x + torch.stack([conv(joined[:, i]) for i, conv in enumerate(self.aggregation)], 1)
        context = self.spatial_context(x.mean(1)) + self.scale_context(x.mean((3, 4)).mT.unsqueeze(3))
        levels = (x + context.unsqueeze(1)).unbind(1)
        outs = [features[0] + enlarge(levels[0], features[0].shape[2:])]
        for i, (f, level) in enumerate(zip(features[1:], levels[1:], strict=True)):
            outs.append(f + pool(level, f.shape[2:], i))
        return outs

    def shift(self, x: Tensor) -> Tensor:
        """Return four sixteenths of the channels, of the next level, the one before, and those two apart, in a ring."""
        parts = x[:, :, : 4 * self.part].split(self.part, 2)
        return torch.cat([part.roll(by, 1) for part, by in zip(parts, (-1, 1, -2, 2), strict=True)], 2)


class Context(nn.Module):
    """Global context: a mean over the positions, weighted by a softmax over them, and a 1x1 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.channel_agg = nn.Conv2d(channels, 1, 1, bias=False)
        self.trans = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to (B, C, 1, 1)."""
        return self.trans((x * spatial_weights(self.channel_agg(x))).mean((2, 3), keepdim=True))
