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
from _demo_pictures import AP, draw_curves, draw_pictures
from _files import replacing
from rich.console import Console
from rich.table import Table

TOOLS = Path(__file__).resolve().parent
CONFIG = TOOLS.parent / "configs/demo/mask-rcnn_nat_fpn_digits.py"


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"), help="where to save (%(default)s)")
    parser.add_argument("--data-root", type=Path, default=Path("data/digits"), help="folder of the set (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (%(default)s)")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the config")
    args = parser.parse_args()

    try:
        prepare_data(args.data_root)
    except FileExistsError as error:
        parser.error(str(error))
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
    """Draw the set under `root`, unless one is there; it may have been drawn with other counts or another seed.

    Raises:
        FileExistsError: Something else is there.
    """
    found = draw_digits.description(root)
    if found is None or found["version"] != draw_digits.VERSION:
        print(f"{root}: drawing digits", flush=True)
        draw_digits.draw(root)
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
