"""Previous knowledge channel attention module."""

from collections.abc import Sequence

import torch
from densezoo.ops.plugins.eca import kernel_size_for
from densezoo.ops.plugins.parts import odd
from densezoo.ops.shapes import positive
from torch import Tensor, nn


class PKCAM(nn.Module):
    """PKCAM (arXiv 2211.07521): ECA that also sees the channels' means of earlier maps; x * (1 + scale).

    Without earlier maps, as in the first block of a stage and as a plug-in, the scale is ECA's. With them a second ECA
    sees the means of all, mixed channel by channel, and a last convolution weighs the two scales.

    Args:
        channels: C.
        kernel_size: Of both ECAs, an odd number; by default ECA's.
        previous: Earlier maps that `forward` gets the means of: the stem's and the last one of each earlier stage.

    Raises:
        ValueError: `channels` is no positive integer, `kernel_size` no odd one, or `previous` negative.
    """

    def __init__(self, channels: int, kernel_size: int | None = None, previous: int = 0, *, device=None, dtype=None):
        super().__init__()
        if not isinstance(previous, int) or previous < 0:
            raise ValueError(f"previous: got {previous!r}, expected the number of earlier maps, 0 or more")
        positive("channels", channels)
        kernel_size = kernel_size_for(channels) if kernel_size is None else odd("kernel_size", kernel_size)
        self.channels, self.previous = channels, previous
        factory = dict(bias=False, device=device, dtype=dtype)
        self.local_conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, **factory)
        if previous:
            self.mix_maps = nn.Conv1d(previous + 1, 1, 1, **factory)
            self.global_conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, **factory)
            self.mix_scales = nn.Conv1d(2, 1, 1, **factory)

    def forward(self, x: Tensor, previous: Sequence[Tensor] = ()) -> Tensor:
        """Take (B, C, H, W) to the same shape.

        Args:
            x: The map.
            previous: The means (B, C') of the earlier maps, in order; C' divides C, and the channels are repeated.

        Raises:
            ValueError: `previous` are not as many as the module was built for, or their widths do not divide C.
        """
        if len(previous) != self.previous or any(self.channels % means.shape[1] for means in previous):
            raise ValueError(
                f"previous: got {[tuple(means.shape) for means in previous]}, expected {self.previous} tensors (B, C') "
                f"with C' a divisor of {self.channels}"
            )
        own = x.mean((2, 3))
        scale = self.local_conv(own[:, None]).sigmoid()
        if previous:
            maps = [means.repeat(1, self.channels // means.shape[1]) for means in previous]
            mixed = self.mix_maps(torch.stack([*maps, own], 1)).relu()
            scales = torch.cat([scale, self.global_conv(mixed).sigmoid()], 1)
            scale = self.mix_scales(scales).sigmoid()
        return x * (1 + scale.squeeze(1)[..., None, None])
