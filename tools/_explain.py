"""What an error of building a config's parts means: where in the config its cause is, and the nearest right answer."""

import inspect
import re
import traceback
from collections.abc import Iterator
from typing import Any

from _errors import TOP_KEYS, ConfigError, describe, did_you_mean, get, path_hint
from mmengine.config import Config
from mmengine.registry import MODELS, OPTIMIZERS, Registry


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
