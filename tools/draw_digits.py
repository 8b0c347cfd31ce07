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
from pycocotools import mask as rle
from sklearn.datasets import load_digits

VERSION = 2  # of the drawing; counts up whenever other pixels come out
# First sample of each form, and the end.
FORMS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667, 1797)
SAMPLES = {"training": range(FORMS[0], FORMS[11]), "validation": range(FORMS[11], FORMS[14])}
BACKGROUND_LABEL = 11
IMAGE_SIZE = 128
DIGIT_SIZES = (32, 56)  # height of the 8x8 sample in pixels
MAX_HIDDEN = 0.1  # of a digit's strokes, by digits in front of it


def background(rng: np.random.Generator) -> np.ndarray:
    """Return a cluttered image (size, size, 3), float32 in 0 to 1: dark smooth colours, lines and blobs."""
    size = IMAGE_SIZE
    image = np.full((size, size, 3), 0.3, np.float32)
    for cells, contrast in ((2, 0.3), (5, 0.12), (16, 0.05)):
        grid = rng.uniform(-contrast, contrast, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(4, 12)):
        layer = np.zeros((size, size), np.float32)
        shape = rng.integers(3)
        centre = tuple(int(v) for v in rng.integers(0, size, 2))
        if shape == 0:
            end = tuple(int(v) for v in rng.integers(0, size, 2))
            cv2.line(layer, centre, end, 1.0, int(rng.integers(1, 4)), cv2.LINE_AA)
        else:
            axes = tuple(int(v) for v in rng.integers(3, 30, 2))
            start = int(rng.integers(0, 360))
            # An arc or a filled ellipse.
            span, thickness = (int(rng.integers(60, 200)), int(rng.integers(1, 5))) if shape == 1 else (360, -1)
            turn = int(rng.integers(0, 180))
            cv2.ellipse(layer, centre, axes, turn, start, start + span, 1.0, thickness, cv2.LINE_AA)
        layer = cv2.GaussianBlur(layer, (0, 0), rng.uniform(0.4, 2.0))
        blend(image, rng.uniform(0, 0.8, 3), layer, rng.uniform(0.2, 0.8))
    return np.clip(image, 0, 0.65) * np.float32(0.6)  # far darker than any digit


def blend(image: np.ndarray, colour: np.ndarray, ink: np.ndarray, opacity: float) -> None:
    """Lay a colour (3,) on an image, as thick as `ink` (size, size) says, in place."""
    image += (ink * np.float32(opacity))[..., None] * (colour.astype(np.float32) - image)


def strokes(sample: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the ink (size, size), float32 in 0 to 1, of an 8x8 sample in 0 to 16, enlarged, turned and placed."""
    height = rng.uniform(*DIGIT_SIZES)
    scale = height / 8 * np.array([rng.uniform(0.8, 1.1), 1.0])
    angle, shear = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(-0.15, 0.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, shear], [0, 1]]) @ np.diag(scale)
    # Half of what the turned square spans, so that it stays inside the image.
    reach = np.abs(matrix) @ (4, 4)
    centre = rng.uniform(reach, IMAGE_SIZE - reach)
    offset = centre - matrix @ (4.5, 4.5)  # the middle of the padded sample, in pixel centres
    field = cv2.warpAffine(
        np.pad(sample, 1).astype(np.float32) / 16,
        np.column_stack([matrix, offset]),
        (IMAGE_SIZE, IMAGE_SIZE),
        flags=cv2.INTER_CUBIC,
    )
    # The level set at 0.4 of full ink is the outline, with a soft edge of about two pixels.
    return np.clip(0.5 + (field - 0.4) * np.float32(height / 16), 0, 1)


def draw_image(
    samples: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]], np.ndarray]:
    """Draw one image from 8x8 samples (N, 8, 8) and their digits (N,).

    Returns:
        The image (size, size, 3) BGR uint8, its instances as (index of the sample, visible mask bool (size, size)), and
        its label map (size, size) uint8.
    """
    image = background(rng)
    instances: list[tuple[int, np.ndarray]] = []
    label_map = np.full((IMAGE_SIZE, IMAGE_SIZE), BACKGROUND_LABEL, np.uint8)
    for _ in range(rng.integers(2, 6)):
        index = int(rng.integers(len(samples)))
        ink = strokes(samples[index], rng)
        mask = ink > 0.5
        if any((whole & mask).sum() > MAX_HIDDEN * whole.sum() for _, whole in instances):
            continue
        blend(image, rng.uniform(0.75, 1, 3), ink, rng.uniform(0.85, 1.0))
        label_map[ink > 0.1] = 0
        label_map[mask] = labels[index] + 1
        instances.append((index, mask))
    for i, (index, mask) in enumerate(instances):
        hidden = np.any([other for _, other in instances[i + 1 :]], axis=0)
        instances[i] = (index, mask & ~hidden)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.7))
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0.01, 0.05))
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), instances, label_map


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
    try:
        drawn = draw(args.data_root, args.training, args.validation, args.seed)
    except FileExistsError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{args.data_root}: {'drawn' if drawn else 'already there'}")


if __name__ == "__main__":
    main()
