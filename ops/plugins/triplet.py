"""Triplet attention."""

from collections import OrderedDict

from densezoo.ops.backend import takes_triton
from densezoo.ops.plugins.parts import map_conv, map_gates, map_unsupported, max_mean
from densezoo.ops.shapes import positive
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
        if takes_triton("triplet", x, map_unsupported, x):
            from densezoo.ops.plugins.axes import gate_axes_triton

            return gate_axes_triton(x, self._gates)
        hw, cw, ch = self._gates(*(max_mean(x, dim) for dim in (1, 2, 3)))
        return x * (hw + cw.transpose(1, 2) + ch[:, 0, ..., None])

    def _gates(self, over_c: Tensor, over_h: Tensor, over_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take maxima and means over C, H and W to gates: (B, 2, H, W) to (B, 1, H, W), and so on."""
        # A third of each while they are small.
        gates = [gate.conv for gate in (self.hw, self.cw, self.hc)]
        hw, cw, hc = map_gates(gates, (over_c, over_h, over_w.mT), 1 / 3)
        return hw, cw, hc.mT
