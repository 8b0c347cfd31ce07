"""Launch settings of the kernels: those in each operator's code, overlaid with what a file has for the GPU at hand.

`sm_90.json` in this folder, for one, has settings for GPUs of compute capability 9.0 where they differ, by operator,
entry and field. `tools/benchmark.py tune` writes it. A wrong file leaves the code's settings, and a log line says why.
"""

import json
import logging
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import torch
from densezoo.ops import backend

FOLDER = Path(__file__).parent
# As many programs as CUDA has on the second axis of a grid, on which some kernels put images.
MAX_IMAGES = 2**16 - 1

_log = logging.getLogger("densezoo")


def file_here() -> Path | None:
    """Return where the settings of this machine's GPU belong, whether or not there are any; None without a GPU."""
    if backend.interprets or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return FOLDER / "sm_{}{}.json".format(*torch.cuda.get_device_capability())


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 1 of a CPU, on which the interpreter runs kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def entry_name(key: Hashable) -> str:
    """Return how files name an entry."""
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def read(path: Path) -> dict[str, dict]:
    """Return a file's settings by operator, none where it does not exist.

    Raises:
        ValueError: It is no JSON object of operators' settings; the message says what is wrong.
    """
    from densezoo.ops import __all__ as operators

    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
        raise ValueError("expected a JSON object with an object for each operator")
    if unknown := set(content) - set(operators):
        raise ValueError(f"got operator {min(unknown)!r}, expected of {', '.join(operators)}")
    return content


@cache
def _read_or_log(path: Path) -> dict[str, dict]:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        _log.warning(f"{path}: {error}: kernels take the settings in their code")
        return {}


class Table(dict[Hashable, tuple]):
    """An operator's launch settings, overlaid when one is first looked up: importing kernels asks for no GPU.

    Args:
        operator: Its name.
        settings: NamedTuples by entry. Of a tuple of them under `key`, the entries are (key, 0), (key, 1) and so on.
    """

    def __init__(self, operator: str, settings: dict[Hashable, tuple]):
        super().__init__()
        for key, value in settings.items():
            single = hasattr(value, "_fields")
            self.update({key: value} if single else {(key, i): setting for i, setting in enumerate(value)})
        self.operator, self.defaults, self._is_overlaid = operator, dict(self), False

    def __getitem__(self, key: Hashable) -> tuple:
        if not self._is_overlaid:
            self.overlay()
        return super().__getitem__(key)

    def overlay(self) -> None:
        """Take what there is for the GPU at hand."""
        self._is_overlaid = True
        path = file_here()
        try:
            self.update(self._settings(_read_or_log(path).get(self.operator, {}) if path else {}))
        except ValueError as error:
            _log.warning(f"{path}: {self.operator}: {error}: its kernels take the settings in their code")

    def _settings(self, part: dict[str, dict]) -> dict[Hashable, tuple]:
        """Return settings by entry; ValueError where a part of a file does not fit the table."""
        keys, settings = {entry_name(key): key for key in self.defaults}, {}
        for name, fields in part.items():
            if name not in keys or not isinstance(fields, dict):
                raise ValueError(f"got {name!r}: {fields!r}, expected fields of one of {', '.join(map(repr, keys))}")
            default = self.defaults[keys[name]]
            hints = get_type_hints(type(default))
            for field, value in fields.items():
                if field not in hints or not _fits(value, hints[field]):
                    kinds = ", ".join(f"{k} ({getattr(hint, '__name__', hint)})" for k, hint in hints.items())
                    raise ValueError(f"{name}: got {field} {value!r}, expected of {kinds}")
            fields = {field: tuple(value) if isinstance(value, list) else value for field, value in fields.items()}
            settings[keys[name]] = default._replace(**fields)
        return settings


def _fits(value: object, hint: type) -> bool:
    """Return whether a value of JSON is of an annotated type: int, int | None or tuple[int, int]."""
    if get_origin(hint) is tuple:
        return isinstance(value, list) and tuple(map(type, value)) == get_args(hint)
    return type(value) in (get_args(hint) or (hint,))
