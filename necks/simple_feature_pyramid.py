"""Simple feature pyramid for backbones of a single scale."""

from collections.abc import Sequence

from densezoo.necks.parts import halve, subsample
from densezoo.ops.shapes import check_features, check_widths, positive
from timm.layers import LayerNorm2d
from torch import Tensor, nn

SCALES = (4, 2, 1, 0.5)


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's simple feature pyramid (arXiv 2203.16527): every level from one map, the backbone's last.

    The map is enlarged by transposed convolutions of stride 2, which halve its width, or pooled; then a 1x1 and a 3x3
    convolution, each with a LayerNorm over the channels, give the level. From a map of stride 16 the default scales
    make levels of strides 4, 8, 16 and 32.

    Args:
        in_channels: The map's width, or a list of that one width, as of a single-scale backbone's
            `feature_info.channels()`.
        out_channels: The width of all outputs.
        scales: Sizes of the levels relative to the map, of 4, 2, 1 and 0.5, finest first.
        num_outs: Levels of the output; those beyond `scales` subsample the coarsest one. As many as scales by default.

    Raises:
        ValueError: An argument is out of its range, or `in_channels` does not divide by a scale.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int = 256,
        scales: Sequence[float] = SCALES,
        num_outs: int | None = None,
    ):
        super().__init__()
        widths = [in_channels] if isinstance(in_channels, int) else check_widths(in_channels)
        if len(widths) != 1:
            raise ValueError(f"in_channels: got {widths}, expected one width: all levels come from one map")
        self.in_channels = [positive("in_channels", widths[0])]
        known = set(scales) if isinstance(scales, Sequence) else set()
        if not known or not known <= set(SCALES) or sorted(known, reverse=True) != list(scales):
            raise ValueError(f"scales: got {scales!r}, expected some of {SCALES} in this order")
        if int(scales[0]) and widths[0] % int(scales[0]):
            raise ValueError(
                f"in_channels: got {widths[0]}, expected a multiple of {scales[0]}, by which the finest level's width "
                "is divided"
            )
        self.num_outs = len(scales) if num_outs is None else positive("num_outs", num_outs)
        if self.num_outs < len(scales):
            raise ValueError(f"num_outs: got {num_outs}, expected {len(scales)} or more, as there are scales")
        self.levels = nn.ModuleList(level(widths[0], positive("out_channels", out_channels), s) for s in scales)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Take one map [(B, in_channels, H, W)] to maps (B, out_channels, scale * H, scale * W), rounded up."""
        check_features(features, self.in_channels)
        outs = [level(features[0]) for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(subsample(outs[-1]))
        return tuple(outs)


class Halve(nn.Module):
    """Max pooling that rounds the size up."""

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to half the height and width."""
        return halve(x)


def level(in_channels: int, out_channels: int, scale: float) -> nn.Sequential:
    """Return what makes the level of one scale."""
    layers, width = [], in_channels
    if scale == 0.5:
        layers.append(Halve())
    for enlarged in (2, 4)[: int(scale) // 2]:
        if enlarged == 4:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width //= 2
    layers += [nn.Conv2d(width, out_channels, 1, bias=False), LayerNorm2d(out_channels)]
    layers += [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels)]
    return nn.Sequential(*layers)
