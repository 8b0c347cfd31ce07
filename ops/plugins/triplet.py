"""Triplet attention."""

from collections import OrderedDict

from densezoo.ops.plugins.parts import map_conv, max_mean, positive
from torch import Tensor, nn


class Triplet(nn.Module):
    """Triplet attention (arXiv 2010.03045): the mean of three gates, one on each pair of the axes C, H and W.

    A gate is made of the maxima and means over the third axis; with `kernel_size` 7 it has 98 weights and a norm,
    whatever the number of channels.

    Args:
        channels: C; any number.
        kernel_size: Of the three convolutions, an odd number.

    Raises:
        ValueError: `channels` is no positive integer or `kernel_size` no odd one.
    """

    def __init__(self, channels: int, kernel_size: int = 7, *, device=None, dtype=None):
        super().__init__()
        positive("channels", channels)
        # The names say on which axes the convolution runs.
        for name in ("cw", "hc", "hw"):
            conv = map_conv(kernel_size, device=device, dtype=dtype)
            self.add_module(name, nn.Sequential(OrderedDict(conv=conv)))

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        # A third of each while they are small.
        cw = self.cw(max_mean(x, 2)).sigmoid() / 3  # (B, 1, C, W)
        hc = self.hc(max_mean(x, 3).transpose(2, 3)).sigmoid() / 3  # (B, 1, H, C)
        hw = self.hw(max_mean(x, 1)).sigmoid() / 3  # (B, 1, H, W)
        return x * (cw.transpose(1, 2) + hc.permute(0, 3, 2, 1) + hw)
