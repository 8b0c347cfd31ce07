"""Deformable attention to capture salient information."""

import torch
from densezoo.ops.plugins.parts import odd
from densezoo.ops.shapes import positive
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DAS(nn.Module):
    """DAS (arXiv 2311.12091): scales each position and channel by a deformable convolution of a narrower map.

    The paper has one after each stage of a network. Made from its formulas: no code was published with it.

    Args:
        channels: C.
        ratio: Width of the narrower map as a fraction of C, above 0 and up to 1; rounded down, but 1 at least.
        kernel_size: Of both convolutions over positions, an odd number.

    Raises:
        ValueError: An argument is out of its range; says what the range is.
    """

    def __init__(self, channels: int, ratio: float = 0.2, kernel_size: int = 3, *, device=None, dtype=None):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        positive("channels", channels)
        if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ValueError(f"ratio: got {ratio!r}, expected a number above 0 and up to 1")
        self.padding, hidden = odd("kernel_size", kernel_size) // 2, max(1, int(channels * ratio))
        self.depthwise = nn.Conv2d(
            channels, channels, kernel_size, padding=self.padding, groups=channels, bias=False, **factory
        )
        self.pointwise = nn.Conv2d(channels, hidden, 1, bias=False, **factory)
        # Of each tap: how far to look, down and right, and how much it counts.
        self.offset = nn.Conv2d(hidden, 3 * kernel_size**2, kernel_size, padding=self.padding, **factory)
        self.deform = nn.Conv2d(hidden, channels, kernel_size, padding=self.padding, **factory)
        self.norm = nn.LayerNorm(channels, **factory)
        self.init_weights()

    def init_weights(self, **_) -> None:  # timm passes what concerns its own blocks
        """Start with taps that look nowhere else."""
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        y = self.pointwise(self.depthwise(x))
        # An instance norm, which torch's own refuses on a single position.
        var, mean = torch.var_mean(y.float() if y.dtype.itemsize < 4 else y, (2, 3), correction=0, keepdim=True)
        y = nn.functional.gelu((y - mean) * (var + 1e-5).rsqrt())
        taps = self.deform.kernel_size[0] ** 2
        offset, mask = self.offset(y.to(x.dtype)).split((2 * taps, taps), 1)
        # It has no kernel for narrow types on a CPU.
        dtype = torch.promote_types(self.deform.weight.dtype, torch.float32)
        y, offset, mask, weight, bias = (
            t.to(dtype) for t in (y, offset, mask.sigmoid(), self.deform.weight, self.deform.bias)
        )
        y = deform_conv2d(y, offset, weight, bias, padding=self.padding, mask=mask)
        gate = self.norm(y.permute(0, 2, 3, 1).to(self.norm.weight.dtype)).sigmoid()
        return x * gate.permute(0, 3, 1, 2).to(x.dtype)
