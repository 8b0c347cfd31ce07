"""Convolutional block attention module."""

from collections import OrderedDict

import torch
from densezoo.ops.backend import takes_triton
from densezoo.ops.plugins.parts import init_as_published, map_conv, map_gates, map_unsupported, max_mean, reduced
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

    def init_weights(self, **_) -> None:  # timm passes what concerns its own blocks
        """Start as the released network: the spatial gate is 1/2 everywhere."""
        init_as_published(self)
        nn.init.zeros_(self.SpatialGate.spatial.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        if takes_triton("cbam", x, map_unsupported, x):
            from densezoo.ops.plugins.cbam_kernels import gate_twice_triton

            return gate_twice_triton(x, self._channel_gate, self._position_gate)
        pooled = torch.stack([x.amax((2, 3)), x.mean((2, 3))], 1)
        x = x * self._channel_gate(pooled)[..., None, None]
        return x * self._position_gate(max_mean(x, 1))

    def _channel_gate(self, pooled: Tensor) -> Tensor:
        """Take maxima and means over H and W (B, 2, C) to (B, C)."""
        return self.ChannelGate(pooled.flatten(0, 1)).unflatten(0, (-1, 2)).sum(1).sigmoid()

    def _position_gate(self, pooled: Tensor) -> Tensor:
        """Take maxima and means over C (B, 2, H, W) to (B, 1, H, W)."""
        return map_gates([self.SpatialGate.spatial], [pooled])[0]
