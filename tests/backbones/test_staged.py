"""What families share."""

import pytest
import torch
from densezoo.backbones.staged import convolve_patches
from torch import nn


@pytest.mark.parametrize("channels, size, dynamic", [(3, 4, False), (3, 4, True), (8, 2, False)])
def test_patches_in_a_compiled_graph_are_the_convolution(channels, size, dynamic):
    conv = nn.Conv2d(channels, 6, size, stride=size).double()
    compiled = torch.compile(convolve_patches, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3 * size, 5 * size), (1, 4 * size, 2 * size)):
        x = torch.randn(*shape, channels, dtype=torch.float64)
        results = []
        for function in (convolve_patches, compiled):
            out = function(conv, x)
            results.append([out, *torch.autograd.grad(out.square().sum(), conv.parameters())])
        torch.testing.assert_close(*results)
