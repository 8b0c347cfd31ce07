import json
import os
import subprocess
import sys
from difflib import SequenceMatcher
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from sklearn.datasets import load_digits
from tiny import TOOLS, tool

SPLITS = ("training", "validation")


@pytest.fixture(scope="module")
def draw_digits():
    return tool("draw_digits")


@pytest.fixture(scope="module")
def root(draw_digits, tmp_path_factory) -> Path:
    """Return a small drawn set."""
    root = tmp_path_factory.mktemp("data") / "digits"
    assert draw_digits.draw(root, training=16, validation=8)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("split", "count"), [("training", 16), ("validation", 8)])
def test_instances(root, split, count):
    coco = COCO(root / f"annotations/instances_{split}.json")
    assert len(coco.imgs) == count
    assert {category["id"]: category["name"] for category in coco.cats.values()} == {i: str(i) for i in range(10)}
    for image_id, info in coco.imgs.items():
        image = cv2.imread(str(root / "images" / split / info["file_name"]))
        assert image.shape == (info["height"], info["width"], 3)
        assert coco.imgToAnns[image_id]
        taken = np.zeros(image.shape[:2], int)
        for annotation in coco.imgToAnns[image_id]:
            mask = coco.annToMask(annotation)
            rows, columns = np.nonzero(mask)
            left, top = columns.min(), rows.min()
            assert annotation["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
            assert annotation["area"] == mask.sum() > 50
            taken += mask
        assert taken.max() == 1


@pytest.mark.parametrize("split", SPLITS)
def test_label_maps(root, split):
    coco = COCO(root / f"annotations/instances_{split}.json")
    for image_id, info in coco.imgs.items():
        path = root / "annotations" / split / info["file_name"].replace(".jpg", ".png")
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (info["height"], info["width"])
        inside = np.zeros(labels.shape, bool)
        for annotation in coco.imgToAnns[image_id]:
            mask = coco.annToMask(annotation).astype(bool)
            # the outline of a digit in front is ignored there
            assert set(np.unique(labels[mask])) <= {0, annotation["category_id"] + 1}
            assert (labels[mask] != 0).mean() > 0.8
            inside |= mask
        assert set(np.unique(labels[~inside])) == {0, 11}


def test_splits_are_whole_forms(draw_digits):
    targets = load_digits().target.tolist()
    first, *others = (targets[a:b] for a, b in zip(draw_digits.FORMS, draw_digits.FORMS[1:], strict=False))
    assert draw_digits.FORMS[-1] == len(targets)
    assert len(first) == 130
    for form in others:
        matcher = SequenceMatcher(None, first, form, autojunk=False)
        # Every form is the first one with some samples missing.
        assert sum(block.size for block in matcher.get_matching_blocks()) >= len(form) - 2
        assert form[:8] in (first[:8], first[1:9])
    training, validation = (draw_digits.SAMPLES[split] for split in SPLITS)
    assert training.stop <= validation.start
    assert {training.stop, validation.start} <= set(draw_digits.FORMS)


def test_no_sample_is_in_both_splits(root, draw_digits):
    targets, used = load_digits().target, {}
    for split in SPLITS:
        annotations = json.loads((root / f"annotations/instances_{split}.json").read_text())["annotations"]
        assert all(targets[annotation["sample"]] == annotation["category_id"] for annotation in annotations)
        used[split] = {annotation["sample"] for annotation in annotations}
        assert used[split] <= set(draw_digits.SAMPLES[split])
    assert not used["training"] & used["validation"]


def test_drawing_depends_on_the_seed_alone(root, draw_digits, tmp_path):
    assert draw_digits.draw(tmp_path / "same", training=16, validation=8)
    assert contents(tmp_path / "same") == contents(root)
    draw_digits.draw(tmp_path / "fewer", training=4, validation=2)
    draw_digits.draw(tmp_path / "other", training=4, validation=2, seed=1)
    name = "images/training/00003.jpg"
    assert (tmp_path / "fewer" / name).read_bytes() == (root / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (root / name).read_bytes()


def test_what_is_there_stays(root, draw_digits, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not draw_digits.draw(root, training=16, validation=8)
    with pytest.raises(FileExistsError, match="'training': 16.*expected.*'training': 20.*another folder"):
        draw_digits.draw(root, training=20, validation=8)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before

    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        draw_digits.draw(tmp_path, training=1, validation=1)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("draw_digits", [], "error: mine: holds something else"),
        ("demo", ["--work-dir", "new"], "error: mine: holds something else"),
        ("draw_digits", ["--validation", "0"], "--training, --validation: got 2000, 0, expected 1 or more"),
    ],
)
def test_mistakes(name, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--data-root", "mine", *arguments])
    with pytest.raises(SystemExit) as end:
        tool(name).main()
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert contents(tmp_path) == {"mine/thesis.txt": b"mine"}


def test_an_interrupted_drawing_leaves_nothing(draw_digits, tmp_path, monkeypatch):
    write = draw_digits.draw_split

    def interrupted(root, split, count, seed):
        write(root, split, count, seed)
        if split == "validation":
            raise KeyboardInterrupt

    monkeypatch.setattr(draw_digits, "draw_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_digits.draw(tmp_path / "digits", training=1, validation=1)
    assert not any(tmp_path.iterdir())


def test_work_dirs_are_resumed_or_numbered(tmp_path, capsys):
    choose, first = tool("demo").choose_work_dir, tmp_path / "demo"
    assert choose(first, ["a=0"]) == first
    assert choose(first, ["a=1"]) == first
    (first / "epoch_1.pth").touch()
    assert choose(first, ["a=1"]) == first
    assert choose(first, ["a=2"]) == tmp_path / "demo-2"
    (first / "metrics.json").write_text("{}")
    (tmp_path / "demo-2/epoch_1.pth").touch()
    assert choose(first, ["a=1"]) == tmp_path / "demo-3"
    assert "finished run, or one of other settings" in capsys.readouterr().out
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    assert choose(tmp_path / "notes", []) == tmp_path / "notes-2"


def test_demo(root, tmp_path):
    """One epoch of the whole demo on a few images."""
    work_dir = tmp_path / "demo"
    command = [sys.executable, TOOLS / "demo.py", "--work-dir", work_dir, "--data-root", root, "--seed", "3"]
    command += ["--cfg-options", "train_cfg.max_epochs=1", "train_cfg.val_interval=1"]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = json.loads((work_dir / "metrics.json").read_text())
    for name in ("coco/bbox_mAP", "coco/segm_mAP"):
        assert 0 <= metrics[name] <= 1
    assert (work_dir / "epoch_1.pth").is_file()
    for name in ("predictions.png", "curves.png"):
        assert cv2.imread(str(work_dir / name)).std() > 1
        assert str(work_dir / name) in result.stdout
    assert len(list((work_dir / "test/pictures").glob("*.png"))) == 8
    assert "AP50" in result.stdout
    assert "seed 3" in result.stdout
