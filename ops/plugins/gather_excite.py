"""Gather-Excite."""

import torch
import torch.nn.functional as F
from densezoo.ops.plugins.parts import pooled_basis, reduced
from densezoo.ops.shapes import per_axis, positive
from torch import Tensor, nn

VARIANTS = ("theta-", "theta", "theta+")


class GatherExcite(nn.Module):
    """Gather-Excite (arXiv 1810.12348): scales each position by what was gathered around it, in its channel.

    Gathered maps are smaller than the input by `extent`, and come back to its size by nearest neighbours. A graph
    exported for free sizes serves those from which more than one position is gathered along both axes.

    Args:
        channels: C.
        extent: How far to gather, a power of two from 2; None for the whole map.
        variant: "theta-" gathers by means, without parameters; "theta" by depthwise convolutions with batch norms;
            "theta+" so, and then mixes the channels by two 1x1 convolutions.
        reduction: The two 1x1 convolutions of "theta+" meet at C / reduction; a divisor of C.
        size: Of the one convolution that gathers the whole map, or (height, width): the map's at training. Another map
            is first pooled to that size.

    Raises:
        ValueError: An argument is out of its range; says what the range is.
    """

    def __init__(
        self,
        channels: int,
        extent: int | None = 8,
        variant: str = "theta",
        reduction: int = 16,
        size: int | tuple[int, int] | None = None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        positive("channels", channels)
        if variant not in VARIANTS:
            raise ValueError(f"variant: got {variant!r}, expected one of {', '.join(VARIANTS)}")
        if extent is not None and (positive("extent", extent) < 2 or extent & (extent - 1)):
            raise ValueError(f"extent: got {extent}, expected a power of two from 2, or None for the whole map")
        if (size is None) != (extent is not None or variant == "theta-"):
            raise ValueError(
                f"size: got {size!r}, expected the map's where a convolution gathers the whole map, else None"
            )
        self.extent = extent
        self.size = None if size is None else per_axis("size", size)
        self.gather = None
        if variant != "theta-":
            layers = []
            for kernel_size in [self.size] if extent is None else [3] * (extent.bit_length() - 1):
                stride, padding = (1, 0) if extent is None else (2, 1)
                conv = nn.Conv2d(
                    channels, channels, kernel_size, stride, padding, groups=channels, bias=False, **factory
                )
                layers += [nn.ReLU()] * bool(layers) + [conv, nn.BatchNorm2d(channels, **factory)]
            self.gather = nn.Sequential(*layers)
        self.mlp = nn.Identity()
        if variant == "theta+":
            hidden = reduced(channels, reduction)
            convs = (nn.Conv2d(*widths, 1, **factory) for widths in ((channels, hidden), (hidden, channels)))
            self.mlp = nn.Sequential(next(convs), nn.ReLU(), next(convs))

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        if self.size is not None:
            rows, columns = (
                pooled_basis(torch.eye(n, dtype=x.dtype, device=x.device), side)
                for n, side in zip(self.size, x.shape[2:], strict=True)
            )
            gathered = self.gather(rows @ x @ columns.mT)
        elif self.gather is not None:
            gathered = self.gather(x)
        elif self.extent is None:
            gathered = x.mean((2, 3), keepdim=True)
        else:
            e = self.extent
            gathered = F.avg_pool2d(x, 2 * e - 1, stride=e, padding=e - 1, count_include_pad=False)
        weight = self.mlp(gathered).sigmoid()
        return x * (weight if self.extent is None else F.interpolate(weight, size=x.shape[2:]))
