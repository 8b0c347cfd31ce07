"""The models that export.py and convert.py work on: a timm name with arguments, or a config."""

import ast
import os
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import timm
import torch
from torch import nn

import densezoo  # noqa: F401  (registers the models)
from densezoo import publishing


class ModelArgs(Action):
    """`--model-args num_classes=10 out_norms=0,1,2,3`: arguments of timm.create_model, as Python writes them."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None):
        """Read the values, or end with a usage message."""
        args = {}
        for text in values:
            key, found, value = text.partition("=")
            if not found or not key.isidentifier():
                parser.error(f"{option_string} {text}: expected KEY=VALUE, such as num_classes=10")
            try:
                args[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                args[key] = value
        setattr(namespace, self.dest, args)


def add_model(parser: ArgumentParser, what: str) -> None:
    """Add the arguments that say which model is meant."""
    parser.add_argument("model", help=what)
    parser.add_argument("--model-args", nargs="+", action=ModelArgs, default={}, metavar="KEY=VALUE",
                        help="arguments of a timm name, such as num_classes=10 or out_norms=0,1,2,3")  # fmt: skip


def is_config(model: str) -> bool:
    """Return whether a model is meant by a config file."""
    return model.endswith(".py")


def build(model: str, model_args: dict, **facts) -> tuple[nn.Module, dict]:
    """Return a model, not trained, and what its sidecar says.

    Args:
        model: timm's name, or the path of a config.
        model_args: Arguments beside a name.
        facts: More of what the sidecar says, under `densezoo`.

    Raises:
        ValueError: There is no such model, or it takes no such arguments.
    """
    if is_config(model):
        if model_args:
            raise ValueError("--model-args: are for a timm name; a config says all of its model itself")
        from _common import load_config
        from mmengine.registry import MODELS, init_default_scope

        cfg = load_config(Namespace(config=model, cfg_options={}))
        init_default_scope(cfg.get("default_scope") or "mmengine")
        if cfg.get("data_preprocessor"):
            cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
        built = MODELS.build(cfg.model)
        return built, publishing.describe_config(cfg.to_dict(), **facts)
    if not timm.is_model(model):
        near = get_close_matches(model, timm.list_models(), 1)
        raise ValueError(f"model: got {model!r}, expected a config (.py) or timm's name of a model"
                         + (f"; did you mean {near[0]!r}?" if near else ""))  # fmt: skip
    try:
        with torch.device("meta"):
            timm.create_model(model, **model_args)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"--model-args: {model}: {error}") from error
    return timm.create_model(model, **model_args), publishing.describe_timm(model, model_args, **facts)


@contextmanager
def told_errors() -> Iterator[None]:
    """Turn what is wrong with the input into one message and exit code 2; DENSEZOO_DEBUG=1 shows the traceback too."""
    try:
        yield
    except Exception as error:
        told = isinstance(error, ValueError | OSError) or type(error).__name__ == "ConfigError"
        if not told or os.environ.get("DENSEZOO_DEBUG"):
            raise
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from error
