"""Published checkpoints: read as data, converted to the zoo's keys, verified strictly, and only then loaded."""

import difflib
import functools
import logging
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

import safetensors.torch
import timm
import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from densezoo import backbones
from densezoo.backbones.staged import ENTRIES

_log = logging.getLogger("densezoo")

# What wrappers put before every name: DDP, torch.compile, timm's feature nets, OpenMMLab's models.
_PREFIXES = ("module.", "_orig_mod.", "model.", "timm_model.", "backbone.")
# What stands beside the backbone in mmpretrain's classifiers.
_CLASSIFIER = ("head.fc.weight", "head.fc.bias")


@dataclass(frozen=True)
class LoadReport:
    """What `load_published` did with a checkpoint.

    Attributes:
        matched: Number of the model's tensors that were loaded.
        renamed: Published name -> the model's name, of the loaded tensors whose name changed.
        dropped: Published names that were left out, because this build of the model has no such part.
        missing: The model's tensors that the checkpoint does not hold and that keep their initial values.
        resized: The model's tensors that the family interpolated from another size, such as bias tables.
    """

    matched: int
    renamed: dict[str, str]
    dropped: list[str]
    missing: list[str]
    resized: list[str]

    def __str__(self) -> str:
        parts = [f"loaded {self.matched} of {self.matched + len(self.missing)} tensors"]
        if self.renamed:
            parts.append(f"{len(self.renamed)} renamed")
        if self.resized:
            parts.append(f"{len(self.resized)} resized ({_some(self.resized)})")
        if self.dropped:
            parts.append(f"{len(self.dropped)} dropped ({_some(self.dropped)})")
        if self.missing:
            parts.append(f"{len(self.missing)} keep their initial values ({_some(self.missing)})")
        return ", ".join(parts)


def load_published(model: nn.Module, source: str | Path | Mapping) -> LoadReport:
    """Load a checkpoint in any published layout into a backbone of the zoo, completely or not at all.

    Wrapping entries (`model`, `state_dict`, `state_dict_ema`, ...) and prefixes (`module.`, `backbone.`, ...) are
    removed, the parts of a whole detector or segmentor outside its backbone are dropped, and the model's family
    converts the rest to its own keys. Parts of the other layout are dropped too: the classifier where the model has
    none, the norms and stages of outputs that it does not give. The model's dtypes, devices and training mode stay.

    Args:
        model: A backbone built by timm or by OpenMMLab, bare or in a wrapper that adds no parts of its own (timm's
            feature net, mmpretrain's `TimmClassifier`, DDP, torch.compile).
        source: Path or URL of a .safetensors file or of one that torch.save wrote, or the checkpoint itself. URLs are
            kept in torch hub's cache, and verified where the name carries a hash (`name-0123abcd.pth`).

    Returns:
        What was loaded, renamed, dropped and left as it was. Nothing is ever left but the output norms `norm{i}` of the
        dense layout, which a classifier's checkpoint does not have.

    Raises:
        FileNotFoundError: `source` is not there, or cannot be downloaded.
        ValueError: The file is not a checkpoint of plain tensors, or not one of this model; names the file and the
            keys. The model is as it was.
    """
    name = "the given state dict" if isinstance(source, Mapping) else str(source)
    model, convert = _find_backbone(model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError(f"{name}: the model is on the meta device, which holds no values; build it on another first")
    published = read_state_dict(source)
    stripped = _strip(published)
    state = {stripped[key]: published[key] for key in stripped}
    try:
        converted = convert(dict(state), model)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: not a layout that {type(model).__name__} knows: {error!r}") from error

    missing, foreign = _verify(model, state, converted, name)
    loaded = {key: tensor for key, tensor in converted.items() if key not in foreign}
    names = {new: old for old, new in stripped.items()}
    origins = _trace(state, loaded, names)
    same = [key for key in loaded if key in state and origins[key] == names[key]]
    report = LoadReport(
        matched=len(loaded),
        renamed={origins[key]: key for key in loaded if origins.get(key, key) != key},
        dropped=[key for key in published if key not in origins.values()],
        missing=missing,
        resized=[key for key in same if loaded[key].numel() != state[key].numel()],
    )
    model.load_state_dict(loaded, strict=False)
    _log.info("%s: %s", name, report)
    return report


def read_state_dict(source: str | Path | Mapping) -> dict[str, Tensor]:
    """Read a checkpoint and return its tensors under their published names, without running anything in it.

    Args:
        source: As for `load_published`.

    Raises:
        FileNotFoundError: `source` is not there, or cannot be downloaded.
        ValueError: It is corrupt, holds code, or holds no tensors.
    """
    name = "the given state dict" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else read_checkpoint(source)
    # Bounded, because a hostile file may nest without end.
    for _ in range(4):
        inner = (content[key] for key in ENTRIES if isinstance(content.get(key), Mapping) and content[key])
        content = next(inner, content)
    state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"{name}: holds no tensors, so it is no checkpoint; entries: {_some(map(str, content))}")
    return state


def read_checkpoint(source: str | Path) -> dict:
    """Read all that a checkpoint file holds, on the CPU, without running anything in it.

    Args:
        source: Path or URL, as for `load_published`.

    Raises:
        FileNotFoundError: `source` is not there, or cannot be downloaded.
        ValueError: It is corrupt, holds code, or is no dict.
    """
    if not isinstance(source, str | Path):
        raise ValueError(f"source: got {type(source).__name__}, expected a path or a URL")
    name = str(source)
    path = _download(name) if "://" in name else _existing(name)
    if str(path) != name:
        name = f"{name} (at {path})"
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if is_zip:
            # torch.save stores its records as they are; others may unpack to any size.
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(record.file_size for record in archive.infolist())
            if unpacked > path.stat().st_size:
                raise ValueError(f"it is compressed and would unpack to {unpacked} bytes; torch.save never compresses")
        # yacs's settings are dicts, which only a dict can stand in for.
        known = [(OrderedDict, "yacs.config.CfgNode"), *((_Ignored, known) for known in _BOOKKEEPING)]
        with torch.serialization.safe_globals(known):
            content = torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files fail in any way.
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)|function (\S+)|(TorchScript)", str(error))
        if code and isinstance(error, pickle.UnpicklingError | RuntimeError):
            raise ValueError(
                f"{name}: refused, because it holds code ({next(filter(None, code.groups()))}) and not plain tensors. "
                "If you trust its source, load it with the code that made it, save model.state_dict() alone, and load "
                "that"
            ) from error
        # torch's own message goes on to advise loading it all the same.
        reason = str(error).split("WeightsUnpickler error: ")[-1].split("\n")[0] or type(error).__name__
        raise ValueError(f"{name}: is damaged, incomplete or no checkpoint: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{name}: holds a {type(content).__name__}, expected a dict of tensors")
    return dict(content)


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{source}: is a folder, expected a checkpoint file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{source}: there is no folder {path.parent}")
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=3, cutoff=0.5)
    raise FileNotFoundError(f"{source}: no such file" + (f"; the folder has {', '.join(near)}" if near else ""))


def _download(url: str) -> Path:
    name = Path(unquote(urlsplit(url).path)).name
    # All of the Hub's repositories call their files the same.
    if hub := re.fullmatch(r"https://huggingface\.co/([^/]+)/([^/]+)/resolve/.+", url):
        name = f"{hub[1]}--{hub[2]}--{name}"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if name and path.is_file():
        return path
    digest = re.search(r"-([0-9a-f]{8,})\.", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=True)
    except RuntimeError as error:
        raise ValueError(f"{url}: the downloaded file is not the one that its name promises: {error}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise FileNotFoundError(
            f"{url}: cannot be downloaded ({error}); get it by other means and give its path, or put it at {path}"
        ) from error
    return path


class _Ignored:
    """Stands in for the bookkeeping that training code saves beside the weights; keeps nothing of it."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


_BOOKKEEPING = (
    "argparse.Namespace",
    "builtins.getattr",
    "builtins.slice",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
)


def _find_backbone(model: nn.Module) -> tuple[nn.Module, Callable]:
    """Return the backbone in the wrappers of timm, torch and OpenMMLab, and its family's key conversion."""
    outer = model
    while isinstance(model, nn.Module):
        for cls in type(model).__mro__:
            if convert := getattr(sys.modules.get(cls.__module__), "checkpoint_filter_fn", None):
                return model, convert
        if isinstance(getattr(model, "backbone", None), nn.Module):
            raise ValueError(
                f"model: {type(model).__name__} is more than a backbone; give its `.backbone` (a config's `load_from` "
                "loads the whole)"
            )
        inner = (getattr(model, prefix.removesuffix("."), None) for prefix in _PREFIXES)
        model = next((module for module in inner if isinstance(module, nn.Module)), None)
    raise ValueError(f"model: {type(outer).__name__} is no backbone of the zoo")


def _strip(published: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of a backbone's tensors without wrapping prefixes, by published name."""
    names = {key: key for key in published}
    while True:
        shared = (prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in names.values()))
        # The other parts of a detector, segmentor or classifier stand beside its backbone.
        beside = ("backbone." for name in names.values() if name.startswith("backbone."))
        prefix = next(shared, None) or next(beside, None)
        if prefix is None:
            return names
        classifier = {key: name.replace(".fc.", ".") for key, name in names.items() if name in _CLASSIFIER}
        names = {key: name.removeprefix(prefix) for key, name in names.items() if name.startswith(prefix)}
        if prefix == "backbone." and classifier:
            # The norm of the only output is the final one.
            norms = {match[0] for name in names.values() if (match := re.match(r"norm\d+\.", name))}
            if len(norms) == 1:
                names = {key: re.sub(r"^norm\d+\.", "norm.", name) for key, name in names.items()}
            return names | classifier


def _trace(state: dict[str, Tensor], loaded: dict[str, Tensor], published: dict[str, str]) -> dict[str, str]:
    """Return the published name that each loaded tensor came from, where it is the same tensor or a view of it."""
    by_identity = {id(tensor): key for key, tensor in state.items()}
    strided = ((key, tensor) for key, tensor in state.items() if tensor.layout == torch.strided)
    by_storage = {tensor.untyped_storage().data_ptr(): key for key, tensor in strided}
    origins = {}
    for key, tensor in loaded.items():
        # The same name may stand for another part in the published layout.
        old = key if state.get(key) is tensor else by_identity.get(id(tensor), key if key in state else None)
        old = old or by_storage.get(tensor.untyped_storage().data_ptr())
        if old is not None:
            origins[key] = published[old]
    return origins


def _verify(
    model: nn.Module, state: dict[str, Tensor], converted: dict[str, Tensor], name: str
) -> tuple[list[str], set[str]]:
    """Return the model's tensors that may stay and the converted ones that it leaves out; raise on any other gap."""
    own = model.state_dict()
    left = [key for key in converted if key not in own]
    foreign = {key for key in left if _of_other_layout(key, model, own)}
    unknown = [key for key in left if key not in foreign]
    missing = [key for key in own if key not in converted]
    # A classifier's checkpoint has no norms for dense outputs; one that has some has to have all of them.
    is_classifier = any(re.match(r"(head|norm)\.", key) for key in converted)
    has_output_norms = any(map(_is_output_norm, converted))
    fresh = [key for key in missing if is_classifier and not has_output_norms and _is_output_norm(key)]
    absent = [key for key in missing if key not in fresh]
    unfit = [key for key, tensor in converted.items() if key in own and not _fits(tensor, own[key])]
    if not (unknown or absent or unfit):
        return fresh, foreign

    found = len(own) - len(missing) - len(unfit)
    problems = [f"{name}: does not fit this {type(model).__name__}: {found} of {len(own)} tensors match"]
    if absent:
        problems.append(f"{len(absent)} are missing ({_some(absent)})")
    if unfit:
        forms = [(key, _form(converted[key], own[key]), _form(own[key], converted[key])) for key in unfit]
        differ = _some(f"{key}: {theirs} in the checkpoint, {ours} in the model" for key, theirs, ours in forms)
        problems.append(f"{len(unfit)} differ ({differ})")
    if unknown:
        problems.append(f"the checkpoint has {len(unknown)} that the model has not ({_some(unknown)})")
    message = "; ".join(problems) + ". The model is as it was."
    hint = _hint(state, own, converted, absent, unfit, unknown)
    raise ValueError(message + (f" Hint: {hint}." if hint else ""))


def _of_other_layout(key: str, model: nn.Module, own: Mapping[str, Tensor]) -> bool:
    """Return whether `key` belongs to a part that this build of the model leaves out."""
    top = key.split(".")[0]
    if top == "head" and not getattr(model, "num_classes", 0):
        return True
    if (top == "norm" or _is_output_norm(key)) and not any(other.startswith(f"{top}.") for other in own):
        return True
    stages = [info["module"] for info in getattr(model, "feature_info", ())]
    kept = [stage for stage in stages if any(other.startswith(f"{stage}.") for other in own)]
    if len(kept) == len(stages):
        return False
    # Stages after the last output wanted are pruned, and the downsampling to them.
    names = ((name, name) for name in (*stages, key))
    groups = group_with_matcher(names, model.group_matcher(coarse=True), reverse=True)
    if groups[key] in {groups[stage] for stage in stages if stage not in kept}:
        return True
    return ".downsample." in key and groups[key] == groups[kept[-1]]


def _is_output_norm(key: str) -> bool:
    return re.match(r"norm\d+\.", key) is not None


def _is_body(key: str) -> bool:
    return re.match(r"(head|norm\d*)\.", key) is None


def _fits(tensor: Tensor, own: Tensor) -> bool:
    # Integers in place of floats are quantised weights, which copying would take at face value.
    same_kind = tensor.is_floating_point() == own.is_floating_point() and tensor.is_complex() == own.is_complex()
    return tensor.shape == own.shape and same_kind and tensor.layout == own.layout and not tensor.is_meta


def _form(tensor: Tensor, other: Tensor) -> str:
    """Return the tensor's shape, and where the other one has the same, what else may differ."""
    shape = str(tuple(tensor.shape))
    return shape if tensor.shape != other.shape else f"{shape} {tensor.dtype} {tensor.layout} on {tensor.device.type}"


def _hint(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    absent: list[str],
    unfit: list[str],
    unknown: list[str],
) -> str:
    """Return how to build a model that the checkpoint fits, or nothing where that cannot be told."""
    if any(map(_is_body, (*absent, *unfit, *unknown))):
        if len(unfit) == 1 and not absent and not unknown:
            theirs, ours = given[unfit[0]].shape, own[unfit[0]].shape
            if len(theirs) == 4 and (theirs[0], *theirs[2:]) == (ours[0], *ours[2:]):
                return f"build with in_chans={theirs[1]}"
        likely = _models_like(state)
        return f"the checkpoint has the layout of {', '.join(likely)}" if likely else ""
    if "head.weight" in unfit:
        theirs, ours = len(given["head.weight"]), len(own["head.weight"])
        return (
            f"the checkpoint has {theirs} classes; build with num_classes={theirs} and call reset_classifier({ours}) "
            "after loading, or build with num_classes=0 to load the backbone alone"
        )
    if absent and (norms := sorted({int(key[4 : key.index(".")]) for key in given if _is_output_norm(key)})):
        return f"this is a dense backbone's checkpoint; build with features_only=True, out_norms={tuple(norms)}"
    if absent and all(map(_is_output_norm, absent)):
        return "the checkpoint's backbone has no norms on its outputs; build with out_norms=()"
    if absent:
        return "the checkpoint has no classifier; build with num_classes=0 or features_only=True"
    return ""


def _models_like(state: Mapping[str, Tensor]) -> list[str]:
    """Return the zoo's models whose tensors have the shapes of `state`, heads and norms of outputs aside."""
    likely = []
    size = sum(tensor.numel() for tensor in state.values())
    for name, family in backbones.VARIANTS.items():
        # Building all of them takes seconds.
        if not 0.5 < size / _size_of(name) < 2:
            continue
        with torch.device("meta"):
            model = timm.create_model(name)
        try:
            converted = family.checkpoint_filter_fn(dict(state), model)
        except Exception:  # another family's layout may fail in any way, which says that it is not this one
            continue
        if _body(converted) == _body(model.state_dict()):
            likely.append(name)
    return likely


@functools.cache
def _size_of(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def _body(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items() if _is_body(key)}


def _some(items: Iterable[str], count: int = 4) -> str:
    items = list(items)
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
