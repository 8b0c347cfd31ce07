"""Draw a small set of handwritten digits on cluttered backgrounds, for detection and for segmentation.

    images/{training,validation}/*.jpg
    annotations/{training,validation}/*.png            ADE20K's label maps: 1 to 10 for the digits 0 to 9, 11 for the
                                                       background, 0 (ignored) along the blurred outlines
    annotations/instances_{training,validation}.json   COCO's instances: boxes and RLE masks of the visible strokes
    digits.json                                        what the set was drawn from

The digits are scikit-learn's `load_digits`: 1797 samples of 8x8, which are the test part of UCI's optdigits, written
on preprinted forms by 13 people, says its documentation. It does not say who wrote which sample, but the labels tell
much: they repeat one sequence of 130, with a few samples missing, 14 times. So there are 14 forms, one after another.
Training images take the first 11, validation images the last 3. One writer then filled two forms, or the documentation
is off by one. That the two lie on either side is unlikely: the mean digits of any two forms on different sides differ
by 1.26 or more (Euclidean, ink from 0 to 1, mean over digits), those of the halves of one form by 0.88 or less.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np
from _digit_image import IMAGE_SIZE, draw_image
from pycocotools import mask as rle
from sklearn.datasets import load_digits

VERSION = 2  # of the drawing; counts up whenever other pixels come out
# First sample of each form, and the end.
FORMS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667, 1797)
SAMPLES = {"training": range(FORMS[0], FORMS[11]), "validation": range(FORMS[11], FORMS[14])}


def draw_split(root: Path, split: str, count: int, seed: int) -> None:
    """Write images, label maps and instances of one split under `root`. Image i does not depend on `count`."""
    data = load_digits()
    samples, labels = data.images[SAMPLES[split]], data.target[SAMPLES[split]]
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        rng = np.random.default_rng((seed, list(SAMPLES).index(split), i))
        image, instances, label_map = draw_image(samples, labels, rng)
        name = f"{i:05d}"
        cv2.imwrite(str(root / "images" / split / f"{name}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
        cv2.imwrite(str(root / "annotations" / split / f"{name}.png"), label_map)
        images.append(dict(id=i, file_name=f"{name}.jpg", height=IMAGE_SIZE, width=IMAGE_SIZE))
        for index, mask in instances:
            segmentation = rle.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i,
                    category_id=int(labels[index]),
                    bbox=rle.toBbox(segmentation).tolist(),
                    area=int(mask.sum()),
                    segmentation=dict(size=segmentation["size"], counts=segmentation["counts"].decode()),
                    iscrowd=0,
                    sample=SAMPLES[split][index],  # in load_digits
                )
            )
    categories = [dict(id=digit, name=str(digit)) for digit in range(10)]
    instances = dict(images=images, annotations=annotations, categories=categories)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(instances))


def description(root: Path) -> dict | None:
    """Return what the set under `root` was drawn from, or None if there is none."""
    file = root / "digits.json"
    return json.loads(file.read_text()) if file.is_file() else None


def draw(root: Path, training: int = 2000, validation: int = 200, seed: int = 0) -> bool:
    """Draw the set into the folder `root`, whole or not at all.

    Returns:
        Whether it was drawn; False where the same set is there already.

    Raises:
        FileExistsError: Something else is there; it stays as it is.
    """
    content = dict(version=VERSION, training=training, validation=validation, seed=seed)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        found = description(root)
        if found == content:
            return False
        raise FileExistsError(
            f"{root}: holds {found or 'something else'}, expected {content}; move it away, or choose another folder"
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        temporary.chmod(0o755)
        for split, count in (("training", training), ("validation", validation)):
            draw_split(temporary, split, count, seed)
        (temporary / "digits.json").write_text(json.dumps(content))
        temporary.rename(root)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return True


def main() -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data/digits"), help="folder of the set (%(default)s)")
    parser.add_argument("--training", type=int, default=2000, help="number of training images (%(default)s)")
    parser.add_argument("--validation", type=int, default=200, help="number of validation images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random (%(default)s)")
    args = parser.parse_args()
    if min(args.training, args.validation) < 1:
        parser.error(f"--training, --validation: got {args.training}, {args.validation}, expected 1 or more")
    try:
        drawn = draw(args.data_root, args.training, args.validation, args.seed)
    except FileExistsError as error:
        parser.error(str(error))
    print(f"{args.data_root}: {'drawn' if drawn else 'already there'}")


if __name__ == "__main__":
    main()
