"""Feature pyramid network and its path aggregation."""

from collections.abc import Sequence

import torch.nn.functional as F
from densezoo.necks.parts import check_levels, conv_norm, crop_to, init_xavier, subsample
from densezoo.ops.shapes import check_features, check_widths, positive
from torch import Tensor, nn

SOURCES = ("on_input", "on_lateral", "on_output")


class FPN(nn.Module):
    """FPN (arXiv 1612.03144): adds each coarser level, enlarged, to the one below it; one width for all.

    Parameters are named as in mmdet, whose detectors' checkpoints fit, and the outputs are mmdet's.

    Args:
        in_channels: The widths of the inputs, finest first.
        out_channels: The width of all outputs.
        num_outs: Levels of the output; those beyond the inputs are half the size each. As many as inputs by default.
        start_level: The first of the inputs that is used.
        add_extra_convs: How further levels come about: from the coarsest output by subsampling (False, as in Faster
            R-CNN), or by strided convolutions (as in RetinaNet) that begin 'on_input' (or True), on the last input,
            'on_lateral', on its lateral map, or 'on_output', on the last output.
        relu_before_extra_convs: Whether the second of these convolutions and further ones take what is positive.
        norm: 'bn' or 'gn' (of 32 groups) after every convolution, which then has no bias.

    Raises:
        ValueError: An argument is out of its range; says what the range is.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_outs: int | None = None,
        start_level: int = 0,
        add_extra_convs: bool | str = False,
        relu_before_extra_convs: bool = False,
        norm: str | None = None,
    ):
        super().__init__()
        self.in_channels = check_widths(in_channels)
        self.num_outs = check_levels(len(self.in_channels), num_outs, start_level)
        self.start_level = start_level
        self.add_extra_convs = "on_input" if add_extra_convs is True else add_extra_convs
        if self.add_extra_convs not in (False, *SOURCES):
            raise ValueError(f"add_extra_convs: got {add_extra_convs!r}, expected False, True or one of {SOURCES}")
        self.relu_before_extra_convs = relu_before_extra_convs
        self.out_channels = positive("out_channels", out_channels)
        self.norm = norm
        widths = self.in_channels[start_level:]
        self.lateral_convs = nn.ModuleList(conv_norm(width, out_channels, 1, norm=norm) for width in widths)
        self.fpn_convs = nn.ModuleList(conv_norm(out_channels, out_channels, 3, norm=norm) for _ in widths)
        if self.add_extra_convs:
            for i in range(len(widths), self.num_outs):
                first = i == len(widths) and self.add_extra_convs == "on_input"
                self.fpn_convs.append(conv_norm(widths[-1] if first else out_channels, out_channels, 3, 2, norm))
        init_xavier(self)

    def aggregate(self, outs: list[Tensor]) -> list[Tensor]:
        """Take the outputs of the top-down path to those of the neck."""
        return outs

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Take maps (B, in_channels[i], H_i, W_i) to `num_outs` maps (B, out_channels, H_i, W_i)."""
        check_features(features, self.in_channels)
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, features[self.start_level :], strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:])
        outs = self.aggregate([conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)])
        if not self.add_extra_convs:
            while len(outs) < self.num_outs:
                outs.append(subsample(outs[-1]))
            return tuple(outs)
        x = {"on_input": features[-1], "on_lateral": laterals[-1], "on_output": outs[-1]}[self.add_extra_convs]
        for conv in self.fpn_convs[len(laterals) :]:
            outs.append(conv(x))
            x = outs[-1].relu() if self.relu_before_extra_convs else outs[-1]
        return tuple(outs)


class PAFPN(FPN):
    """PANet's FPN (arXiv 1803.01534): after the top-down path, one from the bottom up; arguments as for `FPN`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        out_channels, norm = self.out_channels, self.norm
        steps = range(len(self.lateral_convs) - 1)
        self.downsample_convs = nn.ModuleList(conv_norm(out_channels, out_channels, 3, 2, norm) for _ in steps)
        self.pafpn_convs = nn.ModuleList(conv_norm(out_channels, out_channels, 3, norm=norm) for _ in steps)
        init_xavier(self.downsample_convs)
        init_xavier(self.pafpn_convs)

    def aggregate(self, outs: list[Tensor]) -> list[Tensor]:
        """Add each finer level, halved, to the one above it."""
        paths = [outs[0]]
        for x, conv in zip(outs[1:], self.downsample_convs, strict=True):
            paths.append(x + crop_to(conv(paths[-1]), x))
        return paths[:1] + [conv(x) for conv, x in zip(self.pafpn_convs, paths[1:], strict=True)]
