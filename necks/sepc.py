"""Scale-equalizing pyramid convolution."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from densezoo.necks.parts import crop_to, deform_conv2d
from densezoo.ops.shapes import check_features, check_widths, positive
from torch import Tensor, nn


class SEPC(nn.Module):
    """SEPC (arXiv 2005.03101): convolutions over space and levels in place of a one-stage detector's two towers.

    A pyramid convolution holds three 3x3 convolutions that all levels share: each level takes one from itself, one of
    stride 2 from the finer level and one, enlarged, from the coarser level. After `num_pconvs` of them, one convolution
    each makes the features of classes and boxes. These two have no padding, as published: every output is two pixels
    smaller in each axis than its level. (Levels smaller than 3x3 are padded to that.)

    Published forms: Pconv (none of the options), iBN (`ibn`), SEPC-lite (`ibn` and `lcconv_deform`) and SEPC (all).
    Parameters are named as in the published code (github.com/jshilong/SEPC).

    Args:
        in_channels: The widths of the levels, finest first, all the same: it follows an FPN.
        out_channels: The width of all outputs.
        num_pconvs: Pyramid convolutions.
        pconv_deform: Whether the pyramid convolutions deform, to equalize the scales of the levels. The finest level
            always takes the convolutions as they are.
        lcconv_deform: Whether the last two convolutions deform.
        ibn: Whether a batch norm whose statistics are those of all levels together follows each convolution; it wants
            four images a GPU or more.

    Raises:
        ValueError: The levels differ in width, or an argument is not positive.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (256,) * 5,
        out_channels: int = 256,
        num_pconvs: int = 4,
        pconv_deform: bool = False,
        lcconv_deform: bool = False,
        ibn: bool = False,
    ):
        super().__init__()
        self.in_channels = check_widths(in_channels)
        if len(set(self.in_channels)) > 1:
            raise ValueError(
                f"in_channels: got {self.in_channels}, expected one width at all levels, which share the convolutions; "
                "put an FPN before"
            )
        positive("out_channels", out_channels)
        widths = [self.in_channels[0]] + [out_channels] * positive("num_pconvs", num_pconvs)
        self.Pconvs = nn.ModuleList(
            PyramidConv(width, out_channels, pconv_deform, ibn) for width in widths[:num_pconvs]
        )
        self.lconv = SharedConv(out_channels, out_channels, padding=0, deform=lcconv_deform)
        self.cconv = SharedConv(out_channels, out_channels, padding=0, deform=lcconv_deform)
        self.lbn = nn.BatchNorm2d(out_channels) if ibn else None
        self.cbn = nn.BatchNorm2d(out_channels) if ibn else None

    def forward(self, features: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
        """Take maps (B, in_channels[i], H_i, W_i) to a pair a level of maps (B, out_channels, H_i - 2, W_i - 2).

        The first of a pair is for the classes, the second for the boxes.
        """
        check_features(features, self.in_channels)
        for pconv in self.Pconvs:
            features = pconv(features)
        features = [pad_to_kernel(x) for x in features]
        classes = [self.cconv(x, level) for level, x in enumerate(features)]
        boxes = [self.lconv(x, level) for level, x in enumerate(features)]
        return tuple(zip(norm_act(classes, self.cbn), norm_act(boxes, self.lbn), strict=True))


class PyramidConv(nn.Module):
    """A convolution over space and levels, its integrated batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, deform: bool, ibn: bool):
        super().__init__()
        # from the coarser level, from the level itself, from the finer level
        self.Pconv = nn.ModuleList(SharedConv(in_channels, out_channels, stride, 1, deform) for stride in (1, 1, 2))
        self.bn = nn.BatchNorm2d(out_channels) if ibn else None

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Take maps (B, in_channels, H_i, W_i) to maps of their sizes."""
        coarser, same, finer = self.Pconv
        outs = []
        for level, x in enumerate(features):
            out = same(x, level)
            if level > 0:
                out = out + crop_to(finer(features[level - 1], level), out)
            if level < len(features) - 1:
                above = coarser(features[level + 1], level)
                out = out + F.interpolate(above, size=out.shape[2:], mode="bilinear", align_corners=True)
            outs.append(out)
        return norm_act(outs, self.bn)


class SharedConv(nn.Conv2d):
    """A 3x3 convolution shared by the levels, deformable (arXiv 1703.06211) for all but the finest."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, padding: int = 1, deform: bool = False):
        super().__init__(in_channels, out_channels, 3, stride, padding)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)
        self.conv_offset = nn.Conv2d(in_channels, 18, 3, stride, padding) if deform else None
        if deform:
            nn.init.zeros_(self.conv_offset.weight)
            nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor, level: int) -> Tensor:
        """Take a map (B, in_channels, H, W), for an output on `level`."""
        if level == 0 or self.conv_offset is None:
            return super().forward(x)
        offset = self.conv_offset(x)
        return deform_conv2d(x, offset, self.weight, self.bias, stride=self.stride, padding=self.padding)


def norm_act(features: Sequence[Tensor], norm: nn.BatchNorm2d | None) -> list[Tensor]:
    """Apply one batch norm, if any, to the pixels of all levels together, then ReLU."""
    if norm is not None and not norm.training:
        # pixels do not count then
        features = [norm(x) for x in features]
    elif norm is not None:
        sizes = [x.shape[2:] for x in features]
        joined = norm(torch.cat([x.flatten(2) for x in features], 2).unsqueeze(2)).squeeze(2)
        parts = joined.split([height * width for height, width in sizes], 2)
        features = [x.unflatten(2, size) for x, size in zip(parts, sizes, strict=True)]
    return [x.relu() for x in features]


def pad_to_kernel(x: Tensor) -> Tensor:
    """Zero-pad a map at the bottom and right to 3x3 at least."""
    height, width = (torch.sym_max(3 - size, 0) for size in x.shape[2:])
    return F.pad(x, (0, width, 0, height))
