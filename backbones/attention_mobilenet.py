"""MobileNetV2 with ECA (arXiv 1910.03151) or triplet attention (arXiv 2010.03045).

Code and weights were published at github.com/BangguWu/ECANet and github.com/landskape-ai/triplet-attention (both MIT).
The module comes last in a block, after its last norm and before the shortcut, if any, is added. `checkpoint_filter_fn`
takes the published files.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from densezoo.backbones.nat import spread_drop_path
from densezoo.backbones.staged import Blocks, StagedBackbone, check_per_stage, pretrained_filter, rename_keys
from densezoo.ops.plugins import ECA, Triplet
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation

# Called with the channels and the kernel size.
ATTENTION: dict[str, Callable[[int, int | None], nn.Module]] = {
    # The released network's kernels; one of size 1 scales a channel by its own mean alone.
    "eca": lambda channels, kernel_size: ECA(channels, kernel_size or (1 if channels < 96 else 3)),
    "triplet": lambda channels, kernel_size: Triplet(channels, kernel_size or 7),
}


class AttentionMobileNetV2(StagedBackbone):
    """MobileNetV2 with an attention module in every block: maps at strides 4, 8, 16 and 32.

    Images of any size from 32x32. The parts named `norm` are the convolution, norm and activation after the last stage.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dims: Width that each stage ends with.
        inner_dims: Width that each stage begins with.
        depths: Blocks per stage.
        end_depths: How many of them, the last ones, have the width that the stage ends with.
        attention: 'eca' or 'triplet'.
        kernel_size: Of the modules' convolutions; by default the released networks': 7 in triplet attention, in ECA 3
            from 96 channels on and 1 below.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block with a shortcut; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output, for one's own training: none was published with them.

    Raises:
        ValueError: `embed_dims`, `inner_dims`, `end_depths`, `attention` or `out_norms` does not fit the architecture.
    """

    output_fmt = "NCHW"
    position_tables = ()

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (24, 32, 96, 320),
        inner_dims: Sequence[int] = (24, 32, 64, 160),
        depths: Sequence[int] = (2, 3, 7, 4),
        end_depths: Sequence[int] = (2, 3, 3, 1),
        attention: str = "eca",
        kernel_size: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"attention: got {attention!r}, expected one of {', '.join(ATTENTION)}")
        check_per_stage(depths, embed_dims=embed_dims, inner_dims=inner_dims, end_depths=end_depths)
        conv = partial(Conv2dNormActivation, norm_layer=nn.BatchNorm2d, activation_layer=nn.ReLU6)

        def block(width: int, out_width: int, stride: int, expand_ratio: int) -> InvertedResidual:
            layers = InvertedResidual(width, out_width, stride, expand_ratio)
            layers.conv.append(ATTENTION[attention](out_width, kernel_size))
            return layers

        self.depths = tuple(depths)
        self.patch_embed = nn.Sequential(conv(in_chans, 32, stride=2), block(32, 16, 1, expand_ratio=1))
        self.stages = nn.ModuleList()
        self.feature_info = []
        width, residual = 16, []
        for i, depth in enumerate(depths):
            blocks = Blocks()
            for j in range(depth):
                out_width = embed_dims[i] if depth - j <= end_depths[i] else inner_dims[i]
                blocks.append(block(width, out_width, 1 if j else 2, expand_ratio=6))
                residual += [blocks[-1]] * blocks[-1].use_res_connect
                width = out_width
            self.stages.append(blocks)
            self.feature_info.append(dict(num_chs=width, reduction=4 * 2**i, module=f"stages.{i}"))
        for layers, rate in zip(residual, *spread_drop_path(drop_path_rate, [len(residual)]), strict=True):
            if rate:
                layers.conv.append(DropPath(rate))
        head = conv(width, 1280, kernel_size=1)
        for module in (*self.modules(), *head.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        self.build_head(num_classes, global_pool, drop_rate, out_norms, norm_layer=LayerNorm2d)
        if not out_norms:
            self.norm, self.num_features = head, 1280
            self.reset_classifier(num_classes)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run stage `i` on the output of the one before it (of the stem for the first)."""
        return self.stages[i](x)

    def keep_stages(self, count: int) -> None:
        """Drop the stages after the first `count`."""
        del self.stages[count:]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the outputs of the stages wanted do not need; return their indices."""
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if isinstance(self.norm, nn.Identity):
            self.num_features = self.feature_info[self.num_stages - 1]["num_chs"]
        return wanted

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per stage, or one per block."""
        blocks = [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^patch_embed", blocks=r"^stages\.(\d+)" if coarse else blocks)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert a published state dict, which has all blocks in one list, to the keys of `model`."""
    places = ["patch_embed.0.", "patch_embed.1."]
    places += [f"stages.{i}.{j}." for i, depth in enumerate(model.depths) for j in range(depth)]
    rules = {rf"^features\.{k}\.": place for k, place in enumerate([*places, "norm."])}
    rules |= {
        r"^classifier\.1\.": "head.",
        # Triplet attention in its networks' own file.
        r"\.ChannelGateH\.spatial\.": ".cw.conv.",
        r"\.ChannelGateW\.spatial\.": ".hc.conv.",
        r"\.SpatialGate\.spatial\.": ".hw.conv.",
    }
    return rename_keys(state_dict, rules)


VARIANTS: dict[str, dict] = {
    "eca_mobilenetv2": dict(attention="eca"),
    "triplet_mobilenetv2": dict(attention="triplet", kernel_size=7),
    "triplet_mobilenetv2_k3": dict(attention="triplet", kernel_size=3),
}

# The weights are on Google Drive, where no file can be fetched by its name.
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": dict(
            url="",
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.875,
            interpolation="bilinear",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="patch_embed.0.0",
            classifier="head",
            license="mit",
        )
        for name in VARIANTS
    }
)


def _create(variant: str, pretrained: bool, **kwargs) -> AttentionMobileNetV2:
    kwargs = dict(depths=(2, 3, 7, 4)) | VARIANTS[variant] | kwargs
    return build_model_with_cfg(
        AttentionMobileNetV2,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter(checkpoint_filter_fn),
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["depths"]))), feature_cls="getter"),
        **kwargs,
    )


@register_model
def eca_mobilenetv2(pretrained: bool = False, **kwargs) -> AttentionMobileNetV2:
    """MobileNetV2 with ECA."""
    return _create("eca_mobilenetv2", pretrained, **kwargs)


@register_model
def triplet_mobilenetv2(pretrained: bool = False, **kwargs) -> AttentionMobileNetV2:
    """MobileNetV2 with triplet attention."""
    return _create("triplet_mobilenetv2", pretrained, **kwargs)


@register_model
def triplet_mobilenetv2_k3(pretrained: bool = False, **kwargs) -> AttentionMobileNetV2:
    """MobileNetV2 with triplet attention, of 3x3 convolutions."""
    return _create("triplet_mobilenetv2_k3", pretrained, **kwargs)
