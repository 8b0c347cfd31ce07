"""FLatten, focused linear attention in DeiT, PVT, PVTv2, Swin and CSwin (arXiv 2308.00442).

Code and weights were published at github.com/LeapLabTHU/FLatten-Transformer, which states no licence of its own; its
Swin and CSwin files build on MIT-licensed ones. Parameter names are those of the published checkpoints.

The published models run at their trained size alone. Here maps of any size work: position encodings are resized
bicubically, which changes nothing at the trained size. No dense models were published; with `out_norms` the models are
what their hosts' dense versions are.

Of FLatten-DeiT the paper gives size and accuracy alone, and no code was published. Here it is DeiT with focused linear
attention in every block, pooled over the map: no class token, and, as every block encodes positions, no position
embedding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from densezoo.backbones.agent import create, leaplab_cfg, resize_square
from densezoo.backbones.cswin import CSwin
from densezoo.backbones.dinat_s import PatchEmbed
from densezoo.backbones.nat import spread_drop_path
from densezoo.backbones.pvt import NORM_EPS, PVT, Block
from densezoo.backbones.staged import Blocks, StagedBackbone, init_weights, resize_tokens, square_side
from densezoo.backbones.swin import Swin, resize_bias_table
from densezoo.ops import depthwise_conv, focused_linear_attention
from densezoo.ops.depthwise import DepthwiseConv
from densezoo.ops.mlp import Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn


class FocusedBase(nn.Module):
    """What focused linear attention is in every host: feature scales, an encoding of the keys, and a convolution.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        map_size: Side of the map that the position encoding is made for; it is resized bicubically to others.
    """

    def __init__(self, dim: int, num_heads: int, map_size: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of dim {dim}")
        self.num_heads = num_heads
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))
        self.positional_encoding = nn.Parameter(torch.zeros(1, map_size * map_size, dim))
        # One filter for each channel of a head, the same for all heads.
        head_dim = dim // num_heads
        self.dwc = nn.Conv2d(head_dim, head_dim, 5, padding=2, groups=head_dim)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend over a map: (B, H, W, dim) each, with the heads together, to the same."""
        size = query.shape[1:3]
        encoding = resize_tokens(self.positional_encoding, *size)
        tokens = (x.flatten(1, 2) for x in (query, key, value))
        query, key, heads, encoding, scale = (
            x.unflatten(-1, (self.num_heads, -1)) for x in (*tokens, encoding, F.softplus(self.scale))
        )
        x = focused_linear_attention(query, key, heads, scale[0, 0], positional_encoding=encoding[0])
        return x.flatten(2).unflatten(1, size) + self.convolve_heads(value)

    def convolve_heads(self, x: Tensor) -> Tensor:
        """Convolve each head of a map (B, H, W, dim) with the same filters."""
        weight, bias = self.dwc.weight.repeat(self.num_heads, 1, 1, 1), self.dwc.bias.repeat(self.num_heads)
        return depthwise_conv(x, weight, bias)


class FocusedLinearAttention(FocusedBase):
    """Focused linear attention of Swin, DeiT and PVT (`fused` False) over a map (B, H, W, dim)."""

    def __init__(self, dim: int, num_heads: int, map_size: int, fused: bool = True):
        super().__init__(dim, num_heads, map_size)
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q = nn.Linear(dim, dim)
            self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        # As tokens: torch.compile would store a map that two layers take as it likes convolutions to, rows innermost.
        sides, x = x.shape[1:3], x.flatten(1, 2)
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), *self.kv(x).chunk(2, -1))
        q, k, v = (part.unflatten(1, sides) for part in parts)
        return self.proj(self.attend(q, k, v))


class CSwinFocusedLinearAttention(FocusedBase):
    """Focused linear attention of CSwin: takes a projected map (B, H, W, 3 * dim) to (B, H, W, dim).

    It keeps the convolution `get_v` of CSwin's attention beside its own.
    """

    def __init__(self, dim: int, num_heads: int, map_size: int):
        super().__init__(dim, num_heads, map_size)
        self.get_v = DepthwiseConv(dim)

    def forward(self, qkv: Tensor) -> Tensor:
        """Return the map."""
        q, k, v = qkv.chunk(3, -1)
        return self.attend(q, k, v) + self.get_v(v)


class FLattenDeiT(StagedBackbone):
    """Focused linear attention in DeiT without class token: patches of 16x16, one width, one stage.

    Images of any size: sides that 16 does not divide are zero-padded at the bottom or right.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dim: Width.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over the width.
        img_size: Image side that the position encodings are made for.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: (0,) for a norm on the dense output, in place of the final norm and the classifier.

    Raises:
        ValueError: `num_heads`, `img_size` or `out_norms` does not fit the architecture.
    """

    # Focused linear attention has no tables that the published recipes spare.
    position_tables = ()

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        img_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__()
        patch_size = 16
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.patch_embed.norm = nn.Identity()
        self.blocks = Blocks()
        for rate in spread_drop_path(drop_path_rate, [depth])[0]:
            attn = FocusedLinearAttention(embed_dim, num_heads, square_side(img_size) // patch_size)
            self.blocks.append(Block(embed_dim, attn, Mlp(embed_dim, int(embed_dim * mlp_ratio)), rate))
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module="blocks")]
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate, out_norms, norm_eps=NORM_EPS)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run the blocks, the only stage."""
        return self.blocks(x)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per block."""
        return dict(stem=r"^patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])


class FLattenPVT(PVT):
    """Focused linear attention in every stage of PVT.

    Images of any size from 32x32; rows and columns that the last patch does not reach are left out.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dims: Width of each stage.
        depths: Blocks per stage.
        num_heads: Attention heads per stage.
        mlp_ratios: Hidden width of the MLPs over the stage's width.
        img_size: Image side that the position tables are made for.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output; where given, the model has no classifier.

    Raises:
        ValueError: An argument does not fit the others; the message names it.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        img_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            img_size=img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            out_norms=out_norms,
            attention=lambda i, dim, heads, side: FocusedLinearAttention(dim, heads, side, fused=False),
        )


class FLattenPVTv2(FLattenPVT):
    """Focused linear attention in every stage of PVTv2; arguments as for `FLattenPVT`.

    Images of any size from 32x32: sides are rounded up at each stage. Every stage ends with a norm, so that `out_norms`
    adds none: where given, the model has no classifier.
    """

    overlapping = True


class FLattenSwin(Swin):
    """Focused linear attention in the first two stages of Swin, Swin's windows in the others.

    Images of any size from 32x32: sides are rounded up at each stage, and padded to whole windows inside the attention.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dim: Width of the first stage; each next one is twice as wide.
        depths: Blocks per stage.
        num_heads: Attention heads per stage.
        mlp_ratio: Hidden width of the MLPs over the stage's width.
        window_size: Side of a window.
        img_size: Image side that the position tables are made for.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output; where given, the model has no final norm and no classifier,
            and shifts the windows of every second block, those of the last stage too.

    Raises:
        ValueError: An argument does not fit the others; the message names it.
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
        window_size: int = 7,
        img_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            window_size=window_size,
            img_size=img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            out_norms=out_norms,
            attention=lambda i, j, dim, heads, side: FocusedLinearAttention(dim, heads, side) if i < 2 else None,
        )


class FLattenCSwin(CSwin):
    """Focused linear attention in the first two stages of CSwin, then its stripes, then attention over the whole map.

    Images of any size from 32x32.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dim: Width of the first stage; each next one is twice as wide.
        depths: Blocks per stage.
        num_heads: Attention heads per stage.
        mlp_ratio: Hidden width of the MLPs over the stage's width.
        stripe_width: Width of the stripes of the third stage.
        img_size: Image side that the position tables are made for.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output; where given, the model has no final norm and no classifier.

    Raises:
        ValueError: An argument does not fit the others; the message names it.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        stripe_width: int = 7,
        img_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            stripe_width=stripe_width,
            img_size=img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            out_norms=out_norms,
            attention=lambda i, dim, heads, side: CSwinFocusedLinearAttention(dim, heads, side),
        )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert a published state dict to the keys and shapes of `model`.

    Dropped are the index tables and masks that Swin's files hold, which are computed here, and the final norm of PVT's,
    which the published model never applies. Position tables made for another image size are resized bicubically, as in
    the published code for fine-tuning.
    """
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    converted = {}
    for name, value in state_dict.items():
        leaf = name.rsplit(".", 1)[-1]
        unused = name in ("norm.weight", "norm.bias") and isinstance(model, PVT)
        if leaf in ("relative_position_index", "attn_mask") or unused:
            continue
        shape = own.get(name, value.shape)
        if value.shape == shape:
            pass
        elif leaf == "positional_encoding" or leaf.startswith("pos_embed"):
            value = resize_square(value, shape[1])
        elif leaf == "relative_position_bias_table":
            value = resize_bias_table(value, shape[0])
        converted[name] = value
    return converted


_PVT_V2_B1 = dict(embed_dims=(64, 128, 320, 512), depths=(2, 2, 2, 2))
_SWIN_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
_CSWIN_BASE = dict(embed_dim=96, depths=(3, 6, 29, 2), num_heads=(4, 8, 16, 32))

VARIANTS: dict[str, dict] = {
    "flatten_deit_tiny": dict(embed_dim=192, num_heads=3),
    "flatten_pvt_tiny": dict(depths=(2, 2, 2, 2)),
    "flatten_pvt_small": dict(depths=(3, 4, 6, 3)),
    "flatten_pvt_medium": dict(depths=(3, 4, 18, 3)),
    "flatten_pvt_large": dict(depths=(3, 8, 27, 3)),
    "flatten_pvt_v2_b0": dict(_PVT_V2_B1, embed_dims=(32, 64, 160, 256)),
    "flatten_pvt_v2_b1": _PVT_V2_B1,
    "flatten_pvt_v2_b2": dict(_PVT_V2_B1, depths=(3, 4, 6, 3)),
    "flatten_pvt_v2_b3": dict(_PVT_V2_B1, depths=(3, 4, 18, 3)),
    "flatten_pvt_v2_b4": dict(_PVT_V2_B1, depths=(3, 8, 27, 3)),
    "flatten_swin_tiny": dict(depths=(2, 2, 6, 2)),
    "flatten_swin_small": dict(depths=(2, 2, 18, 2)),
    "flatten_swin_base": _SWIN_BASE,
    "flatten_swin_base_384": dict(_SWIN_BASE, window_size=12, img_size=384),
    "flatten_cswin_tiny": dict(depths=(2, 4, 18, 1)),
    "flatten_cswin_small": dict(depths=(2, 4, 32, 2)),
    "flatten_cswin_base": _CSWIN_BASE,
    "flatten_cswin_base_384": dict(_CSWIN_BASE, stripe_width=12, img_size=384),
}


def _pvt(file: str | None = None) -> dict:
    return leaplab_cfg(file, "patch_embed1.proj")


def _swin(file: str | None, size: int = 224) -> dict:
    return leaplab_cfg(file, "patch_embed.proj", size, crop_pct=0.875 if size == 224 else 1.0)


def _cswin(file: str | None = None, size: int = 224) -> dict:
    return leaplab_cfg(file, "stage1_conv_embed.0", size)


# Those without an id were never published.
default_cfgs = generate_default_cfgs(
    {
        "flatten_deit_tiny": leaplab_cfg(None, "patch_embed.proj", pool_size=(14, 14)),
        "flatten_pvt_tiny.in1k": _pvt("3ab1d773f19d45648690"),
        "flatten_pvt_small": _pvt(),
        "flatten_pvt_medium": _pvt(),
        "flatten_pvt_large": _pvt(),
        "flatten_pvt_v2_b0.in1k": _pvt("5d1f01532b104da28e7b"),
        "flatten_pvt_v2_b1": _pvt(),
        "flatten_pvt_v2_b2": _pvt(),
        "flatten_pvt_v2_b3": _pvt(),
        "flatten_pvt_v2_b4": _pvt(),
        "flatten_swin_tiny.in1k": _swin("e1518e76703e4e57a7f2"),
        "flatten_swin_small.in1k": _swin("94188e52af354bf4a88b"),
        "flatten_swin_base.in1k": _swin("7a9e5186bad04e7fb3a9"),
        "flatten_swin_base_384.in1k": _swin("0d0330cf2e5249f1abb6", 384),
        "flatten_cswin_tiny.in1k": _cswin("48ba765ba8b0451d9d5a"),
        "flatten_cswin_small": _cswin(),
        "flatten_cswin_base": _cswin(),
        "flatten_cswin_base_384": _cswin(None, 384),
    }
)


def _create(cls: type[StagedBackbone], variant: str, pretrained: bool, **kwargs) -> StagedBackbone:
    return create(cls, variant, pretrained, checkpoint_filter_fn, VARIANTS[variant] | kwargs)


@register_model
def flatten_deit_tiny(pretrained: bool = False, **kwargs) -> FLattenDeiT:
    """FLatten-DeiT-Tiny, ImageNet-1k."""
    return _create(FLattenDeiT, "flatten_deit_tiny", pretrained, **kwargs)


@register_model
def flatten_pvt_tiny(pretrained: bool = False, **kwargs) -> FLattenPVT:
    """FLatten-PVT-Tiny, ImageNet-1k."""
    return _create(FLattenPVT, "flatten_pvt_tiny", pretrained, **kwargs)


@register_model
def flatten_pvt_small(pretrained: bool = False, **kwargs) -> FLattenPVT:
    """FLatten-PVT-Small, ImageNet-1k."""
    return _create(FLattenPVT, "flatten_pvt_small", pretrained, **kwargs)


@register_model
def flatten_pvt_medium(pretrained: bool = False, **kwargs) -> FLattenPVT:
    """FLatten-PVT-Medium, ImageNet-1k."""
    return _create(FLattenPVT, "flatten_pvt_medium", pretrained, **kwargs)


@register_model
def flatten_pvt_large(pretrained: bool = False, **kwargs) -> FLattenPVT:
    """FLatten-PVT-Large, ImageNet-1k."""
    return _create(FLattenPVT, "flatten_pvt_large", pretrained, **kwargs)


@register_model
def flatten_pvt_v2_b0(pretrained: bool = False, **kwargs) -> FLattenPVTv2:
    """FLatten-PVTv2-B0, ImageNet-1k."""
    return _create(FLattenPVTv2, "flatten_pvt_v2_b0", pretrained, **kwargs)


@register_model
def flatten_pvt_v2_b1(pretrained: bool = False, **kwargs) -> FLattenPVTv2:
    """FLatten-PVTv2-B1, ImageNet-1k."""
    return _create(FLattenPVTv2, "flatten_pvt_v2_b1", pretrained, **kwargs)


@register_model
def flatten_pvt_v2_b2(pretrained: bool = False, **kwargs) -> FLattenPVTv2:
    """FLatten-PVTv2-B2, ImageNet-1k."""
    return _create(FLattenPVTv2, "flatten_pvt_v2_b2", pretrained, **kwargs)


@register_model
def flatten_pvt_v2_b3(pretrained: bool = False, **kwargs) -> FLattenPVTv2:
    """FLatten-PVTv2-B3, ImageNet-1k."""
    return _create(FLattenPVTv2, "flatten_pvt_v2_b3", pretrained, **kwargs)


@register_model
def flatten_pvt_v2_b4(pretrained: bool = False, **kwargs) -> FLattenPVTv2:
    """FLatten-PVTv2-B4, ImageNet-1k."""
    return _create(FLattenPVTv2, "flatten_pvt_v2_b4", pretrained, **kwargs)


@register_model
def flatten_swin_tiny(pretrained: bool = False, **kwargs) -> FLattenSwin:
    """FLatten-Swin-Tiny, ImageNet-1k."""
    return _create(FLattenSwin, "flatten_swin_tiny", pretrained, **kwargs)


@register_model
def flatten_swin_small(pretrained: bool = False, **kwargs) -> FLattenSwin:
    """FLatten-Swin-Small, ImageNet-1k."""
    return _create(FLattenSwin, "flatten_swin_small", pretrained, **kwargs)


@register_model
def flatten_swin_base(pretrained: bool = False, **kwargs) -> FLattenSwin:
    """FLatten-Swin-Base, ImageNet-1k."""
    return _create(FLattenSwin, "flatten_swin_base", pretrained, **kwargs)


@register_model
def flatten_swin_base_384(pretrained: bool = False, **kwargs) -> FLattenSwin:
    """FLatten-Swin-Base, ImageNet-1k at 384x384."""
    return _create(FLattenSwin, "flatten_swin_base_384", pretrained, **kwargs)


@register_model
def flatten_cswin_tiny(pretrained: bool = False, **kwargs) -> FLattenCSwin:
    """FLatten-CSwin-Tiny, ImageNet-1k."""
    return _create(FLattenCSwin, "flatten_cswin_tiny", pretrained, **kwargs)


@register_model
def flatten_cswin_small(pretrained: bool = False, **kwargs) -> FLattenCSwin:
    """FLatten-CSwin-Small, ImageNet-1k."""
    return _create(FLattenCSwin, "flatten_cswin_small", pretrained, **kwargs)


@register_model
def flatten_cswin_base(pretrained: bool = False, **kwargs) -> FLattenCSwin:
    """FLatten-CSwin-Base, ImageNet-1k."""
    return _create(FLattenCSwin, "flatten_cswin_base", pretrained, **kwargs)


@register_model
def flatten_cswin_base_384(pretrained: bool = False, **kwargs) -> FLattenCSwin:
    """FLatten-CSwin-Base, ImageNet-1k at 384x384."""
    return _create(FLattenCSwin, "flatten_cswin_base_384", pretrained, **kwargs)
