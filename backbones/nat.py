"""NAT, Neighborhood Attention Transformer (arXiv 2204.07143), and DiNAT, its dilated form (arXiv 2209.15001).

Code and weights were published at github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT). Parameter names are
those of the published checkpoints, so official files load as they are; dilation is no parameter, so one file serves any
`dilations`. Here `drop_path_rate` defaults to 0: the training configs set the published rates.
"""

from collections.abc import Sequence
from itertools import cycle, islice

import torch
from densezoo.backbones.staged import (
    Blocks,
    StagedBackbone,
    convolve,
    crop_map,
    init_weights,
    pad_map,
    pretrained_filter,
    resize_table,
)
from densezoo.ops import na2d_qkv
from densezoo.ops.backend import is_exporting
from densezoo.ops.mlp import Mlp
from densezoo.ops.norm import LayerNorm, PreNorm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

Dilations = int | Sequence[Sequence[int]]


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of each position of a map (B, H, W, dim) to its neighbourhood, with relative position bias.

    A side shorter than `kernel_size * dilation` is zero-padded to it at the bottom or right before the projections, and
    padded positions take part as ordinary keys, as in NATTEN 0.14, which the published models were trained with.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 7, dilation: int = 1):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of dim {dim}")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        height, width = x.shape[1:3]
        span = self.kernel_size * self.dilation
        at_least = torch.sym_max if is_exporting() else max  # max would fix the exported sizes
        x = pad_map(x, at_least(height, span), at_least(width, span))
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        x = na2d_qkv(qkv, self.kernel_size, dilation=self.dilation, rpb=self.rpb)
        return self.proj(crop_map(x.flatten(3), height, width))


class Block(nn.Module):
    """Pre-norm attention and MLP over a map (B, H, W, dim), with stochastic depth and, where given, layer scale."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.norm1 = PreNorm(dim)
        self.attn = attn
        self.norm2 = PreNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.gamma1, self.gamma2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        y = self.attn(self.norm1(x))
        x = x + self.drop_path(y if self.gamma1 is None else self.gamma1 * y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.gamma2 is None else self.gamma2 * y)


class ConvTokenizer(nn.Module):
    """Take images (B, in_chans, H, W) to a normed map (B, ceil(H / 4), ceil(W / 4), dim) by two convolutions."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        )
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        first, second = self.proj
        x = second(convolve(first, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.norm(x.permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """Take a map (B, H, W, dim) to a normed map (B, ceil(H / 2), ceil(W / 2), 2 * dim) by a strided convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Level(nn.Module):
    """The blocks at one resolution, and the step from there to the next."""

    def __init__(self, blocks: Blocks, downsample: nn.Module):
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample


def spread_dilations(dilations: Dilations, depths: Sequence[int]) -> list[list[int]]:
    """Return one dilation per block: an int for all, or a pattern per level, repeated (or cut) to the level's depth.

    Raises:
        ValueError: `dilations` is neither.
    """

    def is_dilation(d) -> bool:
        return isinstance(d, int) and not isinstance(d, bool) and d >= 1

    if is_dilation(dilations):
        dilations = [[dilations]] * len(depths)
    if (
        not isinstance(dilations, (list, tuple))
        or len(dilations) != len(depths)
        or not all(isinstance(level, (list, tuple)) and level and all(map(is_dilation, level)) for level in dilations)
    ):
        raise ValueError(
            f"dilations: got {dilations!r}, expected a positive int, or {len(depths)} lists of positive ints, one a "
            "level, such as [[1, 8], [1, 4], [1, 2], [1]]; each is repeated to its level's depth"
        )
    return [list(islice(cycle(level), depth)) for level, depth in zip(dilations, depths, strict=True)]


def spread_drop_path(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return one stochastic depth rate per block: from 0 to `rate`, linear over all blocks in order."""
    total = sum(depths)
    rates = iter([rate * i / max(total - 1, 1) for i in range(total)])
    return [list(islice(rates, depth)) for depth in depths]


class NAT(StagedBackbone):
    """NAT and DiNAT: a convolutional stem and four levels of neighbourhood attention at strides 4, 8, 16 and 32.

    Images of any size from 32x32: sides are rounded up at each level and short maps are padded inside the attention.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dim: Width of the first level; each next one is twice as wide.
        depths: Blocks per level.
        num_heads: Attention heads per level.
        mlp_ratio: Hidden width of the MLPs over the level's width.
        kernel_size: Neighbourhood size.
        dilations: An int for all blocks, or a pattern per level, repeated to the level's depth.
        layer_scale: Initial layer scale of the blocks; None for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Levels with a norm on their dense output; where given, the model has no final norm and no classifier.

    Raises:
        ValueError: `dilations`, `num_heads` or `out_norms` does not fit the architecture.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: Dilations = 1,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__()
        widths = [embed_dim * 2**i for i in range(len(depths))]
        self.patch_embed = ConvTokenizer(in_chans, embed_dim)
        self.levels = build_levels(
            widths, depths, num_heads, mlp_ratio, kernel_size, dilations, drop_path_rate, ConvDownsampler, layer_scale
        )
        self.feature_info = [
            dict(num_chs=width, reduction=4 * 2**i, module=f"levels.{i}.blocks") for i, width in enumerate(widths)
        ]
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate, out_norms)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run level `i` on the output of the one before it (of the stem for the first)."""
        if i > 0:
            x = self.levels[i - 1].downsample(x)
        return self.levels[i].blocks(x)

    def keep_stages(self, count: int) -> None:
        """Drop the levels after the first `count`."""
        del self.levels[count:]
        self.levels[-1].downsample = nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per level, or per block with each downsampler beside the block before it."""
        return dict(
            stem=r"^patch_embed",
            blocks=r"^levels\.(\d+)"
            if coarse
            else [
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                (r"^levels\.(\d+)\.downsample", (99999,)),
                (r"^norm", (99999,)),
            ],
        )


def build_levels(
    widths: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: float,
    kernel_size: int,
    dilations: Dilations,
    drop_path_rate: float,
    downsampler: type[nn.Module],
    layer_scale: float | None = None,
) -> nn.ModuleList:
    """Build levels of neighbourhood attention blocks, with a downsampler after each but the last."""
    if len(num_heads) != len(depths):
        raise ValueError(f"num_heads: got {num_heads!r}, expected one a level, as depths {depths!r}")
    levels = nn.ModuleList()
    rates = spread_drop_path(drop_path_rate, depths)
    for i, level_dilations in enumerate(spread_dilations(dilations, depths)):
        blocks = Blocks(
            *(
                Block(
                    widths[i],
                    NeighborhoodAttention(widths[i], num_heads[i], kernel_size, dilation),
                    mlp_ratio,
                    drop_path,
                    layer_scale,
                )
                for dilation, drop_path in zip(level_dilations, rates[i], strict=True)
            )
        )
        levels.append(Level(blocks, downsampler(widths[i]) if i < len(depths) - 1 else nn.Identity()))
    return levels


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert a published state dict, classification or dense, to the keys and shapes of `model`.

    Keys need no change. Bias tables of another kernel size are resized bicubically, as the published 11x11 weights of
    DiNAT-Large were made from the 7x7 ones.
    """
    own = dict(model.named_parameters())
    return {
        name: resize_bias(value, own[name].shape[1:]) if name.endswith(".rpb") and name in own else value
        for name, value in state_dict.items()
    }


def resize_bias(table: Tensor, size: Sequence[int | torch.SymInt]) -> Tensor:
    """Resize a relative position bias table (heads, rows, columns) bicubically; the same tensor where the size fits."""
    return resize_table(table, dict(enumerate(size, 1)), "bicubic")


_NAT_TINY = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0)
_NAT_MINI = dict(_NAT_TINY, depths=(3, 4, 6, 5))
_NAT_SMALL = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.0)
_NAT_BASE = dict(embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2.0, layer_scale=1e-5)
DILATIONS_224 = ((1, 8), (1, 4), (1, 2), (1,))
DILATIONS_384 = ((1, 13), (1, 6), (1, 3), (1,))
_DINAT_LARGE = dict(
    embed_dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2.0, dilations=DILATIONS_224
)

VARIANTS: dict[str, dict] = {
    "nat_mini": _NAT_MINI,
    "nat_tiny": _NAT_TINY,
    "nat_small": dict(_NAT_SMALL, layer_scale=1e-5),
    "nat_base": _NAT_BASE,
    "dinat_mini": dict(_NAT_MINI, dilations=DILATIONS_224),
    "dinat_tiny": dict(_NAT_TINY, dilations=DILATIONS_224),
    "dinat_small": dict(_NAT_SMALL, dilations=DILATIONS_224),
    "dinat_base": dict(_NAT_BASE, dilations=DILATIONS_224),
    "dinat_large": _DINAT_LARGE,
    "dinat_large_384": dict(_DINAT_LARGE, dilations=DILATIONS_384),
    "dinat_large_384_11x11": dict(_DINAT_LARGE, kernel_size=11),
    "dinat_large_21k": _DINAT_LARGE,
    "dinat_large_21k_11x11": dict(_DINAT_LARGE, kernel_size=11),
}


def shi_labs_cfg(path: str, **kwargs) -> dict:
    """Return timm's description of published weights at `path` under shi-labs.com/projects."""
    cfg = dict(
        url="https://shi-labs.com/projects/" + path,
        license="mit",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj.0",
        classifier="head",
    )
    return cfg | kwargs


def _dinat_cfg(file: str, **kwargs) -> dict:
    return shi_labs_cfg("dinat/checkpoints/" + file, **kwargs)


AT_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": shi_labs_cfg("nat/checkpoints/CLS/nat_mini.pth"),
        "nat_tiny.in1k": shi_labs_cfg("nat/checkpoints/CLS/nat_tiny.pth"),
        "nat_small.in1k": shi_labs_cfg("nat/checkpoints/CLS/nat_small.pth"),
        "nat_base.in1k": shi_labs_cfg("nat/checkpoints/CLS/nat_base.pth"),
        "dinat_mini.in1k": _dinat_cfg("imagenet1k/dinat_mini_in1k_224.pth"),
        "dinat_tiny.in1k": _dinat_cfg("imagenet1k/dinat_tiny_in1k_224.pth"),
        "dinat_small.in1k": _dinat_cfg("imagenet1k/dinat_small_in1k_224.pth"),
        "dinat_base.in1k": _dinat_cfg("imagenet1k/dinat_base_in1k_224.pth"),
        "dinat_large.in22k_ft_in1k": _dinat_cfg("imagenet1k/dinat_large_in22k_in1k_224.pth"),
        "dinat_large_384.in22k_ft_in1k": _dinat_cfg("imagenet1k/dinat_large_in22k_in1k_384.pth", **AT_384),
        "dinat_large_384_11x11.in22k_ft_in1k": _dinat_cfg("imagenet1k/dinat_large_in22k_in1k_384_11x11.pth", **AT_384),
        "dinat_large_21k.in22k": _dinat_cfg("imagenet22k/dinat_large_in22k_224.pth", num_classes=21841),
        "dinat_large_21k_11x11.in22k": _dinat_cfg(
            "imagenet22k/dinat_large_in22k_224_11x11interp.pth", num_classes=21841
        ),
    }
)


def _create(variant: str, pretrained: bool, **kwargs) -> NAT:
    kwargs = VARIANTS[variant] | kwargs
    return build_model_with_cfg(
        NAT,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter(checkpoint_filter_fn),
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["depths"]))), feature_cls="getter"),
        **kwargs,
    )


@register_model
def nat_mini(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Mini, ImageNet-1k."""
    return _create("nat_mini", pretrained, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Tiny, ImageNet-1k."""
    return _create("nat_tiny", pretrained, **kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Small, ImageNet-1k."""
    return _create("nat_small", pretrained, **kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Base, ImageNet-1k."""
    return _create("nat_base", pretrained, **kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Mini, ImageNet-1k."""
    return _create("dinat_mini", pretrained, **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Tiny, ImageNet-1k."""
    return _create("dinat_tiny", pretrained, **kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Small, ImageNet-1k."""
    return _create("dinat_small", pretrained, **kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Base, ImageNet-1k."""
    return _create("dinat_base", pretrained, **kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large, ImageNet-22k then 1k."""
    return _create("dinat_large", pretrained, **kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large, ImageNet-22k then 1k at 384x384."""
    return _create("dinat_large_384", pretrained, **kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large with 11x11 neighbourhoods, ImageNet-22k then 1k at 384x384."""
    return _create("dinat_large_384_11x11", pretrained, **kwargs)


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large, ImageNet-22k."""
    return _create("dinat_large_21k", pretrained, **kwargs)


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large, ImageNet-22k, bias tables resized to 11x11 neighbourhoods."""
    return _create("dinat_large_21k_11x11", pretrained, **kwargs)
