"""Published checkpoints: weights with all that a machine without the training config needs to use them.

A published checkpoint is a safetensors file, `NAME-HASH.safetensors`, with the first digits of its SHA-256 in its name,
and a JSON file of the same name, its sidecar. A published folder holds `model.safetensors` and `config.json`, as timm
and the Hugging Face Hub have it. The JSON is the same: `architecture`, `num_classes`, `model_args` and `pretrained_cfg`
are timm's; under `densezoo` lie the file's name and hash, the library that builds the model, and the config, metrics,
data and code version that it comes from. The weights' own header repeats it, so that the file alone loads too.
"""

import hashlib
import importlib.metadata
import inspect
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from densezoo import backbones
from densezoo.checkpoints import LoadReport, load_published, read_checkpoint, read_state_dict
from densezoo.version import __version__

# What timm's config.json says of the images that a model expects, and of its ends.
_PREPROCESSING = (
    *("input_size", "pool_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "first_conv", "classifier"),
    *("license", "tag"),
)
_SCOPES = ("mmdet", "mmseg", "mmpretrain", "densezoo")
# What mmcv looks up by name beside the registries.
_FUNCTIONS = {"nms", "soft_nms", "nms_match", "RoIAlign", "RoIPool"}
_LIBRARIES = ("torch", "timm", *(f"onedl-{name}" for name in ("mmengine", "mmcv", "mmdetection", "mmsegmentation")))


def describe_timm(architecture: str, model_args: Mapping[str, Any], **facts) -> dict:
    """Return the sidecar of a model that timm builds.

    Args:
        architecture: timm's name.
        model_args: The arguments beside it, such as `num_classes` or `out_norms`.
        facts: What goes under `densezoo`: `config`, `metrics`, `data`, `training`, ...
    """
    with torch.device("meta"):
        model = timm.create_model(architecture, **model_args)
    cfg = {key: model.pretrained_cfg[key] for key in _PREPROCESSING if model.pretrained_cfg.get(key) is not None}
    return to_json(
        dict(
            architecture=architecture,
            num_classes=model.num_classes,
            num_features=model.num_features,
            model_args=dict(model_args, num_classes=model.num_classes),
            pretrained_cfg=cfg,
            densezoo=dict(library="timm", **facts, code=code_version()),
        )
    )


def describe_config(config: Mapping, **facts) -> dict:
    """Return the sidecar of the model of an OpenMMLab config; that of timm's classifier in it is timm's.

    The backbone's part is timm's too where the zoo has it, with all of its stages.
    """
    config = {key: value for key, value in config.items() if key not in ("work_dir", "load_from", "resume", "launcher")}
    model = dict(config["model"])
    model.setdefault("data_preprocessor", config.get("data_preprocessor"))
    facts = dict(config=dict(config, model=model), data=describe_data(config)) | facts
    kind = str(model["type"]).split(".")[-1]
    if kind == "TimmClassifier":
        rest = ("type", "data_preprocessor", "loss", "train_cfg", "with_cp", "init_cfg", "pretrained", "model_name")
        args = {key: value for key, value in model.items() if key not in rest and not key.startswith("drop")}
        return describe_timm(model["model_name"], args, **facts)
    entry = dict(densezoo=dict(library="openmmlab", **facts, code=code_version()))
    timm_form = timm_backbone(model["backbone"]) if isinstance(model.get("backbone"), Mapping) else None
    if timm_form:
        entry = {key: value for key, value in describe_timm(*timm_form).items() if key != "densezoo"} | entry
    return to_json(entry)


def timm_backbone(config: Mapping) -> tuple[str, dict] | None:
    """Return timm's name and arguments of a backbone of the zoo in a config; None where timm builds no such."""
    from densezoo import openmmlab

    cls = openmmlab.MODELS.get(str(config["type"])) if str(config["type"]).startswith("densezoo.") else None
    if cls is None or not hasattr(cls, "archs"):
        return None
    rest = ("type", "arch", "out_indices", "out_norms", "frozen_stages", "with_cp", "init_cfg", "drop_path_rate")
    # Built as the config says, so that its own defaults hold; without values.
    with torch.device("meta"):
        built = cls(**{key: value for key, value in config.items() if key not in ("type", "init_cfg")})
    if len(built.out_indices) < 1 or max(built.out_indices) != len(built.feature_info) - 1:
        return None
    parameters = inspect.signature(cls._family).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    arch = config["arch"]
    given = dict(arch) if isinstance(arch, Mapping) else dict(cls.archs[arch.removeprefix(cls._prefix)])
    wanted = defaults | {key: value for key, value in cls._defaults.items() if key != "out_norms"} | given
    wanted |= {key: value for key, value in config.items() if key not in rest}
    wanted |= dict(out_norms=tuple(built.out_norms), num_classes=0)
    name = next(iter(cls.archs)) if isinstance(arch, Mapping) else arch.removeprefix(cls._prefix)
    own = defaults | cls.archs[name]
    return cls._prefix + name, {key: value for key, value in wanted.items() if to_json(value) != to_json(own.get(key))}


def describe_data(config: Mapping) -> dict:
    """Return what a config says of the data of its training and of its test, without the pipelines."""
    data = {}
    for part in ("train", "test"):
        dataset = (config.get(f"{part}_dataloader") or {}).get("dataset") or {}
        while isinstance(inner := dataset.get("dataset") or (dataset.get("datasets") or [None])[0], Mapping):
            dataset = inner
        keys = ("type", "data_root", "ann_file", "data_prefix", "split", "metainfo")
        data[part] = {key: dataset[key] for key in keys if dataset.get(key)} or None
    return data


def code_version() -> dict[str, str]:
    """Return the versions of the zoo and of the libraries that its results depend on; of a clone, the commit too."""
    versions = {"densezoo": __version__}
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        git = ["git", "-C", str(root)]
        try:
            commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
            status = [*git, "status", "--porcelain", "--untracked-files=no"]
            changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
            versions["commit"] = commit.strip() + (", with changes" if changed.strip() else "")
        except (OSError, subprocess.CalledProcessError):  # no git, or a clone of someone else's
            pass
    for name in _LIBRARIES:
        try:
            versions[name.removeprefix("onedl-")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def to_json(value: Any) -> Any:
    """Return plain JSON: tuples become lists; what JSON does not know, its text."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, type) or callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value.tolist() if hasattr(value, "tolist") else str(value)


def save(state: Mapping[str, Tensor], path: str | Path, info: Mapping) -> Path:
    """Write weights and their sidecar, whole or not at all.

    Args:
        state: The model's own state dict.
        path: `NAME.safetensors`; `NAME-HASH.safetensors` where the name holds `{hash}` in its place.
        info: What `describe_timm` or `describe_config` returned.

    Returns:
        The path of the weights.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name.replace('{hash}', 'new')}.tmp")
    sidecar = temporary.with_suffix(".json")
    # Copies: safetensors refuses tensors that share memory.
    tensors = {key: state[key].detach().cpu().contiguous().clone() for key in sorted(state)}
    try:
        safetensors.torch.save_file(tensors, temporary, {"format": "pt", "densezoo": json.dumps(info)})
        digest = sha256(temporary)
        path = path.with_name(path.name.replace("{hash}", digest[:8]))
        entry = dict(info["densezoo"], file=path.name, sha256=digest)
        sidecar.write_text(json.dumps(dict(info, densezoo=entry), indent=1) + "\n")
        os.replace(sidecar, path.with_suffix(".json"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        sidecar.unlink(missing_ok=True)
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(source: str | Path) -> nn.Module:
    """Return the model of a published checkpoint or folder, with its weights, in eval mode on the CPU.

    Nothing in the files is run: the weights are safetensors, and the JSON may name registered models alone.

    Args:
        source: A `.safetensors` file that `tools/export.py`, `tools/convert.py` or `save` wrote, with its sidecar or
            without, or a folder that `push_to_hub` built or timm saved.

    Returns:
        A timm model, or the whole detector, segmentor or classifier of OpenMMLab, which needs `densezoo[openmmlab]`;
        that has the names of its classes in `dataset_meta`.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: It is damaged, says not what model it is of, or its weights are not that model's.
    """
    weights, info = find(source)
    entry = info.get("densezoo", {})
    state = read_checkpoint(weights)
    if entry.get("library", "timm") == "openmmlab":
        model = _build_openmmlab(entry.get("config"), weights)
        metainfo = (entry.get("training") or {}).get("dataset_meta")
        model.dataset_meta = metainfo if isinstance(metainfo, dict) else {}
    else:
        model = _build_timm(info, state, weights)
    load_exactly(model, state, str(weights))
    return model.eval()


def find(source: str | Path) -> tuple[Path, dict]:
    """Return the weights of a published checkpoint or folder, and what is said of them.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There is nothing that says what model it is, or the weights are not those that it speaks of.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        sidecar = path / "config.json"
        if not sidecar.is_file():
            raise ValueError(f"{path}: has no config.json, so it is no published folder")
        info = _read_json(sidecar)
        file = info.get("densezoo", {}).get("file", "model.safetensors")
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{sidecar}: densezoo.file: got {file!r}, expected the name of a file beside it")
        path = path / file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file, though {sidecar.name} speaks of it")
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    elif path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: is no published checkpoint, whose name ends with .safetensors; tools/convert.py makes one of it"
        )
    elif (sidecar := path.with_suffix(".json")).is_file():
        info = _read_json(sidecar)
    else:
        info = _read_header(path)
    expected = info.get("densezoo", {}).get("sha256")
    if expected is not None and sha256(path) != expected:
        raise ValueError(f"{path}: is not the file that its JSON speaks of: their SHA-256 differ; get both anew")
    return path, info


def _read_json(path: Path) -> dict:
    try:
        info = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON: {error}") from error
    return _check_info(info, path)


def _read_header(path: Path) -> dict:
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("densezoo")
        info = None if text is None else json.loads(text)
    except (ValueError, RecursionError, OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: is damaged, incomplete or no checkpoint: {error}") from error
    if info is None:
        raise ValueError(
            f"{path}: says not what model it is of, and its sidecar {path.with_suffix('.json').name} is not there; "
            "build the model and load it with densezoo.checkpoints.load_published"
        )
    return _check_info(info, path)


def _check_info(info: Any, path: Path) -> dict:
    if not isinstance(info, dict) or not isinstance(info.get("densezoo", {}), dict):
        raise ValueError(f"{path}: expected an object with timm's `architecture` or with `densezoo`")
    return info


def _build_timm(info: dict, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    name, args = info.get("architecture"), info.get("model_args") or {}
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"{path}: architecture: got {name!r}, expected a model that timm or the zoo has")
    if not isinstance(args, dict):
        raise ValueError(f"{path}: model_args: got {type(args).__name__}, expected an object")
    args = {"num_classes": info["num_classes"], **args} if "num_classes" in info else args
    known = None
    if name in backbones.VARIANTS:
        known = inspect.signature(timm.model_entrypoint(name).__annotations__["return"]).parameters
    for key, value in args.items():
        # Those of timm's factory name other files.
        if known is not None and key not in known or key.startswith(("pretrained", "checkpoint", "cache")):
            raise ValueError(f"{path}: model_args: {name} takes no {key!r}")
        # A model of so many parts would not be that of these weights, and take forever to build.
        if key.startswith("depth") and any(number > len(state) for number in _numbers(value)):
            raise ValueError(f"{path}: model_args: {key} is {value}, but the file has {len(state)} tensors")
    try:
        with torch.device("meta"):
            shapes = timm.create_model(name, **args).state_dict()
        _compare(shapes, state, path)
        return timm.create_model(name, **args)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ZeroDivisionError, AssertionError) as error:
        raise ValueError(f"{path}: {name} cannot be built with {args}: {error}") from error


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


def _build_openmmlab(config: Any, path: Path) -> nn.Module:
    """Build the model of a config that came as JSON, if it names nothing but what OpenMMLab's libraries register."""
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{path}: densezoo.config: expected an object with `model`")
    try:
        from densezoo import openmmlab  # noqa: F401  (registers the zoo)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: is a model of OpenMMLab: {error}") from error
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    scope = config.get("default_scope") or "mmengine"
    if scope not in ("mmengine", *_SCOPES):
        raise ValueError(f"{path}: densezoo.config.default_scope: got {scope!r}, expected one of {', '.join(_SCOPES)}")
    model = _without_weights(config["model"])
    known = _registered()
    for place, kind in _types(model, "model"):
        if not isinstance(kind, str) or kind not in known:
            raise ValueError(f"{path}: densezoo.config.{place}: got {kind!r}, which no library registers")
    try:
        with DefaultScope.overwrite_default_scope(scope):
            return MODELS.build(Config(dict(model=model)).model)
    except Exception as error:  # classes check their arguments as they like
        raise ValueError(f"{path}: densezoo.config.model: cannot be built: {error}") from error


def _without_weights(config: Any) -> Any:
    """Leave out what names other checkpoints: the weights are at hand."""
    if isinstance(config, list):
        return [_without_weights(item) for item in config]
    if isinstance(config, dict):
        unwanted = ("init_cfg", "pretrained", "trust_remote_code")
        return {key: _without_weights(value) for key, value in config.items() if key not in unwanted}
    return config


def _types(config: Any, place: str) -> Iterator[tuple[str, Any]]:
    items = enumerate(config) if isinstance(config, list) else config.items() if isinstance(config, dict) else ()
    for key, value in items:
        if key in ("type", "_scope_"):
            yield f"{place}.{key}", value
        yield from _types(value, f"{place}.{key}")


def _registered() -> set[str]:
    """Return the names of all models and their parts that OpenMMLab's libraries and the zoo register."""
    from importlib import import_module

    from mmengine.registry import MODELS, TASK_UTILS

    names = set(_FUNCTIONS) | set(_SCOPES) | {"mmengine"}
    for scope in _SCOPES[:3]:
        import_module(f"{scope}.registry")
    registries = [registry for root in (MODELS, TASK_UTILS) for registry in (root, *root.children.values())]
    for registry in registries:
        registry.import_from_location()
    # Only now: what the libraries import registers layers with the roots.
    for registry in registries:
        names.update(registry.module_dict, (f"{registry.scope}.{name}" for name in registry.module_dict))
    return names


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load a state dict that has to be a model's own.

    Raises:
        ValueError: Names or shapes differ; the model is as it was.
    """
    _compare(model.state_dict(), state, name)
    model.load_state_dict(state)


def _compare(own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str | Path) -> None:
    unfit = [
        f"{key}: {tuple(state[key].shape)} there, {tuple(own[key].shape)} here"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = (
        ("are missing", [key for key in own if key not in state]),
        ("have another shape", unfit),
        ("are of no part of the model", [key for key in state if key not in own]),
    )
    told = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})" for what, keys in problems if keys]
    if told:
        raise ValueError(f"{name}: is not of this model: of its {len(own)} tensors " + "; ".join(told))


def load_whole(model: nn.Module, source: str | Path | Mapping) -> LoadReport:
    """Load a checkpoint in any published layout into a backbone or a whole model of OpenMMLab, all of it or nothing.

    As `densezoo.checkpoints.load_published`, which this applies to the backbone; other parts, such as a detector's
    heads, keep their names in OpenMMLab's libraries since mmdet 2 and mmseg 0. Copies that old averaging hooks left
    beside the weights (`ema_*`) are dropped: the weights are the averages already.

    Raises:
        FileNotFoundError: `source` is not there.
        ValueError: As there; names the file and the keys. The model is as it was.
    """
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        return load_published(model, source)
    name = "the given state dict" if isinstance(source, Mapping) else str(source)
    published = read_state_dict(source)
    names = {key: key.removeprefix("module.") for key in published}
    if not any(new.startswith("backbone.") for new in names.values()):
        raise ValueError(f"{name}: has a backbone alone, but {type(model).__name__} has other parts too; convert it "
                         "to the backbone's own name")  # fmt: skip
    averages = [old for old, new in names.items() if new.startswith("ema_")]
    body = {old: published[old] for old, new in names.items() if new.startswith("backbone.")}
    rest = {new: published[old] for old, new in names.items() if old not in body and old not in averages}
    own = model.state_dict()
    _compare({key: value for key, value in own.items() if not key.startswith("backbone.")}, rest, name)
    report = load_published(model.backbone, body)
    model.load_state_dict(rest, strict=False)
    renamed = {old: f"backbone.{new}" for old, new in report.renamed.items() if old != f"backbone.{new}"}
    renamed |= {old: new for old, new in names.items() if new in rest and old != new}
    return LoadReport(
        matched=report.matched + len(rest),
        renamed=renamed,
        dropped=report.dropped + averages,
        missing=[f"backbone.{key}" for key in report.missing],
        resized=[f"backbone.{key}" for key in report.resized],
    )
