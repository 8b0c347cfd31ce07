"""Which runs tools/compare.py starts, on which devices, and what it keeps of them."""

import json
import os
import time
from argparse import Namespace
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path

import draw_digits
import torch
from _compare_runs import import_all, prepare, start, train
from _compare_scores import looks_better, scores_of
from _compare_times import TIMED, measure
from _compare_variations import PLAIN, VARIATIONS
from _files import replacing
from demo import prepare_data
from rich.progress import Progress


class Comparison:
    """The runs that a command line asks for, and the facts that come of them.

    Args:
        args: The arguments of tools/compare.py.
        facts: What is known already; it is added to, here and in the file.

    Raises:
        ConfigError: An option does not fit the configs, or the data set cannot be used.
    """

    def __init__(self, args: Namespace, facts: dict):
        self.args, self.facts, self.configs = args, facts, {}
        wanted = {plain for name in args.names for plain in (name, VARIATIONS[name].plain)} or VARIATIONS
        self.names = [name for name in VARIATIONS if name in wanted]
        import_all()
        prepare_data(args.data_root)
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
