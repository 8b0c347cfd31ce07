"""What can be wrong with a config, and what to say about it: where it is, and the nearest right answer."""

import difflib
import inspect
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, OPTIMIZERS, Registry
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


def explain(error: Exception, cfg: Config | None) -> str | None:
    """Return what to change in a config so that its parts can be built, or None if that is not what `error` tells."""
    if isinstance(error, ConfigError):
        return str(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    # mmengine builds every part from its dict in one of these
    builders = ("build_from_cfg", "build_scheduler_from_cfg", "build_dataloader")
    builds = [frame.f_locals for frame in frames if frame.f_code.co_name in builders]
    build = builds[-1] if builds else {}
    node = build.get("cfg", build.get("dataloader"))
    cls = build.get("obj_cls", build.get("scheduler_cls"))
    text = describe(error)

    if build and not isinstance(node, dict):
        place = next((f"{path}.{key}" for path, part in walk(cfg) for key in part if part[key] is node), "config")
        return f"{place}: is {node!r}, expected a dict with 'type'"
    # mmcv builds layers by functions of its own, with this text and the name here
    if "in registry under scope name" in text and (kind := frames[-1].f_locals.get("layer_type")):
        return unknown_type(kind, MODELS, cfg)
    if text == "None is not a callable object":
        return unknown_type(get(cfg, "optim_wrapper.optimizer.type"), OPTIMIZERS, cfg)
    if "registry" in build and cls is None and isinstance(node.get("type"), str):
        return unknown_type(node["type"], build["registry"], cfg)
    if call := re.search(r"([\w.]+)\(\) got an unexpected keyword argument '(\w+)'", text):
        owner, _, method = call[1].partition(".")
        taker = cls or frames[-1].f_globals.get(owner)
        if method not in ("", "__init__"):
            taker = getattr(taker, method, taker)
        place = f"{place_of(cfg, node, call[2])}.{call[2]}"
        name = getattr(taker, "__name__", owner)
        return f"{place}: {name} takes no such argument{did_you_mean(call[2], parameters_of(taker))}"
    if "at least one array to concatenate" in text:
        return f"{place_of(cfg, node)}: the dataset is empty; check ann_file, data_prefix and metainfo.classes"
    told = isinstance(error, ValueError | TypeError | KeyError | AssertionError | RuntimeError)
    raiser = frames[-1].f_globals.get("__name__", "").split(".")[0]
    if build or isinstance(error, OSError | ImportError) or told and raiser in ("densezoo", "mmengine"):
        return f"{place_of(cfg, node)}: {text}{path_hint(error)}" if build else text + path_hint(error)
    return None


def unknown_type(kind: str, registry: Registry, cfg: Config) -> str:
    """Return the message about a `type` that no library has."""
    place = next((path for path, part in walk(cfg) if part.get("type") == kind), "config")
    return f"{place}.type: no {kind!r} is known{did_you_mean(kind, names_of(registry))}"


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


def walk(node: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    """Yield the place and content of every dict in a config, those that mmengine reads first."""
    if isinstance(node, Config):
        for key in sorted(node, key=lambda key: key not in TOP_KEYS):
            yield from walk(node[key], key)
    elif isinstance(node, dict):
        yield path, node
        for key, item in node.items():
            yield from walk(item, f"{path}.{key}")
    elif isinstance(node, list | tuple):
        for i, item in enumerate(node):
            yield from walk(item, f"{path}.{i}")


def place_of(cfg: Config | None, node: dict | None, key: str | None = None) -> str:
    """Return where in the config the dict `node` is, and if that cannot be told, where one with `key` is."""

    def name_of(kind: Any) -> str:
        return getattr(kind, "__name__", str(kind)).split(".")[-1]

    def likeness(part: dict) -> tuple[bool, int]:
        same = node is not None and name_of(part.get("type")) == name_of(node.get("type"))
        return key in part, sum(part.get(name) == value for name, value in node.items()) if same else -1

    found = max(walk(cfg), key=lambda entry: likeness(entry[1]), default=None)
    if found and (likeness(found[1])[1] >= 0 or key is not None and likeness(found[1])[0]):
        return found[0]
    return str(node.get("type")) if node else "config"


def get(cfg: Config, place: str) -> Any:
    """Return the value at a dotted place, or None."""
    node = cfg
    for key in place.split("."):
        node = node.get(key) if isinstance(node, dict | Config) else None
    return node


def names_of(registry: Registry) -> set[str]:
    """Return the names known to a registry, to those above it, and by scope to those beside it."""
    names, root = set(), registry
    while root is not None:
        names.update(root.module_dict)
        registry, root = root, root.parent
    for scope, child in registry.children.items():
        names.update(f"{scope}.{name}" for name in child.module_dict)
    return names


def parameters_of(target: Any) -> set[str]:
    """Return the names of the arguments of a function, or of a class and its bases."""
    functions = [base.__init__ for base in target.__mro__[:-1]] if inspect.isclass(target) else [target]
    signatures = [inspect.signature(function) for function in functions if callable(function)]
    parameters = [parameter for signature in signatures for parameter in signature.parameters.values()]
    return {parameter.name for parameter in parameters if "VAR" not in parameter.kind.name} - {"self"}
