"""Every config of a neck builds; one of each neck trains a step and is evaluated."""

import math

import pytest

pytest.importorskip("mmdet")

import test_configs
import torch
from mmengine.registry import MODELS
from test_configs import CONFIGS, Record, check_data, check_runtime, load

from densezoo.runner import Runner

data_roots = test_configs.data_roots

# Folder -> the type of the neck, and the config that trains a step in every test; the others are slow.
FAMILIES = {
    "fpn": ("FPN", None),
    "pafpn": ("PAFPN", "mask-rcnn_nat-mini_pafpn_1x_coco"),
    "simple_feature_pyramid": ("densezoo.SimpleFeaturePyramid", "mask-rcnn_nat-isotropic-small_simple-fpn_100e_coco"),
    "sepc": ("densezoo.SEPC", "retinanet_nat-mini_sepc_1x_coco"),
    "rcnet": ("densezoo.RCNet", "retinanet_nat-mini_rcnet_1x_coco"),
    "gold_yolo": ("densezoo.GatherDistribute", "yolox_nat-mini_gold-yolo-s_300e_coco"),
    "detectors": ("RFP", "cascade-rcnn_nat-mini_rfp_1x_coco"),
}
PATHS = [path for family in FAMILIES for path in sorted((CONFIGS / family).glob("*.py"))]


def types(node) -> set[str]:
    """Return every type in a config."""
    if isinstance(node, dict):
        return {node.get("type")}.union(*map(types, node.values()))
    return set().union(*map(types, node)) if isinstance(node, list | tuple) else set()


def test_every_neck_has_configs_on_a_resnet_and_a_zoo_backbone():
    for family, (kind, _) in FAMILIES.items():
        configs = [load(path) for path in PATHS if path.parent.name == family]
        backbones = {config.model.backbone.type for config in configs}
        assert any("ResNet" in backbone for backbone in backbones)
        # those of FPN are in the backbones' folders
        assert family == "fpn" or any(backbone.startswith("densezoo.") for backbone in backbones)
        for config in configs:
            assert {kind, f"densezoo.{kind}"} & types(config.model.neck)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_config_builds(path):
    cfg = load(path)
    with torch.device("meta"):
        MODELS.build(cfg.model)
    check_data(cfg)
    check_runtime(cfg)


SMALL = {
    "CachedMosaic": dict(img_scale=(64, 64)),
    "CachedMixUp": dict(img_scale=(64, 64)),
    "Pad": dict(size=(64, 64)),
    "BatchSyncRandomResize": dict(random_size_range=(64, 64)),
}


def shrink(node) -> None:
    """Make small what `test_configs` leaves as it is, and leave out weights to download."""
    if isinstance(node, dict):
        if "pad_to_square" not in node:
            node.update(SMALL.get(node.get("type"), {}))
        if node.get("init_cfg"):
            node["init_cfg"] = None
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            shrink(child)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem == FAMILIES[path.parent.name][1] else pytest.mark.slow)
        for path in PATHS
    ],
)
def test_trains_a_step_and_is_evaluated(path, data_roots, tmp_path):
    cfg = test_configs.load_for_a_step(path, data_roots["mmdet"], tmp_path)
    shrink(cfg.model)
    shrink(cfg.train_dataloader.dataset.pipeline)
    if path.parent.name in ("rcnet", "gold_yolo"):
        # batch norm on 1x1 maps
        cfg.train_dataloader.batch_size = cfg.train_dataloader.dataset.indices = 2
    if "r50" in path.stem and path.parent.name == "detectors":
        # Pretrained weights are in bounds, standardized random ones are not without norms' own statistics.
        for backbone in (cfg.model.backbone, cfg.model.neck.rfp_backbone):
            backbone.update(norm_eval=False, frozen_stages=-1, norm_cfg=dict(type="BN", momentum=1.0))
        cfg.optim_wrapper.clip_grad = dict(max_norm=0.1)
        # SAC reflects two pixels of the coarsest map
        for split in ("train", "val"):
            for step in cfg[f"{split}_dataloader"].dataset.pipeline:
                step.update(dict(scale=(160, 128)) if step.type == "Resize" else {})
    runner = Runner.from_cfg(cfg)
    record = Record()
    runner.register_hook(record)
    runner.train()
    assert len(record.losses) == 1 and math.isfinite(record.losses[0])
    state = runner.optim_wrapper.optimizer.state
    assert not [name for name, p in runner.model.named_parameters() if p.requires_grad and p not in state]
    assert math.isfinite(record.metrics["coco/bbox_mAP"])
