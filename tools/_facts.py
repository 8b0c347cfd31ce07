"""The published results of every model: model_cards/facts/*.yaml, read and checked."""

from collections.abc import Collection
from pathlib import Path
from urllib.parse import urljoin

import yaml

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
STATUSES = ("published", "converted", "reproduced")
# Key in the facts -> name, Hugging Face's metric, Hugging Face's task; the first that a result has names its task.
METRICS = {
    "top1": ("top-1", "accuracy", "image-classification"),
    "box_ap": ("box AP", "box AP", "object-detection"),
    "pq": ("PQ", "PQ", "panoptic-segmentation"),
    "mask_ap": ("mask AP", "mask AP", "instance-segmentation"),
    "miou": ("mIoU", "mIoU", "semantic-segmentation"),
    "miou_ms": ("multi-scale mIoU", "mIoU", "semantic-segmentation"),
    "macc": ("mAcc", "mAcc", "semantic-segmentation"),
}
FAMILY_KEYS = ("source", "license", "weights_base", "papers", "models")
MODEL_KEYS = ("paper", "source", "license", "note", "weights", "results")
RESULT_KEYS = ("dataset", "method", "size", "params", "flops", "config", "weights", "status", *METRICS)


def load_facts(path: Path) -> dict:
    """Return a family's facts: addresses of weights in full, every result with method, status, weights, metrics.

    Raises:
        ValueError: A key or a status is not one of those known; names file and place.
    """
    facts = yaml.safe_load(path.read_text())
    check_known(facts, FAMILY_KEYS, path.name)
    for name, model in facts["models"].items():
        check_known(model, MODEL_KEYS, f"{path.name}: {name}")
        for result in model["results"]:
            check_known(result, RESULT_KEYS, f"{path.name}: {name}: results")
            result.setdefault("method", "classifier")
            check_known([result.setdefault("status", "published")], STATUSES, f"{path.name}: {name}: status")
            result["metrics"] = [(*METRICS[key], result[key]) for key in METRICS if key in result]
            result.setdefault("weights", model["weights"])
        for place in (model, *model["results"]):
            # Empty where none were published.
            place["weights"] = place["weights"] and urljoin(facts.get("weights_base", ""), place["weights"])
    return facts


def published_flops(model: dict) -> float | None:
    """Return what the authors published of the FLOPs of the classifier, in G."""
    return next((r["flops"] for r in model["results"] if r["method"] == "classifier" and "flops" in r), None)


def flops_differ(counted: float, published: float) -> bool:
    """Return whether a published number is more than 1 % off, beyond its rounding."""
    unit = 10.0 ** -len(str(published).partition(".")[2])
    return abs(counted - published) > max(0.01 * published, unit / 2)


def check_known(found: Collection[str], known: Collection[str], place: str) -> None:
    """Raise ValueError if something found is not known."""
    if unknown := sorted(set(found) - set(known)):
        raise ValueError(f"{place}: got {unknown[0]!r}, expected one of: {', '.join(known)}")
