"""Switchable atrous convolution of DetectoRS."""

import torch.nn.functional as F
from densezoo.necks.parts import deform_conv2d
from densezoo.ops.backend import is_exporting
from densezoo.ops.shapes import positive
from torch import Tensor, nn


class SAC(nn.Conv2d):
    """Switchable atrous convolution (arXiv 2006.02334): a 3x3 convolution at one and at three times its dilation.

    A switch at every position, from the 5x5 pixels around it, mixes the two, whose weights differ by `weight_diff`;
    before and after, what a 1x1 convolution makes of the map's mean is added. Weights are standardized, then scaled
    and shifted by `weight_gamma` and `weight_beta`, which `use_sac` takes from pretrained weights.

    Parameters are named, and outputs are, as in mmcv's `SAC`; but a bias is added, which there is left out. It starts
    as the convolution that it takes the place of. Maps have 3x3 pixels at least.

    Args:
        in_channels: The width of the input.
        out_channels: The width of the output.
        stride: As in `nn.Conv2d`.
        dilation: The smaller one; the padding is the same, so that the stride alone changes the size.
        bias: As in `nn.Conv2d`.
        use_deform: Whether both convolutions deform (arXiv 1703.06211).

    Raises:
        ValueError: A width or the dilation is not positive, or a map is smaller than 3x3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        use_deform: bool = False,
    ):
        positive("in_channels", in_channels)
        positive("out_channels", out_channels)
        positive("dilation", dilation)
        super().__init__(in_channels, out_channels, 3, stride, dilation, dilation, bias=bias)
        self.use_deform = use_deform
        self.register_buffer("weight_gamma", self.weight.new_ones(out_channels, 1, 1, 1))
        self.register_buffer("weight_beta", self.weight.new_zeros(out_channels, 1, 1, 1))
        self.weight_diff = nn.Parameter(self.weight.new_zeros(self.weight.shape))
        self.switch = nn.Conv2d(in_channels, 1, 1, stride)
        self.pre_context = nn.Conv2d(in_channels, in_channels, 1)
        self.post_context = nn.Conv2d(out_channels, out_channels, 1)
        others = [self.switch, self.pre_context, self.post_context]
        if use_deform:
            self.offset_s = nn.Conv2d(in_channels, 18, 3, stride, 1)
            self.offset_l = nn.Conv2d(in_channels, 18, 3, stride, 1)
            others += [self.offset_s, self.offset_l]
        for conv in others:
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)
        # at one: all of the smaller dilation
        nn.init.ones_(self.switch.bias)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return the standard deviation and the mean of each output's weights (out_channels, 1, 1, 1)."""
        flat = self.weight.flatten(1)
        std, mean = (flat.var(1) + 1e-5).sqrt(), flat.mean(1)
        return std.view(-1, 1, 1, 1), mean.view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        # Asked of a graph to export it would limit the sizes that the graph serves.
        if not is_exporting() and min(x.shape[2:]) < 3:
            raise ValueError(f"x: got a map of {tuple(x.shape[2:])}, expected 3x3 pixels at least")
        x = x + self.pre_context(x.mean((2, 3), keepdim=True))
        around = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
        switch = self.switch(around)
        std, mean = self.statistics()
        weight = self.weight_gamma * (self.weight - mean) / std + self.weight_beta
        small, large = (self.offset_s(around), self.offset_l(around)) if self.use_deform else (None, None)
        out = switch * self.convolve(x, weight, 1, small)
        out = out + (1 - switch) * self.convolve(x, weight + self.weight_diff, 3, large)
        if self.bias is not None:
            out = out + self.bias.view(-1, 1, 1)
        return out + self.post_context(out.mean((2, 3), keepdim=True))

    def convolve(self, x: Tensor, weight: Tensor, factor: int, offset: Tensor | None) -> Tensor:
        """Convolve at `factor` times the dilation, deformed by `offset` if there is one."""
        dilation = tuple(factor * d for d in self.dilation)
        if offset is None:
            return F.conv2d(x, weight, None, self.stride, dilation, dilation)
        return deform_conv2d(x, offset, weight, None, stride=self.stride, padding=dilation, dilation=dilation)


def use_sac(model: nn.Module, use_deform: bool = True) -> int:
    """Put `SAC` in the place of every 3x3 convolution of one group below a module, with its weights; return how many.

    The published networks do so in all stages but the first, after pretrained weights are loaded: then the model
    computes what it did before.
    """
    count = 0
    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            # not those within a SAC, nor what extends a convolution
            if type(conv) is not nn.Conv2d or isinstance(parent, SAC) or conv.kernel_size != (3, 3) or conv.groups != 1:
                continue
            if conv.padding != conv.dilation or conv.dilation[0] != conv.dilation[1]:
                continue
            sac = SAC(
                conv.in_channels, conv.out_channels, conv.stride, conv.dilation[0], conv.bias is not None, use_deform
            )
            sac.load_state_dict(conv.state_dict(), strict=False)
            sac.to(conv.weight.device, conv.weight.dtype).train(conv.training)
            gamma, beta = sac.statistics()
            sac.weight_gamma.copy_(gamma.detach())
            sac.weight_beta.copy_(beta.detach())
            setattr(parent, name, sac)
            count += 1
    return count
