"""tools/test.py and dist_test.sh: metrics, drawn predictions, and checkpoints that do not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from datasets import make_ade20k, make_coco
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from tiny import CLASSIFIER, DETECTOR, SEGMENTOR, TOOLS, tool, write_classes, write_config

evaluate = tool("test").main
TASKS = {
    "classifier": (CLASSIFIER, write_classes, ("accuracy/top1", "accuracy/top2")),
    "detector": (DETECTOR, make_coco, ("coco/bbox_mAP", "coco/segm_mAP")),
    "segmentor": (SEGMENTOR, make_ade20k, ("mIoU", "mAcc", "aAcc")),
}


@pytest.fixture(scope="module", params=TASKS)
def trained(request, tmp_path_factory):
    """Return a task's name, config and checkpoint of random weights; its data set is there."""
    base, make, _ = TASKS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    path = write_config(folder / f"{request.param}.py", base, make(folder / "data"))
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, folder / "weights.pth")
    return request.param, str(path), str(folder / "weights.pth")


def test_metrics_and_pictures(trained, tmp_path, monkeypatch, capfd):
    task, path, checkpoint = trained
    monkeypatch.chdir(tmp_path)
    evaluate([path, checkpoint, "--show-dir", "shown"])
    metrics = json.loads(Path("work_dirs", task, "metrics.json").read_text())
    assert set(TASKS[task][2]) <= metrics.keys()
    # all are proportions of something or, where there is nothing of a size, -1
    assert all(-1 <= value <= 100 for value in metrics.values())
    table = capfd.readouterr().out
    assert all(name in table for name in metrics)
    dataset = Config.fromfile(path).test_dataloader.dataset
    pictures = [Image.open(file) for file in Path("shown").rglob("*.png")]
    assert len(pictures) == {"classifier": 16, "detector": 2, "segmentor": 2}[task], dataset
    assert all(np.asarray(picture).std() > 0 for picture in pictures)


def fail(capsys, *args):
    with pytest.raises(SystemExit) as end:
        evaluate([*args, "--work-dir", "work"])
    assert end.value.code == 2
    assert not Path("work").exists()
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return message


@pytest.fixture
def classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / f"{tmp_path.name}.py", CLASSIFIER, write_classes(tmp_path / "data", 2))
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    state = MODELS.build(cfg.model).state_dict()
    torch.save({"state_dict": state}, "right.pth")
    return str(path), state


def test_unfit_checkpoints(classifier, capsys):
    path, state = classifier
    torch.save({key: value for key, value in state.items() if "mlp" not in key}, "missing.pth")
    torch.save({"state_dict": state | {"neck.weight": torch.zeros(1)}}, "unexpected.pth")
    torch.save({"state_dict": state | {"head.fc.bias": torch.zeros(7)}}, "shape.pth")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, "wrapped.pth")
    Path("damaged.pth").write_bytes(Path("right.pth").read_bytes()[:9999])

    message = fail(capsys, path, "missing.pth")
    assert "missing.pth: 55 of the 71 tensors of this ImageClassifier are in the checkpoint; 16 are missing" in message
    assert "(backbone.levels.0.blocks.0.mlp.fc1.weight, " in message
    assert "1 are in the checkpoint alone (neck.weight)" in fail(capsys, path, "unexpected.pth")
    assert "1 have another shape (head.fc.bias: (7,) there, (4,) here)" in fail(capsys, path, "shape.pth")
    assert "damaged.pth: is damaged" in fail(capsys, path, "damaged.pth")
    assert "rigth.pth: no such file" in (message := fail(capsys, path, "rigth.pth")) and "right.pth" in message
    evaluate([path, "wrapped.pth", "--out", "deep/er/out.json"])
    assert "accuracy/top1" in json.loads(Path("deep/er/out.json").read_text())


def test_wrong_options(classifier, capsys):
    path, _ = classifier
    message = fail(capsys, path, "right.pth", "--cfg-options", "test_evaluator.topkk=1")
    assert "test_evaluator.topkk: Accuracy takes no such argument; did you mean 'topk'?" in message
    message = fail(capsys, path, "right.pth", "--cfg-options", "test_dataloader.dataset.data_prefix=vall")
    assert "vall: No such file or directory; did you mean" in message
    message = fail(capsys, path, "right.pth", "--cfg-options", "test_evaluator=None")
    assert "test_evaluator is missing" in message
    os.mkdir("folder")
    assert "--out folder: is a folder" in fail(capsys, path, "right.pth", "--out", "folder")


def test_two_processes(classifier):
    """Two processes find what one finds."""
    path, _ = classifier
    evaluate([path, "right.pth", "--out", "one.json"])
    command = ["bash", TOOLS / "dist_test.sh", path, "right.pth", "2", "--out", "two.json"]
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads(Path("two.json").read_text()) == json.loads(Path("one.json").read_text())
