"""What tools/check_data.py needs of any data set: files read without trust, and paths out of its config."""

import json
import os
import warnings
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from _check_report import Report
from _errors import ConfigError
from PIL import Image
from tqdm import tqdm


def is_count(value: Any) -> bool:
    """Return whether a value of a JSON file is a whole number that may count or name something."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def are_numbers(values: Any, length: int | None = None) -> bool:
    """Return whether `values` is a list of finite numbers, of this length if one is given."""
    right = isinstance(values, list) and length in (None, len(values))
    return right and all(type(v) in (int, float) and abs(v) < 1e12 for v in values)


def read_json(path: str, lists: tuple[str, ...], report: Report) -> dict | None:
    """Return the object in a JSON file if it has these lists; else report and return None."""
    fix = "give the path of a whole annotation file; download or unpack it again if it is damaged"
    if not os.path.isfile(path):
        report.problem("missing annotation file", path, "put it there, or correct ann_file or data_root")
        return None
    try:
        data = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        report.problem("annotation file that cannot be read", f"{path}: {error}", fix)
        return None
    for key in lists:
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            report.problem("annotation file of another format", f"{path}: there is no list {key!r}", fix)
            return None
    return data


def records(data: dict, key: str, fields: dict[str, type], path: str, report: Report) -> Iterator[dict]:
    """Yield the entries of the list `key` that have these fields and, where `id` is one, an id of their own."""
    seen = set()
    for i, entry in enumerate(data[key]):
        place = f"{path}: {key}[{i}]"
        if not isinstance(entry, dict):
            report.problem(f"damaged entry of {key}", f"{place}: is a {type(entry).__name__}", "expected an object")
            continue
        wrong = [
            f"{name} is {entry.get(name)!r:.60}"
            for name, kind in fields.items()
            if not (is_count(entry.get(name)) if kind is int else isinstance(entry.get(name), kind))
        ]
        if wrong:
            expected = ", ".join(f"{name}: {kind.__name__}" for name, kind in fields.items())
            report.problem(f"damaged entry of {key}", f"{place}: {'; '.join(wrong)}", f"expected {expected}")
        elif "id" in fields and entry["id"] in seen:
            report.problem(f"id twice in {key}", f"{place}: {entry['id']}", "give every entry an id of its own")
        else:
            seen.add(entry.get("id"))
            yield entry


def read_pixels(path: str, size: tuple[int, int] | None) -> tuple[Image.Image | None, tuple[str, str, str] | None]:
    """Return the decoded image, or else what to report: it is not there, not an image, or not of `size`."""
    if not os.path.isfile(path):
        return None, ("missing image", path, "put it there, or correct data_prefix or data_root")
    try:
        with warnings.catch_warnings():
            # Pillow's about odd metadata and, below its limit, large images
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if size and image.size != size:
                    found, expected = ("x".join(map(str, sides)) for sides in (image.size, size))
                    what = f"{path}: {found}, but {expected} (width x height) in its annotation"
                    return None, ("size that differs", what, "images or annotations are of another version")
                image.load()
                return image, None
    # decoders raise what they like
    except Exception as error:
        return None, ("image that cannot be read", f"{path}: {error!s:.100}", "copy or download it again")


def check_images(sizes: dict[str, tuple[int, int] | None], report: Report, check: Any = None) -> None:
    """Decode every image, with a progress bar, and report those that are missing, damaged or of another size.

    Args:
        sizes: Path -> (width, height), None where not known.
        report: What to add to.
        check: Called with path and pixels of each image that is right so far; returns what to report, or None.
    """

    def look(item: tuple[str, tuple[int, int] | None]) -> tuple[str, str, str] | None:
        image, problem = read_pixels(*item)
        return problem or (check(item[0], np.asarray(image)) if check else None)

    with ThreadPool(os.cpu_count()) as pool:
        bar = tqdm(pool.imap(look, sizes.items(), chunksize=8), "images", len(sizes), leave=False, disable=None)
        for problem in bar:
            if problem:
                report.problem(*problem)


def locate(config: dict, value: object, name: str) -> str:
    """Return a path of a dataset's config, which is below its data_root."""
    root = config.get("data_root") or ""
    for key, part in (("data_root", root), (name, value)):
        if not isinstance(part, str):
            raise ConfigError(f"dataset.{key}: is {part!r}, expected a path")
    return os.path.join(root, value)


def folder(config: dict, *keys: str) -> str:
    """Return the folder that `data_prefix` gives under one of these keys, or is itself."""
    prefix = config.get("data_prefix") or ""
    if isinstance(prefix, dict):
        prefix = next((prefix[key] for key in keys if key in prefix), "")
    return locate(config, prefix, "data_prefix")
