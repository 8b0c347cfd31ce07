"""What mmdet takes from panopticapi, which installs from its repository alone: ids in colours, and panoptic quality.

Panoptic quality is that of arXiv 1801.00868. Where panopticapi is installed, it is left alone.
"""

import importlib.util
import sys
from collections import defaultdict
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np

# The id of no segment, and the factor that puts two ids into one number.
VOID = 0
OFFSET = 256**3


def install() -> None:
    """Make `panopticapi` importable, with the parts that mmdet uses; best before mmdet is imported."""
    if "panopticapi" in sys.modules or importlib.util.find_spec("panopticapi"):
        return
    package = sys.modules["panopticapi"] = ModuleType("panopticapi", __doc__)
    # others may ask importlib.util.find_spec for it
    package.__spec__, package.__path__ = ModuleSpec("panopticapi", None), []
    for name, parts in dict(
        evaluation=dict(VOID=VOID, OFFSET=OFFSET, PQStat=PQStat), utils=dict(rgb2id=rgb2id, id2rgb=id2rgb)
    ).items():
        module = ModuleType(f"panopticapi.{name}", __doc__)
        vars(module).update(parts)
        sys.modules[module.__name__] = module
        setattr(package, name, module)


def rgb2id(color: np.ndarray) -> np.ndarray:
    """Return the segment ids (H, W), int32, of an image (H, W, 3) whose channels are their digits in base 256."""
    return np.asarray(color).astype(np.int32) @ np.array([1, 256, 256**2], np.int32)


def id2rgb(ids: np.ndarray) -> np.ndarray:
    """Return the image (H, W, 3), uint8, that holds segment ids (H, W): the opposite of `rgb2id`."""
    return (np.asarray(ids)[..., None] // np.array([1, 256, 256**2]) % 256).astype(np.uint8)


@dataclass
class Matches:
    """The segments of a category: matched, only predicted, only there, and the sum of the IoUs of those matched."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    iou: float = 0.0

    def __iadd__(self, other: "Matches") -> "Matches":
        """Add those of other images."""
        self.tp, self.fp, self.fn = self.tp + other.tp, self.fp + other.fp, self.fn + other.fn
        self.iou += other.iou
        return self


class PQStat:
    """The matches of each category, by its id, and the panoptic quality that they come to."""

    def __init__(self):
        self.pq_per_cat: dict[int, Matches] = defaultdict(Matches)

    def __getitem__(self, category: int) -> Matches:
        return self.pq_per_cat[category]

    def __iadd__(self, other: "PQStat") -> "PQStat":
        """Add the matches of other images."""
        for category, matches in other.pq_per_cat.items():
            self.pq_per_cat[category] += matches
        return self

    def pq_average(self, categories: dict[int, dict], isthing: bool | None) -> tuple[dict, dict[int, dict]]:
        """Return the quality of all categories (None), of things or of stuff, and that of each.

        Args:
            categories: Category id -> COCO's entry for it, with `isthing`.
            isthing: Which categories to take.

        Returns:
            Panoptic (`pq`), segmentation (`sq`) and recognition quality (`rq`) from 0 to 1, averaged over the `n`
            categories that have a segment, predicted or there; NaN if none has. The same of each category by its id,
            zeros where it has no segment.
        """
        of_each, counted = {}, []
        for category, info in categories.items():
            if isthing is not None and bool(info["isthing"]) != isthing:
                continue
            matches = self.pq_per_cat[category]
            total = matches.tp + (matches.fp + matches.fn) / 2
            quality = dict(
                pq=matches.iou / max(total, 0.5), sq=matches.iou / max(matches.tp, 1), rq=matches.tp / max(total, 0.5)
            )
            of_each[category] = quality
            if total:
                counted.append(quality)
        average = {
            key: sum(q[key] for q in counted) / len(counted) if counted else np.nan for key in ("pq", "sq", "rq")
        }
        return average | dict(n=len(counted)), of_each
