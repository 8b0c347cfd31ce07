"""tools/check_data.py: whole data sets pass, every kind of damage is named, and nothing makes it crash or hang."""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmengine")

from datasets import make_ade20k, make_coco, make_coco_panoptic, make_imagenet
from PIL import Image
from tiny import CLASSIFIER, DETECTOR, SEGMENTOR, tool, write_classes, write_config

check = tool("check_data").main

PANOPTIC = """
_base_ = ["BASE/datasets/coco_panoptic_lsj.py", "BASE/default_runtime.py"]
train_dataloader = dict(dataset=dict(data_root="ROOT/"))
val_dataloader = dict(dataset=dict(data_root="ROOT/"))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = None
""".replace("BASE", str(Path(__file__).parents[2] / "configs" / "_base_"))
IMAGENET = """
default_scope = "mmpretrain"
custom_imports = dict(imports=["densezoo.openmmlab"])
data = dict(type="ImageNet", data_root="ROOT", metainfo=dict(classes=list("abcd")))
train_dataloader = dict(dataset=dict(**data, split="train"))
val_dataloader = dict(dataset=dict(type="RepeatDataset", times=2, dataset=dict(**data, split="val")))
"""
FORMATS = {
    "coco": (DETECTOR, make_coco),
    "panoptic": (PANOPTIC, lambda root: make_coco_panoptic(make_coco(root))),
    "ade20k": (SEGMENTOR, make_ade20k),
    "imagenet": (IMAGENET, make_imagenet),
    "folders": (CLASSIFIER, lambda root: write_classes(root, 1)),
}


@pytest.fixture
def data(tmp_path, request):
    """Return the config and the root of a data set of the format that the test names."""
    base, make = FORMATS[request.param]
    return write_config(tmp_path / "config.py", base, make(tmp_path / "data")), tmp_path / "data"


def of(name):
    return pytest.mark.parametrize("data", [name], indirect=True)


@pytest.mark.parametrize("data", FORMATS, indirect=True)
def test_whole_data_pass(data, capsys):
    assert check([str(data[0])]) == 0
    out = capsys.readouterr().out
    assert "nothing to fix" in out and "PROBLEM" not in out
    assert "train_dataloader.dataset: " in out and "val_dataloader.dataset" in out


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


BOX = {"bbox": [100, 10, 60, 20]}
RLE = {"size": [96, 128], "counts": [1, 2]}
COCO_DAMAGE = {
    "box outside its image: 1; expected x, y": lambda d: d["annotations"][0].update(BOX),
    "box that is none: 1": lambda d: d["annotations"][0].update(bbox=[1, 2, -3, 4]),
    "object of no image: 1; remove it": lambda d: d["annotations"][0].update(image_id=77),
    "object of no category: 1": lambda d: d["annotations"][0].update(category_id=12),
    "id twice in annotations: 1": lambda d: d["annotations"].append(d["annotations"][0]),
    "class without a category: 1": lambda d: d["categories"][0].update(name="persons"),
    "'person'; did you mean 'persons'?": lambda d: d["categories"][0].update(name="persons"),
    "two categories of one name: 1": lambda d: d["categories"].append({"id": 12, "name": "person"}),
    "size that differs: 1": lambda d: d["images"][0].update(width=129),
    "128x96, but 129x96 (width x height)": lambda d: d["images"][0].update(width=129),
    "missing image: 1; put it there": lambda d: d["images"][0].update(file_name="x.jpg"),
    "damaged entry of images: 1": lambda d: d["images"][0].pop("file_name"),
    "damaged mask: 1": lambda d: d["annotations"][0].update(segmentation=[[1, 2, 3]]),
    "damaged mask: 2": lambda d: [a.update(segmentation=RLE) for a in d["annotations"][:2]],
    "object without area or iscrowd: 1": lambda d: d["annotations"][0].pop("iscrowd"),
    "no objects at all": lambda d: d["annotations"].clear(),
    "there is no list 'categories'": lambda d: d.pop("categories"),
}  # fmt: skip


@of("coco")
@pytest.mark.parametrize("message", COCO_DAMAGE)
def test_damaged_coco(data, capsys, message):
    path, root = data
    change(root / "annotations" / "instances_train2017.json", COCO_DAMAGE[message])
    assert check([str(path)]) == 2
    out = capsys.readouterr().out
    assert message in out and "to fix" in out
    assert "val_dataloader.dataset: CocoDataset, 2 images: 0 problem(s)" in out


@of("coco")
def test_notes_are_no_problems(data, capsys):
    path, root = data

    def edit(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]
        content["annotations"][0]["bbox"][3] = 0
        content["categories"].append({"id": 12, "name": "street sign"})

    change(root / "annotations" / "instances_train2017.json", edit)
    assert check([str(path)]) == 0
    out = capsys.readouterr().out
    for note in ("image without objects: 1", "box of less than a pixel: 1", "category that is no class: 1"):
        assert f"note: {note}" in out


@of("panoptic")
def test_damaged_panoptic(data, capsys):
    path, root = data
    change(root / "annotations" / "panoptic_train2017.json", lambda d: d["annotations"][0]["segments_info"].pop())
    Image.new("L", (128, 96)).save(root / "annotations" / "panoptic_train2017" / "000000000002.png")
    (root / "annotations" / "panoptic_val2017" / "000000000001.png").unlink()
    assert check([str(path)]) == 2
    out = capsys.readouterr().out
    assert "segment in map or annotations alone: 1" in out and "panoptic map without colours: 1" in out
    assert "missing image: 1" in out and "panoptic_val2017/000000000001.png" in out


@of("ade20k")
def test_damaged_label_maps(data, capsys):
    path, root = data
    maps = sorted((root / "annotations" / "training").iterdir())
    labels = np.array(Image.open(maps[0]))
    labels[0, :3] = 151, 200, 255
    Image.fromarray(labels).save(maps[0])
    Image.new("L", (64, 64), 3).save(maps[1])
    val = sorted((root / "annotations" / "validation").iterdir())
    Image.new("RGB", (128, 96)).save(val[0])
    val[1].unlink()
    assert check([str(path)]) == 2
    out = capsys.readouterr().out
    assert "label that is no class: 1; expected 0 to 150, or 255 to ignore" in out and ": [151, 200]" in out
    assert "size that differs: 1" in out and "128x96, but 64x64" in out
    assert "label map in colours: 1" in out and "missing label map: 1" in out


@of("imagenet")
def test_damaged_imagenet(data, capsys):
    path, root = data
    with (root / "meta" / "val.txt").open("a") as file:
        file.write("x.JPEG 4\nno-label\ny.JPEG 0\n")
    image = next((root / "train").rglob("*.JPEG"))
    image.write_bytes(image.read_bytes()[:500])
    assert check([str(path)]) == 2
    out = capsys.readouterr().out
    assert "damaged line: 2; expected NAME LABEL, labels from 0 to 3" in out and "missing image: 1" in out
    assert "image that cannot be read: 1; copy or download it again" in out and str(image) in out


@of("folders")
def test_damaged_folders(data, capsys):
    path, root = data
    (root / "train" / "e").mkdir()
    options = ["--cfg-options", "train_dataloader.dataset.metainfo.classes=[a,b,c,d]"]
    assert check([str(path), *options]) == 2
    out = capsys.readouterr().out
    assert "other number of classes: 1" in out and "5 folders, 4 classes" in out and "class without images: 1" in out


@of("coco")
def test_no_such_files(data, capsys):
    path, root = data
    assert check([str(path), "--cfg-options", "data_root=nowhere", "train_dataloader.dataset.data_root=nowhere/"]) == 2
    assert "missing annotation file: 1" in capsys.readouterr().out
    assert check([str(path), "--cfg-options", "test_evaluator.ann_file=none.json"]) == 2
    assert "test_evaluator.ann_file: there is no file 'none.json'" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        check([str(path), "--cfg-options", "train_dataloader.dataset.type=CocoDatset"])
    assert end.value.code == 2 and "did you mean 'CocoDataset'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        check([str(path), "--cfg-options", "train_dataloader.dataset.ann_file=3"])
    assert end.value.code == 2 and "train_dataloader.dataset.ann_file: is 3" in capsys.readouterr().err


WEIRD = (
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    "",
    "\ud800\0",
    "../" * 99,
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    {"id": []},
)


def damage_json(path, rng):
    """Replace or remove one value somewhere in the file."""
    node = root = json.loads(path.read_text())
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = rng.choice(list(keys))
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.9:
            node = node[key]
            continue
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = rng.choice(WEIRD)
        path.write_text(json.dumps(root))
        return


def damage(config, root, rng):
    """Damage one file of a data set or its config, and return how; True first where it must be noticed."""
    kind = rng.choice(["json", "json", "cut", "flip", "remove", "folder", "pipe", "config", "config"])
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.suffix != ".txt")
    if any(file.name.startswith("panoptic_") for file in files):
        files = [file for file in files if not file.name.startswith("instances_")]
    jsons = [file for file in files if file.suffix == ".json"]
    if kind == "json" and not jsons:
        kind = "cut"
    if kind == "config":
        lines = config.read_text().splitlines(keepends=True)
        i = rng.randrange(len(lines))
        lines[i] = rng.choice(["", lines[i][::-1], lines[i].replace("=", "=-", 1), lines[i].replace("dict", "list"),
                               lines[i].replace('"', "", 1), lines[i].replace("ROOT", "\0"), lines[i] * 2])  # fmt: skip
        config.write_text("".join(lines))
        return False, f"config line {i}"
    file = rng.choice(jsons if kind == "json" else files)
    content = file.read_bytes()
    if kind == "json":
        damage_json(file, rng)
    elif kind == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "flip":
        flipped = bytearray(content)
        for _ in range(20):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
    else:
        file.unlink()
        if kind == "folder":
            file.mkdir()
        if kind == "pipe":
            os.mkfifo(file)
    # In a folder without a list of its files, what is gone or has become a pipe cannot be missed.
    return kind == "cut" or kind == "pipe" and bool(jsons), f"{kind} {file}"


@pytest.mark.parametrize("data", FORMATS, indirect=True)
def test_fuzz(data, capsys, tmp_path):
    """A hundred damages, twenty of each format: an answer in seconds, exit code 0 or 2, and no traceback."""
    config, root = data
    originals = {file: file.read_bytes() for file in [config, *root.rglob("*")] if file.is_file()}

    def too_long(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    noticed = 0
    for seed in range(20):
        rng = random.Random(seed)
        must, how = damage(config, root, rng)
        signal.alarm(30)
        try:
            code = check([str(config)])
        except SystemExit as end:
            code = end.code
        finally:
            signal.alarm(0)
        captured = capsys.readouterr()
        assert code in ((2,) if must else (0, 2)), (seed, how, captured)
        assert "Traceback" not in captured.err + captured.out, (seed, how)
        assert code == 0 or "error: " in captured.err or "PROBLEM" in captured.out, (seed, how)
        assert "data that cannot be checked" not in captured.out, (seed, how, captured.out)
        noticed += code == 2
        for file, content in originals.items():
            if file.is_dir():
                file.rmdir()
            elif file.is_fifo():
                file.unlink()
            file.write_bytes(content)
    assert noticed >= 8
    assert check([str(config)]) == 0
