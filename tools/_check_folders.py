"""The checks of tools/check_data.py for ADE20K's and ImageNet's folders.

Each takes a dataset's config, its class, its metainfo and a report, and returns how many images there are.
"""

import inspect
import os
from pathlib import Path

import numpy as np
from _check_files import check_images, folder, is_count, locate, read_pixels
from _check_report import Report


def default(config: dict, cls: type, name: str) -> object:
    """Return an argument of a dataset, from its config or the nearest class that has a default."""
    for base in cls.__mro__[:-1]:
        parameter = inspect.signature(base.__init__).parameters.get(name)
        if parameter and parameter.default is not inspect.Parameter.empty:
            return config.get(name, parameter.default)
    return config.get(name)


def check_segmentation(config: dict, cls: type, metainfo: dict, report: Report) -> int:
    """Check semantic segmentation as ADE20K has it: images, and maps of the same names whose grey values are labels."""
    root, maps = folder(config, "img_path"), folder(config, "seg_map_path")
    suffix, map_suffix = str(default(config, cls, "img_suffix")), str(default(config, cls, "seg_map_suffix"))
    for path in (root, maps):
        if not os.path.isdir(path):
            report.problem("missing folder", path, "put it there, or correct data_prefix or data_root")
            return 0
    names = {str(file.relative_to(root)).removesuffix(suffix) for file in Path(root).rglob(f"*{suffix}")}
    if ann_file := config.get("ann_file"):
        try:
            names = {line.strip() for line in Path(locate(config, ann_file, "ann_file")).read_text().splitlines()} - {
                ""
            }
        except (OSError, ValueError) as error:
            report.problem("annotation file that cannot be read", str(error), "correct ann_file, or leave it out")
    if not names:
        report.problem("no images", f"{root}: no file *{suffix}", "correct data_prefix or img_suffix")
    classes = max(len(metainfo.get("classes") or ()), len(cls.METAINFO.get("classes") or ()))
    last = classes if default(config, cls, "reduce_zero_label") else classes - 1
    ignored = default(config, cls, "ignore_index")

    def check(path: str, labels: np.ndarray) -> tuple[str, str, str] | None:
        image = os.path.join(root, os.path.relpath(path, maps).removesuffix(map_suffix) + suffix)
        if labels.ndim != 2 or labels.dtype.kind not in "iu":
            what = f"{path}: {labels.dtype} of shape {labels.shape}"
            return "label map in colours", what, "save the class of every pixel as its grey value"
        wrong = [int(label) for label in np.unique(labels) if not (0 <= label <= last or label == ignored)]
        if classes and wrong:
            return "label that is no class", f"{path}: {wrong[:5]}", f"expected 0 to {last}, or {ignored} to ignore"
        _, problem = read_pixels(image, labels.shape[::-1])
        return problem or (("map without labels", path, "label it, or leave it out") if empty(labels) else None)

    def empty(labels: np.ndarray) -> bool:
        return bool(np.isin(labels, [ignored, 0] if last == classes else [ignored]).all())

    for name in sorted(names):
        if not os.path.isfile(os.path.join(maps, name + map_suffix)):
            what = os.path.join(maps, name + map_suffix)
            report.problem("missing label map", what, "put it there, or remove its image")
    there = [path for name in sorted(names) if os.path.isfile(path := os.path.join(maps, name + map_suffix))]
    check_images(dict.fromkeys(there), report, check)
    return len(names)


def check_classification(config: dict, cls: type, metainfo: dict, report: Report) -> int:
    """Check classification as ImageNet has it: a folder a class, or a file of names and labels."""
    config = dict(config)
    split, classes = config.get("split"), metainfo.get("classes") or ()
    if split:
        config["data_prefix"] = config.get("data_prefix") or split
        listed = f"meta/{split}.txt"
        if not config.get("ann_file") and os.path.exists(locate(config, listed, "ann_file")):
            config["ann_file"] = listed
    root = folder(config, "img_path")
    if not os.path.isdir(root):
        report.problem("missing folder", root, "put it there, or correct data_prefix or data_root")
        return 0
    if config.get("ann_file"):
        names = listed_names(locate(config, config["ann_file"], "ann_file"), len(classes), report)
    else:
        endings = tuple(default(config, cls, "extensions") or ()) or cls.IMG_EXTENSIONS
        folders = {entry.name for entry in os.scandir(root) if entry.is_dir()}
        found = (file for name in sorted(folders) for file in Path(root, name).rglob("*"))
        files = [file.relative_to(root) for file in found if file.name.lower().endswith(endings)]
        if classes and len(folders) != len(classes):
            what = f"{root}: {len(folders)} folders, {len(classes)} classes"
            report.problem("other number of classes", what, "expected a folder a class; correct metainfo.classes")
        for name in sorted(folders - {file.parts[0] for file in files}):
            report.problem("class without images", os.path.join(root, name), "fill or remove the folder")
        names = [str(file) for file in files]
    if not names:
        report.problem("no images", root, "correct data_prefix, or ann_file")
    check_images({os.path.join(root, name): None for name in names}, report)
    return len(names)


def listed_names(path: str, classes: int, report: Report) -> list[str]:
    """Return the names of the images in a file of names and labels."""
    try:
        lines = Path(path).read_text().splitlines() if os.path.isfile(path) else None
    except ValueError:
        lines = None
    if lines is None:
        report.problem("annotation file that cannot be read", path, "expected a file of lines: NAME LABEL")
        return []
    names = []
    for i, line in enumerate(lines, 1):
        name, _, label = line.strip().rpartition(" ")
        if name and label.isdecimal() and is_count(int(label[:18])) and (not classes or int(label[:18]) < classes):
            names.append(name)
        elif line.strip():
            expected = f"expected NAME LABEL, labels from 0{f' to {classes - 1}' if classes else ''}"
            report.problem("damaged line", f"{path}, line {i}: {line!r:.80}", expected)
    return names
