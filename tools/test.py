"""Evaluate a checkpoint as its config says, and save the metrics; see tools/README.md."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import Start, load_config, make_parser
from _errors import ConfigError
from _expect import add_test_time_augmentation, compare, find_expected
from _files import replacing
from _launch import add_run_arguments, finish
from _predictions import draw
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from rich.console import Console
from rich.table import Table

from densezoo.runner import Runner

NEEDS = ("model", "test_dataloader", "test_evaluator", "test_cfg")


class DrawHook(Hook):
    """Saves every image with its predictions, and its ground truth where the pipeline loads it."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: Sequence = ()) -> None:
        """Draw a batch, in the folders of the data set."""
        dataset = runner.test_dataloader.dataset
        prefix = getattr(dataset, "data_prefix", {})
        root = prefix.get("img_path") or prefix.get("img") or ""
        for sample in outputs:
            path = os.path.relpath(sample.img_path, root)
            name = Path(sample.img_path).name if path.startswith("..") else path
            draw(sample, sample.img_path, dataset.metainfo, (self.folder / name).with_suffix(".png"), True)


def main(argv: Sequence[str] | None = None) -> int:
    """Test as the command line says; return 1 if a metric is not the expected one."""
    parser = make_parser(__doc__)
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="file or URL; has to fit the model exactly")
    parser.add_argument("--out", help="where to save the metrics as JSON; default: metrics.json in the work dir")
    parser.add_argument("--show-dir", help="folder in which to save every image with its predictions")
    parser.add_argument("--tta", action="store_true",
                        help="augment: by the config's tta_model, else mirror images")  # fmt: skip
    parser.add_argument("--expect", type=float, nargs="?", const=0.1, metavar="TOLERANCE",
                        help="exit with 1 if a metric is further than this from the card; default: 0.1")  # fmt: skip
    add_run_arguments(parser)
    args = parser.parse_args(argv)

    with Start() as start:
        start.cfg = cfg = load_config(args, NEEDS)
        out = Path(args.out or Path(cfg.work_dir, "metrics.json"))
        if out.is_dir():
            raise ConfigError(f"--out {out}: is a folder, expected a file")
        expected = None if args.expect is None else find_expected(args.config, args.tta)
        if args.tta:
            add_test_time_augmentation(cfg)
        cfg.load_from, cfg.resume = args.checkpoint, False
        start.runner = runner = Runner.from_cfg(cfg)
        if args.show_dir:
            runner.register_hook(DrawHook(args.show_dir))
        metrics = {name: to_plain(value) for name, value in runner.test().items()}
    if is_main_process():
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as file:
            file.write_text(json.dumps(metrics, indent=2, default=str) + "\n")
        show(metrics)
        print(f"{args.checkpoint} on {len(runner.test_dataloader.dataset)} images; saved to {out}")
    failed = expected is not None and not compare(expected, metrics, args.expect)
    finish()
    return int(failed)


def to_plain(value: Any) -> Any:
    """Return a metric as JSON knows it; what is not a number becomes null."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(metrics: dict) -> None:
    """Print the metrics as a table."""
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
