"""What the tools share: arguments, configs, and errors that say what to change."""

import difflib
import os
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

# Nothing that a file holds is ever run: torch obeys this, whatever a library asks of it.
os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")

from _errors import ConfigError, check_keys, check_option, describe, did_you_mean, path_hint
from _explain import explain
from _launch import set_environment
from mmengine.config import Config, DictAction

from densezoo.runner import Runner

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Options(DictAction):
    """`--cfg-options a.b=1 c=[2,3]`, as OpenMMLab reads it."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None):
        """Read the values, or end with a usage message."""
        for value in values:
            if not re.match(r"[^=\s]+=", value):
                parser.error(f"{option_string} {value}: expected KEY=VALUE, such as train_dataloader.batch_size=2")
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:
            parser.error(f"{option_string}: {error}")


def make_parser(description: str) -> ArgumentParser:
    """Return a parser with the arguments that every tool has."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--cfg-options", nargs="+", action=Options, default={}, metavar="KEY=VALUE",
                        help="values that replace the config's, such as train_dataloader.batch_size=4")  # fmt: skip
    return parser


def load_config(args: Namespace, needs: Iterable[str] = ("model",)) -> Config:
    """Read the config `args.config`, with `args.cfg_options` and the arguments of a run put in.

    Raises:
        ConfigError: The file, a key or a value is wrong.
    """
    path = Path(args.config)
    if not path.is_file():
        known = {other.name: other for other in (*CONFIGS.glob("**/[!_]*.py"), *path.parent.glob("*.py"))}
        near = difflib.get_close_matches(path.name, known, 1)
        raise ConfigError(f"{path}: there is no such config{f'; did you mean {known[near[0]]}?' if near else ''}")
    try:
        cfg = Config.fromfile(path)
    except SyntaxError as error:
        raise ConfigError(f"{path}: line {error.lineno}: {error.msg}: {(error.text or '').strip()}") from error
    except ImportError as error:
        cause = error.__cause__ or error
        hint = "; did you mean 'densezoo.openmmlab'?" if re.search(r"densezoo\.\w+", str(cause)) else ""
        raise ConfigError(f"{path}: {cause}{hint}") from error
    except Exception as error:
        raise ConfigError(f"{path}: {describe(error)}{path_hint(error)}") from error

    for option in args.cfg_options:
        check_option(cfg, option)
    try:
        cfg.merge_from_dict(args.cfg_options)
    except (IndexError, KeyError, TypeError) as error:
        raise ConfigError(f"--cfg-options: {describe(error)}") from error
    check_keys(cfg, path)
    for key in needs:
        if cfg.get(key) is None:
            raise ConfigError(f"{path}: {key} is missing{did_you_mean(key, cfg)}")
    scope = cfg.get("default_scope") or "mmengine"
    if find_spec(scope) is None:
        hint = did_you_mean(scope, ("mmdet", "mmseg", "mmpretrain"))
        raise ConfigError(f"{path}: default_scope: there is no package {scope!r}{hint}")
    use_timm_layout(cfg)
    # A run tells what these are; the config file may not know.
    if hasattr(args, "work_dir"):
        cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", path.stem))
        cfg.launcher = args.launcher
        set_environment(args.launcher, args.local_rank)
    return cfg


class Start:
    """Turns what goes wrong before a run's first step into one message and exit code 2; later errors stay as they are.

    DENSEZOO_DEBUG=1 shows the traceback of such an error too.
    """

    cfg: Config | None = None
    runner: Runner | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and not (self.runner and self.runner.started):
            message = explain(error, self.cfg)
            if message and not os.environ.get("DENSEZOO_DEBUG"):
                # The launcher ends the other processes as soon as the first has told.
                time.sleep(20 * (os.environ.get("LOCAL_RANK", "0") != "0"))
                print(f"error: {message}", file=sys.stderr)
                raise SystemExit(2)


def get_dataset(cfg: Config, loader: str) -> dict:
    """Return the config of the dataset of a loader, out of its wrappers."""
    dataset = cfg[loader]["dataset"]
    while isinstance(inner := dataset.get("dataset") or (dataset.get("datasets") or [None])[0], dict):
        dataset = inner
    return dataset


def use_timm_layout(cfg: Config) -> None:
    """Point ImageNet's test loader at validation/, timm's other name for val/, where only that is there."""
    for loader in ("val_dataloader", "test_dataloader"):
        if cfg.get(loader) is None:
            continue
        dataset = get_dataset(cfg, loader)
        root = Path(dataset.get("data_root") or "")
        if dataset.get("split") == "val" and not dataset.get("data_prefix") and (root / "validation").is_dir():
            if not (root / "val").exists():
                dataset["data_prefix"] = "validation"
