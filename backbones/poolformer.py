"""PoolFormer and the other MetaFormers of its paper (arXiv 2111.11418), and PoolFormerV2 (arXiv 2210.13452).

Code and weights were published at github.com/sail-sg/poolformer and, of PoolFormerV2, github.com/sail-sg/metaformer
(both Apache-2.0); timm hosts copies. `checkpoint_filter_fn` takes the official files, classification and dense, and
timm's. Published, PoolFormer norms the last map and pools it; timm pools first, so that its logits differ: a model
computes in the order of the file that it loaded, and its state dict says which. The hybrid MetaFormers, published for
224x224, take any size here: position embeddings are resized, and matrices over positions see a resized map. Of the
random mixer no code or weights were published with the paper; it is that of the same authors' later MetaFormer code.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from densezoo.backbones.nat import spread_drop_path
from densezoo.backbones.staged import (
    Blocks,
    StagedBackbone,
    check_per_stage,
    convolve,
    init_weights,
    pretrained_filter,
    rename_keys,
    resize_tokens,
    square_side,
)
from densezoo.ops import pool_mix
from densezoo.ops.backend import is_exporting
from densezoo.ops.pooling import add_branch
from densezoo.ops.pooling.reference import map_norm, pool_less_self
from densezoo.ops.precision import autocast_dtype
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class GroupNorm1(nn.Module):
    """Normalise maps (B, H, W, dim), each over all its positions and channels, and scale and shift the channels."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        return map_norm(x, self.weight, self.bias, self.eps)


class FinalNorm(GroupNorm1):
    """The norm of the last map or, with `pool_first`, of the pooled vector.

    The state dict holds which it is, as a count, which all that save, average and broadcast models leave alone.
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.register_buffer("order", torch.tensor(0))
        # What the buffer says, known without asking a device.
        self._pool_first = False

    @property
    def pool_first(self) -> bool:
        """Whether the norm comes after the pooling."""
        return self._pool_first

    @pool_first.setter
    def pool_first(self, value: bool) -> None:
        self._pool_first = value
        self.order.fill_(int(value))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`, a map (B, H, W, dim) or vectors (..., dim)."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-6) if self.pool_first else super().forward(x)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}order" in state_dict:
            self._pool_first = bool(state_dict[f"{prefix}order"])


class Pooling(nn.Module):
    """Mean of the 3x3 neighbours inside a map (B, H, W, dim), less the position itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        return pool_less_self(x)


class Attention(nn.Module):
    """Multi-head attention, 32 channels a head, of each position of a map (B, H, W, dim) to all."""

    def __init__(self, dim: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        height, width = x.shape[1:3]
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, -1, 32)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


class PositionMixer(nn.Module):
    """Mix the positions of a map (B, H, W, dim) by a matrix over them, one for all channels.

    The matrix is made for `side` x `side` positions: another map is resized to them bilinearly, and the result back.
    """

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def matrix(self) -> Tensor:
        """Return the matrix (side * side, side * side), outputs before inputs."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        size = x.shape[1:3]
        x = _resize(x.permute(0, 3, 1, 2), (self.side, self.side))
        x = F.linear(x.flatten(2), self.matrix()).unflatten(2, (self.side, self.side))
        return _resize(x, size).permute(0, 2, 3, 1)


def _resize(x: Tensor, size: Sequence[int | torch.SymInt]) -> Tensor:
    """Resize maps (B, dim, H, W) bilinearly; the same tensor where the size fits."""
    if not is_exporting() and x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class SpatialFc(PositionMixer):
    """A learned linear layer over positions, without bias."""

    def __init__(self, side: int):
        super().__init__(side)
        self.fc = nn.Linear(side * side, side * side, bias=False)

    def matrix(self) -> Tensor:
        """Return the matrix (side * side, side * side), outputs before inputs."""
        return self.fc.weight


class RandomMixing(PositionMixer):
    """A fixed random matrix over positions, whose rows are softmaxes of uniform numbers.

    It is drawn from a seed of its own, so that a model mixes alike wherever it is built.
    """

    def __init__(self, side: int, seed: int):
        super().__init__(side)
        matrix = torch.empty(side * side, side * side)
        if not matrix.is_meta:
            matrix.uniform_(generator=torch.Generator(matrix.device).manual_seed(seed))
        self.register_buffer("random_matrix", matrix.softmax(-1))

    def matrix(self) -> Tensor:
        """Return the matrix (side * side, side * side), outputs before inputs."""
        return self.random_matrix


# Called with the width, the side of the map at the trained size and the number of the block in the model.
TOKEN_MIXERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "identity": lambda dim, side, number: nn.Identity(),
    "random": lambda dim, side, number: RandomMixing(side, seed=number),
    "pooling": lambda dim, side, number: Pooling(),
    "attention": lambda dim, side, number: Attention(dim),
    "spatial_fc": lambda dim, side, number: SpatialFc(side),
}


class StarReLU(nn.Module):
    """A scaled and shifted square of ReLU."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`."""
        return self.scale * F.relu(x).square() + self.bias


class Block(nn.Module):
    """Pre-norm token mixer and MLP over a map (B, H, W, dim), with stochastic depth.

    Where given, `layer_scale` multiplies the branches and `res_scale` the shortcuts, channel by channel.
    """

    def __init__(
        self,
        dim: int,
        token_mixer: nn.Module,
        mlp: nn.Module,
        norm_layer: Callable[[int], nn.Module],
        drop_path: float,
        layer_scale: float | None,
        res_scale: float | None,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.token_mixer = token_mixer
        self.norm2 = norm_layer(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.layer_scale_1, self.layer_scale_2, self.res_scale_1, self.res_scale_2 = (
            None if value is None else nn.Parameter(torch.full((dim,), value))
            for value in (layer_scale, layer_scale, res_scale, res_scale)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        if type(self.token_mixer) is Pooling and type(self.norm1) is GroupNorm1 and self.res_scale_1 is None:
            first, second = self.norm1, self.norm2
            x, y = pool_mix(
                x, first.weight, first.bias, second.weight, second.bias, first.eps,
                layer_scale=self.layer_scale_1, drop=self._drop(x),
            )  # fmt: skip
        else:
            x = self._add(x, self.token_mixer(self.norm1(x)), self.layer_scale_1, self.res_scale_1)
            y = self.norm2(x)
        if self._folds(y):
            # The scale of the MLP's last layer gives its gradient without a pass over the map.
            scale, mlp = self.layer_scale_2, self.mlp
            y = F.linear(mlp.act(mlp.fc1(y)), scale[:, None] * mlp.fc2.weight)
            return add_branch(x, y, scale * mlp.fc2.bias, self._drop(x))
        return self._add(x, self.mlp(y), self.layer_scale_2, self.res_scale_2)

    def _add(self, x: Tensor, y: Tensor, layer_scale: Tensor | None, res_scale: Tensor | None) -> Tensor:
        y = self.drop_path(y if layer_scale is None else layer_scale * y)
        return (x if res_scale is None else res_scale * x) + y

    def _drop(self, x: Tensor) -> Tensor | None:
        """Return what stochastic depth multiplies a branch of `x` by, (B, 1, 1, 1); None for 1."""
        if not self.training or isinstance(self.drop_path, nn.Identity):
            return None
        return self.drop_path(x.new_ones(x.shape[0], 1, 1, 1))

    def _folds(self, x: Tensor) -> bool:
        """Return whether the MLP of `x` takes the layer scale into its last weight: float16 does not hold it there."""
        if self.layer_scale_2 is None or self.res_scale_2 is not None or is_exporting():
            return False
        return (autocast_dtype(x) or x.dtype) != torch.float16


class PatchEmbed(nn.Module):
    """Take images (B, in_chans, H, W) to a map (B, (H + 1) // 4, (W + 1) // 4, dim) by overlapping patches of 7x7."""

    def __init__(self, in_chans: int, dim: int, norm: nn.Module):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=2)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.norm(convolve(self.conv, x.permute(0, 2, 3, 1)))


class Downsample(nn.Module):
    """Take a map (B, H, W, dim) to (B, ceil(H / 2), ceil(W / 2), out_dim) by a norm and overlapping patches of 3x3."""

    def __init__(self, dim: int, out_dim: int, norm: nn.Module):
        super().__init__()
        self.norm = norm
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """The step to a resolution, a position embedding of `side` x `side` where that is given, and the blocks there."""

    def __init__(self, dim: int, downsample: nn.Module, side: int | None, blocks: Blocks):
        super().__init__()
        self.pos_embed = None if side is None else nn.Parameter(torch.zeros(1, side * side, dim))
        self.downsample = downsample
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of the stage."""
        x = self.downsample(x)
        if self.pos_embed is not None:
            height, width = x.shape[1:3]
            x = x + resize_tokens(self.pos_embed, height, width).unflatten(1, (height, width))
        return self.blocks(x)


class PoolFormer(StagedBackbone):
    """PoolFormer and other MetaFormers: stages of a token mixer and an MLP at strides 4, 8, 16 and 32.

    Images of any size from 32x32. The stem leaves out up to two pixels at the bottom and right, as published.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dims: Width of each stage.
        depths: Blocks per stage.
        token_mixers: 'pooling', 'identity', 'random', 'attention' or 'spatial_fc', per stage. The first stage of
            attention starts with a position embedding.
        layer_scale: Initial layer scale of the blocks; None for none.
        channel_norm: Whether norms are LayerNorms over the channels; else each takes its whole map as one group.
        version: 2 for PoolFormerV2: StarReLU, no biases in MLPs and norms, norms beside the convolutions, scaled
            shortcuts in the last two stages, and the final norm after the pooling.
        img_size: Image side that position embeddings and matrices over positions are made for.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output; where given, the model has no final norm and no classifier.

    Raises:
        ValueError: `embed_dims`, `token_mixers`, `version`, `img_size` or `out_norms` does not fit the architecture.
    """

    # The published recipe decays the position embeddings.
    position_tables = ()

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        token_mixers: Sequence[str] = ("pooling", "pooling", "pooling", "pooling"),
        layer_scale: float | None = 1e-5,
        channel_norm: bool = False,
        version: int = 1,
        img_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__()
        check_per_stage(depths, embed_dims=embed_dims, token_mixers=token_mixers)
        if unknown := set(token_mixers) - TOKEN_MIXERS.keys():
            raise ValueError(f"token_mixers: got {', '.join(unknown)}, expected of {', '.join(TOKEN_MIXERS)}")
        if version not in (1, 2):
            raise ValueError(f"version: got {version!r}, expected 1 or 2")
        norm_layer, conv_norm, mlp = nn.LayerNorm if channel_norm else GroupNorm1, lambda dim: nn.Identity(), Mlp
        if version == 2:
            norm_layer = partial(norm_layer, eps=1e-6, bias=False)
            conv_norm, mlp = partial(nn.LayerNorm, eps=1e-6, bias=False), partial(Mlp, act_layer=StarReLU, bias=False)
        self.patch_embed = PatchEmbed(in_chans, embed_dims[0], conv_norm(embed_dims[0]))
        self.stages = nn.ModuleList()
        self.feature_info = []
        for i, rates in enumerate(spread_drop_path(drop_path_rate, depths)):
            dim, mixer, reduction = embed_dims[i], token_mixers[i], 4 * 2**i
            if mixer == "attention" and dim % 32:
                raise ValueError(f"embed_dims: got {dim} for stage {i} of attention, expected a multiple of 32")
            side = square_side(img_size) // reduction
            res_scale = 1.0 if version == 2 and i >= len(depths) - 2 else None
            first = sum(depths[:i])
            parts = (
                (TOKEN_MIXERS[mixer](dim, side, first + j), mlp(dim, 4 * dim), norm_layer, rate)
                for j, rate in enumerate(rates)
            )
            downsample = Downsample(embed_dims[i - 1], dim, conv_norm(embed_dims[i - 1])) if i else nn.Identity()
            self.stages.append(
                Stage(
                    dim,
                    downsample,
                    side if mixer == "attention" and mixer not in token_mixers[:i] else None,
                    Blocks(*(Block(dim, *part, layer_scale, res_scale) for part in parts)),
                )
            )
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
        self.apply(init_weights)
        if version == 2 and not out_norms:
            self.build_head(num_classes, global_pool, drop_rate, out_norms, norm_eps=1e-6, pool_first=True)
            return
        self.build_head(
            num_classes, global_pool, drop_rate, out_norms, norm_layer=nn.LayerNorm if channel_norm else GroupNorm1
        )
        if isinstance(self.norm, GroupNorm1):
            self.norm = FinalNorm(self.num_features)

    @property
    def pool_first(self) -> bool:
        """Whether the final norm comes after the pooling."""
        return getattr(self.norm, "pool_first", False)

    @pool_first.setter
    def pool_first(self, value: bool) -> None:
        self.norm.pool_first = value

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run stage `i` on the output of the one before it (of the stem for the first)."""
        return self.stages[i](x)

    def keep_stages(self, count: int) -> None:
        """Drop the stages after the first `count`."""
        del self.stages[count:]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per stage, or per block, with what leads to the stage beside the first."""
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|pos_embed)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^patch_embed", blocks=r"^stages\.(\d+)" if coarse else blocks)


_FROM_TIMM = {
    r"^stem\.": "patch_embed.",
    r"\.(layer|res)_scale([12])\.scale$": r".\1_scale_\2",
    r"^head\.norm\.": "norm.",
    r"^head\.fc\.": "head.",
}
_ORDER = "norm.order"


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert a published state dict (official, dense or timm's) to the keys of `model`."""
    if any(name.startswith("stem.") for name in state_dict):
        converted, pool_first = rename_keys(state_dict, _FROM_TIMM), True
    else:
        converted, pool_first = _from_official(state_dict), False
    for name, value in converted.items():
        # 1x1 convolutions, and a position embedding that lies like a map.
        if name.endswith((".fc1.weight", ".fc2.weight")):
            converted[name] = value.flatten(1)
        elif name.endswith(".pos_embed") and value.dim() == 4:
            converted[name] = value.flatten(2).mT
    if "norm.weight" in converted and isinstance(getattr(model, "norm", None), FinalNorm):
        converted.setdefault(_ORDER, torch.tensor(int(pool_first), device="cpu"))
    return converted


def _from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parts of the one list, `network`, that holds the stages and what leads from each to the next."""
    indices = sorted({int(name.split(".")[1]) for name in state_dict if name.startswith("network.")})
    rules, stage = {}, 0
    for i in indices:
        if f"network.{i}.proj.weight" in state_dict:
            stage += 1
            rules[rf"^network\.{i}\.proj\."] = f"stages.{stage}.downsample.conv."
        elif f"network.{i}.pos_embed" in state_dict:
            rules[rf"^network\.{i}\."] = f"stages.{stage}."
        else:
            rules[rf"^norm{i}\."] = f"norm{stage}."
            rules[rf"^network\.{i}\."] = f"stages.{stage}.blocks."
    return rename_keys(state_dict, rules | {r"^patch_embed\.proj\.": "patch_embed.conv."})


_S, _M = (64, 128, 320, 512), (96, 192, 384, 768)
_S12 = dict(embed_dims=_S, depths=(2, 2, 6, 2))
_SIZES: dict[str, dict] = {
    "s12": _S12,
    "s24": dict(embed_dims=_S, depths=(4, 4, 12, 4)),
    "s36": dict(embed_dims=_S, depths=(6, 6, 18, 6)),
    "m36": dict(embed_dims=_M, depths=(6, 6, 18, 6)),
    "m48": dict(embed_dims=_M, depths=(8, 8, 24, 8)),
}


def _hybrid(*token_mixers: str, **kwargs) -> dict:
    return dict(_S12, token_mixers=token_mixers, **kwargs)


VARIANTS: dict[str, dict] = {
    **{
        f"densezoo_poolformer_{size}": dict(arch, layer_scale=1e-5 if size in ("s12", "s24") else 1e-6)
        for size, arch in _SIZES.items()
    },
    **{f"densezoo_poolformerv2_{size}": dict(arch, layer_scale=None, version=2) for size, arch in _SIZES.items()},
    "metaformer_id_s12": _hybrid(*["identity"] * 4),
    "metaformer_random_s12_224": _hybrid(*["random"] * 4),
    "metaformer_pppa_s12_224": _hybrid("pooling", "pooling", "pooling", "attention", channel_norm=True),
    "metaformer_ppaa_s12_224": _hybrid("pooling", "pooling", "attention", "attention", channel_norm=True),
    "metaformer_pppf_s12_224": _hybrid("pooling", "pooling", "pooling", "spatial_fc"),
    "metaformer_ppff_s12_224": _hybrid("pooling", "pooling", "spatial_fc", "spatial_fc"),
}


def _cfg(file: str = "", **kwargs) -> dict:
    cfg = dict(
        url=file and "https://github.com/sail-sg/poolformer/releases/download/v1.0/" + file,
        license="apache-2.0",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.9,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.conv",
        classifier="head",
    )
    return cfg | kwargs


def _v2_cfg(size: str) -> dict:
    return _cfg(hf_hub_id=f"timm/poolformerv2_{size}.sail_in1k", crop_pct=1.0)


default_cfgs = generate_default_cfgs(
    {
        "densezoo_poolformer_s12.sail_in1k": _cfg("poolformer_s12.pth.tar"),
        "densezoo_poolformer_s24.sail_in1k": _cfg("poolformer_s24.pth.tar"),
        "densezoo_poolformer_s36.sail_in1k": _cfg("poolformer_s36.pth.tar"),
        "densezoo_poolformer_m36.sail_in1k": _cfg("poolformer_m36.pth.tar", crop_pct=0.95),
        "densezoo_poolformer_m48.sail_in1k": _cfg("poolformer_m48.pth.tar", crop_pct=0.95),
        **{f"densezoo_poolformerv2_{size}.sail_in1k": _v2_cfg(size) for size in _SIZES},
        "metaformer_id_s12.sail_in1k": _cfg("metaformer_id_s12.pth.tar"),
        "metaformer_random_s12_224": _cfg(),
        "metaformer_pppa_s12_224.sail_in1k": _cfg("metaformer_pppa_s12_224.pth.tar", crop_pct=0.95),
        "metaformer_ppaa_s12_224.sail_in1k": _cfg("metaformer_ppaa_s12_224.pth.tar", crop_pct=0.95),
        "metaformer_pppf_s12_224.sail_in1k": _cfg("metaformer_pppf_s12_224.pth.tar"),
        "metaformer_ppff_s12_224.sail_in1k": _cfg("metaformer_ppff_s12_224.pth.tar"),
    }
)


def _create(variant: str, pretrained: bool, **kwargs) -> PoolFormer:
    kwargs = VARIANTS[variant] | kwargs
    return build_model_with_cfg(
        PoolFormer,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter(checkpoint_filter_fn),
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["depths"]))), feature_cls="getter"),
        **kwargs,
    )


@register_model
def densezoo_poolformer_s12(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormer-S12, ImageNet-1k."""
    return _create("densezoo_poolformer_s12", pretrained, **kwargs)


@register_model
def densezoo_poolformer_s24(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormer-S24, ImageNet-1k."""
    return _create("densezoo_poolformer_s24", pretrained, **kwargs)


@register_model
def densezoo_poolformer_s36(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormer-S36, ImageNet-1k."""
    return _create("densezoo_poolformer_s36", pretrained, **kwargs)


@register_model
def densezoo_poolformer_m36(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormer-M36, ImageNet-1k."""
    return _create("densezoo_poolformer_m36", pretrained, **kwargs)


@register_model
def densezoo_poolformer_m48(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormer-M48, ImageNet-1k."""
    return _create("densezoo_poolformer_m48", pretrained, **kwargs)


@register_model
def densezoo_poolformerv2_s12(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormerV2-S12, ImageNet-1k."""
    return _create("densezoo_poolformerv2_s12", pretrained, **kwargs)


@register_model
def densezoo_poolformerv2_s24(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormerV2-S24, ImageNet-1k."""
    return _create("densezoo_poolformerv2_s24", pretrained, **kwargs)


@register_model
def densezoo_poolformerv2_s36(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormerV2-S36, ImageNet-1k."""
    return _create("densezoo_poolformerv2_s36", pretrained, **kwargs)


@register_model
def densezoo_poolformerv2_m36(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormerV2-M36, ImageNet-1k."""
    return _create("densezoo_poolformerv2_m36", pretrained, **kwargs)


@register_model
def densezoo_poolformerv2_m48(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormerV2-M48, ImageNet-1k."""
    return _create("densezoo_poolformerv2_m48", pretrained, **kwargs)


@register_model
def metaformer_id_s12(pretrained: bool = False, **kwargs) -> PoolFormer:
    """MetaFormer-S12 without token mixing, ImageNet-1k."""
    return _create("metaformer_id_s12", pretrained, **kwargs)


@register_model
def metaformer_random_s12_224(pretrained: bool = False, **kwargs) -> PoolFormer:
    """MetaFormer-S12 with fixed random token mixing, without weights."""
    return _create("metaformer_random_s12_224", pretrained, **kwargs)


@register_model
def metaformer_pppa_s12_224(pretrained: bool = False, **kwargs) -> PoolFormer:
    """MetaFormer-S12 with pooling in three stages and attention in the last, ImageNet-1k."""
    return _create("metaformer_pppa_s12_224", pretrained, **kwargs)


@register_model
def metaformer_ppaa_s12_224(pretrained: bool = False, **kwargs) -> PoolFormer:
    """MetaFormer-S12 with pooling in two stages and attention in two, ImageNet-1k."""
    return _create("metaformer_ppaa_s12_224", pretrained, **kwargs)


@register_model
def metaformer_pppf_s12_224(pretrained: bool = False, **kwargs) -> PoolFormer:
    """MetaFormer-S12 with pooling in three stages and a spatial MLP in the last, ImageNet-1k."""
    return _create("metaformer_pppf_s12_224", pretrained, **kwargs)


@register_model
def metaformer_ppff_s12_224(pretrained: bool = False, **kwargs) -> PoolFormer:
    """MetaFormer-S12 with pooling in two stages and a spatial MLP in two, ImageNet-1k."""
    return _create("metaformer_ppff_s12_224", pretrained, **kwargs)
