"""DiNAT_s, dilated neighbourhood attention in Swin's skeleton (arXiv 2209.15001).

Code and weights were published at github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT). Parameter names are
those of the published checkpoints. Blocks, padding and `dilations` are NAT's; stem and downsampling are Swin's.
"""

from collections.abc import Sequence

import torch
from densezoo.backbones.nat import (
    AT_384,
    DILATIONS_224,
    DILATIONS_384,
    Dilations,
    build_levels,
    checkpoint_filter_fn,
    shi_labs_cfg,
)
from densezoo.backbones.staged import (
    StagedBackbone,
    convolve,
    init_weights,
    pad_to_multiple,
    pretrained_filter,
)
from densezoo.ops.norm import LayerNorm, PreNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Take images (B, in_chans, H, W) to a normed map (B, ceil(H / size), ceil(W / size), dim), one position a patch.

    Sides that `size` does not divide are zero-padded at the bottom or right.
    """

    def __init__(self, in_chans: int, dim: int, size: int):
        super().__init__()
        self.size = size
        self.proj = nn.Conv2d(in_chans, dim, size, stride=size)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.norm(convolve(self.proj, pad_to_multiple(x.permute(0, 2, 3, 1), self.size)))


class PatchMerging(nn.Module):
    """Take a map (B, H, W, dim) to (B, ceil(H / 2), ceil(W / 2), 2 * dim): 2x2 patches, normed, then projected.

    Odd sides are zero-padded at the bottom or right.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = PreNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        x = pad_to_multiple(x, 2)
        # Channels of the four positions in the order (row, column) = (0, 0), (1, 0), (0, 1), (1, 1).
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        return self.reduction(self.norm(x))


class DiNAT_s(StagedBackbone):
    """DiNAT_s: patches of 4x4 and four levels of dilated neighbourhood attention at strides 4, 8, 16 and 32.

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
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        kernel_size: int = 7,
        dilations: Dilations = DILATIONS_224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__()
        widths = [embed_dim * 2**i for i in range(len(depths))]
        self.patch_embed = PatchEmbed(in_chans, embed_dim, size=4)
        self.layers = build_levels(
            widths, depths, num_heads, mlp_ratio, kernel_size, dilations, drop_path_rate, PatchMerging
        )
        self.feature_info = [
            dict(num_chs=width, reduction=4 * 2**i, module=f"layers.{i}.blocks") for i, width in enumerate(widths)
        ]
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate, out_norms)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run level `i` on the output of the one before it (of the stem for the first)."""
        if i > 0:
            x = self.layers[i - 1].downsample(x)
        return self.layers[i].blocks(x)

    def keep_stages(self, count: int) -> None:
        """Drop the levels after the first `count`."""
        del self.layers[count:]
        self.layers[-1].downsample = nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per level, or per block with each downsampler beside the block before it."""
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99999,)),
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^patch_embed", blocks=r"^layers\.(\d+)" if coarse else blocks)


_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
_LARGE = dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48))

VARIANTS: dict[str, dict] = {
    "dinat_s_tiny": _TINY,
    "dinat_s_small": dict(_TINY, depths=(2, 2, 18, 2)),
    "dinat_s_base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "dinat_s_large": _LARGE,
    "dinat_s_large_384": dict(_LARGE, dilations=DILATIONS_384),
    "dinat_s_large_21k": _LARGE,
}


def _cfg(file: str, **kwargs) -> dict:
    return shi_labs_cfg("dinat/checkpoints/" + file, first_conv="patch_embed.proj", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224.pth"),
        "dinat_s_small.in1k": _cfg("imagenet1k/dinat_s_small_in1k_224.pth"),
        "dinat_s_base.in1k": _cfg("imagenet1k/dinat_s_base_in1k_224.pth"),
        "dinat_s_large.in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224.pth"),
        "dinat_s_large_384.in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_384.pth", **AT_384),
        "dinat_s_large_21k.in22k": _cfg("imagenet22k/dinat_s_large_in22k_224.pth", num_classes=21841),
    }
)


def _create(variant: str, pretrained: bool, **kwargs) -> DiNAT_s:
    kwargs = VARIANTS[variant] | kwargs
    return build_model_with_cfg(
        DiNAT_s,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter(checkpoint_filter_fn),
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["depths"]))), feature_cls="getter"),
        **kwargs,
    )


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs) -> DiNAT_s:
    """DiNAT_s-Tiny, ImageNet-1k."""
    return _create("dinat_s_tiny", pretrained, **kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs) -> DiNAT_s:
    """DiNAT_s-Small, ImageNet-1k."""
    return _create("dinat_s_small", pretrained, **kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs) -> DiNAT_s:
    """DiNAT_s-Base, ImageNet-1k."""
    return _create("dinat_s_base", pretrained, **kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs) -> DiNAT_s:
    """DiNAT_s-Large, ImageNet-22k then 1k."""
    return _create("dinat_s_large", pretrained, **kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs) -> DiNAT_s:
    """DiNAT_s-Large, ImageNet-22k then 1k at 384x384."""
    return _create("dinat_s_large_384", pretrained, **kwargs)


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs) -> DiNAT_s:
    """DiNAT_s-Large, ImageNet-22k."""
    return _create("dinat_s_large_21k", pretrained, **kwargs)
