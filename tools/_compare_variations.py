"""What tools/compare.py compares: by name, what changes in a config of configs/demo."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from densezoo.necks import use_sac
from mmengine.config import Config
from torch import nn

CONFIGS = Path(__file__).resolve().parents[1] / "configs/demo"
WIDTHS = [64, 128, 256, 512]  # of ResNet-18's stages
FPN = dict(type="FPN", in_channels=WIDTHS, start_level=1, out_channels=64, num_outs=3)
# A backbone whose stages take feedback; as the plain one but for where its code lies.
STAGED_RESNET = dict(
    type="densezoo.SEResNet", arch=dict(depths=(2, 2, 2, 2), bottleneck=False), attention=None, num_classes=0
)
CROSS_ENTROPY = dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0)


@dataclass(frozen=True)
class Variation:
    """One row of the table.

    Args:
        title: What the row says.
        plain: Name of the variation that it is compared with; its own where it is one of these.
        changes: What replaces values of that one's config, as in a config that inherits from it.
        prepare: Called with the model before it is trained, where a config cannot say what to change.
    """

    title: str
    plain: str
    changes: dict = field(default_factory=dict)
    prepare: Callable[[nn.Module], None] = lambda model: None


def add_sac(model: nn.Module) -> None:
    """Put switchable atrous convolution into all stages but the first, of both backbones."""
    for backbone in (model.backbone, model.neck.rfp_modules[0]):
        for i in (2, 3, 4):
            use_sac(backbone.get_submodule(f"layer{i}"))


def module(name: str, position: str = "after_conv2", stages: tuple[int, ...] = (1, 1, 1, 1), **options) -> dict:
    """Return the changes that put an attention module into ResNet-18, by default at the end of every block."""
    plugin = dict(cfg=dict(type=f"densezoo.{name}", **options), position=position, stages=stages)
    return dict(model=dict(backbone=dict(plugins=[plugin])))


def neck(*parts: dict, **model) -> dict:
    """Return the changes that put one neck, or several in a row, in the place of the FPN."""
    return dict(model=dict(neck=list(parts) if len(parts) > 1 else dict(parts[0], _delete_=True), **model))


def head(name: str, key: str = "bbox_head", **options) -> dict:
    """Return the changes that give a head another type."""
    return dict(model={key: dict(type=f"densezoo.{name}", **options)})


def decoder(**options) -> dict:
    """Return the changes that put a decoder in the place of UPerNet's."""
    common = dict(_delete_=True, channels=64, num_classes=11, loss_decode=CROSS_ENTROPY)
    return dict(model=dict(decode_head=common | options))


def frequencies() -> dict:
    """Return the changes for FcaNet's attention, whose size goes with the stage's."""
    changes = [module("FCA", stages=tuple(int(i == j) for j in range(4)), dct_size=max(7, 32 >> i)) for i in range(4)]
    return dict(model=dict(backbone=dict(plugins=[change["model"]["backbone"]["plugins"][0] for change in changes])))


def pconvs(deform: bool) -> dict:
    """Return the changes that put SEPC in the place of the FPN alone and of RetinaNet's towers."""
    sepc = dict(type="densezoo.SEPC", in_channels=[64] * 3, out_channels=64, lcconv_deform=True, ibn=True)
    return neck(FPN, sepc | dict(pconv_deform=deform), bbox_head=dict(type="densezoo.SEPCRetinaHead", stacked_convs=0))


DYHEAD = dict(type="densezoo.DyHead", in_channels=64, out_channels=64, num_blocks=2)
RFP = dict(type="densezoo.RFP", in_channels=WIDTHS, start_level=1, out_channels=64, num_outs=3, aspp_out_channels=16)
RECURSIVE = neck(RFP | dict(rfp_backbone=STAGED_RESNET), backbone=dict(_delete_=True, output_img=True, **STAGED_RESNET))
# One stage less than ResNet-18 has, as ViTDet's pyramid comes from one map of stride 16.
SIMPLE = neck(
    dict(type="densezoo.SimpleFeaturePyramid", in_channels=WIDTHS[2:3], out_channels=64, scales=(2, 1, 0.5)),
    backbone=dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,)),
)
GOLD_YOLO = neck(
    dict(type="densezoo.GatherDistribute", in_channels=WIDTHS, arch="n"),
    dict(type="ChannelMapper", in_channels=[32, 64, 128], out_channels=64, kernel_size=1, num_outs=3),
)
RCNET = dict(type="densezoo.RCNet", in_channels=WIDTHS, out_channels=64, start_level=1, num_outs=3)
DEEPLAB = decoder(
    type="DepthwiseSeparableASPPHead",
    in_channels=512,
    in_index=3,
    c1_in_channels=64,
    c1_channels=16,
    dilations=(1, 3, 6, 9),
    norm_cfg=dict(type="BN", requires_grad=True),
)
ALL_LEVELS = dict(in_channels=WIDTHS, in_index=[0, 1, 2, 3], align_corners=True)

PLAIN = {
    "faster-rcnn": "Faster R-CNN, FPN",
    "retinanet": "RetinaNet, FPN",
    "atss": "ATSS, FPN",
    "fcos": "FCOS, FPN",
    "upernet": "UPerNet",
}
VARIATIONS = {name: Variation(title, name) for name, title in PLAIN.items()} | {
    "se": Variation("SE", "faster-rcnn", module("SE")),
    "cbam": Variation("CBAM", "faster-rcnn", module("CBAM")),
    "bam": Variation("BAM, between stages", "faster-rcnn", module("BAM", "after_stage", (1, 1, 1, 0))),
    "eca": Variation("ECA", "faster-rcnn", module("ECA")),
    "triplet": Variation("Triplet", "faster-rcnn", module("Triplet")),
    "fca": Variation("FCA", "faster-rcnn", frequencies()),
    "gather-excite": Variation("Gather-Excite, theta", "faster-rcnn", module("GatherExcite")),
    "ela": Variation("ELA", "faster-rcnn", module("ELA")),
    "pkcam": Variation("PKCAM, without earlier maps", "faster-rcnn", module("PKCAM")),
    "das": Variation("DAS, after stages", "faster-rcnn", module("DAS", "after_stage")),
    "ulsam": Variation("ULSAM", "faster-rcnn", module("ULSAM")),
    "pafpn": Variation("PAFPN", "faster-rcnn", neck(dict(FPN, type="PAFPN"))),
    "rcnet": Variation("RCNet", "faster-rcnn", neck(RCNET)),
    "gold-yolo": Variation("Gold-YOLO's, size n", "faster-rcnn", GOLD_YOLO),
    "simple-pyramid": Variation("simple feature pyramid, on three stages", "faster-rcnn", SIMPLE),
    "rfp": Variation("RFP", "faster-rcnn", RECURSIVE),
    "rfp-sac": Variation("RFP with SAC", "faster-rcnn", RECURSIVE, add_sac),
    "dyhead": Variation("Dynamic Head, 2 blocks", "faster-rcnn", neck(FPN, DYHEAD)),
    "bvr": Variation("BVR", "faster-rcnn", head("BVRRoIHead", "roi_head")),
    "retinanet-sepc-lite": Variation("SEPC-lite", "retinanet", pconvs(False)),
    "retinanet-sepc": Variation("SEPC", "retinanet", pconvs(True)),
    "retinanet-bvr": Variation("BVR", "retinanet", head("BVRRetinaHead")),
    "atss-dyhead": Variation("Dynamic Head, 2 blocks", "atss", neck(FPN, DYHEAD, bbox_head=dict(stacked_convs=0))),
    "atss-bvr": Variation("BVR", "atss", head("BVRATSSHead")),
    "fcos-bvr": Variation("BVR", "fcos", head("BVRFCOSHead")),
    "deeplabv3plus": Variation("DeepLabV3+", "upernet", DEEPLAB),
    "p2at": Variation("P2AT", "upernet", decoder(type="densezoo.P2ATHead", **ALL_LEVELS)),
    "fpenet": Variation("FPENet", "upernet", decoder(type="densezoo.MEUHead", **ALL_LEVELS)),
}


def config_of(name: str) -> Config:
    """Return the config of a variation."""
    variation = VARIATIONS[name]
    cfg = Config.fromfile(CONFIGS / f"{variation.plain}_r18_digits.py")
    # Merging takes the `_delete_` out.
    cfg.merge_from_dict(deepcopy(variation.changes))
    return cfg
