"""CSwin (arXiv 2107.00652) as a skeleton, for families that bring their own attention to its first stages."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from densezoo.backbones.nat import spread_drop_path
from densezoo.backbones.staged import Blocks, StagedBackbone, check_per_stage, convolve, init_weights, square_side
from densezoo.ops import window_attention
from densezoo.ops.depthwise import DepthwiseConv
from densezoo.ops.mlp import Mlp
from densezoo.ops.norm import LayerNorm, PreNorm
from timm.layers import DropPath
from torch import Tensor, nn


class LePEAttention(nn.Module):
    """Attention within stripes of a map, plus a depthwise convolution of the values (locally-enhanced position).

    Takes the projected map (B, H, W, 3 * dim) to (B, H, W, dim). The last stripe is narrower where `width` does not
    divide the map. The convolution sees zeros beyond its stripe.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        axis: 2 for stripes of full height beside each other, 1 for stripes of full width above each other, None for
            one window that is the whole map.
        width: Rows or columns of a stripe.
    """

    def __init__(self, dim: int, num_heads: int, axis: int | None = None, width: int = 0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of dim {dim}")
        self.num_heads = num_heads
        # Stripes as rows and columns; None for the whole side.
        self.window_size = (width if axis == 1 else None, width if axis == 2 else None)
        self.get_v = DepthwiseConv(dim, window_size=self.window_size)

    def forward(self, qkv: Tensor) -> Tensor:
        """Return the map."""
        window = tuple(side or size for side, size in zip(self.window_size, qkv.shape[1:3], strict=True))
        y = window_attention(qkv, num_heads=self.num_heads, window_size=window)
        return y + self.get_v(qkv.chunk(3, -1)[2])


class CSwinBlock(nn.Module):
    """Pre-norm attention and MLP over a map (B, H, W, dim); `attns` share its heads between them, in order."""

    def __init__(self, dim: int, attns: Sequence[nn.Module], mlp_ratio: float, drop_path: float = 0.0):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm1 = PreNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.attns = nn.ModuleList(attns)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm2 = PreNorm(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        parts = self.project(self.norm1(x)).chunk(len(self.attns), -1)
        y = torch.cat([attn(part) for attn, part in zip(self.attns, parts, strict=True)], dim=-1)
        x = x + self.drop_path(self.proj(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def project(self, x: Tensor) -> Tensor:
        """Return query, key and value of the first of `attns`, then of the next: (B, H, W, 3 * dim)."""
        if len(self.attns) == 1:
            return self.qkv(x)
        # Published are all queries, keys, then values. To put the layer in order costs less than what it returns.
        weight, bias = (
            t.unflatten(0, (3, len(self.attns), -1)).transpose(0, 1).flatten(0, 2)
            for t in (self.qkv.weight, self.qkv.bias)
        )
        return F.linear(x, weight, bias)


class ToChannelsLast(nn.Module):
    """Take (B, C, H, W) to (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a view."""
        return x.permute(0, 2, 3, 1)


class Merge(nn.Module):
    """Take a map (B, H, W, dim) to a normed map (B, ceil(H / 2), ceil(W / 2), out_dim) by a strided convolution."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.norm(convolve(self.conv, x))


class CSwin(StagedBackbone):
    """Stages at strides 4, 8, 16 and 32: a family's attention in two, then cross-shaped stripes, then the whole map.

    Args:
        attention: Called with stage, width, heads and map side at `img_size`, once for each block of the first two
            stages; the module takes a projected map (B, H, W, 3 * dim) to (B, H, W, dim).
    """

    # The published recipes have no tables to spare.
    position_tables = ()

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float,
        stripe_width: int,
        img_size: int,
        drop_rate: float,
        drop_path_rate: float,
        out_norms: Sequence[int],
        attention: Callable[[int, int, int, int], nn.Module],
    ):
        super().__init__()
        check_per_stage(depths, num_heads=num_heads)
        stem = nn.Conv2d(in_chans, embed_dim, 7, stride=4, padding=2)
        self.stage1_conv_embed = nn.Sequential(stem, ToChannelsLast(), LayerNorm(embed_dim))
        self.feature_info = []
        for i, rates in enumerate(spread_drop_path(drop_path_rate, depths)):
            dim, heads, side = embed_dim * 2**i, num_heads[i], square_side(img_size) // (4 * 2**i)
            if i:
                setattr(self, f"merge{i}", Merge(dim // 2, dim))
            blocks = Blocks()
            for rate in rates:
                if i < 2:
                    attns = [attention(i, dim, heads, side)]
                elif i == 2:
                    attns = [LePEAttention(dim // 2, heads // 2, axis, stripe_width) for axis in (2, 1)]
                else:
                    attns = [LePEAttention(dim, heads)]
                blocks.append(CSwinBlock(dim, attns, mlp_ratio, rate))
            setattr(self, f"stage{i + 1}", blocks)
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stage{i + 1}"))
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate, out_norms)

    def patch_embed(self, x: Tensor) -> Tensor:
        """Run the stem on images (B, in_chans, H, W)."""
        return self.stage1_conv_embed(x)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run stage `i` on the output of the one before it (of the stem for the first)."""
        if i > 0:
            x = self.get_submodule(f"merge{i}")(x)
        return self.get_submodule(f"stage{i + 1}")(x)

    def keep_stages(self, count: int) -> None:
        """Drop the stages after the first `count`."""
        for i in range(count, self.num_stages):
            delattr(self, f"merge{i}")
            delattr(self, f"stage{i + 1}")

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per stage, or per block, each convolution with the first block after it."""
        stages = range(len(self.feature_info))
        blocks = [(rf"^(?:merge{i}|stage{i + 1})\b", (i,)) for i in stages]
        if not coarse:
            first = [(rf"^merge{i}\b", (i + 1, 0)) for i in stages]
            blocks = [*first, (r"^stage(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^stage1_conv_embed", blocks=blocks)
