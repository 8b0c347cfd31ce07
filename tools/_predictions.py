"""What a model predicts of an image: as plain data, as a map, and drawn."""

from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
from _files import replacing
from mmengine.registry import VISUALIZERS
from mmengine.structures import BaseDataElement
from pycocotools import mask as coco_mask


def to_data(sample: BaseDataElement, classes: Sequence[str] | None) -> dict:
    """Return a model's prediction for an image as plain data, with the names of the classes."""

    def named(label: int) -> dict:
        return {"label": label, "class": classes[label] if classes and label < len(classes) else str(label)}

    data = {"size": list(sample.ori_shape[:2])}
    if "pred_instances" in sample:
        found = sample.pred_instances.cpu()
        data["instances"] = [
            {**named(label), "score": score, "bbox": box}
            for label, score, box in zip(*(found[key].tolist() for key in ("labels", "scores", "bboxes")), strict=True)
        ]
        for instance, mask in zip(data["instances"], found.get("masks", ()), strict=False):
            rle = coco_mask.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8))
            instance["mask"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    if "pred_sem_seg" in sample:
        labels, counts = sample.pred_sem_seg.data.cpu().unique(return_counts=True)
        total = int(counts.sum())
        data["classes"] = [
            {**named(label), "fraction": count / total}
            for label, count in sorted(zip(labels.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])
        ]
    if "pred_score" in sample:
        scores, labels = sample.pred_score.cpu().topk(min(5, len(sample.pred_score)))
        data["top5"] = [{**named(label), "score": s} for s, label in zip(scores.tolist(), labels.tolist(), strict=True)]
    return data


def write_map(sample: BaseDataElement, out: Path) -> None:
    """Save the class of every pixel as the grey value of a PNG."""
    labels = sample.pred_sem_seg.data[0].cpu().numpy()
    with replacing(out) as file:
        mmcv.imwrite(labels.astype(np.uint8 if labels.max() < 256 else np.uint16), str(file))


def draw(sample: BaseDataElement, image: str | Path, metainfo: dict, out: Path, with_truth: bool = False) -> None:
    """Save an image with a prediction; if wanted, with the ground truth at its left or, of a class, above it."""
    pixels = mmcv.imread(str(image), channel_order="rgb")
    meta = {key: metainfo.get(key) for key in ("classes", "palette")}
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        if "pred_score" in sample:
            visualizer = VISUALIZERS.get("mmpretrain.UniversalVisualizer")()
            visualizer.dataset_meta = meta
            # room for the text
            factor = max(1, 224 / min(pixels.shape[:2]))
            visualizer.visualize_cls(pixels, sample, rescale_factor=factor, draw_gt=with_truth, out_file=str(file))
            return
        if "pred_sem_seg" in sample:
            meta["classes"] = meta["classes"] or [str(i) for i in range(int(sample.pred_sem_seg.data.max()) + 1)]
            colors = np.random.default_rng(0).integers(256, size=(len(meta["classes"]), 3))
            meta["palette"] = meta["palette"] or colors.tolist()
            visualizer = VISUALIZERS.get("mmseg.SegLocalVisualizer")(alpha=0.5)
        else:
            visualizer = VISUALIZERS.get("mmdet.DetLocalVisualizer")()
        visualizer.dataset_meta = meta
        visualizer.add_datasample("", pixels, sample, draw_gt=with_truth, out_file=str(file))
