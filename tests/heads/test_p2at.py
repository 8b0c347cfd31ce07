"""P2AT's decoder: its attention's definition and its maps."""

import torch
import torch.nn.functional as F
from densezoo.heads import P2ATDecoder
from densezoo.heads.p2at import P2ATPredictor, PooledAxialAttention


def test_attention_among_rows_and_columns():
    attn = PooledAxialAttention(8, num_heads=2, key_dim=3, pos_embed_size=4).eval()
    x = torch.randn(1, 8, 5, 7)
    y = attn.pool_in(x)
    p1 = F.avg_pool2d(y, 3, 1, 1)
    p2 = F.avg_pool2d(p1, 5, 1, 2)
    p3 = F.avg_pool2d(p2, 7, 1, 3)
    q, k, v = attn.qkv(y * attn.pool_out(torch.cat([p1, p2, p3], 1))).split([6, 6, 12], 1)
    out = v
    for dim, positions, project in ((3, attn.row_pos, attn.row), (2, attn.column_pos, attn.column)):
        length = x.shape[5 - dim]
        own = F.interpolate(positions, (length,), mode="linear")[0]
        heads = []
        for h in range(2):
            a, b, c = (t.mean(dim)[0].chunk(2)[h] for t in (q, k, v))
            a, b = a + own[:6].chunk(2)[h], b + own[6:].chunk(2)[h]
            heads.append(c @ (a.T @ b / 3**0.5).softmax(-1).T)
        out = out + project(torch.cat(heads)[None].unsqueeze(dim))
    details = attn.detail1(x)
    expected = (details + attn.detail2(details)) * attn.proj(out)
    torch.testing.assert_close(attn(x), expected, atol=1e-5, rtol=1e-5)


def test_maps():
    decoder = P2ATDecoder([8, 16, 24, 32], 16, num_heads=2, key_dim=4)
    maps = [torch.randn(2, c, *s) for c, s in ((8, (24, 30)), (16, (12, 15)), (24, (6, 8)), (32, (3, 4)))]
    x, fused = decoder(maps)
    assert x.shape == (2, 16, 24, 30)
    assert [tuple(f.shape) for f in fused] == [(2, 16, 12, 15), (2, 16, 24, 30)]
    assert P2ATPredictor(16, 5)(x).shape == (2, 5, 24, 30)
