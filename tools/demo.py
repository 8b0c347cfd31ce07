"""Run the zoo from end to end in minutes, on a GPU or on two CPU cores.

Draws a set of handwritten digits, trains Mask R-CNN with a NAT backbone and FPN on it (tools/train.py), tests it on
digits of other writers (tools/test.py), and shows what came out.

An unfinished run of the same settings in the work dir is taken up again. A finished run, or one of other settings,
stays as it is: the new one goes to the next free name (work_dirs/demo-2, ...).
"""

import argparse
import json
import subprocess
import sys
from itertools import count
from pathlib import Path

import draw_digits
import matplotlib
from _files import replacing
from pycocotools.coco import COCO
from rich.console import Console
from rich.table import Table

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

TOOLS = Path(__file__).resolve().parent
CONFIG = TOOLS.parent / "configs/demo/mask-rcnn_nat_fpn_digits.py"
AP = {"box": "coco/bbox_mAP", "mask": "coco/segm_mAP"}  # names among the metrics
NUM_PICTURES = 8


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"), help="where to save (%(default)s)")
    parser.add_argument("--data-root", type=Path, default=Path("data/digits"), help="folder of the set (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (%(default)s)")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the config")
    args = parser.parse_args()

    prepare_data(args.data_root)
    options = [*data_options(args.data_root), f"randomness.seed={args.seed}", *args.cfg_options]
    work_dir = choose_work_dir(args.work_dir, options)
    test_dir = work_dir / "test"

    run("train.py", CONFIG, "--work-dir", work_dir, "--resume", "auto", "--cfg-options", *options)
    checkpoint = Path((work_dir / "last_checkpoint").read_text())
    options.append(f"test_evaluator.outfile_prefix={test_dir / 'results'}")
    pictures = test_dir / "pictures"
    run("test.py", CONFIG, checkpoint, "--work-dir", test_dir, "--show-dir", pictures, "--cfg-options", *options)

    draw_pictures(args.data_root, test_dir / "results.segm.json", work_dir / "predictions.png")
    draw_curves(work_dir, work_dir / "curves.png")
    metrics = json.loads((test_dir / "metrics.json").read_text())
    # Marks the run as finished.
    with replacing(work_dir / "metrics.json") as file:
        file.write_text(json.dumps(metrics, indent=2) + "\n")
    show(
        metrics,
        {
            "digits": args.data_root,
            "checkpoint": checkpoint,
            "predictions": f"{work_dir / 'predictions.png'}, all of them: {pictures}",
            "curves": work_dir / "curves.png",
            "metrics": work_dir / "metrics.json",
        },
    )


def prepare_data(root: Path) -> None:
    """Draw the set under `root`, unless one is there; it may have been drawn with other counts or another seed."""
    found = draw_digits.description(root)
    if found is None or found["version"] != draw_digits.VERSION:
        print(f"{root}: drawing digits", flush=True)
        try:
            draw_digits.draw(root)
        except FileExistsError as error:
            sys.exit(f"error: {error}")
        found = draw_digits.description(root)
    print(f"{root}: {found['training']} training images, {found['validation']} of other writers", flush=True)


def data_options(root: Path) -> list[str]:
    """Return the options that make the config read the set under `root`."""
    loaders = [f"{split}_dataloader.dataset.data_root={root}/" for split in ("train", "val", "test")]
    annotations = root / "annotations/instances_validation.json"
    return loaders + [f"{split}_evaluator.ann_file={annotations}" for split in ("val", "test")]


def choose_work_dir(first: Path, options: list[str]) -> Path:
    """Return the first of `first`, `first`-2, ... that is free or holds an unfinished run of these options."""
    settings = json.dumps(dict(config=CONFIG.read_text(), options=options), indent=2)
    for i in count(1):
        folder = first if i == 1 else first.with_name(f"{first.name}-{i}")
        file = folder / "demo.json"
        # A run that failed before its first step leaves the settings alone.
        if not folder.exists() or folder.is_dir() and {path.name for path in folder.iterdir()} <= {file.name}:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(settings)
            return folder
        if file.is_file() and file.read_text() == settings and not (folder / "metrics.json").exists():
            print(f"{folder}: going on with the unfinished run", flush=True)
            return folder
        print(f"{folder}: holds a finished run, or one of other settings", flush=True)


def run(tool: str, *args: str | Path) -> None:
    """Run a tool, and exit as it does if it fails."""
    result = subprocess.run([sys.executable, TOOLS / tool, *args])
    if result.returncode:
        sys.exit(result.returncode)


def draw_pictures(root: Path, results: Path, out: Path) -> None:
    """Save the first images of the set under `root` with their ground truth above and COCO `results` below."""
    truth = COCO(root / "annotations/instances_validation.json")
    predicted = truth.loadRes(str(results)) if results.is_file() and json.loads(results.read_text()) else COCO()
    ids = sorted(truth.imgs)[:NUM_PICTURES]
    figure, axes = plt.subplots(2, len(ids), figsize=(2.5 * len(ids), 5.4), squeeze=False, layout="constrained")
    for column, image_id in zip(axes.T, ids, strict=True):
        pixels = plt.imread(root / "images/validation" / truth.imgs[image_id]["file_name"])
        for axis, title, source in zip(column, ("ground truth", "prediction"), (truth, predicted), strict=True):
            axis.imshow(pixels)
            axis.set_title(title)
            axis.axis("off")
            for instance in source.imgToAnns[image_id]:
                if instance.get("score", 1) < 0.5:
                    continue
                colour = plt.cm.tab10(instance["category_id"])
                x, y, width, height = instance["bbox"]
                axis.contour(source.annToMask(instance), levels=[0.5], colors=[colour], linewidths=1.5)
                axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), width, height, fill=False, color=colour))
                label = truth.cats[instance["category_id"]]["name"]
                if "score" in instance:
                    label += f" {instance['score']:.2f}"
                axis.text(x, y - 2, label, color="white", fontsize=8, bbox=dict(facecolor=colour, pad=1, linewidth=0))
    save(figure, out)


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
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(*zip(*sorted(losses.items()), strict=True))
    left.set(xlabel="iteration", ylabel="training loss")
    for name, curve in aps.items():
        right.plot(*zip(*sorted(curve.items()), strict=True), marker="o", label=name)
    right.set(xlabel="epoch", ylabel="AP on held-out images", ylim=(0, 1))
    right.legend()
    save(figure, out)


def save(figure: plt.Figure, out: Path) -> None:
    """Save a figure whole or not at all."""
    with replacing(out) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)


def show(metrics: dict, places: dict[str, Path | str]) -> None:
    """Print AP, and where everything lies."""
    table = Table("", "AP", "AP50", "AP75", title="Mask R-CNN with NAT and FPN on held-out digits (COCO's AP)")
    for name, key in AP.items():
        table.add_row(name, *(f"{metrics.get(key + suffix, 0.0):.3f}" for suffix in ("", "_50", "_75")))
    console = Console(soft_wrap=True)
    console.print(table)
    for name, place in places.items():
        console.print(f"{name:12}{place}", highlight=False)


if __name__ == "__main__":
    main()
