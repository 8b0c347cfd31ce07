"""Swin (arXiv 2103.14030) as a skeleton, for families that bring their own attention to some of its blocks."""

from collections.abc import Callable, Sequence

import torch
from densezoo.backbones.dinat_s import PatchEmbed, PatchMerging
from densezoo.backbones.nat import Block, Level, resize_bias, spread_drop_path
from densezoo.backbones.staged import (
    Blocks,
    StagedBackbone,
    check_per_stage,
    crop_map,
    init_weights,
    pad_to_multiple,
    square_side,
)
from densezoo.ops import window_attention
from torch import Tensor, nn


class WindowAttention(nn.Module):
    """Multi-head attention within the windows of a map (B, H, W, dim), with relative position bias.

    Sides that the window does not divide are zero-padded at the bottom or right before the projections, and padded
    positions take part as ordinary keys, as in the published dense models. With `shift` the windows start that many
    positions further on.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of dim {dim}")
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        height, width = x.shape[1:3]
        qkv = self.qkv(pad_to_multiple(x, self.window_size))
        # The published table goes by query - key, the operator's by key - query: one is the other read backwards.
        bias = self.relative_position_bias_table.flip(0).mT.unflatten(1, (2 * self.window_size - 1,) * 2)
        x = window_attention(qkv, bias, num_heads=self.num_heads, window_size=self.window_size, shift=self.shift)
        return self.proj(crop_map(x, height, width))


class Swin(StagedBackbone):
    """Patches of 4x4 and stages at strides 4, 8, 16 and 32, of a family's attention or Swin's windows.

    Every second block shifts its windows by half their size. A classifier has no shift where the map at `img_size` is
    not larger than the window, and takes the map's side for the window; the published dense models always shift.

    Args:
        attention: Called with stage, block, width, heads and map side at `img_size`, once for each block; None for
            Swin's attention.
    """

    position_tables = ("relative_position_bias_table",)

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float,
        window_size: int,
        img_size: int,
        drop_rate: float,
        drop_path_rate: float,
        out_norms: Sequence[int],
        attention: Callable[[int, int, int, int, int], nn.Module | None],
    ):
        super().__init__()
        check_per_stage(depths, num_heads=num_heads)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, size=4)
        self.layers = nn.ModuleList()
        self.feature_info = []
        for i, rates in enumerate(spread_drop_path(drop_path_rate, depths)):
            dim, heads, side = embed_dim * 2**i, num_heads[i], square_side(img_size) // (4 * 2**i)
            window = window_size if out_norms else min(window_size, side)
            whole = not out_norms and side <= window_size
            blocks = Blocks()
            for j, rate in enumerate(rates):
                shift = window // 2 if j % 2 and not whole else 0
                attn = attention(i, j, dim, heads, side) or WindowAttention(dim, heads, window, shift)
                blocks.append(Block(dim, attn, mlp_ratio, rate))
            self.layers.append(Level(blocks, PatchMerging(dim) if i < len(depths) - 1 else nn.Identity()))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"layers.{i}.blocks"))
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate, out_norms)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run stage `i` on the output of the one before it (of the stem for the first)."""
        if i > 0:
            x = self.layers[i - 1].downsample(x)
        return self.layers[i].blocks(x)

    def keep_stages(self, count: int) -> None:
        """Drop the stages after the first `count`."""
        del self.layers[count:]
        self.layers[-1].downsample = nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per stage, or per block with each downsampler beside the block before it."""
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99999,)),
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^patch_embed", blocks=r"^layers\.(\d+)" if coarse else blocks)


def resize_bias_table(table: Tensor, entries: int) -> Tensor:
    """Resize a published table of relative position biases (side * side, heads) bicubically to (entries, heads)."""
    side, new_side = (round(n**0.5) for n in (len(table), entries))
    return resize_bias(table.mT.unflatten(1, (side, side)), (new_side, new_side)).flatten(1).mT
