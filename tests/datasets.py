"""A few generated images in the folder layouts of COCO 2017, ADE20K and ImageNet-1k, with the real class lists."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

# before mmdet, which looks for mmcv's operators when it is imported
import densezoo.openmmlab  # noqa: F401
from densezoo.panoptic import id2rgb

# The 80 categories of COCO 2017 keep the ids of a list of 90; these were never used.
COCO_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
# Folder names of the first classes of ImageNet-1k, in the order of their labels.
IMAGENET_FOLDERS = ("n01440764", "n01443537", "n01484850", "n01491361")


def make_coco(root: Path, num_images: int = 2, size: tuple[int, int] = (96, 128)) -> Path:
    """Write train2017/, val2017/ and annotations/ under `root`, images of three objects and a crowd; return `root`."""
    from mmdet.datasets import CocoDataset

    names = CocoDataset.METAINFO["classes"]
    ids = [i for i in range(1, 91) if i not in COCO_UNUSED_IDS]
    categories = [{"supercategory": "thing", "id": i, "name": name} for i, name in zip(ids, names, strict=True)]
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        rng = np.random.default_rng(len(split))
        (root / split).mkdir()
        images, annotations = [], []
        for image_id in range(1, num_images + 1):
            image = noise(rng, size)
            for _ in range(3):
                box = random_box(rng, size)
                polygon = draw_object(image, rng, box)
                category = int(rng.choice(ids))
                annotations.append(annotation(len(annotations) + 1, image_id, category, box, [polygon]))
            crowd = random_box(rng, size)
            annotations.append(
                annotation(len(annotations) + 1, image_id, int(rng.choice(ids)), crowd, run_lengths(crowd, size))
            )
            file_name = f"{image_id:012d}.jpg"
            image.save(root / split / file_name)
            images.append({"license": 1, "file_name": file_name, "height": size[0], "width": size[1], "id": image_id})
        (root / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(
                {
                    "info": {"description": "generated", "version": "1.0", "year": 2017},
                    "licenses": [{"url": "", "id": 1, "name": "none"}],
                    "images": images,
                    "annotations": annotations,
                    "categories": categories,
                }
            )
        )
    return root


def make_coco_panoptic(root: Path) -> Path:
    """Add annotations/panoptic_{train2017,val2017} to what `make_coco` wrote under `root`; return `root`.

    Its objects lie on two kinds of stuff, above and below; later ones cover earlier ones.
    """
    from mmdet.datasets import CocoPanopticDataset

    stuff = CocoPanopticDataset.METAINFO["stuff_classes"]
    for split in ("train2017", "val2017"):
        folder = root / "annotations" / f"panoptic_{split}"
        folder.mkdir()
        data = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        objects, data["annotations"] = data["annotations"], []
        categories = [dict(category, isthing=1) for category in data["categories"]]
        categories += [{"supercategory": "stuff", "id": i, "name": n, "isthing": 0} for i, n in enumerate(stuff, 92)]
        data["categories"] = categories
        for image in data["images"]:
            height, width = image["height"], image["width"]
            ids = np.zeros((height, width), np.int32)
            ids[: height // 2], ids[height // 2 :] = 1001, 1002
            segments = {1001: (92, 0), 1002: (93, 0)}
            for item in objects:
                if item["image_id"] == image["id"]:
                    rle = coco_mask.frPyObjects(item["segmentation"], height, width)
                    rle = coco_mask.merge(rle) if isinstance(rle, list) else rle
                    ids[coco_mask.decode(rle) > 0] = item["id"]
                    segments[item["id"]] = item["category_id"], item["iscrowd"]
            infos = []
            for segment, (category, crowd) in segments.items():
                rows, columns = np.nonzero(ids == segment)
                if len(rows):
                    x, y = int(columns.min()), int(rows.min())
                    box = [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1]
                    info = {"id": segment, "category_id": category, "area": len(rows), "bbox": box, "iscrowd": crowd}
                    infos.append(info)
            file_name = image["file_name"].replace(".jpg", ".png")
            Image.fromarray(id2rgb(ids)).save(folder / file_name)
            data["annotations"].append({"image_id": image["id"], "file_name": file_name, "segments_info": infos})
        (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(data))
    return root


def make_ade20k(root: Path, num_images: int = 2, size: tuple[int, int] = (96, 128)) -> Path:
    """Write images/ and annotations/, each with training/ and validation/, under `root`; return `root`.

    Label 0 is "other" and ignored in training; 1 to 150 are the classes.
    """
    from mmseg.datasets import ADE20KDataset

    num_classes = len(ADE20KDataset.METAINFO["classes"])
    for split, short in (("training", "train"), ("validation", "val")):
        rng = np.random.default_rng(len(split))
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(1, num_images + 1):
            image, labels = noise(rng, size), Image.new("L", size[::-1], 0)
            for _ in range(4):
                polygon = draw_object(image, rng, random_box(rng, size))
                ImageDraw.Draw(labels).polygon(polygon, fill=int(rng.integers(1, num_classes + 1)))
            image.save(root / "images" / split / f"ADE_{short}_{i:08d}.jpg")
            labels.save(root / "annotations" / split / f"ADE_{short}_{i:08d}.png")
    return root


def make_imagenet(root: Path, num_images: int = 4, size: tuple[int, int] = (96, 128)) -> Path:
    """Write train/ with a folder a class, val/ without, and the label files meta/{train,val}.txt under `root`."""
    (root / "meta").mkdir(parents=True)
    (root / "val").mkdir()
    rng = np.random.default_rng(0)
    labels = {"train": [], "val": []}
    for i in range(num_images):
        label = i % len(IMAGENET_FOLDERS)
        folder = IMAGENET_FOLDERS[label]
        (root / "train" / folder).mkdir(parents=True, exist_ok=True)
        for split, name in (("train", f"{folder}/{folder}_{i}.JPEG"), ("val", f"ILSVRC2012_val_{i + 1:08d}.JPEG")):
            image = noise(rng, size)
            draw_object(image, rng, random_box(rng, size))
            image.save(root / split / name)
            labels[split].append(f"{name} {label}\n")
    for split, lines in labels.items():
        (root / "meta" / f"{split}.txt").write_text("".join(lines))
    return root


def noise(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Return an RGB image of noise; `size` is (height, width)."""
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def random_box(rng: np.random.Generator, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) within the image, sides a quarter to half of its own."""
    height, width = (int(rng.integers(side // 4, side // 2)) for side in size)
    return int(rng.integers(0, size[1] - width)), int(rng.integers(0, size[0] - height)), width, height


def draw_object(image: Image.Image, rng: np.random.Generator, box: tuple[int, int, int, int]) -> list[float]:
    """Draw a rhombus of one colour that fills the box; return its polygon as x, y, x, y, ..."""
    x, y, w, h = box
    polygon = [x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h / 2]
    ImageDraw.Draw(image).polygon(polygon, fill=tuple(map(int, rng.integers(0, 256, 3))))
    return polygon


def run_lengths(box: tuple[int, int, int, int], size: tuple[int, int]) -> dict:
    """Return the box's mask as COCO gives crowds: uncompressed run lengths, column by column, zeros first."""
    x, y, w, h = box
    height, width = size
    gaps = [x * height + y] + [h, height - h] * (w - 1) + [h]
    return {"counts": [*gaps, height * width - sum(gaps)], "size": list(size)}


def annotation(
    annotation_id: int, image_id: int, category_id: int, box: tuple[int, int, int, int], segmentation: list | dict
) -> dict:
    """Return one entry of COCO's annotations; run lengths make it a crowd."""
    crowd = isinstance(segmentation, dict)
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "area": box[2] * box[3] / (1 if crowd else 2),
        "iscrowd": int(crowd),
        "segmentation": segmentation,
    }
