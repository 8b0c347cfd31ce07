"""DaViT, Dual Attention Vision Transformer (arXiv 2204.03645), and Florence-2's image towers (arXiv 2311.06242).

Code was published at github.com/dingmyu/davit (MIT); timm hosts the weights (Apache-2.0), and Microsoft the towers with
the rest of Florence-2 (MIT). `checkpoint_filter_fn` takes the official files, classification and dense, timm's and
Florence-2's: parameter names here are timm's, with the zoo's `patch_embed`, `norm` and `head`. The stochastic depth
rate rises from block to block as in the official code; timm gives both blocks of a pair the same.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from densezoo.backbones.nat import spread_drop_path
from densezoo.backbones.staged import (
    Blocks,
    StagedBackbone,
    check_per_stage,
    convolve,
    crop_map,
    init_weights,
    pad_to_multiple,
    pretrained_filter,
    rename_keys,
)
from densezoo.ops import channel_attention_qkv, window_attention
from densezoo.ops.depthwise import DepthwiseConv
from densezoo.ops.mlp import Mlp
from densezoo.ops.norm import LayerNorm, PreNorm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class PositionEncoding(nn.Module):
    """Add to a map (B, H, W, dim) its depthwise 3x3 convolution, a conditional position encoding."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = DepthwiseConv(dim, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        return self.proj(x)


class WindowAttention(nn.Module):
    """Multi-head attention within the windows of a map (B, H, W, dim), without position bias.

    Sides that the window does not divide are zero-padded at the bottom or right before the projections, and padded
    positions take part as ordinary keys, as published.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        height, width = x.shape[1:3]
        qkv = self.qkv(pad_to_multiple(x, self.window_size))
        x = window_attention(qkv, num_heads=self.num_heads, window_size=self.window_size)
        return self.proj(crop_map(x, height, width))


class ChannelAttention(nn.Module):
    """Attention of the channels of each group to each other, over all positions of a map (B, H, W, dim).

    As published, the projections called k, v and q act as query, key and value, scaled by the groups' width; in
    Florence-2 they have the roles that they are named after, scaled by the number of positions.
    """

    def __init__(self, dim: int, num_heads: int, florence: bool):
        super().__init__()
        self.num_heads = num_heads
        self.florence = florence
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        if self.florence:
            x = channel_attention_qkv(qkv, scale=(x.shape[1] * x.shape[2]) ** -0.5)
        else:
            x = channel_attention_qkv(qkv, roles=(1, 2, 0))
        return self.proj(x.flatten(3))


class Block(nn.Module):
    """Pre-norm attention and MLP over a map (B, H, W, dim), each behind a position encoding."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.cpe1 = PositionEncoding(dim)
        self.norm1 = PreNorm(dim)
        self.attn = attn
        self.cpe2 = PositionEncoding(dim)
        self.norm2 = PreNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        x = self.cpe1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Take images (B, in_chans, H, W) to a normed map (B, ceil(H / 4), ceil(W / 4), dim) by overlapping patches.

    Sides that 4 does not divide are zero-padded at the bottom or right.
    """

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.norm(convolve(self.conv, pad_to_multiple(x.permute(0, 2, 3, 1), 4)))


class Downsample(nn.Module):
    """Take a map (B, H, W, dim) to (B, ceil(H / 2), ceil(W / 2), 2 * dim) by a norm and a strided convolution.

    A kernel of 2 zero-pads odd sides at the bottom or right; one of 3 overlaps.
    """

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.norm = PreNorm(dim)
        self.conv = nn.Conv2d(dim, 2 * dim, kernel_size, stride=2, padding=(kernel_size - 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        x = self.norm(x)
        if self.conv.kernel_size == (2, 2):
            x = pad_to_multiple(x, 2)
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DaViT(StagedBackbone):
    """DaViT: stages at strides 4, 8, 16 and 32 that alternate attention within windows and between channels.

    Images of any size: sides are rounded up at each stage and the windows padded inside the attention.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name, one that keeps the width; '' for none.
        embed_dim: Width of the first stage; each next one is twice as wide.
        depths: Pairs of a window block and a channel block per stage.
        num_heads: Attention heads, and channel groups, per stage.
        mlp_ratio: Hidden width of the MLPs over the stage's width.
        window_size: Side of the windows.
        florence: Whether to change what Florence-2 changed: downsampling by overlapping 3x3 patches, and the roles and
            scale of channel attention.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output; where given, the model has no final norm and no classifier.

    Raises:
        ValueError: `num_heads`, `global_pool` or `out_norms` does not fit the architecture.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 1, 3, 1),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        window_size: int = 7,
        florence: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__()
        check_per_stage(depths, num_heads=num_heads)
        self.patch_embed = PatchEmbed(in_chans, embed_dim)
        self.stages = nn.ModuleList()
        self.feature_info = []
        for i, rates in enumerate(spread_drop_path(drop_path_rate, [2 * depth for depth in depths])):
            dim, heads = embed_dim * 2**i, num_heads[i]
            if dim % heads:
                raise ValueError(f"num_heads: got {heads} for stage {i}, expected a divisor of its width {dim}")
            blocks = Blocks(
                *(
                    nn.Sequential(
                        Block(dim, WindowAttention(dim, heads, window_size), mlp_ratio, rates[j]),
                        Block(dim, ChannelAttention(dim, heads, florence), mlp_ratio, rates[j + 1]),
                    )
                    for j in range(0, len(rates), 2)
                )
            )
            downsample = Downsample(dim // 2, 3 if florence else 2) if i else nn.Identity()
            self.stages.append(nn.Sequential(OrderedDict(downsample=downsample, blocks=blocks)))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate, out_norms, pool_first=True)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run stage `i` on the output of the one before it (of the stem for the first)."""
        return self.stages[i](x)

    def keep_stages(self, count: int) -> None:
        """Drop the stages after the first `count`."""
        del self.stages[count:]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per stage, or per pair of blocks with the downsampling beside the first."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^patch_embed", blocks=r"^stages\.(\d+)" if coarse else blocks)


_RENAMED = {
    # official (patch_embeds, main_blocks) and Florence-2 (convs, blocks)
    r"^(patch_embeds|convs)\.0\.proj\.": "patch_embed.conv.",
    r"^(patch_embeds|convs)\.0\.norm\.": "patch_embed.norm.",
    r"^(patch_embeds|convs)\.(\d+)\.proj\.": r"stages.\2.downsample.conv.",
    r"^(patch_embeds|convs)\.(\d+)\.norm\.": r"stages.\2.downsample.norm.",
    r"^(main_)?blocks\.(\d+)\.": r"stages.\2.blocks.",
    r"\.cpe\.0\.": ".cpe1.",
    r"\.cpe\.1\.": ".cpe2.",
    r"^norms\.": "norm.",
    r"\.conv([12])\.fn\.dw\.": r".cpe\1.proj.",
    r"\.(window|channel)_attn\.norm\.": ".norm1.",
    r"\.(window|channel)_attn\.fn\.": ".attn.",
    r"\.ffn\.norm\.": ".norm2.",
    r"\.ffn\.fn\.net\.": ".mlp.",
    # timm
    r"^stem\.": "patch_embed.",
    r"^head\.norm\.": "norm.",
    r"^head\.fc\.": "head.",
    # timm's and Florence-2's towers
    r"\.spatial_block\.": ".0.",
    r"\.channel_block\.": ".1.",
}
_TOWER = "vision_tower."


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert a published state dict (official, dense, timm's, mmpretrain's, Florence-2's) to the keys of `model`.

    Of a whole Florence-2 only the image tower is kept. It has no norms after its stages: those of `model` stay.
    """
    tower = {name.removeprefix(_TOWER): value for name, value in state_dict.items() if name.startswith(_TOWER)}
    if "patch_embed.projection.weight" in state_dict:
        state_dict = _from_mmpretrain(state_dict)
    if not tower:
        return rename_keys(state_dict, _RENAMED)
    norms = {name: value for name, value in model.state_dict().items() if name.startswith("norm")}
    return norms | rename_keys(tower, _RENAMED)


def _from_mmpretrain(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the stem, and the parts of which mmpretrain has the downsampling at the end of the stage before."""
    rules = {rf"^stages\.{i}\.downsample\.": f"stages.{i + 1}.next." for i in range(3)}
    rules |= {r"\.next\.": ".downsample.", r"\.projection\.": ".conv.", r"\.attn\.w_msa\.": ".attn."}
    return rename_keys(state_dict, rules | {r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.", r"\.ffn\.layers\.1\.": ".mlp.fc2."})


_TINY = dict(embed_dim=96, depths=(1, 1, 3, 1), num_heads=(3, 6, 12, 24))
_BASE = dict(embed_dim=128, depths=(1, 1, 9, 1), num_heads=(4, 8, 16, 32))
_LARGE = dict(embed_dim=192, depths=(1, 1, 9, 1), num_heads=(6, 12, 24, 48))
_HUGE = dict(embed_dim=256, depths=(1, 1, 9, 1), num_heads=(8, 16, 32, 64))

VARIANTS: dict[str, dict] = {
    "densezoo_davit_tiny": _TINY,
    "densezoo_davit_small": dict(_TINY, depths=(1, 1, 9, 1)),
    "densezoo_davit_base": _BASE,
    "densezoo_davit_large": _LARGE,
    "densezoo_davit_large_window12_384": dict(_LARGE, window_size=12),
    "densezoo_davit_huge": _HUGE,
    "densezoo_davit_giant": dict(embed_dim=384, depths=(1, 1, 12, 3), num_heads=(12, 24, 48, 96)),
    "densezoo_davit_base_fl": dict(_BASE, window_size=12, florence=True),
    "densezoo_davit_huge_fl": dict(_HUGE, window_size=12, florence=True),
}


def _cfg(hf_hub_id: str | None = None, **kwargs) -> dict:
    cfg = dict(
        url="",
        hf_hub_id=hf_hub_id,
        license="apache-2.0",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.95,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.conv",
        classifier="head",
    )
    return cfg | kwargs


def _florence_cfg(hf_hub_id: str) -> dict:
    return _cfg(
        hf_hub_id,
        hf_hub_filename="pytorch_model.bin",
        license="mit",
        num_classes=0,
        input_size=(3, 768, 768),
        pool_size=(24, 24),
        crop_pct=1.0,
        crop_mode="squash",
    )


# Published without weights where no hub id is given.
default_cfgs = generate_default_cfgs(
    {
        "densezoo_davit_tiny.msft_in1k": _cfg("timm/davit_tiny.msft_in1k"),
        "densezoo_davit_small.msft_in1k": _cfg("timm/davit_small.msft_in1k"),
        "densezoo_davit_base.msft_in1k": _cfg("timm/davit_base.msft_in1k"),
        "densezoo_davit_large": _cfg(),
        "densezoo_davit_large_window12_384": _cfg(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
        "densezoo_davit_huge": _cfg(),
        "densezoo_davit_giant": _cfg(),
        "densezoo_davit_base_fl.msft_florence2": _florence_cfg("microsoft/Florence-2-base"),
        "densezoo_davit_huge_fl.msft_florence2": _florence_cfg("microsoft/Florence-2-large"),
    }
)


def _create(variant: str, pretrained: bool, **kwargs) -> DaViT:
    kwargs = VARIANTS[variant] | kwargs
    return build_model_with_cfg(
        DaViT,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter(checkpoint_filter_fn),
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["depths"]))), feature_cls="getter"),
        **kwargs,
    )


@register_model
def densezoo_davit_tiny(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Tiny, ImageNet-1k."""
    return _create("densezoo_davit_tiny", pretrained, **kwargs)


@register_model
def densezoo_davit_small(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Small, ImageNet-1k."""
    return _create("densezoo_davit_small", pretrained, **kwargs)


@register_model
def densezoo_davit_base(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Base, ImageNet-1k."""
    return _create("densezoo_davit_base", pretrained, **kwargs)


@register_model
def densezoo_davit_large(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Large, without weights."""
    return _create("densezoo_davit_large", pretrained, **kwargs)


@register_model
def densezoo_davit_large_window12_384(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Large with windows of 12x12 for 384x384, without weights."""
    return _create("densezoo_davit_large_window12_384", pretrained, **kwargs)


@register_model
def densezoo_davit_huge(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Huge, without weights."""
    return _create("densezoo_davit_huge", pretrained, **kwargs)


@register_model
def densezoo_davit_giant(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Giant, without weights."""
    return _create("densezoo_davit_giant", pretrained, **kwargs)


@register_model
def densezoo_davit_base_fl(pretrained: bool = False, **kwargs) -> DaViT:
    """Image tower of Florence-2 Base, a DaViT-Base."""
    return _create("densezoo_davit_base_fl", pretrained, **kwargs)


@register_model
def densezoo_davit_huge_fl(pretrained: bool = False, **kwargs) -> DaViT:
    """Image tower of Florence-2 Large, a DaViT-Huge."""
    return _create("densezoo_davit_huge_fl", pretrained, **kwargs)
