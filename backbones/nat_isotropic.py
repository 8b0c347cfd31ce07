"""Isotropic NAT and DiNAT, and ViT-rpb, their counterpart with full attention (arXiv 2209.15001).

Code and weights were published at github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT). Parameter names are
those of the published checkpoints. The published ViT-rpb runs at 224x224 only; here its bias tables are resized
bicubically to maps of another size, which changes nothing at the trained one.
"""

import torch
import torch.nn.functional as F
from densezoo.backbones import nat
from densezoo.backbones.dinat_s import PatchEmbed
from densezoo.backbones.nat import Block, NeighborhoodAttention, resize_bias, shi_labs_cfg, spread_drop_path
from densezoo.backbones.staged import Blocks, StagedBackbone, init_weights, pretrained_filter
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class FullAttention(nn.Module):
    """Multi-head attention of each position of a map (B, H, W, dim) to all, with relative position bias.

    The bias table (heads, 2 * map_size - 1, 2 * map_size - 1) holds one entry per offset of key from query; a map of
    another size takes the table resized bicubically.
    """

    def __init__(self, dim: int, num_heads: int, map_size: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of dim {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * map_size - 1, 2 * map_size - 1))
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        height, width = x.shape[1:3]
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.position_bias(height, width).to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).flatten(2).unflatten(1, (height, width)))

    def position_bias(self, height: int | torch.SymInt, width: int | torch.SymInt) -> Tensor:
        """Return the bias (heads, height * width, height * width) of a map, queries before keys."""
        table = resize_bias(self.rpb, (2 * height - 1, 2 * width - 1))
        rows, columns = (torch.arange(size, device=table.device) for size in (height, width))
        row = rows[None, :] - rows[:, None] + height - 1
        column = columns[None, :] - columns[:, None] + width - 1
        return table[:, row[:, None, :, None], column[None, :, None, :]].flatten(3, 4).flatten(1, 2)


class NATIsotropic(StagedBackbone):
    """Patches of 16x16 and blocks of one width: neighbourhood attention, every other block dilated, or full attention.

    Images of any size: sides that 16 does not divide are zero-padded at the bottom or right.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dim: Width.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over the width.
        kernel_size: Neighbourhood size; None for full attention (ViT-rpb).
        dilation: Dilation of every second block; the others have 1.
        img_size: Image side that the bias tables of full attention are made for.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: (0,) for a norm on the dense output, in place of the final norm and the classifier.

    Raises:
        ValueError: `num_heads` or `out_norms` does not fit the architecture.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int | None = 7,
        dilation: int = 1,
        img_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: tuple[int, ...] = (),
    ):
        super().__init__()
        patch_size = 16
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.layers = Blocks()
        for i, drop_path in enumerate(spread_drop_path(drop_path_rate, [depth])[0]):
            if kernel_size is None:
                attn = FullAttention(embed_dim, num_heads, img_size // patch_size)
            else:
                attn = NeighborhoodAttention(embed_dim, num_heads, kernel_size, dilation if i % 2 else 1)
            self.layers.append(Block(embed_dim, attn, mlp_ratio, drop_path))
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module="layers")]
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate, out_norms)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run the blocks, the only stage."""
        return self.layers(x)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per block."""
        return dict(stem=r"^patch_embed", blocks=[(r"^layers\.(\d+)", None), (r"^norm", (99999,))])


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert a published state dict to the keys and shapes of `model`.

    The index that ViT-rpb stores beside each bias table is dropped: here it is computed. Bias tables of another size
    are resized bicubically.
    """
    state_dict = {name: value for name, value in state_dict.items() if not name.endswith(".relative_position_index")}
    return nat.checkpoint_filter_fn(state_dict, model)


_SMALL = dict(embed_dim=384, num_heads=12)
_BASE = dict(embed_dim=768, num_heads=24)

VARIANTS: dict[str, dict] = {
    "nat_isotropic_small": _SMALL,
    "dinat_isotropic_small": dict(_SMALL, dilation=2),
    "vitrpb_small": dict(_SMALL, kernel_size=None),
    "nat_isotropic_base": _BASE,
    "dinat_isotropic_base": dict(_BASE, dilation=2),
    "vitrpb_base": dict(_BASE, kernel_size=None),
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": shi_labs_cfg(
            f"dinat/checkpoints/isotropic/{name}_in1k_224.pth", first_conv="patch_embed.proj", pool_size=(14, 14)
        )
        for name in VARIANTS
    }
)


def _create(variant: str, pretrained: bool, **kwargs) -> NATIsotropic:
    return build_model_with_cfg(
        NATIsotropic,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter(checkpoint_filter_fn),
        feature_cfg=dict(out_indices=(0,), feature_cls="getter"),
        **(VARIANTS[variant] | kwargs),
    )


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """Isotropic NAT, small, ImageNet-1k."""
    return _create("nat_isotropic_small", pretrained, **kwargs)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """Isotropic DiNAT, small, ImageNet-1k."""
    return _create("dinat_isotropic_small", pretrained, **kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """ViT with relative position bias, small, ImageNet-1k."""
    return _create("vitrpb_small", pretrained, **kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """Isotropic NAT, base, ImageNet-1k."""
    return _create("nat_isotropic_base", pretrained, **kwargs)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """Isotropic DiNAT, base, ImageNet-1k."""
    return _create("dinat_isotropic_base", pretrained, **kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """ViT with relative position bias, base, ImageNet-1k."""
    return _create("vitrpb_base", pretrained, **kwargs)
