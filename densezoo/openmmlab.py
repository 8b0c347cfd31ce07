"""The zoo in OpenMMLab: importing this registers every backbone and plugin with mmengine, under the scope `densezoo`.

A config says `custom_imports = dict(imports=["densezoo.openmmlab"])`, and in a model of mmdet, mmseg or mmpretrain

    backbone=dict(type="densezoo.NAT", arch="tiny", init_cfg=dict(type="Pretrained", checkpoint=...))

and in a ResNet of theirs, with any module of `densezoo.ops.plugins`,

    plugins=[dict(cfg=dict(type="densezoo.CBAM"), stages=(True, True, True, True), position="after_conv3")]

and after any backbone, with any module of `densezoo.necks`,

    neck=dict(type="densezoo.RCNet", in_channels=[64, 128, 256, 512], start_level=1)

Importing it again or reloading it is harmless. mmcv's operators need no compiler after it (see `densezoo.mmcv_ops`).
"""

import copy
import difflib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterable, Sequence

try:
    import mmcv  # noqa: F401
    import mmengine
except ModuleNotFoundError as error:
    message = f"densezoo.openmmlab: {error}; pip install 'densezoo[openmmlab]'"
    raise ModuleNotFoundError(message, name=error.name) from error
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit, initialize, update_init_info
from timm.models import group_parameters
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from densezoo import mmcv_ops, necks, panoptic
from densezoo.backbones import (
    agent,
    attention_mobilenet,
    attention_resnet,
    davit,
    dinat_s,
    flatten,
    focalnet,
    maxvit,
    nat,
    nat_isotropic,
    poolformer,
    quadtree,
)
from densezoo.checkpoints import load_published
from densezoo.heads import dyhead
from densezoo.ops import plugins


def _leave_out_language_models() -> None:
    """Import mmpretrain without its language models where transformers is too new for them.

    They are imported where transformers is 4.28 or newer, fail with 5, and take mmpretrain and mmdet with them.
    """
    name = "mmpretrain.utils.dependency"
    try:
        too_new = int(importlib.metadata.version("transformers").split(".")[0]) >= 5
        package = importlib.metadata.distribution("onedl-mmpretrain")
    except importlib.metadata.PackageNotFoundError:
        return
    if too_new and "mmpretrain" not in sys.modules:
        # The module alone, as it has to be known before the package imports it.
        spec = importlib.util.spec_from_file_location(name, package.locate_file("mmpretrain/utils/dependency.py"))
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.WITH_MULTIMODAL = False


# Before anything imports mmcv.ops, mmdet or mmpretrain, where that is possible.
mmcv_ops.install()
panoptic.install()
_leave_out_language_models()


class _Registry(mmengine.Registry):
    def get(self, key: str) -> type | None:
        # Not before they are named: they import mmdet or mmseg, which takes seconds.
        if key.rpartition(".")[2] in _EXTENSIONS:
            importlib.import_module(_EXTENSIONS[key.rpartition(".")[2]])
        return super().get(key)


def _registry(parent: mmengine.Registry) -> mmengine.Registry:
    if "densezoo" in parent.children:
        return parent.children["densezoo"]
    return _Registry(parent.name, parent=parent, scope="densezoo")


# What extends classes of mmdet and mmseg -> the module that has it.
_EXTENSIONS = {
    "BVRATSSHead": "densezoo.mmdet_heads",
    "BVRFCOSHead": "densezoo.mmdet_heads",
    "BVRRetinaHead": "densezoo.mmdet_heads",
    "BVRRoIHead": "densezoo.mmdet_heads",
    "IoUAwareFocalLoss": "densezoo.mmdet_heads",
    "RelationDINO": "densezoo.mmdet_heads",
    "RelationDINOHead": "densezoo.mmdet_heads",
    "SEPCFreeAnchorRetinaHead": "densezoo.mmdet_sepc",
    "SEPCRetinaHead": "densezoo.mmdet_sepc",
    "MEUHead": "densezoo.mmseg_heads",
    "P2ATHead": "densezoo.mmseg_heads",
}


MODELS = _registry(mmengine.MODELS)
# A neck as it is.
MODELS.register_module(module=dyhead.DyHead, force=True)

_CONFIGS: dict[str, dict] = {}


def config_for(name: str, **changes) -> dict:
    """Return the config of a backbone from its timm name, such as `nat_tiny`.

    Args:
        name: timm's name of the model.
        changes: What to set beside `type` and `arch`: `out_indices`, `drop_path_rate`, `init_cfg`, ...

    Raises:
        ValueError: The zoo has no such model.
    """
    if name not in _CONFIGS:
        raise ValueError(f"name: got {name!r}; {_nearest(name, _CONFIGS)}")
    return _CONFIGS[name] | changes


class _Backbone:
    """What turns a family's class, the second base, into an OpenMMLab backbone; mmengine's BaseModule is the third.

    Args:
        arch: The variant's name without the family's, such as `tiny`, or the architecture's arguments in a dict.
        out_indices: The stages whose outputs are returned; all by default. Stages after the last one are left out.
        out_norms: The stages that have a norm on their output; () for raw outputs. By default all returned ones, none
            in a family whose published detectors and segmentors have none.
        frozen_stages: Freeze nothing (-1), the stem (0), or the stem and the first n stages (n): they get no gradients
            and stay in eval mode.
        with_cp: Whether to recompute activations in the backward instead of storing them.
        norm_eval: Whether batch norms stay in eval mode while training, as with few images a GPU.
        output_img: Whether to return the images before the maps, for `densezoo.RFP`.
        init_cfg: `dict(type="Pretrained", checkpoint=...)` loads a published checkpoint strictly, by
            `densezoo.checkpoints.load_published`; without it the family's own initialisation stays.
        kwargs: Other arguments of the family's class, such as `drop_path_rate`, `in_chans` or `dilations`.

    Raises:
        ValueError: An argument is out of its range; says what the range is.
        TypeError: The family has no such argument.
    """

    def __init_subclass__(cls, prefix: str | None = None, **defaults):
        """Register a type whose variants are those of the family's module that start with `prefix`.

        `defaults` are arguments with other defaults than the family's or these, as its published dense models have.
        """
        # A subclass of such a type keeps its variants, and is registered by whoever wrote it.
        if prefix is None:
            return
        cls._family = cls.__bases__[1]
        cls._prefix = prefix
        cls._defaults = defaults
        variants = sys.modules[cls._family.__module__].VARIANTS
        # A name that several prefixes fit belongs to the type that was registered first.
        names = [name for name in variants if name.startswith(prefix) and name not in _CONFIGS]
        cls.archs = {name.removeprefix(prefix): variants[name] for name in names}
        for arch in cls.archs:
            _CONFIGS[prefix + arch] = dict(type=f"densezoo.{cls.__name__}", arch=arch)
        MODELS.register_module(module=cls, force=True)

    def __init__(
        self,
        arch: str | dict,
        out_indices: int | Sequence[int] | None = None,
        out_norms: Sequence[int] | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        norm_eval: bool = False,
        output_img: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **kwargs,
    ):
        defaults = dict(self._defaults)
        default_norms = defaults.pop("out_norms", None)
        kwargs = defaults | self._variant(arch) | kwargs
        parameters = inspect.signature(self._family).parameters
        for key in kwargs.keys() - parameters.keys():
            message = f"{type(self).__name__}.__init__() got an unexpected keyword argument {key!r}"
            raise TypeError(f"{message}; {_nearest(key, parameters)}")
        # One number of blocks a stage, or a single stage.
        stages = len(kwargs.get("depths", parameters["depths"].default)) if "depths" in parameters else 1
        if out_indices is None:
            out_indices = range(stages)
        out_indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        if not out_indices or not set(out_indices) <= set(range(stages)):
            raise ValueError(f"out_indices: got {out_indices}, expected stage indices from 0 to {stages - 1}")
        if frozen_stages not in range(-1, stages + 1):
            raise ValueError(
                f"frozen_stages: got {frozen_stages!r}, expected -1 (nothing), 0 (the stem) or up to {stages} (the "
                "stem and as many stages)"
            )
        if out_norms is None:
            out_norms = out_indices if default_norms is None else default_norms
        super().__init__(**kwargs, out_norms=tuple(out_norms))
        self.init_cfg = copy.deepcopy(init_cfg)
        self.output_img = output_img
        self.out_indices = tuple(self.prune_intermediate_layers(out_indices, prune_norm=True))
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.set_grad_checkpointing(with_cp)
        self._freeze()

    def _variant(self, arch: str | dict) -> dict:
        if isinstance(arch, dict):
            return dict(arch)
        if not isinstance(arch, str) or (short := arch.removeprefix(self._prefix)) not in self.archs:
            raise ValueError(
                f"arch: {type(self).__name__} has no {arch!r}; {_nearest(str(arch), self.archs)}; a dict gives the "
                "arguments of another one"
            )
        return self.archs[short]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Take images (B, in_chans, H, W) to one map (B, C, H / stride, W / stride) a stage of `out_indices`."""
        maps = self.forward_intermediates(x, indices=list(self.out_indices), intermediates_only=True)
        return (x, *maps) if self.output_img else tuple(maps)

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode of all but the frozen stages and, with `norm_eval`, the batch norms."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        if self.frozen_stages < 0:
            return
        # The stages after the last output are not there.
        stages = min(self.frozen_stages, max(self.out_indices) + 1)
        items = dict(self.named_modules()) | dict(self.named_parameters())
        groups = group_with_matcher(((name, name) for name in items), self.group_matcher(coarse=True), reverse=True)
        # Group 0 is the stem; a stage is one group or, in an isotropic family, one for each block.
        last = f"{self.feature_info[stages - 1]['module']}."
        limit = max(groups[name] for name in items if name.startswith(last)) if stages else 0
        frozen = [item for name, item in items.items() if groups[name] <= limit]
        frozen += [self.get_submodule(f"norm{i}") for i in range(stages) if i in self.out_norms]
        for item in frozen:
            item.requires_grad_(False)
            if isinstance(item, nn.Module):
                item.eval()

    def init_weights(self) -> None:
        """Apply `init_cfg`, a published checkpoint last."""
        if self.is_init:
            return
        configs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []
        pretrained = [config for config in configs if config["type"] in ("Pretrained", PretrainedInit)]
        initialize(self, [config for config in configs if config not in pretrained])
        for config in pretrained:
            checkpoint = config.get("checkpoint")
            report = f"{type(self).__name__}: {load_published(self, checkpoint)} from {checkpoint}"
            print_log(report, logger="current", level=logging.INFO)
            if hasattr(self, "_params_init_info"):
                update_init_info(self, init_info=report)
        self.is_init = True

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Return a parameter's layer, from 0 at the stem, and the number of layers, for layer-wise learning rates.

        Args:
            param_name: The parameter's name in the whole model.
            prefix: What this backbone's parameters start with there; all others belong to the layer after its last.
        """
        layers = group_parameters(self, self.group_matcher(coarse=False), reverse=True)
        heads = max(layers.values()) + 1
        layer = layers.get(param_name.removeprefix(prefix), heads) if param_name.startswith(prefix) else heads
        return layer, heads + 1


def _nearest(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Valid: {', '.join(valid)}"


class NAT(_Backbone, nat.NAT, BaseModule, prefix="nat_"):
    """NAT (arXiv 2204.07143); arguments as for `_Backbone`."""


class DiNAT(_Backbone, nat.NAT, BaseModule, prefix="dinat_"):
    """DiNAT (arXiv 2209.15001); arguments as for `_Backbone`."""


class DiNAT_s(_Backbone, dinat_s.DiNAT_s, BaseModule, prefix="dinat_s_"):
    """DiNAT_s (arXiv 2209.15001), on Swin's skeleton; arguments as for `_Backbone`."""


class NATIsotropic(_Backbone, nat_isotropic.NATIsotropic, BaseModule, prefix="nat_isotropic_"):
    """Isotropic NAT (arXiv 2209.15001), one stage at stride 16; arguments as for `_Backbone`."""


class DiNATIsotropic(_Backbone, nat_isotropic.NATIsotropic, BaseModule, prefix="dinat_isotropic_"):
    """Isotropic DiNAT (arXiv 2209.15001), one stage at stride 16; arguments as for `_Backbone`."""


class ViTRPB(_Backbone, nat_isotropic.NATIsotropic, BaseModule, prefix="vitrpb_"):
    """ViT with relative position bias (arXiv 2209.15001), one stage at stride 16; arguments as for `_Backbone`."""


class DaViT(_Backbone, davit.DaViT, BaseModule, prefix="densezoo_davit_"):
    """DaViT (arXiv 2204.03645); arguments as for `_Backbone`."""


class MaxViT(_Backbone, maxvit.MaxViT, BaseModule, prefix="densezoo_maxvit_", out_norms=()):
    """MaxViT (arXiv 2204.01697); arguments as for `_Backbone`."""


class AgentDeiT(_Backbone, agent.AgentDeiT, BaseModule, prefix="agent_deit_"):
    """Agent attention in DeiT (arXiv 2312.08874), one stage at stride 16; arguments as for `_Backbone`."""


class AgentPVT(
    _Backbone,
    agent.AgentPVT,
    BaseModule,
    prefix="agent_pvt_",
    out_norms=(),
    agent_sizes=agent.AgentPVT.DENSE_AGENT_SIZES,
):
    """Agent attention in PVT (arXiv 2312.08874), of more agents than the classifier; arguments as for `_Backbone`."""


class AgentSwin(_Backbone, agent.AgentSwin, BaseModule, prefix="agent_swin_"):
    """Agent attention in Swin (arXiv 2312.08874), of more agents than the classifier; arguments as for `_Backbone`."""


class AgentCSwin(_Backbone, agent.AgentCSwin, BaseModule, prefix="agent_cswin_"):
    """Agent attention in CSwin (arXiv 2312.08874); arguments as for `_Backbone`."""


class FLattenDeiT(_Backbone, flatten.FLattenDeiT, BaseModule, prefix="flatten_deit_"):
    """FLatten in DeiT (arXiv 2308.00442), one stage at stride 16; arguments as for `_Backbone`."""


class FLattenPVTv2(_Backbone, flatten.FLattenPVTv2, BaseModule, prefix="flatten_pvt_v2_"):
    """FLatten in PVTv2 (arXiv 2308.00442), whose stages end with norms anyhow; arguments as for `_Backbone`."""


class FLattenPVT(_Backbone, flatten.FLattenPVT, BaseModule, prefix="flatten_pvt_", out_norms=()):
    """FLatten in PVT (arXiv 2308.00442); arguments as for `_Backbone`."""


class FLattenSwin(_Backbone, flatten.FLattenSwin, BaseModule, prefix="flatten_swin_"):
    """FLatten in Swin (arXiv 2308.00442); arguments as for `_Backbone`."""


class FLattenCSwin(_Backbone, flatten.FLattenCSwin, BaseModule, prefix="flatten_cswin_"):
    """FLatten in CSwin (arXiv 2308.00442); arguments as for `_Backbone`."""


class QuadTree(_Backbone, quadtree.QuadTree, BaseModule, prefix="quadtree_"):
    """QuadTree (arXiv 2201.02767); arguments as for `_Backbone`."""


class FocalNet(_Backbone, focalnet.FocalNet, BaseModule, prefix="densezoo_focalnet_"):
    """FocalNet (arXiv 2203.11926); arguments as for `_Backbone`."""


class PoolFormer(_Backbone, poolformer.PoolFormer, BaseModule, prefix="densezoo_poolformer_"):
    """PoolFormer (arXiv 2111.11418); arguments as for `_Backbone`."""


class PoolFormerV2(_Backbone, poolformer.PoolFormer, BaseModule, prefix="densezoo_poolformerv2_", version=2):
    """PoolFormerV2 (arXiv 2210.13452); arguments as for `_Backbone`."""


class MetaFormer(_Backbone, poolformer.PoolFormer, BaseModule, prefix="metaformer_"):
    """MetaFormers with other token mixers (arXiv 2111.11418); arguments as for `_Backbone`."""


class SEResNet(
    _Backbone, attention_resnet.AttentionResNet, BaseModule, prefix="se_resnet", out_norms=(), attention="se"
):
    """SE-ResNet (arXiv 1709.01507); arguments as for `_Backbone`."""


class CBAMResNet(
    _Backbone, attention_resnet.AttentionResNet, BaseModule, prefix="cbam_resnet", out_norms=(), attention="cbam"
):
    """ResNet with CBAM (arXiv 1807.06521); arguments as for `_Backbone`."""


class BAMResNet(
    _Backbone, attention_resnet.AttentionResNet, BaseModule, prefix="bam_resnet", out_norms=(), attention="bam"
):
    """ResNet with BAM (arXiv 1807.06514); arguments as for `_Backbone`."""


class ECAResNet(
    _Backbone, attention_resnet.AttentionResNet, BaseModule, prefix="eca_resnet", out_norms=(), attention="eca"
):
    """ECA-Net (arXiv 1910.03151); arguments as for `_Backbone`."""


class TripletResNet(
    _Backbone, attention_resnet.AttentionResNet, BaseModule, prefix="triplet_resnet", out_norms=(), attention="triplet"
):
    """ResNet with triplet attention (arXiv 2010.03045); arguments as for `_Backbone`."""


class FcaNet(_Backbone, attention_resnet.AttentionResNet, BaseModule, prefix="fcanet", out_norms=(), attention="fca"):
    """FcaNet (arXiv 2012.11879); arguments as for `_Backbone`."""


class ECAMobileNetV2(
    _Backbone, attention_mobilenet.AttentionMobileNetV2, BaseModule, prefix="eca_", out_norms=(), attention="eca"
):
    """MobileNetV2 with ECA (arXiv 1910.03151); arguments as for `_Backbone`."""


class TripletMobileNetV2(
    _Backbone,
    attention_mobilenet.AttentionMobileNetV2,
    BaseModule,
    prefix="triplet_",
    out_norms=(),
    attention="triplet",
):
    """MobileNetV2 with triplet attention (arXiv 2010.03045); arguments as for `_Backbone`."""


class _Plugin:
    """What turns an attention module, the second base, into a plugin layer of mmcv, which says `in_channels`."""

    def __init_subclass__(cls):
        MODELS.register_module(module=cls, force=True)

    def __init__(self, in_channels: int, **kwargs):
        super().__init__(in_channels, **kwargs)


class BAM(_Plugin, plugins.BAM):
    """BAM (arXiv 1807.06514); arguments as for `densezoo.ops.plugins.BAM`."""


class CBAM(_Plugin, plugins.CBAM):
    """CBAM (arXiv 1807.06521); arguments as for `densezoo.ops.plugins.CBAM`."""


class DAS(_Plugin, plugins.DAS):
    """DAS (arXiv 2311.12091); arguments as for `densezoo.ops.plugins.DAS`."""


class ECA(_Plugin, plugins.ECA):
    """ECA (arXiv 1910.03151); arguments as for `densezoo.ops.plugins.ECA`."""


class ELA(_Plugin, plugins.ELA):
    """ELA (arXiv 2403.01123); arguments as for `densezoo.ops.plugins.ELA`."""


class FCA(_Plugin, plugins.FCA):
    """FcaNet's attention (arXiv 2012.11879); arguments as for `densezoo.ops.plugins.FCA`."""


class GatherExcite(_Plugin, plugins.GatherExcite):
    """Gather-Excite (arXiv 1810.12348); arguments as for `densezoo.ops.plugins.GatherExcite`."""


class PKCAM(_Plugin, plugins.PKCAM):
    """PKCAM (arXiv 2211.07521); arguments as for `densezoo.ops.plugins.PKCAM`."""


class SE(_Plugin, plugins.SE):
    """Squeeze-and-Excitation (arXiv 1709.01507); arguments as for `densezoo.ops.plugins.SE`."""


class Triplet(_Plugin, plugins.Triplet):
    """Triplet attention (arXiv 2010.03045); arguments as for `densezoo.ops.plugins.Triplet`."""


class ULSAM(_Plugin, plugins.ULSAM):
    """ULSAM (arXiv 2006.15102); arguments as for `densezoo.ops.plugins.ULSAM`."""


class RFP(necks.RFP):
    """Recursive feature pyramid (arXiv 2006.02334); arguments as for `densezoo.necks.RFP`.

    `rfp_backbone` is the second backbone's config; the first one has `output_img=True`.
    """

    def __init__(self, in_channels: Sequence[int], rfp_backbone: dict, **kwargs):
        super().__init__(in_channels, MODELS.build(rfp_backbone), **kwargs)

    def init_weights(self) -> None:
        """Apply the second backbone's `init_cfg`."""
        self.rfp_modules[0].init_weights()


for _neck in (necks.FPN, necks.PAFPN, necks.SEPC, necks.GatherDistribute, necks.RCNet, necks.SimpleFeaturePyramid, RFP):
    MODELS.register_module(module=_neck, force=True)
