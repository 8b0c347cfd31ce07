"""tools/infer.py: drawn images and JSON for every task, and images that cannot be read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image
from pycocotools import mask as coco_mask
from tiny import CLASSIFIER, DETECTOR, SEGMENTOR, tool, write_config

infer = tool("infer").main
HEIGHT, WIDTH = 60, 90


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Write a.png, b.jpg, b.png and a broken one to images/."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "b.png"):
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "b.jpg").read_bytes()[:50])
    (folder / "notes.txt").write_text("no image")
    return folder


def write_model(base, meta=None):
    """Write a config without its data, and a checkpoint of random weights; return both paths."""
    path = write_config(Path("model.py"), base, Path("nowhere"))
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict(), "meta": meta or {}}, "model.pth")
    return "model.py", "model.pth"


def results(folder="predictions"):
    return {file.name: json.loads(file.read_text()) for file in Path(folder).glob("*.json")}


def test_detector(images):
    assert infer([str(images / "a.png"), *write_model(DETECTOR)]) == 0
    (result,) = results().values()
    assert result["image"] == str(images / "a.png") and result["size"] == [HEIGHT, WIDTH]
    assert 0 < len(result["instances"]) <= 5
    classes = DATASETS.get("mmdet.CocoDataset").METAINFO["classes"]
    for instance in result["instances"]:
        assert instance["class"] == classes[instance["label"]]
        assert 0 <= instance["score"] <= 1
        x1, y1, x2, y2 = instance["bbox"]
        assert 0 <= x1 <= x2 <= WIDTH and 0 <= y1 <= y2 <= HEIGHT
        assert coco_mask.decode(instance["mask"]).shape == (HEIGHT, WIDTH)
    assert Image.open("predictions/a_drawn.png").size == (WIDTH, HEIGHT)


def test_segmentor(images):
    assert infer([str(images / "*.png"), *write_model(SEGMENTOR), "--out-dir", "out"]) == 0
    found = results("out")
    assert found.keys() == {"a.json", "b.json"}
    classes = DATASETS.get("mmseg.ADE20KDataset").METAINFO["classes"]
    for result in found.values():
        labels = np.asarray(Image.open(Path("out", result["map"])))
        assert labels.shape == (HEIGHT, WIDTH) and labels.dtype == np.uint8
        counts = np.bincount(labels.ravel(), minlength=150)
        assert {entry["label"]: entry["fraction"] for entry in result["classes"]} == pytest.approx(
            {label: count / labels.size for label, count in enumerate(counts) if count}
        )
        assert all(entry["class"] == classes[entry["label"]] for entry in result["classes"])
    assert Image.open("out/a_drawn.png").size == (WIDTH, HEIGHT)


def test_classifier(images, capsys):
    """A folder with a broken image: the others are done, it is named, and the exit code tells."""
    names = dict(dataset_meta=dict(classes=("ant", "bee", "cat", "dog")))
    assert infer([str(images), *write_model(CLASSIFIER, names)]) == 1
    captured = capsys.readouterr()
    assert f"{images / 'broken.jpg'}: cannot be read as an image; skipped" in captured.err
    assert "3 of 4 images done" in captured.out
    found = results()
    # two images of one name
    assert found.keys() == {"a.json", "b_jpg.json", "b_png.json"}
    for result in found.values():
        assert {entry["class"] for entry in result["top5"]} == {"ant", "bee", "cat", "dog"}
        scores = [entry["score"] for entry in result["top5"]]
        assert sorted(scores, reverse=True) == scores and sum(scores) == pytest.approx(1)
    assert len(list(Path("predictions").glob("*_drawn.png"))) == 3


def test_mistakes(images, capsys):
    model = write_model(CLASSIFIER)

    def fail(*args):
        with pytest.raises(SystemExit) as end:
            infer([*args, "--out-dir", "out"])
        assert end.value.code == 2
        assert not Path("out").exists()
        return capsys.readouterr().err

    assert f"there is no such file; did you mean {images / 'a.png'}?" in fail(str(images / "aa.png"), *model)
    Path("empty").mkdir()
    assert "error: empty: the folder has no image" in fail("empty", *model)
    assert "modell.pth: no such file" in fail(str(images), model[0], "modell.pth")
    assert "no key modl; did you mean 'model'?" in fail(str(images), *model, "--cfg-options", "modl.head.topk=1")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, "other.pth")
    assert "other.pth: 0 of the 71 tensors" in fail(str(images), model[0], "other.pth")
