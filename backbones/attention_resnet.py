"""ResNets with an attention module, of the papers that introduced it.

These are SE (arXiv 1709.01507), CBAM (1807.06521), BAM (1807.06514), ECA (1910.03151), triplet attention (2010.03045)
and FcaNet (2012.11879). Code and weights were published at github.com/moskomule/senet.pytorch,
Jongchan/attention-module, BangguWu/ECANet, landskape-ai/triplet-attention and cfzd/FcaNet (all MIT). SE's authors
published theirs in Caffe, with the stride in the first convolution of a block; that network is timm's
`legacy_seresnet50`.

The blocks are timm's: their attention, `se`, comes after the last norm of a block and before the shortcut is added, as
in all of these networks. BAM is part of no block, but ends every stage except the last. FcaNet pools maps of other
sizes than those at training to these first, as published. `checkpoint_filter_fn` takes the published files, also those
of mmdet's detectors.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from densezoo.backbones.nat import spread_drop_path
from densezoo.backbones.staged import Blocks, StagedBackbone, check_per_stage, pretrained_filter, rename_keys
from densezoo.ops.backend import is_exporting
from densezoo.ops.plugins import BAM, CBAM, ECA, FCA, SE, Triplet
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import Tensor, nn

# Called with a stage and its kernel size; each returns the class of its blocks' module, options bound.
ATTENTION: dict[str, Callable[[int, int | None], Callable[..., nn.Module] | None]] = {
    "se": lambda stage, kernel_size: SE,
    "cbam": lambda stage, kernel_size: partial(CBAM, kernel_size=kernel_size or 7),
    "bam": lambda stage, kernel_size: None,
    "eca": lambda stage, kernel_size: partial(ECA, kernel_size=kernel_size),
    "triplet": lambda stage, kernel_size: partial(Triplet, kernel_size=kernel_size or 7),
    "fca": lambda stage, kernel_size: partial(FCA, dct_size=max(7, 56 >> stage)),
}
_WITHOUT_KERNEL = ("se", "bam", "fca")


class MaxPool(nn.MaxPool2d):
    """ResNet's pooling, whose exported graph serves odd and even sizes: torch's asks which they are."""

    def forward(self, x: Tensor) -> Tensor:
        """Take maps (B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2))."""
        if not is_exporting():
            return super().forward(x)
        below, beside = (2 * ((size + 1) // 2) - size for size in x.shape[2:])
        return F.max_pool2d(F.pad(x, (1, beside, 1, below), value=float("-inf")), 3, stride=2)


class AttentionResNet(StagedBackbone):
    """ResNet with an attention module in every block, or between stages: maps at strides 4, 8, 16 and 32.

    Images of any size from 32x32. Strides are in the 3x3 convolutions.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dims: Width of each stage's 3x3 convolutions; of four times that is the output of a bottleneck.
        depths: Blocks per stage.
        bottleneck: Whether blocks are bottlenecks, as from ResNet-50 on.
        attention: 'se', 'cbam', 'bam', 'eca', 'triplet' or 'fca'.
        kernel_sizes: Of the modules' convolutions per stage, in CBAM, ECA and triplet attention; by default the
            modules' own.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output, for one's own training: none was published with them.

    Raises:
        ValueError: `embed_dims`, `attention`, `kernel_sizes` or `out_norms` does not fit the architecture.
    """

    output_fmt = "NCHW"
    position_tables = ()

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        bottleneck: bool = True,
        attention: str = "se",
        kernel_sizes: Sequence[int] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"attention: got {attention!r}, expected one of {', '.join(ATTENTION)}")
        if kernel_sizes is None:
            kernel_sizes = (None,) * len(depths)
        elif attention in _WITHOUT_KERNEL:
            raise ValueError(f"kernel_sizes: got {kernel_sizes!r}, expected None, as {attention!r} has no such kernels")
        check_per_stage(depths, embed_dims=embed_dims, kernel_sizes=kernel_sizes)
        width = embed_dims[0]
        self.patch_embed = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False),
                bn1=nn.BatchNorm2d(width),
                act1=nn.ReLU(),
                maxpool=MaxPool(3, stride=2, padding=1),
            )
        )
        block = Bottleneck if bottleneck else BasicBlock
        self.feature_info = []
        for i, rates in enumerate(spread_drop_path(drop_path_rate, depths)):
            layer, out_width = [], embed_dims[i] * block.expansion
            for rate in rates:
                stride = 2 if i and not layer else 1
                shortcut = stride > 1 or width != out_width
                layer.append(
                    block(
                        width,
                        embed_dims[i],
                        stride,
                        downsample_conv(width, out_width, kernel_size=1, stride=stride) if shortcut else None,
                        attn_layer=ATTENTION[attention](i, kernel_sizes[i]),
                        drop_path=DropPath(rate) if rate else None,
                    )
                )
                width = out_width
            if attention == "bam" and i < len(depths) - 1:
                layer.append(BAM(width))
            self.add_module(f"layer{i + 1}", Blocks(*layer))
            self.feature_info.append(dict(num_chs=width, reduction=4 * 2**i, module=f"layer{i + 1}"))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        self.build_head(num_classes, global_pool, drop_rate, out_norms, norm_layer=LayerNorm2d)
        # The last block ends with its activation.
        self.norm = nn.Identity()

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run stage `i` on the output of the one before it (of the stem for the first)."""
        return self.get_submodule(f"layer{i + 1}")(x)

    def keep_stages(self, count: int) -> None:
        """Drop the stages after the first `count`."""
        for i in range(count, self.num_stages):
            delattr(self, f"layer{i + 1}")

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per stage, or one per block."""
        blocks = [(r"^layer(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^patch_embed", blocks=r"^layer(\d+)" if coarse else blocks)


_FROM_PUBLISHED = {
    r"^(conv1|bn1)\.": r"patch_embed.\1.",
    r"^fc\.": "head.",
    # Triplet attention in its ResNet's own file.
    r"\.triplet_attention\.ChannelGateH\.spatial\.": ".se.cw.conv.",
    r"\.triplet_attention\.ChannelGateW\.spatial\.": ".se.hc.conv.",
    r"\.triplet_attention\.SpatialGate\.spatial\.": ".se.hw.conv.",
    r"^(layer\d\.\d+)\.(?:cbam|eca|triplet_attention|att)\.": r"\1.se.",
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert a published state dict to the keys of `model`.

    Raises:
        ValueError: It is FcaNet's, of other frequencies.
    """
    depths = {
        i: len([m for m in layer if not isinstance(m, BAM)])
        for i, layer in enumerate((getattr(model, f"layer{i}", ()) for i in range(1, 4)), start=1)
    }
    rules = _FROM_PUBLISHED | {rf"^bam{i}\.": f"layer{i}.{depth}." for i, depth in depths.items()}
    converted = {}
    for name, value in rename_keys(state_dict, rules).items():
        if name.endswith(".se.dct_layer.weight"):
            fca = dict(model.named_modules()).get(name.removesuffix(".dct_layer.weight"))
            if isinstance(fca, FCA):
                fca.check_published(value)
                continue
        converted[name] = value
        # Torch did not count before 0.4.1.
        if name.endswith(".running_var"):
            converted.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0, device="cpu"))
    return converted


_DEPTHS = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}


def _variant(depth: str, attention: str, *kernel_sizes: int) -> dict:
    kernels = dict(kernel_sizes=kernel_sizes) if kernel_sizes else {}
    return dict(depths=_DEPTHS[depth], bottleneck=int(depth) >= 50, attention=attention, **kernels)


VARIANTS: dict[str, dict] = {
    **{f"se_resnet{depth}": _variant(depth, "se") for depth in _DEPTHS},
    **{f"cbam_resnet{depth}": _variant(depth, "cbam") for depth in ("18", "34", "50", "101")},
    **{f"bam_resnet{depth}": _variant(depth, "bam") for depth in ("18", "34", "50", "101")},
    "eca_resnet18": _variant("18", "eca", 3, 5, 7, 7),
    "eca_resnet34": _variant("34", "eca", 3, 3, 5, 7),
    "eca_resnet50": _variant("50", "eca", 3, 5, 5, 7),
    "eca_resnet101": _variant("101", "eca", 3, 3, 5, 7),
    "eca_resnet152": _variant("152", "eca", 3, 3, 5, 7),
    **{f"triplet_resnet{depth}": _variant(depth, "triplet", 7, 7, 7, 7) for depth in ("18", "34", "50", "101")},
    **{f"triplet_resnet{depth}_k3": _variant(depth, "triplet", 3, 3, 3, 3) for depth in ("18", "50")},
    **{f"fcanet{depth}": _variant(depth, "fca") for depth in ("34", "50", "101", "152")},
}


def _cfg(url: str = "", **kwargs) -> dict:
    return dict(
        url=url,
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bilinear",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.conv1",
        classifier="head",
        license="mit",
        **kwargs,
    )


_SE_URL = "https://github.com/moskomule/senet.pytorch/releases/download/archive/seresnet50-60a8950a85b2b.pkl"
_FCA_URL = "https://github.com/cfzd/FcaNet/releases/download/v1.0/"
# The other weights are on Google Drive, where no file can be fetched by its name.
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _cfg() for name in VARIANTS if name != "se_resnet50" and not name.startswith("fcanet")}
    | {"se_resnet50.in1k": _cfg(_SE_URL)}
    | {f"fcanet{depth}.in1k": _cfg(f"{_FCA_URL}fca{depth}.pth") for depth in ("34", "50", "101", "152")}
)


def _create(variant: str, pretrained: bool, **kwargs) -> AttentionResNet:
    kwargs = VARIANTS[variant] | kwargs
    return build_model_with_cfg(
        AttentionResNet,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter(checkpoint_filter_fn),
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["depths"]))), feature_cls="getter"),
        **kwargs,
    )


@register_model
def se_resnet18(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """SE-ResNet-18."""
    return _create("se_resnet18", pretrained, **kwargs)


@register_model
def se_resnet34(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """SE-ResNet-34."""
    return _create("se_resnet34", pretrained, **kwargs)


@register_model
def se_resnet50(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """SE-ResNet-50."""
    return _create("se_resnet50", pretrained, **kwargs)


@register_model
def se_resnet101(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """SE-ResNet-101."""
    return _create("se_resnet101", pretrained, **kwargs)


@register_model
def se_resnet152(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """SE-ResNet-152."""
    return _create("se_resnet152", pretrained, **kwargs)


@register_model
def cbam_resnet18(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-18 with CBAM."""
    return _create("cbam_resnet18", pretrained, **kwargs)


@register_model
def cbam_resnet34(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-34 with CBAM."""
    return _create("cbam_resnet34", pretrained, **kwargs)


@register_model
def cbam_resnet50(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-50 with CBAM."""
    return _create("cbam_resnet50", pretrained, **kwargs)


@register_model
def cbam_resnet101(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-101 with CBAM."""
    return _create("cbam_resnet101", pretrained, **kwargs)


@register_model
def bam_resnet18(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-18 with BAM."""
    return _create("bam_resnet18", pretrained, **kwargs)


@register_model
def bam_resnet34(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-34 with BAM."""
    return _create("bam_resnet34", pretrained, **kwargs)


@register_model
def bam_resnet50(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-50 with BAM."""
    return _create("bam_resnet50", pretrained, **kwargs)


@register_model
def bam_resnet101(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-101 with BAM."""
    return _create("bam_resnet101", pretrained, **kwargs)


@register_model
def eca_resnet18(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ECA-Net-18."""
    return _create("eca_resnet18", pretrained, **kwargs)


@register_model
def eca_resnet34(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ECA-Net-34."""
    return _create("eca_resnet34", pretrained, **kwargs)


@register_model
def eca_resnet50(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ECA-Net-50."""
    return _create("eca_resnet50", pretrained, **kwargs)


@register_model
def eca_resnet101(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ECA-Net-101."""
    return _create("eca_resnet101", pretrained, **kwargs)


@register_model
def eca_resnet152(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ECA-Net-152."""
    return _create("eca_resnet152", pretrained, **kwargs)


@register_model
def triplet_resnet18(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-18 with triplet attention."""
    return _create("triplet_resnet18", pretrained, **kwargs)


@register_model
def triplet_resnet34(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-34 with triplet attention."""
    return _create("triplet_resnet34", pretrained, **kwargs)


@register_model
def triplet_resnet50(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-50 with triplet attention."""
    return _create("triplet_resnet50", pretrained, **kwargs)


@register_model
def triplet_resnet101(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-101 with triplet attention."""
    return _create("triplet_resnet101", pretrained, **kwargs)


@register_model
def triplet_resnet18_k3(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-18 with triplet attention, of 3x3 convolutions."""
    return _create("triplet_resnet18_k3", pretrained, **kwargs)


@register_model
def triplet_resnet50_k3(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """ResNet-50 with triplet attention, of 3x3 convolutions."""
    return _create("triplet_resnet50_k3", pretrained, **kwargs)


@register_model
def fcanet34(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """FcaNet-34."""
    return _create("fcanet34", pretrained, **kwargs)


@register_model
def fcanet50(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """FcaNet-50."""
    return _create("fcanet50", pretrained, **kwargs)


@register_model
def fcanet101(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """FcaNet-101."""
    return _create("fcanet101", pretrained, **kwargs)


@register_model
def fcanet152(pretrained: bool = False, **kwargs) -> AttentionResNet:
    """FcaNet-152."""
    return _create("fcanet152", pretrained, **kwargs)
