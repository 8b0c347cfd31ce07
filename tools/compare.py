"""Train the zoo's attention modules, necks and heads on the drawn digits, each in ResNet-18, and compare.

    python tools/compare.py                           all, with seed 0; what looks better, also with seeds 1 and 2
    python tools/compare.py se pafpn --more-seeds     two of them and what they are compared with, with seed 0 alone
    python tools/compare.py --report                  write the table and the plot anew

Results are kept in a JSON file as they come, and what it has is not trained again: a run that was stopped goes on, and
other seeds are added. A failed run is reported in the table and tried again the next time. The table and the plot lie
beside that file. Times are measured last, one model after the other.
"""

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from typing import NoReturn

# Asking for GPUs then leaves CUDA alone, which copies of this process could not use otherwise.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import cv2
import draw_digits
import torch
from _common import Options
from _compare_report import looks_better, report, scores_of
from _compare_runs import TIMED, import_all, measure, prepare, start, train
from _compare_variations import PLAIN, VARIATIONS
from _errors import ConfigError
from _files import replacing
from demo import prepare_data
from rich.progress import Progress

OUT = Path(__file__).resolve().parents[1] / "configs/demo/comparison.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(VARIATIONS)} (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="for all of them (0)")
    parser.add_argument("--more-seeds", type=int, nargs="*", default=[1, 2],
                        help="for what looks better than the plain model, and for that (1 2)")  # fmt: skip
    parser.add_argument("--jobs", type=int, help="trainings at a time (8 a GPU, as cores allow; 1 without a GPU)")
    parser.add_argument("--data-root", type=Path, default=Path("data/digits"), help="folder of the set (%(default)s)")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/compare"), help="for the runs (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON of the results (configs/demo/comparison.json)")
    parser.add_argument("--report", action="store_true", help="train nothing, only write the table and the plot")
    parser.add_argument("--cfg-options", nargs="+", action=Options, default={}, metavar="KEY=VALUE",
                        help="changes to all configs")  # fmt: skip
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in VARIATIONS:
            near = difflib.get_close_matches(name, VARIATIONS, 1) or VARIATIONS
            fail(f"{name}: there is no such variation; did you mean {' or '.join(near)}?")
    if args.report and not args.out.is_file():
        fail(f"--out {args.out}: there are no results to report; run without --report first")
    if not args.report:
        # Threads of this process would be missing in its copies.
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        try:
            Comparison(args).run()
        except ConfigError as error:
            fail(str(error))
    report(read(args.out), args.out)
    print(f"table: {args.out.with_suffix('.md')}, plot: {args.out.with_suffix('.png')}")


def read(place: Path) -> dict:
    """Return the facts in a file, none where there is no file."""
    try:
        facts = json.loads(place.read_text()) if place.exists() else {"variations": {}}
        return facts | {"variations": facts["variations"]}
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"--out {place}: holds something else than results of this tool; move it away, or choose another file")


def fail(message: str) -> NoReturn:
    """End with one line."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Comparison:
    """The runs that a command line asks for, and the facts that come of them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        wanted = {plain for name in args.names for plain in (name, VARIATIONS[name].plain)} or VARIATIONS
        self.names = [name for name in VARIATIONS if name in wanted]
        import_all()
        prepare_data(args.data_root)
        self.configs, self.facts = {}, read(args.out)
        for name in self.names:
            self.configs[name], digest = prepare(name, args.data_root, args.cfg_options)
            # Results of another config, budget or data set do not count.
            if self.facts["variations"].get(name, {}).get("digest") != digest:
                self.facts["variations"][name] = dict(digest=digest, scores={}, errors={})
        cfg, data = self.configs[self.names[0]], draw_digits.description(args.data_root)
        epochs = {n: c.train_cfg.max_epochs for n, c in self.configs.items() if n in PLAIN}
        epochs = self.facts.get("budget", {}).get("epochs", {}) | epochs
        budget = dict(epochs=epochs, batch_size=cfg.train_dataloader.batch_size)
        self.facts["budget"] = budget | {split: data[split] for split in ("training", "validation")}
        self.facts["seeds"] = [str(seed) for seed in args.seeds]
        self.facts["timed"] = TIMED
        self.cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())
        self.gpus = torch.cuda.device_count()
        self.jobs = args.jobs or max(1, min(os.cpu_count(), 8 * self.gpus))
        for folder in (args.work_dir, args.out.parent):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Train with the first seeds, then what looks better with more seeds, and time all."""
        self.train([(name, seed) for seed in self.args.seeds for name in self.names])
        chosen = [name for name in self.names if name in PLAIN and scores_of(self.facts, name)]
        chosen += [name for name in self.names if looks_better(self.facts, name, self.facts["seeds"])]
        self.train([(name, seed) for name in chosen for seed in self.args.more_seeds])
        if any("times" not in self.facts["variations"][name] for name in self.names):
            self.time()

    def train(self, runs: list[tuple[str, int]]) -> None:
        """Train what has no score yet, several at a time."""
        todo = [(name, seed) for name, seed in runs if str(seed) not in scores_of(self.facts, name)]
        threads, running = max(1, self.cores // self.jobs), {}
        # A thread that redraws could hold a lock in the moment of a copy.
        with Progress(auto_refresh=False) as progress:
            bar = progress.add_task(f"training {len(todo)} of {len(runs)}", total=len(todo))
            for count in range(len(todo)):
                while len(running) < self.jobs and todo:
                    name, seed = todo.pop(0)
                    folder, used = self.folder(name, seed), [gpu for *_, gpu in running.values()]
                    gpu = min(range(self.gpus), key=used.count, default=None)
                    args = (name, self.configs[name], seed, folder)
                    process = start(train, folder.with_suffix(".json"), gpu, threads, *args)
                    running[process.sentinel] = (process, name, seed, gpu)
                process, name, seed, _ = running.pop(wait(running)[0])
                process.join()
                text = self.record(name, seed, process.exitcode)
                progress.update(bar, advance=1, refresh=True)
                progress.console.print(f"{count + 1}: {name}, seed {seed}: {text}", highlight=False, soft_wrap=True)

    def record(self, name: str, seed: int, exitcode: int) -> str:
        """Take over what a run left; return it in words."""
        entry, file = self.facts["variations"][name], self.folder(name, seed).with_suffix(".json")
        result = json.loads(file.read_text()) if file.is_file() else dict(error=f"ended with {exitcode}")
        if "error" in result:
            entry["errors"][str(seed)] = result["error"]
            text = f"failed: {result['error']} (see {file.with_suffix('.log')})"
        else:
            entry["errors"].pop(str(seed), None)
            entry["scores"][str(seed)], entry["parameters"] = result["score"], result["parameters"]
            text = f"{result['score']:.3f} in {result['seconds']:.0f} s"
        self.save()
        return text

    def time(self) -> None:
        """Time all that was trained, in one process with nothing beside it."""
        seeds = [*self.args.seeds, *self.args.more_seeds]
        weights = {n: [*chain(*(self.folder(n, s).glob("epoch_*.pth") for s in seeds))] for n in self.names}
        configs = {name: (self.configs[name], found[0]) for name, found in weights.items() if found}
        out = self.args.work_dir / "times.json"
        process = start(measure, out, 0 if self.gpus else None, self.cores, configs, out)
        with Progress() as progress:
            bar = progress.add_task("timing", total=len(configs))
            while True:
                ended = not process.is_alive()
                found = json.loads(out.read_text()) if out.is_file() else {}
                progress.update(bar, completed=len(found))
                if ended:
                    break
                time.sleep(0.5)
        for name in configs.keys() & found.keys():
            self.facts["variations"][name]["times"] = found[name]
        # They were about the times before.
        self.facts.pop("remarks", None)
        self.save()

    def folder(self, name: str, seed: int) -> Path:
        """Return the work dir of a run."""
        return self.args.work_dir / f"{name}-seed{seed}"

    def save(self) -> None:
        """Write the facts."""
        with replacing(self.args.out) as file:
            file.write_text(json.dumps(self.facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
