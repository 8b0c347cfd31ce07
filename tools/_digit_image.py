"""One image of tools/draw_digits.py, whose VERSION counts up with the pixels: digits before clutter, and masks."""

import cv2
import numpy as np

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
