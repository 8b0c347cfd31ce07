"""Train a config of mmdet, mmseg or mmpretrain; see tools/README.md."""

import difflib
import re
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from _common import Start, load_config, make_parser
from _errors import ConfigError
from _launch import add_run_arguments, finish
from _switches import add_switches, apply_switches, is_average
from mmengine.config import Config
from torch import cuda, nn

from densezoo.checkpoints import read_checkpoint
from densezoo.runner import Runner

NEEDS = ("model", "train_dataloader", "train_cfg", "optim_wrapper")
# What a checkpoint has to hold to be resumed, beside its place in the training.
RESUMED = ("state_dict", "optimizer", "message_hub")


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    parser = make_parser(__doc__)
    parser.add_argument("config", help="config file")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the backbone; the rest of a detector changes with every image")  # fmt: skip
    parser.add_argument("--resume", nargs="?", const="auto", metavar="PATH",
                        help="go on from a checkpoint; without a path, from the work dir's newest, if any")  # fmt: skip
    parser.add_argument("--auto-scale-lr", action="store_true",
                        help="scale the learning rate by batch size / auto_scale_lr.base_batch_size")  # fmt: skip
    add_switches(parser)
    add_run_arguments(parser)
    args = parser.parse_args(argv)

    with Start() as start:
        start.cfg = cfg = load_config(args, NEEDS)
        apply_switches(cfg, args)
        if args.auto_scale_lr:
            if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
                raise ConfigError(f"--auto-scale-lr: {args.config} does not set auto_scale_lr.base_batch_size")
            cfg.auto_scale_lr.enable = True
        if args.compile and not cuda.is_available():
            check_compiler()
        if args.resume:
            set_resume(cfg, args.resume)
        if cfg.get("load_from"):
            cfg.load_from = existing_checkpoint(cfg.load_from, "load_from")
        start.runner = runner = Runner.from_cfg(cfg)
        if args.channels_last:
            runner.model.to(memory_format=torch.channels_last)
        if args.compile:
            compile_backbone(runner.model)
        runner.train()
    finish()


def set_resume(cfg: Config, source: str) -> None:
    """Let the run go on from a checkpoint, with its seed."""
    if source == "auto":
        path = newest_checkpoint(Path(cfg.work_dir))
        if path is None:
            print(f"--resume: no checkpoint in {cfg.work_dir}; starting from the beginning")
            return
    else:
        path = existing_checkpoint(source, "--resume")
    checkpoint = read_checkpoint(path)
    meta = checkpoint.get("meta")
    # A best checkpoint has a place in the training but no optimizer.
    if not isinstance(meta, dict) or not {"epoch", "iter", *RESUMED} <= meta.keys() | checkpoint.keys():
        raise ConfigError(f"--resume {path}: holds weights but no state of a training; start from it with load_from")
    if "ema_state_dict" in checkpoint and not any(map(is_average, cfg.get("custom_hooks") or ())):
        raise ConfigError(f"--resume {path}: its run kept moving averages; give --ema, or start from it with load_from")
    cfg.resume, cfg.load_from = True, str(path)
    # Samplers are built with the seed, before mmengine takes it from the checkpoint.
    if meta.get("seed") is not None:
        cfg.randomness = dict(cfg.get("randomness") or {}, seed=meta["seed"])


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that `last_checkpoint` in a work dir names, also if the folder has moved since.

    Where it names none, the one of the latest epoch or iteration.
    """
    pointer = folder / "last_checkpoint"
    if pointer.is_file() and (named := pointer.read_text().strip()):
        for path in (Path(named), folder / Path(named).name):
            if path.is_file():
                return path
    numbered = {path: re.fullmatch(r"(?:epoch|iter)_(\d+)", path.stem) for path in folder.glob("*.pth")}
    found = {path: int(match[1]) for path, match in numbered.items() if match}
    return max(found, key=found.get, default=None)


def existing_checkpoint(path: str, option: str) -> str:
    """Return the path, or say which checkpoint may be meant."""
    if "://" in path or Path(path).is_file():
        return path
    near = difflib.get_close_matches(Path(path).name, [other.name for other in Path(path).parent.glob("*.pth")], 1, 0.0)
    hint = f"; did you mean {Path(path).parent / near[0]}?" if near else ""
    raise ConfigError(f"{option}: there is no checkpoint {path}{hint}")


def compile_backbone(model: nn.Module) -> None:
    """Compile the backbone in place, which leaves the names of its parameters as they are."""
    model = getattr(model, "module", model)
    # mmpretrain's classifiers around timm or Hugging Face models keep them as `model`
    backbone = getattr(model, "backbone", None) or getattr(model, "model", None)
    if backbone is None:
        raise ConfigError(f"--compile: {type(model).__name__} has no backbone")
    backbone.compile()


def check_compiler() -> None:
    """Raise ConfigError where torch.compile could not build for a CPU: its kernels are modules of Python's in C++."""
    missing = []
    if not (shutil.which("g++") or shutil.which("clang++")):
        missing.append("a C++ compiler (Debian: apt-get install g++)")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        missing.append(f"{header} (Debian: apt-get install python3-dev, for Debian's Python)")
    if missing:
        raise ConfigError(f"--compile: torch.compile needs for a CPU {' and '.join(missing)}; or leave --compile out")


if __name__ == "__main__":
    main()
