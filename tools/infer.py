"""Run a trained model on images: drawn predictions and JSON for each of them; see tools/README.md."""

import glob
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import mmcv
import torch
from _common import Start, get_dataset, load_config, make_parser
from _errors import ConfigError, similar_path
from _files import replacing
from _predictions import draw, to_data, write_map
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import DATASETS, MODELS, init_default_scope
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


if __name__ == "__main__":
    sys.exit(main())
