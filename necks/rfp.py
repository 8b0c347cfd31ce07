"""Recursive feature pyramid of DetectoRS."""

from collections.abc import Sequence

import torch
from densezoo.necks.fpn import FPN
from densezoo.ops.shapes import positive
from torch import Tensor, nn


class RFP(FPN):
    """Recursive feature pyramid (arXiv 2006.02334): an FPN whose outputs go through a second backbone once more.

    The first pyramid's levels but the finest, each through ASPP and a 1x1 convolution that starts at zero, are added in
    the second backbone after the first block of their stage. The same FPN takes its outputs; the second pyramid and the
    first are mixed by gates.

    The second backbone is any of this zoo with stages, under timm (`features_only=True`) or OpenMMLab; `use_sac` gives
    both backbones DetectoRS' convolutions. For mmdet's ResNet there is mmdet's `RFP`, the same network on a ResNet
    (where a ReLU follows the addition).

    Args:
        in_channels: The widths of the levels, finest first, two at least.
        rfp_backbone: The second backbone: takes images (B, C, H, W) to maps of the widths of `in_channels`.
        out_channels: The width of all outputs.
        num_outs: As in `FPN`.
        aspp_out_channels: The width of each of the ASPP's branches.
        aspp_dilations: The dilations of its 3x3 convolutions; 1 is a 1x1 convolution, the last one of the map's mean.
        kwargs: Other arguments of `FPN`.

    Raises:
        ValueError: An argument is out of its range, or `rfp_backbone` has other stages or takes nothing in.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        rfp_backbone: nn.Module,
        out_channels: int = 256,
        num_outs: int | None = None,
        aspp_out_channels: int = 64,
        aspp_dilations: Sequence[int] = (1, 3, 6, 1),
        **kwargs,
    ):
        super().__init__(in_channels, out_channels, num_outs, **kwargs)
        # The finest level of the backbone takes nothing in.
        self.first_level = max(self.start_level, 1)
        widths = self.in_channels[self.first_level :]
        if not widths:
            raise ValueError(f"in_channels: got {self.in_channels}, expected two levels or more")
        stages = stages_of(rfp_backbone, self.in_channels)[self.first_level :]
        # As a list they are no further children.
        self.stages = list(stages)
        self.rfp_modules = nn.ModuleList([rfp_backbone])
        self.rfp_aspp = ASPP(out_channels, aspp_out_channels, aspp_dilations)
        self.rfp_convs = nn.ModuleList(nn.Conv2d(len(aspp_dilations) * aspp_out_channels, width, 1) for width in widths)
        self.rfp_weight = nn.Conv2d(out_channels, 1, 1)
        self.channels_last = getattr(rfp_backbone, "model", rfp_backbone).output_fmt == "NHWC"
        for conv in (*self.rfp_convs, self.rfp_weight):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Take the images (B, C, H, W) and their maps (B, in_channels[i], H_i, W_i) to `num_outs` maps."""
        images, *maps = features
        first = super().forward(maps)
        levels = first[self.first_level - self.start_level :]
        try:
            for stage, conv, x in zip(self.stages, self.rfp_convs, levels, strict=False):
                feedback = conv(self.rfp_aspp(x))
                stage.feedback = feedback.permute(0, 2, 3, 1) if self.channels_last else feedback
            maps = self.rfp_modules[0](images)
        finally:
            for stage in self.stages:
                stage.feedback = None
        second = super().forward(maps)
        return tuple(torch.lerp(a, b, self.rfp_weight(b).sigmoid()) for a, b in zip(first, second, strict=True))


def stages_of(backbone: nn.Module, in_channels: Sequence[int]) -> list[nn.Module]:
    """Return what holds the blocks of each stage that a backbone of this zoo returns, with a place for `feedback`.

    Raises:
        ValueError: It is none, or returns maps of other widths.
    """
    model = getattr(backbone, "model", backbone)
    is_zoos = hasattr(model, "feature_info") and hasattr(backbone, "out_indices")
    info = [model.feature_info[i] for i in backbone.out_indices] if is_zoos else []
    stages = []
    for stage in info:
        stages += [m for m in model.get_submodule(stage["module"]).modules() if hasattr(m, "feedback")][:1]
    if not stages or len(stages) < len(info):
        raise ValueError(
            f"rfp_backbone: {type(model).__name__} takes no feedback; expected a backbone of densezoo that returns "
            "the maps of its stages (mmdet has its own RFP for its DetectoRS_ResNet)"
        )
    widths = [stage["num_chs"] for stage in info]
    if widths != list(in_channels):
        raise ValueError(f"rfp_backbone: returns maps of {widths} channels, expected in_channels {list(in_channels)}")
    return stages


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: dilated convolutions side by side, and one of the map's mean."""

    def __init__(self, in_channels: int, out_channels: int, dilations: Sequence[int]):
        super().__init__()
        positive("aspp_out_channels", out_channels)
        if not dilations or dilations[-1] != 1:
            raise ValueError(f"aspp_dilations: got {dilations!r}, expected a last one of 1: it sees the map's mean")
        self.aspp = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, 3, padding=d, dilation=d)
            if positive("aspp_dilations", d) > 1
            else nn.Conv2d(in_channels, out_channels, 1)
            for d in dilations
        )
        for conv in self.aspp:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, in_channels, H, W) to (B, branches * out_channels, H, W)."""
        *branches, pooled = self.aspp
        mean = pooled(x.mean((2, 3), keepdim=True)).relu().expand(-1, -1, *x.shape[2:])
        return torch.cat([conv(x).relu() for conv in branches] + [mean], 1)
