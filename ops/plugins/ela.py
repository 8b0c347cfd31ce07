"""Efficient local attention."""

from densezoo.ops.plugins.parts import odd
from densezoo.ops.shapes import positive
from torch import Tensor, nn


class ELA(nn.Module):
    """Efficient local attention (arXiv 2403.01123): scales each row, then each column, by its neighbours' means.

    One convolution and norm serve both axes. The paper's versions have `kernel_size`, `groups` and `norm_groups`

        T  5, C, 32      B  7, C, 16      S  5, C / 8, 16      L  7, C / 8, 16

    Args:
        channels: C.
        kernel_size: Of the convolution along an axis, an odd number.
        groups: Of the convolution, a divisor of C; C by default.
        norm_groups: Of the group norm, a divisor of C.

    Raises:
        ValueError: An argument is out of its range; says what the range is.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        groups: int | None = None,
        norm_groups: int = 16,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        groups = positive("channels", channels) if groups is None else groups
        for name, value in (("groups", groups), ("norm_groups", norm_groups)):
            if channels % positive(name, value):
                raise ValueError(f"{name}: got {value} for {channels} channels, expected a divisor of the channels")
        padding = odd("kernel_size", kernel_size) // 2
        self.conv = nn.Conv1d(channels, channels, kernel_size, padding=padding, groups=groups, bias=False, **factory)
        self.norm = nn.GroupNorm(norm_groups, channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        rows, columns = (self.norm(self.conv(x.mean(axis))).sigmoid() for axis in (3, 2))
        return x * rows[..., None] * columns[:, :, None]
