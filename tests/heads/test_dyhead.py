"""Dynamic Head: the published block's outputs, and what its attentions are."""

from pathlib import Path

import parity
import torch
import torch.nn.functional as F
from densezoo.heads import DyHead
from densezoo.heads.dyhead import DyConv

GOLDENS = Path(parity.__file__).parent / "goldens"


def test_parity():
    golden = parity.load(GOLDENS / "dyhead_block.json")
    block = DyConv(64, 64)
    block.load_state_dict(parity.state_dict_from(golden))
    names = list(golden["inputs"])
    with torch.no_grad():
        outs = block(tuple(parity.fixed_input(name, golden["inputs"][name]) for name in names))
    for name, out in zip(names, outs, strict=True):
        assert parity.compare(golden["outputs"][name], out) < 1e-5


def test_without_offsets_it_is_convolution():
    """Offsets are 0 and masks 1/2 at a zero convolution; then every part is a torch function."""
    block = DyConv(16, 32).eval()
    torch.nn.init.zeros_(block.offset.weight)
    torch.nn.init.zeros_(block.offset.bias)
    maps = [torch.randn(2, 16, *size) for size in ((12, 10), (6, 5), (3, 3))]

    def conv(i, x):
        c = block.DyConv[i].conv
        return block.DyConv[i].bn(F.conv2d(x, c.weight / 2, c.bias, c.stride, 1))

    def scaled(x):
        weight = (block.AttnConv[1](x.mean((2, 3), keepdim=True)).relu() + 3).clamp(0, 6) / 6
        return x * weight

    up = F.interpolate(conv(0, maps[2]), (6, 5), mode="bilinear", align_corners=True)
    x = (scaled(conv(1, maps[1])) + scaled(conv(2, maps[0])) + scaled(up)) / 3
    theta = (block.relu.fc(x.mean((2, 3))) + 3).clamp(0, 6) / 6
    a1, b1, a2, b2 = theta[..., None, None].chunk(4, 1)
    expected = torch.max(x * (2 * a1) + b1 - 0.5, x * (2 * a2 - 1) + b2 - 0.5)
    torch.testing.assert_close(block(tuple(maps))[1], expected, atol=1e-5, rtol=1e-5)


def test_parameters_of_six_blocks():
    # three 3x3 convolutions with bias and norm, one of 27 numbers, one number of attention and the two linear layers
    block = 3 * (256 * 256 * 9 + 256 + 512) + 256 * 27 * 9 + 27 + 257 + 256 * 64 + 64 + 64 * 1024 + 1024
    assert sum(p.numel() for p in DyHead(256).parameters()) == 6 * block
