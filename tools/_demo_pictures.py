"""Pictures of what tools/demo.py trained: its predictions, and the curves of the training."""

import json
from pathlib import Path

from _files import replacing
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from pycocotools.coco import COCO

AP = {"box": "coco/bbox_mAP", "mask": "coco/segm_mAP"}  # names among the metrics
NUM_PICTURES = 8


def draw_pictures(root: Path, results: Path, out: Path) -> None:
    """Save the first images of the set under `root` with their ground truth above and COCO `results` below."""
    truth = COCO(root / "annotations/instances_validation.json")
    predicted = truth.loadRes(str(results)) if results.is_file() and json.loads(results.read_text()) else COCO()
    ids = sorted(truth.imgs)[:NUM_PICTURES]
    figure = Figure(figsize=(2.5 * len(ids), 5.4), layout="constrained")
    axes = figure.subplots(2, len(ids), squeeze=False)
    for column, image_id in zip(axes.T, ids, strict=True):
        pixels = imread(root / "images/validation" / truth.imgs[image_id]["file_name"])
        for axis, title, source in zip(column, ("ground truth", "prediction"), (truth, predicted), strict=True):
            axis.imshow(pixels)
            axis.set_title(title)
            axis.axis("off")
            for instance in source.imgToAnns[image_id]:
                if instance.get("score", 1) < 0.5:
                    continue
                colour = colormaps["tab10"](instance["category_id"])
                x, y, width, height = instance["bbox"]
                axis.contour(source.annToMask(instance), levels=[0.5], colors=[colour], linewidths=1.5)
                axis.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, color=colour))
                label = truth.cats[instance["category_id"]]["name"]
                if "score" in instance:
                    label += f" {instance['score']:.2f}"
                axis.text(x, y - 2, label, color="white", fontsize=8, bbox=dict(facecolor=colour, pad=1, linewidth=0))
    with replacing(out) as file:
        figure.savefig(file, dpi=110)


def draw_curves(work_dir: Path, out: Path) -> None:
    """Save loss and AP over the training, from what mmengine logged."""
    losses, aps = {}, {name: {} for name in AP}
    # One file for each time that the run was taken up; later ones replace the steps that they repeat.
    for log in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in map(json.loads, log.read_text().splitlines()):
            if "loss" in line:
                losses[line["step"]] = line["loss"]
            for name, key in AP.items():
                if key in line:
                    aps[name][line["step"]] = line[key]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*sorted(losses.items()), strict=True))
    left.set(xlabel="iteration", ylabel="training loss")
    for name, curve in aps.items():
        right.plot(*zip(*sorted(curve.items()), strict=True), marker="o", label=name)
    right.set(xlabel="epoch", ylabel="AP on held-out images", ylim=(0, 1))
    right.legend()
    with replacing(out) as file:
        figure.savefig(file, dpi=110)
