"""Published FLOPs and parameters of networks and detectors with attention modules, counted as their authors did.

The cards count multiply-adds of convolutions and matrix products. The authors' counters add norms and activations, each
in its own way, and some count in units of 2^30; so counted, the numbers are theirs.
"""

from collections import Counter

import pytest
import timm
import torch
from torch import nn

pytest.importorskip("triton")

from densezoo.ops.plugins import ECA
from tiny import tool

get_flops = tool("get_flops")

# Model -> published G, their unit, operations for each element of a batch norm.
CLASSIFIERS = {
    "eca_resnet50": (3.86, 2**30, 4),
    "eca_resnet101": (7.35, 2**30, 4),
    "eca_resnet152": (10.83, 2**30, 4),
    "eca_mobilenetv2": (0.3199, 2**20 * 1e3, 4),
    "triplet_resnet18": (1.825, 1e9, 2),
    "triplet_resnet18_k3": (1.823, 1e9, 2),
    "triplet_resnet50": (4.169, 1e9, 2),
    "triplet_resnet50_k3": (4.131, 1e9, 2),
    "triplet_mobilenetv2_k3": (0.322, 1e9, 2),
}
# Config -> published G at 1280x800 with 1000 proposals and 100 masks, and M of parameters that are trained.
DETECTORS = {
    "faster-rcnn_eca-resnet50_fpn_1x_coco": (207.18, 41.53),
    "faster-rcnn_eca-resnet101_fpn_1x_coco": (283.32, 60.52),
    "mask-rcnn_eca-resnet50_fpn_1x_coco": (275.69, 44.18),
    "mask-rcnn_eca-resnet101_fpn_1x_coco": (351.83, 63.17),
}


def count_elements(model: nn.Module) -> Counter:
    """Return a counter of what passes through the layers of a model from now on, by kind of layer."""
    counted = Counter()

    def count(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            counted["norm"] += output.numel()
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            counted["activation"] += output.numel()
        elif isinstance(module, nn.MaxPool2d | ECA):
            counted["pool"] += inputs[0].numel()
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            counted["bias"] += output.numel() * (module.bias is not None)
            if isinstance(module, nn.ConvTranspose2d):
                counted["upsampling"] += inputs[0].numel() * module.weight[0].numel()

    for module in model.modules():
        module.register_forward_hook(count)
    return counted


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name):
    published, unit, per_norm = CLASSIFIERS[name]
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    counted = count_elements(model)
    operations = get_flops.count_multiply_adds(model, (3, 224, 224))
    operations += per_norm * counted["norm"] + counted["activation"]
    assert operations / unit == pytest.approx(published, rel=6e-3)


class Detector(nn.Module):
    """A two-stage detector on as many proposals and masks as mmdet counts FLOPs of."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> None:
        levels = self.detector.neck(self.detector.backbone(images))
        self.detector.rpn_head(levels)
        head = self.detector.roi_head
        head.bbox_head(images.new_empty(1000, 256, 7, 7))
        if head.with_mask:
            head.mask_head(images.new_empty(100, 256, 14, 14))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "101" in name else ()) for name in DETECTORS]
)
def test_detectors(name):
    pytest.importorskip("mmdet")
    from mmengine.registry import MODELS
    from test_configs import CONFIGS, load

    flops, millions = DETECTORS[name]
    cfg = load(CONFIGS / f"attention_resnet/{name}.py")
    with torch.device("meta"):
        model = MODELS.build(cfg.model).eval()
    # mmdet 1 had a class more, for the background: four coordinates of 1024 weights, and a mask of 256.
    extra = 4 * 1025 + 257 * model.roi_head.with_mask
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) + extra
    assert round(trained / 1e6, 2) == millions

    counted = count_elements(model)
    operations = get_flops.count_multiply_adds(Detector(model), (3, 800, 1280))
    operations += 2 * counted["norm"] + counted["activation"] + counted["pool"] + counted["bias"]
    # Its counter takes an upsampling convolution of stride 2 for one over all positions of the output.
    operations += 3 * counted["upsampling"]
    assert operations / 1e9 == pytest.approx(flops, rel=2e-4)
