"""The checks of tools/check_data.py for COCO's formats.

Each takes a dataset's config, its class, its metainfo and a report, and returns how many images there are.
"""

import os
from collections import Counter

import numpy as np
from _check_files import are_numbers, check_images, folder, locate, read_json, records
from _check_report import Report
from _errors import did_you_mean


def check_classes(categories: list[dict], classes: object, path: str, report: Report) -> None:
    """Report what the classes of the config and the categories of the file do not share."""
    names = Counter(category["name"] for category in categories)
    for name in (name for name in classes or () if name not in names):
        fix = "correct metainfo.classes, or take the file of this data set"
        report.problem("class without a category", f"{path}: {name!r}{did_you_mean(str(name), names)}", fix)
    for name in (name for name, count in names.items() if count > 1):
        report.problem("two categories of one name", f"{path}: {name!r}", "give each a name of its own")
    for name in (name for name in names if classes and name not in classes):
        report.note("category that is no class", f"{path}: {name!r}", "its objects are left out")


def check_box(entry: dict, image: dict, place: str, report: Report) -> bool:
    """Report a box that is none or not in the image; return whether it is one to train on."""
    box, sides = entry.get("bbox"), (image["width"], image["height"])
    if not are_numbers(box, 4) or min(box[2:]) < 0:
        report.problem("box that is none", f"{place}: bbox {box!r:.80}", "expected x, y, width, height in pixels")
        return False
    # COCO's own boxes reach a fraction of a pixel beyond.
    if any(x < -1 or x + length > side + 1 for x, length, side in zip(box[:2], box[2:], sides, strict=True)):
        what, expected = f"{place}: bbox {box} in {sides[0]}x{sides[1]}", "expected x, y, width, height in pixels"
        report.problem("box outside its image", what, f"{expected}, not corners or fractions")
        return False
    if min(box[2:]) < 1:
        report.note("box of less than a pixel", f"{place}: bbox {box}", "left out of a training")
        return False
    return True


def mask_problem(mask: object, image: dict) -> str | None:
    """Return what is wrong with a segmentation, polygons or run lengths."""
    if isinstance(mask, list):
        right = mask and all(are_numbers(part) and len(part) >= 6 and len(part) % 2 == 0 for part in mask)
        return None if right else "expected polygons of at least three x, y"
    if not isinstance(mask, dict):
        return "expected polygons or run lengths"
    sides, counts = [image["height"], image["width"]], mask.get("counts")
    if mask.get("size") != sides:
        return f"size {mask.get('size')!r:.40}, expected {sides}"
    if are_numbers(counts):
        return None if min(counts, default=-1) >= 0 and sum(counts) == sides[0] * sides[1] else "counts of another size"
    return None if isinstance(counts, str) and counts and all("0" <= c <= "o" for c in counts) else "damaged counts"


def check_coco(config: dict, cls: type, metainfo: dict, report: Report) -> int:
    """Check COCO's detection and instance segmentation."""
    path = locate(config, config.get("ann_file"), "ann_file")
    data = read_json(path, ("images", "annotations", "categories"), report)
    if data is None:
        return 0
    categories = list(records(data, "categories", dict(id=int, name=str), path, report))
    check_classes(categories, metainfo.get("classes"), path, report)
    known = {category["id"] for category in categories}
    fields = dict(id=int, file_name=str, width=int, height=int)
    images = {image["id"]: image for image in records(data, "images", fields, path, report)}
    with_mask = any(isinstance(step, dict) and step.get("with_mask") for step in config.get("pipeline") or ())

    filled = set()
    for entry in records(data, "annotations", dict(id=int, image_id=int, category_id=int), path, report):
        place = f"{path}: annotation {entry['id']}"
        image = images.get(entry["image_id"])
        if image is None:
            what = f"{place}: image_id {entry['image_id']}"
            report.problem("object of no image", what, "remove it, or add the image")
            continue
        if entry["category_id"] not in known:
            what = f"{place}: category_id {entry['category_id']}"
            report.problem("object of no category", what, "correct it, or add the category; ids need not be from 0")
        if not are_numbers([entry.get("area")]) or entry.get("iscrowd") not in (0, 1):
            what = f"{place}: area {entry.get('area')!r:.40}, iscrowd {entry.get('iscrowd')!r:.40}"
            report.problem("object without area or iscrowd", what, "expected a number of pixels, and 0 or 1")
        if check_box(entry, image, place, report):
            filled.add(entry["image_id"])
        if with_mask and (wrong := mask_problem(entry.get("segmentation"), image)):
            report.problem("damaged mask", f"{place}: {wrong}", "correct its segmentation, or train boxes alone")
    return check_whole(config, images, filled, path, report)


def check_whole(config: dict, images: dict, filled: set, path: str, report: Report) -> int:
    """Decode all images, and report those without objects, a problem where all are; return how many there are."""
    for image in images.values():
        if image["id"] not in filled:
            report.note("image without objects", f"{path}: {image['file_name']!r}", "left out of most trainings")
    if not filled:
        report.problem("no objects at all", path, "take the annotation file of these images")
    prefix = folder(config, "img", "img_path")
    check_images({os.path.join(prefix, i["file_name"]): (i["width"], i["height"]) for i in images.values()}, report)
    return len(images)


def check_coco_panoptic(config: dict, cls: type, metainfo: dict, report: Report) -> int:
    """Check COCO's panoptic segmentation: segments in a file, and their ids as colours of PNG files."""
    from densezoo.panoptic import rgb2id

    path = locate(config, config.get("ann_file"), "ann_file")
    data = read_json(path, ("images", "annotations", "categories"), report)
    if data is None:
        return 0
    categories = list(records(data, "categories", dict(id=int, name=str, isthing=int), path, report))
    check_classes(categories, metainfo.get("classes"), path, report)
    known = {category["id"] for category in categories}
    fields = dict(id=int, file_name=str, width=int, height=int)
    images = {image["id"]: image for image in records(data, "images", fields, path, report)}
    prefix, maps, expected, filled = folder(config, "seg"), {}, {}, set()
    for entry in records(data, "annotations", dict(image_id=int, file_name=str, segments_info=list), path, report):
        image = images.get(entry["image_id"])
        if image is None:
            what = f"{path}: {entry['file_name']!r}: image_id {entry['image_id']}"
            report.problem("segments of no image", what, "remove them, or add the image")
            continue
        fields, place = dict(id=int, category_id=int, iscrowd=int), f"{path}: {entry['file_name']!r}"
        segments = list(records(entry, "segments_info", fields, place, report))
        for segment in segments:
            if segment["category_id"] not in known:
                what = f"{place}: segment {segment['id']}: category_id {segment['category_id']}"
                report.problem("segment of no category", what, "correct it, or add the category")
            check_box(segment, image, f"{place}: segment {segment['id']}", report)
        filled |= {entry["image_id"]} if segments else set()
        png = os.path.join(prefix, entry["file_name"])
        maps[png], expected[png] = (image["width"], image["height"]), {segment["id"] for segment in segments}

    def check(png: str, pixels: np.ndarray) -> tuple[str, str, str] | None:
        if pixels.ndim != 3 or pixels.shape[2] != 3:
            return "panoptic map without colours", png, "take the PNG files of panoptic segmentation"
        differing = expected[png] ^ (set(np.unique(rgb2id(pixels)).tolist()) - {0})
        what = f"{png}: {sorted(differing)[:3]}"
        fix = "maps and annotations are of different versions"
        return ("segment in map or annotations alone", what, fix) if differing else None

    check_images(maps, report, check)
    return check_whole(config, images, filled, path, report)
