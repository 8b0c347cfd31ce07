"""FPENet's decoder: its definition and its size."""

import torch
import torch.nn.functional as F
from densezoo.heads import MEU, MEUDecoder


def test_definition():
    meu = MEU(12, 8, 16).eval()
    high, low = torch.randn(2, 12, 5, 6), torch.randn(2, 8, 10, 11)
    a, b = meu.high(high), meu.low(low)
    channel = (meu.channel.weight[:, :, 0, 0] @ a.mean((2, 3))[..., None]).relu().sigmoid()[..., None]
    position = (b.mean(1, keepdim=True) * meu.position.weight.item()).sigmoid()
    expected = b * channel + F.interpolate(a, (10, 11), mode="bilinear", align_corners=True) * position
    torch.testing.assert_close(meu(high, low), expected)


def test_decoder_is_a_chain():
    decoder = MEUDecoder([8, 12, 20], 16).eval()
    maps = [torch.randn(1, c, s, s) for c, s in ((8, 12), (12, 6), (20, 3))]
    torch.testing.assert_close(decoder(maps), decoder.blocks[1](decoder.blocks[0](maps[2], maps[1]), maps[0]))


def test_parameters_in_the_published_network():
    # of its levels of 16, 32 and 64 channels: two 1x1 convolutions with norms, one among channels, one number
    count = sum(p.numel() for meu in (MEU(64, 32, 64), MEU(64, 16, 32)) for p in meu.parameters())
    assert count == (64 * 64 + 32 * 64 + 4 * 64 + 64 * 64 + 1) + (64 * 32 + 16 * 32 + 4 * 32 + 32 * 32 + 1)
