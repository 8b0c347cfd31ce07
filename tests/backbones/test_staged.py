"""What families share."""

import pytest
import torch
from densezoo.backbones.maxvit import SameConv2d
from densezoo.backbones.staged import convolve
from torch import nn


@pytest.mark.parametrize(
    "channels, size, stride, dynamic",
    [(3, 4, 4, False), (3, 4, 4, True), (3, 3, 2, False), (3, 7, 4, True), (4, 7, 4, False), (8, 2, 2, False)],
)
def test_convolutions_of_images_in_a_compiled_graph(channels, size, stride, dynamic):
    torch._dynamo.reset()
    padding = size // 2 if size > stride else 0
    conv = nn.Conv2d(channels, 6, size, stride, padding, bias=size != 3).double()
    compiled = torch.compile(convolve, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3 * stride, 5 * stride), (1, 17, 22)):
        x = torch.randn(*shape, channels, dtype=torch.float64)
        results = []
        for function in (convolve, compiled):
            out = function(conv, x)
            results.append([out, *torch.autograd.grad(out.square().sum(), conv.parameters())])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(1, 3, 16, 18), (2, 3, 17, 9)])
def test_convolutions_that_pad_by_themselves(shape):
    torch._dynamo.reset()
    conv, x = SameConv2d(3, 6).double(), torch.randn(shape, dtype=torch.float64)
    compiled = torch.compile(convolve, backend="aot_eager", fullgraph=True)
    out = compiled(conv, x.permute(0, 2, 3, 1), conv.pads(*shape[2:]))
    torch.testing.assert_close(out.permute(0, 3, 1, 2), conv(x))
