"""Configs with the zoo's heads: they build, train a step and are evaluated, each parameter with a gradient."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.registry import MODELS
from test_configs import (  # noqa: F401
    CONFIGS,
    Record,
    check_data,
    check_runtime,
    data_roots,
    known,
    load,
    load_for_a_step,
)

from densezoo.runner import Runner

# What the models count; none were published.
MILLIONS = {
    "dyhead/atss_r50_fpn_dyhead_1x_coco": "38.90",
    "dyhead/atss_nat-mini_fpn_dyhead_ms-2x_coco": "34.18",
    "dyhead/retinanet_r50_fpn_dyhead_1x_coco": "45.34",
    "dyhead/retinanet_nat-mini_fpn_dyhead_1x_coco": "40.62",
    "dyhead/faster-rcnn_r50_fpn_dyhead_1x_coco": "53.26",
    "dyhead/faster-rcnn_nat-mini_fpn_dyhead_1x_coco": "48.48",
    "bvr/retinanet_r50_fpn_bvr_1x_coco": "46.42",
    "bvr/retinanet_nat-mini_fpn_bvr_1x_coco": "38.15",
    "bvr/fcos_r50_fpn_bvr_1x_coco": "40.74",
    "bvr/fcos_nat-mini_fpn_bvr_1x_coco": "36.02",
    "bvr/atss_r50_fpn_bvr_1x_coco": "40.74",
    "bvr/atss_nat-mini_fpn_bvr_1x_coco": "36.02",
    "bvr/faster-rcnn_r50_fpn_bvr_1x_coco": "52.26",
    "bvr/faster-rcnn_nat-mini_fpn_bvr_1x_coco": "47.49",
    "deeplabv3plus/deeplabv3plus_r50-d8_160k_ade20k-512x512": "43.69",
    "deeplabv3plus/deeplabv3plus_nat-mini_160k_ade20k-512x512": "33.87",
    "fpenet/fpenet_r50_160k_ade20k-512x512": "23.80",
    "fpenet/fpenet_nat-mini_160k_ade20k-512x512": "19.56",
    "p2at/p2at_r50_160k_ade20k-512x512": "25.40",
    "p2at/p2at_nat-mini_160k_ade20k-512x512": "21.13",
    "relation_detr/relation-dino_r50_1x_coco": "48.37",
    "relation_detr/relation-dino_nat-mini_1x_coco": "40.11",
}
# Each head, those of RelationNet++ in one and in two stages.
QUICK = (
    "dyhead/atss_nat-mini_fpn_dyhead_ms-2x_coco",
    "bvr/retinanet_nat-mini_fpn_bvr_1x_coco",
    "bvr/faster-rcnn_nat-mini_fpn_bvr_1x_coco",
    "deeplabv3plus/deeplabv3plus_nat-mini_160k_ade20k-512x512",
    "fpenet/fpenet_nat-mini_160k_ade20k-512x512",
    "p2at/p2at_nat-mini_160k_ade20k-512x512",
    "relation_detr/relation-dino_nat-mini_1x_coco",
)


def test_every_config_is_listed():
    folders = {name.partition("/")[0] for name in MILLIONS}
    assert {f"{path.parent.name}/{path.stem}" for d in folders for path in (CONFIGS / d).glob("*.py")} == set(MILLIONS)


def path_of(name: str) -> Path:
    return CONFIGS / f"{name}.py"


@pytest.mark.parametrize("name", MILLIONS)
def test_config_builds(name):
    cfg = load(path_of(name))
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == MILLIONS[name]
    check_data(cfg)
    check_runtime(cfg)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MILLIONS]
)
def test_trains_a_step_and_is_evaluated(name, data_roots, tmp_path):  # noqa: F811
    cfg = load(path_of(name))
    best = cfg.default_hooks.checkpoint.save_best
    cfg = load_for_a_step(path_of(name), data_roots[cfg.default_scope], tmp_path)
    if "num_queries" in cfg.model:
        # small images have fewer positions
        cfg.model.update(num_queries=30, num_hybrid_queries=40)
    runner = Runner.from_cfg(cfg)
    record = Record()
    runner.register_hook(record)
    runner.train()
    assert len(record.losses) == 1
    assert math.isfinite(record.losses[0])
    state = runner.optim_wrapper.optimizer.state
    assert not [key for key, p in runner.model.named_parameters() if p.requires_grad and p not in state]
    assert math.isfinite(record.metrics[best])
