"""Run a trained model on images: drawn predictions and JSON for each of them; see tools/README.md."""

import glob
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
import torch
from _common import Start, get_dataset, load_config, make_parser
from _errors import ConfigError, similar_path
from _files import replacing
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from mmengine.structures import BaseDataElement
from pycocotools import mask as coco_mask
from torch import nn
from tqdm import tqdm

from densezoo.checkpoints import read_checkpoint
from densezoo.runner import load_weights

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def main(argv: Sequence[str] | None = None) -> int:
    """Infer as the command line says; return 1 if an image could not be read."""
    parser = make_parser(__doc__)
    parser.add_argument("input", help="image, folder of images, or glob in quotes, where ** means all folders below")
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="file or URL; has to fit the model exactly")
    parser.add_argument("--out-dir", default="predictions", help="where to save; default: predictions")
    args = parser.parse_args(argv)

    with Start() as start:
        paths = find_images(args.input)
        start.cfg = cfg = load_config(args, ("model", "test_dataloader"))
        init_default_scope(cfg.get("default_scope") or "mmengine")
        model, metainfo = build_model(cfg, args.checkpoint)
        pipeline = build_pipeline(cfg)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    same_stem = Counter(path.stem for path in paths)

    unreadable = []
    for path in tqdm(paths, disable=not sys.stderr.isatty()):
        if not readable(path):
            unreadable.append(path)
            print(f"{path}: cannot be read as an image; skipped", file=sys.stderr)
            continue
        with torch.no_grad():
            (sample,) = model.test_step(pseudo_collate([pipeline(dict(img_path=str(path), img_id=0))]))
        name = path.stem if same_stem[path.stem] == 1 else path.name.replace(".", "_")
        result = {"image": str(path), **to_data(sample, metainfo["classes"])}
        if "pred_sem_seg" in sample:
            result["map"] = f"{name}_map.png"
            write_map(sample, out_dir / result["map"])
        draw(sample, path, metainfo, out_dir / f"{name}_drawn.png")
        with replacing(out_dir / f"{name}.json") as file:
            file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(paths) - len(unreadable)} of {len(paths)} images done; saved to {out_dir}")
    return int(bool(unreadable))


def find_images(source: str) -> list[Path]:
    """Return the images that a path, a folder or a glob means."""
    path = Path(source)
    if path.is_dir():
        found = [file for file in path.iterdir() if file.suffix.lower() in IMAGES]
    elif path.exists():
        found = [path]
    else:
        found = [Path(match) for match in glob.glob(source, recursive=True) if Path(match).is_file()]
    if not found:
        reason = "the folder has no image" if path.is_dir() else f"there is no such file{similar_path(path)}"
        raise ConfigError(f"{source}: {reason}")
    return sorted(found)


def readable(path: Path) -> bool:
    """Return whether a file is an image."""
    try:
        return mmcv.imread(str(path)) is not None
    # decoders raise what they like
    except Exception:
        return False


def build_model(cfg: Config, checkpoint: str) -> tuple[nn.Module, dict]:
    """Return the model with its weights, and the classes and colours that it was trained on."""
    if cfg.get("data_preprocessor"):
        cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    content = read_checkpoint(checkpoint)
    print(load_weights(model, content, checkpoint))
    metainfo = content.get("meta", {}).get("dataset_meta")
    if not metainfo:
        dataset = get_dataset(cfg, "test_dataloader")
        with DATASETS.switch_scope_and_registry(None) as registry:
            metainfo = registry.get(dataset["type"])._load_metainfo(dataset.get("metainfo"))
    return model.to(get_device()).eval(), {"classes": None, "palette": None, **metainfo}


def build_pipeline(cfg: Config) -> Compose:
    """Return the test pipeline without what loads annotations."""
    pipeline = get_dataset(cfg, "test_dataloader")["pipeline"]
    return Compose([step for step in pipeline if "Annotations" not in str(step["type"])])


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


if __name__ == "__main__":
    sys.exit(main())
