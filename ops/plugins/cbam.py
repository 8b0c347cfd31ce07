"""Convolutional block attention module."""

from collections import OrderedDict

from densezoo.ops.plugins.parts import init_as_published, map_conv, max_mean, reduced
from torch import Tensor, nn


class CBAM(nn.Module):
    """CBAM (arXiv 1807.06521): scales each channel, then each position, by a function of maxima and means.

    Args:
        channels: C.
        reduction: The channel gate's two linear layers meet at C / reduction; a divisor of C.
        kernel_size: Of the spatial gate's convolution, an odd number.

    Raises:
        ValueError: `reduction` does not divide `channels`, or `kernel_size` is not odd.
    """

    def __init__(self, channels: int, reduction: int = 16, kernel_size: int = 7, *, device=None, dtype=None):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        hidden = reduced(channels, reduction)
        mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, hidden, **factory), nn.ReLU(), nn.Linear(hidden, channels, **factory)
        )
        self.ChannelGate = nn.Sequential(OrderedDict(mlp=mlp))
        self.SpatialGate = nn.Sequential(OrderedDict(spatial=map_conv(kernel_size, **factory)))
        self.init_weights()

    def init_weights(self) -> None:
        """Start as the released network: the spatial gate is 1/2 everywhere."""
        init_as_published(self)
        nn.init.zeros_(self.SpatialGate.spatial.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        weight = (self.ChannelGate(x.mean((2, 3))) + self.ChannelGate(x.amax((2, 3)))).sigmoid()
        x = x * weight[..., None, None]
        return x * self.SpatialGate(max_mean(x, 1)).sigmoid()
