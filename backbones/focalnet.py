"""FocalNet, Focal Modulation Networks (arXiv 2203.11926).

Code and weights were published at github.com/microsoft/FocalNet (MIT); parameter names are those of its checkpoints.
`checkpoint_filter_fn` takes them, classification and dense, and timm's. The two layouts compute the same but for
large_fl4, in which timm leaves out the normalisation of the modulator: each file keeps its own numbers. Focal windows
are no fixed part of a checkpoint: kernels are zero-padded or cropped around their centre, as the published detectors
start from narrower classifiers. The dense layout convolves the image one pixel further to the left and top where
`use_conv_embed` is set, as published.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from densezoo.backbones.nat import Level, spread_drop_path
from densezoo.backbones.staged import (
    Blocks,
    StagedBackbone,
    check_per_stage,
    convolve,
    init_weights,
    pad_to_multiple,
    pretrained_filter,
    rename_keys,
)
from densezoo.ops import focal_modulation
from densezoo.ops.backend import is_exporting
from densezoo.ops.mlp import Mlp
from densezoo.ops.norm import LayerNorm, PreNorm
from densezoo.ops.precision import autocast_dtype
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class AlignedLinear(nn.Linear):
    """A linear layer whose product is in 16 bits a multiple of 8 channels wide; the first ones are its output.

    For other widths cuBLAS takes kernels that read single numbers.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Take (..., in_features) to (..., out_features)."""
        spare = -self.out_features % 8
        if is_exporting() or (autocast_dtype(input) or input.dtype).itemsize != 2:
            return super().forward(input)
        weight, bias = F.pad(self.weight, (0, 0, 0, spare)), F.pad(self.bias, (0, spare))
        return F.linear(input, weight, bias)[..., : self.out_features]


class PointwiseConv(nn.Conv2d):
    """The parameters of a 1x1 convolution, applied to a map (B, H, W, dim)."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Return a map of the shape of `input`."""
        return F.linear(input, self.weight.flatten(1), self.bias)


class FocalModulation(nn.Module):
    """Multiply each position of a map (B, H, W, dim) by what the focal levels around it hold.

    Level l convolves level l - 1 with a depthwise kernel of `focal_window + 2 * l`.
    """

    def __init__(
        self, dim: int, focal_level: int, focal_window: int, use_postln_in_modulation: bool, normalize_modulator: bool
    ):
        super().__init__()
        self.normalize_modulator = normalize_modulator
        self.split = (dim, dim, focal_level + 1)
        self.f = AlignedLinear(dim, sum(self.split))
        self.h = PointwiseConv(dim)
        # Sequences for the sake of the published names; the operator convolves.
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, focal_window + 2 * level, groups=dim, bias=False))
            for level in range(focal_level)
        )
        self.ln = PreNorm(dim) if use_postln_in_modulation else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        query, context, gates = self.f(x).split(self.split, dim=-1)
        weights = [layer[0].weight for layer in self.focal_layers]
        context = focal_modulation(context, gates, weights, normalize_modulator=self.normalize_modulator)
        return self.proj(self.ln(query * self.h(context)))


class Block(nn.Module):
    """Focal modulation and MLP over a map (B, H, W, dim), each with its norm before or, `use_postln`, after it."""

    def __init__(
        self,
        dim: int,
        modulation: FocalModulation,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
        use_postln: bool,
    ):
        super().__init__()
        self.use_postln = use_postln
        self.norm1 = PreNorm(dim)
        self.modulation = modulation
        self.norm2 = PreNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.gamma_1, self.gamma_2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        sides = x.shape[1:3]
        # As tokens: torch.compile would store maps of four axes as it likes convolutions to, rows innermost.
        x = x.flatten(1, 2)
        for layer, norm, gamma in (
            (self.modulation, self.norm1, self.gamma_1),
            (self.mlp, self.norm2, self.gamma_2),
        ):
            y = x if self.use_postln else norm(x)
            y = layer(y.unflatten(1, sides)).flatten(1, 2)
            y = norm(y) if self.use_postln else y
            x = x + self.drop_path(y if gamma is None else gamma * y)
        return x.unflatten(1, sides)


class PatchEmbed(nn.Module):
    """Take a map (B, in_chans, H, W) to a normed one (B, ceil(H / stride), ceil(W / stride), dim).

    Sides that `stride` does not divide are zero-padded at the bottom or right.
    """

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, padding: int = 0):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        x = pad_to_multiple(x.permute(0, 2, 3, 1), self.proj.stride[0])
        return self.norm(convolve(self.proj, x))


class FocalNet(StagedBackbone):
    """FocalNet: a patch embedding and stages of focal modulation, each next one at half the resolution.

    Images of any size: sides are rounded up at each stage.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        patch_size: Side of the patches of the stem, the stride of the first stage.
        embed_dim: Width of the first stage; each next one is twice as wide.
        depths: Blocks per stage.
        mlp_ratio: Hidden width of the MLPs over the stage's width.
        focal_levels: Focal levels per stage, the mean of the map aside.
        focal_windows: Kernel size of the first focal level, per stage; each next level's is larger by 2.
        layer_scale: Initial layer scale of the blocks; None for none.
        use_conv_embed: Whether the patches of the stem, 7x7 for a `patch_size` of 4, and between stages, 3x3, overlap.
        use_postln: Whether the norms of a block come after its modulation and its MLP.
        use_postln_in_modulation: Whether the modulated query is normed before its projection.
        normalize_modulator: Whether to divide the sum over the focal levels by their number.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output; where given, the model has no final norm and no classifier.

    Raises:
        ValueError: `focal_levels`, `focal_windows`, `use_conv_embed` or `out_norms` does not fit the architecture.
    """

    # The published recipes decay all but norms and biases.
    position_tables = ()

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        mlp_ratio: float = 4.0,
        focal_levels: Sequence[int] = (2, 2, 2, 2),
        focal_windows: Sequence[int] = (3, 3, 3, 3),
        layer_scale: float | None = None,
        use_conv_embed: bool = False,
        use_postln: bool = False,
        use_postln_in_modulation: bool = False,
        normalize_modulator: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__()
        check_per_stage(depths, focal_levels=focal_levels, focal_windows=focal_windows)
        if min(focal_levels) < 1:
            raise ValueError(f"focal_levels: got {focal_levels!r}, expected at least 1 per stage")
        if not all(window > 0 and window % 2 for window in focal_windows):
            raise ValueError(f"focal_windows: got {focal_windows!r}, expected odd kernel sizes")
        if use_conv_embed and patch_size != 4:
            raise ValueError(f"use_conv_embed: its stem has stride 4, but patch_size is {patch_size}")
        stem, step = dict(kernel_size=patch_size, stride=patch_size), dict(kernel_size=2, stride=2)
        if use_conv_embed:
            stem = dict(kernel_size=7, stride=4, padding=3 if out_norms else 2)
            step = dict(kernel_size=3, stride=2, padding=1)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, **stem)
        self.layers = nn.ModuleList()
        self.feature_info = []
        for i, rates in enumerate(spread_drop_path(drop_path_rate, depths)):
            dim = embed_dim * 2**i
            flags = use_postln_in_modulation, normalize_modulator
            blocks = Blocks(
                *(
                    Block(
                        dim,
                        FocalModulation(dim, focal_levels[i], focal_windows[i], *flags),
                        mlp_ratio,
                        rate,
                        layer_scale,
                        use_postln,
                    )
                    for rate in rates
                )
            )
            downsample = PatchEmbed(dim, 2 * dim, **step) if i < len(depths) - 1 else nn.Identity()
            self.layers.append(Level(blocks, downsample))
            self.feature_info.append(dict(num_chs=dim, reduction=patch_size * 2**i, module=f"layers.{i}.blocks"))
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate, out_norms)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run stage `i` on the output of the one before it (of the stem for the first)."""
        if i > 0:
            x = self.layers[i - 1].downsample(x.permute(0, 3, 1, 2))
        return self.layers[i].blocks(x)

    def keep_stages(self, count: int) -> None:
        """Drop the stages after the first `count`."""
        del self.layers[count:]
        self.layers[-1].downsample = nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per stage, or per block with each downsampling beside the block before it."""
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99999,)),
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^patch_embed", blocks=r"^layers\.(\d+)" if coarse else blocks)


_FROM_TIMM = {
    r"^stem\.": "patch_embed.",
    r"^layers\.1\.downsample\.": "layers.0.downsample.",
    r"^layers\.2\.downsample\.": "layers.1.downsample.",
    r"^layers\.3\.downsample\.": "layers.2.downsample.",
    r"\.norm([12])_post\.": r".norm\1.",
    r"\.ls([12])\.gamma$": r".gamma_\1",
    r"\.modulation\.norm\.": ".modulation.ln.",
    r"^head\.fc\.": "head.",
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert a published state dict (official, dense or timm's) to the keys and shapes of `model`.

    Kernels of other focal windows are zero-padded or cropped around their centre. For focal levels that only `model`
    has, the gates are zero and the kernels those of `model`; a checkpoint with more levels does not fit.
    """
    own = model.state_dict()
    if any(name.startswith("stem.") for name in state_dict):
        state_dict = _convert_timm(state_dict, model)
    fitted = {name: _fit(name, value, own[name]) if name in own else value for name, value in state_dict.items()}
    if any(".focal_layers." in name for name in state_dict):
        fitted |= {name: own[name] for name in own.keys() - fitted.keys() if ".focal_layers." in name}
    return fitted


def _convert_timm(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    converted = rename_keys(state_dict, _FROM_TIMM)
    for name, value in converted.items():
        # Its linear layers are 1x1 convolutions.
        if name.endswith((".f.weight", ".modulation.proj.weight", ".fc1.weight", ".fc2.weight")):
            converted[name] = value.flatten(1)
    for name, module in model.named_modules():
        weight = f"{name}.h.weight"
        if isinstance(module, FocalModulation) and module.normalize_modulator and weight in converted:
            # timm's model does not divide by this, so its file has to give the same without.
            converted[weight] = converted[weight] * module.split[-1]
    return converted


def _fit(name: str, value: Tensor, own: Tensor) -> Tensor:
    """Fit a kernel to another focal window, or a projection to more focal levels; return others as they are."""
    if value.dim() == own.dim() == 4 and ".focal_layers." in name:
        margin = (own.shape[-1] - value.shape[-1]) // 2
        return F.pad(value, (margin,) * 4) if margin else value
    if name.endswith((".f.weight", ".f.bias")) and len(value) < len(own) and value.shape[1:] == own.shape[1:]:
        new_gates = value.new_zeros(len(own) - len(value), *value.shape[1:])
        # The gate of the mean stays last.
        return torch.cat([value[:-1], new_gates, value[-1:]])
    return value


_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2))
_SMALL = dict(embed_dim=96, depths=(2, 2, 18, 2))
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2))
_LRF = dict(focal_levels=(3, 3, 3, 3))
_FL3 = dict(
    depths=(2, 2, 18, 2),
    focal_levels=(3, 3, 3, 3),
    focal_windows=(5, 5, 5, 5),
    layer_scale=1e-4,
    use_conv_embed=True,
    use_postln=True,
)
_FL4 = dict(_FL3, focal_levels=(4, 4, 4, 4), focal_windows=(3, 3, 3, 3))
_HUGE = dict(embed_dim=352, focal_windows=(3, 3, 3, 3), use_postln_in_modulation=True)
_ISO = dict(patch_size=16, depths=(12,), focal_levels=(3,), focal_windows=(3,))

VARIANTS: dict[str, dict] = {
    "densezoo_focalnet_tiny_srf": _TINY,
    "densezoo_focalnet_tiny_lrf": _TINY | _LRF,
    "densezoo_focalnet_small_srf": _SMALL,
    "densezoo_focalnet_small_lrf": _SMALL | _LRF,
    "densezoo_focalnet_base_srf": _BASE,
    "densezoo_focalnet_base_lrf": _BASE | _LRF,
    "densezoo_focalnet_tiny_iso": dict(_ISO, embed_dim=192),
    "densezoo_focalnet_small_iso": dict(_ISO, embed_dim=384),
    "densezoo_focalnet_base_iso": dict(_ISO, embed_dim=768, layer_scale=1e-4, use_postln=True),
    "densezoo_focalnet_large_fl3": dict(_FL3, embed_dim=192),
    "densezoo_focalnet_large_fl4": dict(_FL4, embed_dim=192, normalize_modulator=True),
    "densezoo_focalnet_xlarge_fl3": dict(_FL3, embed_dim=256),
    "densezoo_focalnet_xlarge_fl4": dict(_FL4, embed_dim=256),
    "densezoo_focalnet_huge_fl3": _FL3 | _HUGE,
    "densezoo_focalnet_huge_fl4": _FL4 | _HUGE,
}


def _cfg(url: str, **kwargs) -> dict:
    cfg = dict(
        url=url,
        license="mit",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj",
        classifier="head",
    )
    return cfg | kwargs


def _release_cfg(file: str, **kwargs) -> dict:
    return _cfg("https://github.com/microsoft/FocalNet/releases/download/v1.0.0/" + file, **kwargs)


def _storage_cfg(file: str, **kwargs) -> dict:
    return _cfg("https://projects4jw.blob.core.windows.net/focalnet/release/classification/" + file, **kwargs)


_IN22K = dict(num_classes=21842)
_IN22K_384 = dict(_IN22K, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

default_cfgs = generate_default_cfgs(
    {
        "densezoo_focalnet_tiny_srf.ms_in1k": _release_cfg("focalnet_tiny_srf.pth"),
        "densezoo_focalnet_tiny_lrf.ms_in1k": _release_cfg("focalnet_tiny_lrf.pth"),
        "densezoo_focalnet_small_srf.ms_in1k": _release_cfg("focalnet_small_srf.pth"),
        "densezoo_focalnet_small_lrf.ms_in1k": _release_cfg("focalnet_small_lrf.pth"),
        "densezoo_focalnet_base_srf.ms_in1k": _release_cfg("focalnet_base_srf.pth"),
        "densezoo_focalnet_base_lrf.ms_in1k": _release_cfg("focalnet_base_lrf.pth"),
        "densezoo_focalnet_tiny_iso.ms_in1k": _storage_cfg("focalnet_tiny_iso_16.pth", pool_size=(14, 14)),
        "densezoo_focalnet_small_iso.ms_in1k": _storage_cfg("focalnet_small_iso_16.pth", pool_size=(14, 14)),
        "densezoo_focalnet_base_iso.ms_in1k": _storage_cfg("focalnet_base_iso_16.pth", pool_size=(14, 14)),
        "densezoo_focalnet_large_fl3.ms_in22k": _release_cfg("focalnet_large_lrf_384.pth", **_IN22K_384),
        "densezoo_focalnet_large_fl4.ms_in22k": _release_cfg("focalnet_large_lrf_384_fl4.pth", **_IN22K_384),
        "densezoo_focalnet_xlarge_fl3.ms_in22k": _release_cfg("focalnet_xlarge_lrf_384.pth", **_IN22K_384),
        "densezoo_focalnet_xlarge_fl4.ms_in22k": _release_cfg("focalnet_xlarge_lrf_384_fl4.pth", **_IN22K_384),
        "densezoo_focalnet_huge_fl3.ms_in22k": _storage_cfg("focalnet_huge_lrf_224.pth", **_IN22K),
        "densezoo_focalnet_huge_fl4.ms_in22k": _storage_cfg("focalnet_huge_lrf_224_fl4.pth", num_classes=0),
    }
)


def _create(variant: str, pretrained: bool, **kwargs) -> FocalNet:
    kwargs = VARIANTS[variant] | kwargs
    return build_model_with_cfg(
        FocalNet,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter(checkpoint_filter_fn),
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["depths"]))), feature_cls="getter"),
        **kwargs,
    )


@register_model
def densezoo_focalnet_tiny_srf(pretrained: bool = False, **kwargs) -> FocalNet:
    """FocalNet-Tiny with 2 focal levels, ImageNet-1k."""
    return _create("densezoo_focalnet_tiny_srf", pretrained, **kwargs)


@register_model
def densezoo_focalnet_tiny_lrf(pretrained: bool = False, **kwargs) -> FocalNet:
    """FocalNet-Tiny with 3 focal levels, ImageNet-1k."""
    return _create("densezoo_focalnet_tiny_lrf", pretrained, **kwargs)


@register_model
def densezoo_focalnet_small_srf(pretrained: bool = False, **kwargs) -> FocalNet:
    """FocalNet-Small with 2 focal levels, ImageNet-1k."""
    return _create("densezoo_focalnet_small_srf", pretrained, **kwargs)


@register_model
def densezoo_focalnet_small_lrf(pretrained: bool = False, **kwargs) -> FocalNet:
    """FocalNet-Small with 3 focal levels, ImageNet-1k."""
    return _create("densezoo_focalnet_small_lrf", pretrained, **kwargs)


@register_model
def densezoo_focalnet_base_srf(pretrained: bool = False, **kwargs) -> FocalNet:
    """FocalNet-Base with 2 focal levels, ImageNet-1k."""
    return _create("densezoo_focalnet_base_srf", pretrained, **kwargs)


@register_model
def densezoo_focalnet_base_lrf(pretrained: bool = False, **kwargs) -> FocalNet:
    """FocalNet-Base with 3 focal levels, ImageNet-1k."""
    return _create("densezoo_focalnet_base_lrf", pretrained, **kwargs)


@register_model
def densezoo_focalnet_tiny_iso(pretrained: bool = False, **kwargs) -> FocalNet:
    """Isotropic FocalNet-Tiny, one stage at stride 16, ImageNet-1k."""
    return _create("densezoo_focalnet_tiny_iso", pretrained, **kwargs)


@register_model
def densezoo_focalnet_small_iso(pretrained: bool = False, **kwargs) -> FocalNet:
    """Isotropic FocalNet-Small, one stage at stride 16, ImageNet-1k."""
    return _create("densezoo_focalnet_small_iso", pretrained, **kwargs)


@register_model
def densezoo_focalnet_base_iso(pretrained: bool = False, **kwargs) -> FocalNet:
    """Isotropic FocalNet-Base, one stage at stride 16, ImageNet-1k."""
    return _create("densezoo_focalnet_base_iso", pretrained, **kwargs)


@register_model
def densezoo_focalnet_large_fl3(pretrained: bool = False, **kwargs) -> FocalNet:
    """FocalNet-Large with 3 focal levels, ImageNet-22k at 384x384."""
    return _create("densezoo_focalnet_large_fl3", pretrained, **kwargs)


@register_model
def densezoo_focalnet_large_fl4(pretrained: bool = False, **kwargs) -> FocalNet:
    """FocalNet-Large with 4 focal levels, ImageNet-22k at 384x384."""
    return _create("densezoo_focalnet_large_fl4", pretrained, **kwargs)


@register_model
def densezoo_focalnet_xlarge_fl3(pretrained: bool = False, **kwargs) -> FocalNet:
    """FocalNet-XLarge with 3 focal levels, ImageNet-22k at 384x384."""
    return _create("densezoo_focalnet_xlarge_fl3", pretrained, **kwargs)


@register_model
def densezoo_focalnet_xlarge_fl4(pretrained: bool = False, **kwargs) -> FocalNet:
    """FocalNet-XLarge with 4 focal levels, ImageNet-22k at 384x384."""
    return _create("densezoo_focalnet_xlarge_fl4", pretrained, **kwargs)


@register_model
def densezoo_focalnet_huge_fl3(pretrained: bool = False, **kwargs) -> FocalNet:
    """FocalNet-Huge with 3 focal levels, ImageNet-22k."""
    return _create("densezoo_focalnet_huge_fl3", pretrained, **kwargs)


@register_model
def densezoo_focalnet_huge_fl4(pretrained: bool = False, **kwargs) -> FocalNet:
    """FocalNet-Huge with 4 focal levels, ImageNet-22k; its file has no classifier."""
    return _create("densezoo_focalnet_huge_fl4", pretrained, **kwargs)
