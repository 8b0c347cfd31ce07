"""Squeeze-and-Excitation."""

from densezoo.ops.plugins.parts import squeeze_mlp
from torch import Tensor, nn


class SE(nn.Module):
    """Squeeze-and-Excitation (arXiv 1709.01507): scales each channel by a function of all channels' means.

    Args:
        channels: C.
        reduction: The two linear layers meet at C / reduction; a divisor of C.

    Raises:
        ValueError: `reduction` does not divide `channels`.
    """

    def __init__(self, channels: int, reduction: int = 16, *, device=None, dtype=None):
        super().__init__()
        self.fc = squeeze_mlp(channels, reduction, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        return x * self.fc(x.mean((2, 3)))[..., None, None]
