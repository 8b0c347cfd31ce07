"""Exported models give what the models give, at sizes that they were not traced with, and detectors what mmdet's give.

model_cards/exports.json says which models these tests have exported, and how far the results lay from the model's; run
as a script, this file adds what is not in it, or measures what is named: `python tests/test_exporting.py [NAME ...]`.
"""

import copy
import json
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests")]
sys.path.insert(0, str(ROOT / "tests" / "backbones"))
from densezoo.backbones import VARIANTS  # noqa: E402
from densezoo.necks import use_sac  # noqa: E402
from test_backbones import architecture, build  # noqa: E402

from densezoo import exporting  # noqa: E402

sys.path.pop(0)

STATED = ROOT / "model_cards" / "exports.json"
# One variant of each class; the others are of the same code.
CLASSES = {}
for variant in VARIANTS:
    CLASSES.setdefault(architecture(variant)["cls"].__name__, variant)
TRACED, SIZES = (96, 128), [(1, 67, 224), (3, 33, 48)]
# A detector's last level has to have more than one row and column.
TRACED_WHOLE, SIZES_WHOLE = (160, 224), [(1, 150, 260), (3, 141, 133)]

BASE = ROOT / "configs" / "_base_" / "models"
BACKBONE = dict(
    type="densezoo.PoolFormer", arch=dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1)), out_norms=(0, 1, 2, 3)
)
NECK = {"neck.in_channels": [16, 16, 32, 32], "neck.out_channels": 16}
RPN = {"rpn_head.in_channels": 16, "rpn_head.feat_channels": 16}
BOXES = {"roi_head.bbox_roi_extractor.out_channels": 16, "test_cfg.rpn.nms_pre": 100, "test_cfg.rpn.max_per_img": 50}
DENSE = {"bbox_head.in_channels": 16, "bbox_head.feat_channels": 16, "bbox_head.stacked_convs": 1}
FASTER = NECK | RPN | BOXES | {"roi_head.bbox_head.in_channels": 16, "roi_head.bbox_head.fc_out_channels": 16}
RETINANET = DENSE | {"test_cfg.nms_pre": 100}
FPN = dict(type="FPN", in_channels=[16, 16, 32, 32], out_channels=16, start_level=1, num_outs=5)
DYHEAD = dict(type="densezoo.DyHead", in_channels=16, out_channels=16, num_blocks=1)
# Three levels, as SEPC takes two cells off each.
THREE = dict(type="FPN", in_channels=[16, 16, 32, 32], out_channels=32, start_level=1, num_outs=3)
THREE_STRIDES = {"bbox_head.anchor_generator.strides": [8, 16, 32]}
WIDE = DENSE | {"bbox_head.in_channels": 32, "bbox_head.feat_channels": 32}
SEPC = dict(
    type="densezoo.SEPC", in_channels=[32] * 3, out_channels=32, num_pconvs=1, pconv_deform=True, lcconv_deform=True,
    ibn=True,
)  # fmt: skip
STAGED = dict(type="densezoo.SEResNet", arch=dict(depths=(1, 1, 1, 1), bottleneck=False), attention=None, num_classes=0)
RFP = dict(type="densezoo.RFP", in_channels=[64, 128, 256, 512], out_channels=16, aspp_out_channels=8)
RCNET = dict(type="densezoo.RCNet", in_channels=[16, 16, 32, 32], out_channels=16, start_level=1, num_outs=5)
DECODER = {"decode_head.in_channels": [16, 16, 32, 32], "decode_head.channels": 16}
# The models of the configs, with few channels.
MODELS = {
    "Mask R-CNN": (
        "mask-rcnn_fpn.py",
        NECK | RPN | BOXES | {
            "roi_head.bbox_head.in_channels": 16, "roi_head.bbox_head.fc_out_channels": 16,
            "roi_head.mask_roi_extractor.out_channels": 16, "roi_head.mask_head.num_convs": 1,
            "roi_head.mask_head.in_channels": 16, "roi_head.mask_head.conv_out_channels": 16,
        },
    ),
    "Cascade Mask R-CNN": (
        "cascade-mask-rcnn_fpn.py",
        NECK | RPN | BOXES | {
            f"roi_head.bbox_head.{i}.{key}": value for i in range(3)
            for key, value in dict(in_channels=16, conv_out_channels=16, fc_out_channels=16, num_shared_convs=1).items()
        } | {
            "roi_head.mask_roi_extractor.out_channels": 16, "roi_head.mask_head.num_convs": 1,
            "roi_head.mask_head.in_channels": 16, "roi_head.mask_head.conv_out_channels": 16,
        },
    ),
    "Faster R-CNN": ("faster-rcnn_fpn.py", FASTER),
    "RetinaNet": ("retinanet_fpn.py", NECK | RETINANET),
    "RetinaNet, PAFPN": ("retinanet_fpn.py", NECK | RETINANET | {"neck.type": "PAFPN"}),
    "RetinaNet, DyHead": (
        "retinanet_fpn.py", RETINANET | {"neck": [FPN | dict(add_extra_convs="on_output"), DYHEAD]},
    ),
    "RetinaNet, RCNet": ("retinanet_fpn.py", RETINANET | {"neck": [RCNET]}),
    "RetinaNet, SEPC": (
        "retinanet_fpn.py",
        RETINANET | WIDE | THREE_STRIDES
        | {"neck": [THREE, SEPC], "bbox_head.type": "densezoo.SEPCRetinaHead", "bbox_head.stacked_convs": 0},
    ),
    "RetinaNet, RelationNet++": (
        "retinanet_fpn.py",
        RETINANET | WIDE | THREE_STRIDES | {"neck": [THREE], "bbox_head.type": "densezoo.BVRRetinaHead"},
    ),
    "Faster R-CNN, RFP with SAC": (
        "faster-rcnn_fpn.py",
        FASTER | {"backbone": dict(STAGED, output_img=True, _delete_=True)}
        | {"neck": [dict(RFP, rfp_backbone=STAGED, num_outs=5)], "test_cfg.rcnn.score_thr": 0.02},
    ),
    "ATSS": ("atss_fpn.py", NECK | WIDE | {"test_cfg.nms_pre": 100, "neck.start_level": 1, "neck.out_channels": 32}),
    "UPerNet": (
        "upernet.py",
        DECODER | {"auxiliary_head": None},
    ),
    "Semantic FPN": (
        "semantic-fpn.py", NECK | {"decode_head.in_channels": [16] * 4, "decode_head.channels": 16},
    ),
    "DeepLabV3+": (
        "deeplabv3plus.py",
        {"decode_head.in_channels": 32, "decode_head.c1_in_channels": 16, "decode_head.channels": 16}
        | {"decode_head.c1_channels": 16, "auxiliary_head": None},
    ),
    "FPENet": ("fpenet.py", DECODER),
    "P2AT": ("p2at.py", DECODER),
}  # fmt: skip
# Parts of names of parameters that start so that they do next to nothing.
STILL = ("Pconv", "lconv", "cconv", "bvr.", "rfp_convs", "rfp_weight", "switch", "_context", "weight_diff")
# Those with steps of their own, which the forms for export do not have.
REFUSED = {
    "RelationNet++ in Faster R-CNN": ("faster-rcnn_fpn.py", FASTER | {"roi_head.type": "densezoo.BVRRoIHead"}),
    "FCOS": (
        "fcos_fpn.py",
        NECK | WIDE | {"neck.out_channels": 32},
    ),
}


@cache
def openmmlab(name: str) -> nn.Module:
    """Return a small model that is sure of enough to give detections."""
    from mmengine.config import Config
    from mmengine.registry import MODELS as REGISTRY
    from mmengine.registry import DefaultScope

    import densezoo.openmmlab  # noqa: F401

    file, changes = (MODELS | REFUSED)[name]
    cfg = Config.fromfile(BASE / file)
    cfg.model.backbone = BACKBONE
    cfg.merge_from_dict({f"model.{key}": value for key, value in changes.items()})
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg" if "decode_head" in cfg.model else "mmdet"):
        model = REGISTRY.build(cfg.model).eval()
    if "SAC" in name:
        for backbone in (model.backbone, model.neck[0].rfp_modules[0]):
            assert sum(use_sac(backbone.get_submodule(f"layer{i}")) for i in (2, 3, 4)) == 6
    for key, parameter in model.named_parameters():
        if "conv_seg" in key and key.endswith("bias"):
            # else all is of one class
            nn.init.zeros_(parameter)
        elif any(part in key for part in ("retina_", "atss_", "rpn_cls", "rpn_reg", "fc_", "conv_seg", "conv_logits")):
            # not so sure that scores are equal
            nn.init.normal_(parameter, std=0.02 if "retina_" in key or "atss_" in key else 0.3)
        elif any(part in key for part in (*STILL, "offset")):
            # deformed, and not on whole positions; outputs about as large as inputs
            nn.init.normal_(parameter, std=0.1 if "offset" in key else 0.3 * parameter[0].numel() ** -0.5)
        elif parameter.dim() == 1 and "layer_scale" in key:
            nn.init.ones_(parameter)
    return model


def measure(model: nn.Module, folder: Path, traced=TRACED, sizes=SIZES) -> dict[str, float]:
    """Return the largest difference of a model's program and of its ONNX form at other sizes, labels aside."""
    onnxruntime = pytest.importorskip("onnxruntime")
    module, names = exporting.exportable(model)
    program = exporting.to_program(module, traced)
    # It runs where densezoo is not installed.
    assert not any("densezoo" in str(node.target) for node in program.graph.nodes)
    free = program.module()
    exporting.to_onnx(program, folder / "x.onnx", names)
    session = onnxruntime.InferenceSession(folder / "x.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == names
    axes = session.get_inputs()[0].shape
    assert (axes[0], axes[2], axes[3]) == ("batch", "height", "width")
    runs = {
        "program": lambda images: exporting.flat(free(images)),
        "onnx": lambda images: [torch.from_numpy(np.asarray(x)) for x in session.run(None, {"images": images.numpy()})],
    }
    errors = dict.fromkeys(runs, 0.0)
    for size in sizes:
        images = exporting.sample(module, size)
        if names[0] == "boxes":
            # Else there would be nothing to compare.
            with torch.no_grad():
                scores = module(images)[1]
            assert (scores[:, 0] > scores[:, -1] + exporting.TOLERANCE).all(), scores[:, [0, -1]]
        for form, run in runs.items():
            found = exporting.differences(module, run, images, names)
            assert exporting.agree(found), (form, size, found)
            errors[form] = max([errors[form], *(error for name, error in found.items() if name != "labels")])
    return errors


def backbone(cls: str) -> nn.Module:
    return build(CLASSES[cls], blocks=1, features_only=True).eval()


def test_every_class_and_model_is_stated():
    stated = json.loads(STATED.read_text())
    assert list(stated["backbones"]) == list(CLASSES)
    assert list(stated["models"]) == list(MODELS)
    assert all(error < exporting.TOLERANCE for kind in stated.values() for m in kind.values() for error in m.values())


def test_readme_has_the_table():
    pytest.importorskip("mmengine")
    from tiny import tool

    make_cards, readme = tool("make_cards"), (ROOT / "README.md").read_text()
    table = make_cards.exports_table(json.loads(STATED.read_text()))
    assert readme == make_cards.put_table(readme, "exports", table)


# The families' exports take minutes together: a quick one stands for them in the fast run.
QUICK = ("PoolFormer",)


@pytest.mark.parametrize("cls", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CLASSES])
def test_backbones(cls, tmp_path):
    errors = measure(backbone(cls), tmp_path)
    assert errors.keys() == {"program", "onnx"} and all(error < 1e-4 for error in errors.values()), errors


def test_classifier_and_its_names(tmp_path):
    small = dict(embed_dims=(8, 8), depths=(1, 1), token_mixers=("pooling",) * 2)
    model = timm.create_model("densezoo_poolformer_s12", **small)
    assert exporting.exportable(model)[1] == ["logits"]
    assert all(error < 1e-4 for error in measure(model, tmp_path).values())


class Pyramid(nn.Module):
    """Two maps of an image, and a neck on them."""

    def __init__(self, neck: nn.Module, channels: int):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, channels, 8, 8), nn.Conv2d(channels, channels, 3, 2, 1)
        self.neck, self.feature_info = neck, SimpleNamespace(channels=lambda: [channels] * 2)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fine = self.fine(images)
        return tuple(self.neck([fine, self.coarse(fine)]))


def test_deformable_convolutions(tmp_path):
    from densezoo.heads import DyHead

    errors = measure(Pyramid(DyHead(16, 16, num_blocks=1), 16).eval(), tmp_path)
    assert errors.keys() == {"program", "onnx"} and all(error < 1e-4 for error in errors.values()), errors


DETECTORS = ["Mask R-CNN", "Cascade Mask R-CNN", "RetinaNet", "RetinaNet, DyHead", "RetinaNet, SEPC"]
DETECTORS += ["RetinaNet, RelationNet++", "Faster R-CNN, RFP with SAC", "ATSS"]


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_are_mmdets(name):
    """What is exported, in plain PyTorch, gives the detections of mmdet."""
    pytest.importorskip("mmdet")
    from mmdet.structures import DetDataSample

    model = openmmlab(name)
    module, names = exporting.exportable(model)
    images = torch.randint(0, 256, (2, 3, 100, 130), generator=torch.Generator().manual_seed(1))
    meta = dict(img_shape=(100, 130), ori_shape=(100, 130), scale_factor=(1.0, 1.0))
    with torch.no_grad():
        outputs = dict(zip(names, module(images.float()), strict=True))
        samples = [DetDataSample(metainfo=meta) for _ in images]
        expected = model.test_step(dict(inputs=list(images), data_samples=samples))
        for i, sample in enumerate(expected):
            found = outputs["scores"][i] > 0
            wanted = sample.pred_instances
            assert found.sum() == len(wanted) > 5
            torch.testing.assert_close(outputs["scores"][i][found], wanted.scores, rtol=1e-4, atol=1e-4)
            # Those of nearly equal scores may have changed places.
            distance = (outputs["boxes"][i][found][:, None] - wanted.bboxes).abs().amax(-1)
            distance = distance + (outputs["labels"][i][found][:, None] != wanted.labels) * 1e3
            assert distance.min(0)[0].max() < 1e-2 and distance.min(1)[0].max() < 1e-2
        if "masks" in names:
            masks = outputs["masks"]
            assert masks.shape == (2, outputs["boxes"].shape[1], 28, 28) and masks.min() >= 0 and masks.max() <= 1
            x = model.extract_feat(module.preprocess(images.float()))
            rois = torch.cat([torch.zeros(5, 1), outputs["boxes"][0, :5]], 1)
            stages = [(i,) for i in range(3)] if name.startswith("Cascade") else [()]
            theirs = sum(model.roi_head._mask_forward(*i, x, rois)["mask_preds"].sigmoid() for i in stages)
            theirs = theirs[torch.arange(5), outputs["labels"][0, :5]] / len(stages)
            torch.testing.assert_close(masks[0, :5], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["UPerNet", "Semantic FPN", "DeepLabV3+", "FPENet", "P2AT"])
def test_segmentors_are_mmsegs(name):
    pytest.importorskip("mmseg")
    from mmseg.structures import SegDataSample

    model = openmmlab(name)
    images = torch.randint(0, 256, (2, 3, 100, 132), generator=torch.Generator().manual_seed(1))
    meta = dict(img_shape=(100, 132), ori_shape=(100, 132), pad_shape=(100, 132))
    with torch.no_grad():
        logits, labels = exporting.exportable(model)[0](images.float())
        samples = [SegDataSample(metainfo=meta) for _ in images]
        expected = model.test_step(dict(inputs=list(images), data_samples=samples))
    for i, sample in enumerate(expected):
        torch.testing.assert_close(logits[i], sample.seg_logits.data, rtol=1e-3, atol=1e-4)
        assert (labels[i] == sample.pred_sem_seg.data[0]).float().mean() > 0.999
    assert len(labels.unique()) > 3


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "UPerNet" else pytest.mark.slow) for n in MODELS])
def test_models(name, tmp_path):
    pytest.importorskip("mmdet")
    errors = measure(openmmlab(name), tmp_path, TRACED_WHOLE, SIZES_WHOLE)
    assert all(error < exporting.TOLERANCE for error in errors.values()), errors


def test_what_onnx_cannot_translate(tmp_path):
    class Eigenvalues(nn.Conv2d):
        def forward(self, x):
            return torch.linalg.eigvals(super().forward(x)[:, 0, :8, :8]).real

    program = exporting.to_program(Eigenvalues(3, 1, 1), (32, 32))
    with pytest.raises(ValueError, match="the model has no ONNX form, but a torch.export program: .*eig"):
        exporting.to_onnx(program, tmp_path / "x.onnx", ["values"])
    assert not any(tmp_path.iterdir())


def test_image_without_detections():
    pytest.importorskip("mmdet")
    model = copy.deepcopy(openmmlab("Faster R-CNN"))
    model.roi_head.test_cfg.score_thr = 0.9999
    module, _ = exporting.exportable(model)
    program = exporting.to_program(module, TRACED_WHOLE).module()
    boxes, scores, _ = program(exporting.sample(module, (1, 150, 260)))
    assert boxes.shape == (1, 100, 4) and not scores.any()


def test_adaptive_pooling_is_torchs():
    x = torch.randn(2, 3, 7, 11)
    for size in [(1, 1), (2, 3), (6, 6)]:
        torch.testing.assert_close(exporting._AdaptivePool(size)(x), nn.AdaptiveAvgPool2d(size)(x))


@pytest.mark.parametrize("name", ["Module", *REFUSED])
def test_models_without_a_form_are_refused(name):
    if name == "Module":
        model = nn.Module()
        model.data_preprocessor = nn.Identity()
    else:
        pytest.importorskip("mmdet")
        model = openmmlab(name)
    with pytest.raises(ValueError, match=f"{type(model).__name__} .*has no form for export; there are forms for"):
        exporting.exportable(model)


def write(names: list[str]) -> None:
    """Measure what is named, or else all that is not stated yet, and state it."""
    stated = json.loads(STATED.read_text()) if STATED.exists() else {}
    whole = (TRACED_WHOLE, SIZES_WHOLE)
    for kind, known, make, sizes in (("backbones", CLASSES, backbone, ()), ("models", MODELS, openmmlab, whole)):
        found = {name: errors for name, errors in stated.get(kind, {}).items() if name in known}
        for name in known:
            if name in names or not names and name not in found:
                with TemporaryDirectory() as folder:
                    errors = measure(make(name), Path(folder), *sizes)
                print(name, errors, flush=True)
                found[name] = {form: float(f"{error:.0e}") for form, error in errors.items()}
                stated[kind] = {name: found[name] for name in known if name in found}
                STATED.write_text(json.dumps(stated, indent=1) + "\n")


if __name__ == "__main__":
    write(sys.argv[1:])
