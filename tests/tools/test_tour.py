"""The way of a new user, by the command line: draw digits, train, evaluate, export in every form, predict the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TOOLS

pytest.importorskip("mmengine")

from mmdet.structures import DetDataSample
from PIL import Image
from pycocotools import mask as coco_mask

import densezoo

DEMO = TOOLS.parent / "configs/demo/mask-rcnn_nat_fpn_digits.py"
# Less to export; and a model of few steps is sure of nothing.
FEW_STEPS = f"""
_base_ = ["{DEMO}"]
model = dict(
    backbone=dict(arch=dict(depths=(1, 1, 1))),
    test_cfg=dict(rcnn=dict(score_thr=0.01)),
)
train_cfg = dict(max_epochs=2, val_interval=2)
param_scheduler = []
"""


def run(folder: Path, tool: str, *arguments: str) -> None:
    """Run a tool in `folder`, as its user does."""
    command = [sys.executable, TOOLS / tool, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{tool} {arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def train(folder: Path, config: str, training: int, validation: int) -> str:
    """Draw digits and train on them, where the demo's config looks for them; return the checkpoint."""
    run(folder, "draw_digits.py", "--training", str(training), "--validation", str(validation))
    run(folder, "train.py", config)
    return (folder / "work_dirs" / Path(config).stem / "last_checkpoint").read_text()


def evaluate(folder: Path, config: str, checkpoint: str) -> dict[str, dict]:
    """Evaluate a checkpoint, and return what it predicts for the held-out images, by file name."""
    run(folder, "test.py", config, checkpoint, "--out", "metrics.json")
    run(folder, "infer.py", "data/digits/images/validation", config, checkpoint)
    files = sorted((folder / "predictions").glob("*.json"))
    return {Path(found["image"]).name: found for found in (json.loads(file.read_text()) for file in files)}


def export(folder: Path, config: str, checkpoint: str) -> Path:
    """Export a checkpoint as a published one, a program and ONNX; return the published one."""
    run(folder, "export.py", "checkpoint", config, checkpoint, "--metrics", "metrics.json")
    (path,) = (folder / "published").glob("*.safetensors")
    for form in ("program", "onnx"):
        run(folder, "export.py", form, str(path), "--size", "128", "128")
    return path


def check_forms(folder: Path, path: Path, predicted: dict[str, dict]) -> None:
    """Check that each exported form, loaded back, predicts what the trained model does."""
    model = densezoo.load(path).eval()
    program = torch.export.load(path.with_suffix(".pt2")).module()
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    assert json.loads(path.with_suffix(".json").read_text())["densezoo"]["metrics"].keys() >= {"coco/bbox_mAP"}
    count = 0
    for name, expected in predicted.items():
        pixels = np.asarray(Image.open(folder / "data/digits/images/validation" / name))[..., ::-1].copy()
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        shape = dict(img_shape=pixels.shape[:2], ori_shape=pixels.shape[:2], scale_factor=(1.0, 1.0))
        with torch.no_grad():
            (sample,) = model.test_step(dict(inputs=[image], data_samples=[DetDataSample(metainfo=shape)]))
            outputs = [program(image[None].float())]
        found = sample.pred_instances
        check(found.bboxes, found.scores, found.labels, expected["instances"])
        masks = [coco_mask.decode(instance["mask"]) for instance in expected["instances"]]
        assert (found.masks.numpy() == np.array(masks, bool).reshape(found.masks.shape)).mean() > 0.9999
        outputs.append(map(torch.from_numpy, session.run(None, {"images": image[None].float().numpy()})))
        for boxes, scores, labels, _ in outputs:
            some = scores[0] > 0
            check(boxes[0, some], scores[0, some], labels[0, some], expected["instances"])
        count += len(found)
    assert count >= len(predicted)


def check(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, expected: list[dict]) -> None:
    """Check that detections are the expected ones, in any order, but for the last ones: others are nearly as good."""
    wanted = [torch.tensor([instance[key] for instance in expected]) for key in ("bbox", "score", "label")]
    assert len(boxes) == len(expected)
    if expected:
        distance = (boxes[:, None] - wanted[0].view(-1, 4)).abs().amax(-1) / 128
        distance = distance + (scores[:, None] - wanted[1]).abs() + (labels[:, None] != wanted[2])
        last = wanted[1].min() + 2e-3 if len(expected) == 20 else 0
        assert (distance.amin(0)[wanted[1] > last] < 2e-3).all() and (distance.amin(1)[scores > last] < 2e-3).all()


@pytest.mark.slow
def test_few_steps(tmp_path):
    config = "few.py"
    (tmp_path / config).write_text(FEW_STEPS)
    checkpoint = train(tmp_path, config, training=24, validation=3)
    predicted = evaluate(tmp_path, config, checkpoint)
    check_forms(tmp_path, export(tmp_path, config, checkpoint), predicted)


@pytest.mark.slow
def test_demo(tmp_path):
    """The whole training, a quarter of an hour on two cores."""
    config = str(DEMO)
    checkpoint = train(tmp_path, config, training=2000, validation=200)
    predicted = evaluate(tmp_path, config, checkpoint)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["coco/bbox_mAP"] > 0.6 and metrics["coco/segm_mAP"] > 0.6
    check_forms(tmp_path, export(tmp_path, config, checkpoint), dict(list(predicted.items())[:20]))


@pytest.mark.slow
def test_cards_and_page(tmp_path):
    run(tmp_path, "make_cards.py", "--check")
    run(tmp_path, "make_zoo.py", "--out-dir", "zoo")
    page = (tmp_path / "zoo/index.html").read_text()
    assert all(f'id="{card.stem}"' in page for card in (TOOLS.parent / "model_cards").glob("*.md"))
