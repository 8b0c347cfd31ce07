"""What can be wrong with the keys of a config, and the hints that messages give at the nearest right answer."""

import difflib
import inspect
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

# What mmengine reads from a config.
TOP_KEYS = {*inspect.signature(Runner.__init__).parameters} - {"self", "cfg"} | {
    *("activation_checkpointing", "compile", "custom_imports", "efficient_conv_bn_eval", "find_unused_parameters"),
    *("model_wrapper_cfg", "sync_bn"),
}
# Dicts of which mmengine ignores unknown keys.
CLOSED_DICTS = {
    "env_cfg": ("cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"),
    "auto_scale_lr": ("enable", "base_batch_size"),
    "optim_wrapper.clip_grad": ("type", "max_norm", "norm_type", "error_if_nonfinite", "foreach", "clip_value"),
    "optim_wrapper.paramwise_cfg": (
        *("custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult", "flat_decay_mult", "dwconv_decay_mult"),
        *("dcn_offset_lr_mult", "bypass_duplicate", "layer_decay_rate"),
    ),
}
# How alike two names are of which one is the other misspelled.
ALIKE = 0.85


class ConfigError(Exception):
    """A config, an option or a file that a person has to change; the text says how."""


def check_keys(cfg: Config, path: Path) -> None:
    """Check the keys that mmengine does not check itself: those at the top, and of dicts that go to no class."""
    for key in cfg:
        if key not in TOP_KEYS and (near := difflib.get_close_matches(key, TOP_KEYS, 1, ALIKE)):
            raise ConfigError(f"{path}: {key}: there is no such key; did you mean {near[0]!r}?")
    for place, known in CLOSED_DICTS.items():
        for key in get(cfg, place) or ():
            if key not in known:
                raise ConfigError(f"{path}: {place}.{key}: there is no such key{did_you_mean(key, known)}")


def check_option(cfg: Config, option: str) -> None:
    """Check the key of an option as far as its own neighbours tell; building the parts tells the rest."""
    node, done = cfg, []
    for key in option.split("."):
        place = ".".join((*done, key))
        if isinstance(node, list | tuple):
            if not (key.isdigit() and int(key) < len(node)):
                raise ConfigError(f"--cfg-options {option}: {'.'.join(done)} is a list of {len(node)}: no index {key}")
            node = node[int(key)]
        elif isinstance(node, dict | Config):
            if key not in node:
                if not done and key not in TOP_KEYS:
                    raise ConfigError(f"--cfg-options {option}: no key {key}{did_you_mean(key, {*cfg, *TOP_KEYS})}")
                near = difflib.get_close_matches(key, map(str, node), 1, ALIKE)
                # A class says itself what it takes; module names of custom_keys may be alike.
                if near and "type" not in node and "custom_keys" not in done:
                    raise ConfigError(f"--cfg-options {option}: no key {place}; did you mean {near[0]!r}?")
                return
            node = node[key]
        elif node is not None:
            raise ConfigError(f"--cfg-options {option}: {'.'.join(done)} is {node!r} and has no keys")
        done.append(key)


def describe(error: Exception) -> str:
    """Return the text of an exception, with its type where the text alone says too little."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, OSError | ValueError | TypeError | ImportError) or len(text) < 20:
        text = f"{type(error).__name__}: {text}"
    return text if len(text) < 500 else f"{text[:500]} ..."


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return a hint at the option that is most like `word`, or at all of them where they are few."""
    options = sorted(map(str, options))
    if near := difflib.get_close_matches(word, options, 1):
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(options)}" if 0 < len(options) <= 20 else ""


def similar_path(path: str | Path) -> str:
    """Return a hint at the existing path that is most like a missing one."""
    path = Path(path).expanduser().absolute()
    parent = next(folder for folder in path.parents if folder.is_dir())
    name = path.relative_to(parent).parts[0]
    near = difflib.get_close_matches(name, os.listdir(parent), 1)
    if near:
        return f"; did you mean {parent / near[0]}?"
    return "" if parent == path.parent else f"; there is no folder {parent / name}"


def path_hint(error: Exception) -> str:
    """Return a hint about the first path in an error's text that does not exist."""
    for word in [getattr(error, "filename", None), *re.split(r"[\s'\"`,:;()]+", str(error))]:
        if isinstance(word, str) and "/" in word and "//" not in word and not os.path.exists(word):
            return similar_path(word)
    return ""


def get(cfg: Config, place: str) -> Any:
    """Return the value at a dotted place, or None."""
    node = cfg
    for key in place.split("."):
        node = node.get(key) if isinstance(node, dict | Config) else None
    return node
