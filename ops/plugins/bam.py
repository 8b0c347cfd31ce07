"""Bottleneck attention module."""

from collections import OrderedDict

from densezoo.ops.plugins.parts import init_as_published, reduced
from densezoo.ops.shapes import positive
from torch import Tensor, nn


class BAM(nn.Module):
    """BAM (arXiv 1807.06514): x * (1 + sigmoid(channel gate * spatial gate)); made for the places between stages.

    The released code pools square maps only; here the channel gate takes the mean of any map. Its batch norm sees one
    vector an image, so training needs a batch of two or more (or frozen norms).

    Args:
        channels: C.
        reduction: Both gates work on C / reduction channels; a divisor of C.
        dilation: Of the spatial gate's two 3x3 convolutions.

    Raises:
        ValueError: `reduction` does not divide `channels`, or `dilation` is no positive integer.
    """

    def __init__(self, channels: int, reduction: int = 16, dilation: int = 4, *, device=None, dtype=None):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        hidden = reduced(channels, reduction)
        gate_c = OrderedDict(
            gate_c_fc_0=nn.Linear(channels, hidden, **factory),
            gate_c_bn_1=nn.BatchNorm1d(hidden, **factory),
            gate_c_relu_1=nn.ReLU(),
            gate_c_fc_final=nn.Linear(hidden, channels, **factory),
        )
        gate_s = OrderedDict(
            gate_s_conv_reduce0=nn.Conv2d(channels, hidden, 1, **factory),
            gate_s_bn_reduce0=nn.BatchNorm2d(hidden, **factory),
            gate_s_relu_reduce0=nn.ReLU(),
        )
        for i in range(2):
            gate_s[f"gate_s_conv_di_{i}"] = nn.Conv2d(
                hidden, hidden, 3, padding=positive("dilation", dilation), dilation=dilation, **factory
            )
            gate_s[f"gate_s_bn_di_{i}"] = nn.BatchNorm2d(hidden, **factory)
            gate_s[f"gate_s_relu_di_{i}"] = nn.ReLU()
        gate_s["gate_s_conv_final"] = nn.Conv2d(hidden, 1, 1, **factory)
        self.channel_att = nn.Sequential(OrderedDict(gate_c=nn.Sequential(gate_c)))
        self.spatial_att = nn.Sequential(OrderedDict(gate_s=nn.Sequential(gate_s)))
        self.init_weights()

    def init_weights(self, **_) -> None:  # timm passes what concerns its own blocks
        """Start as the released network."""
        init_as_published(self)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        channel = self.channel_att(x.mean((2, 3)))[..., None, None]
        return x * (1 + (channel * self.spatial_att(x)).sigmoid())
