"""Draw what a model sees: feature maps, the attention of a pixel, predictions beside the truth; see tools/README.md."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import densezoo.backbones  # noqa: F401  (registers them with timm)
import numpy as np
import timm
import torch
from _attention import attention_weights, find_layers
from _common import Start, get_dataset, load_config, make_parser
from _errors import ConfigError, did_you_mean, similar_path
from _files import replacing
from _panels import draw_panels, main_components
from _predictions import draw
from infer import build_model
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from densezoo.checkpoints import load_published


def main(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="features|attention|predictions")
    for name, run in (("features", draw_features), ("attention", draw_attention)):
        command = commands.add_parser(name, help=run.__doc__)
        command.add_argument("model", help="timm's name")
        command.add_argument("image", help="image file")
        command.add_argument("--checkpoint", help="published or trained weights; default: random ones")
        command.add_argument("--short-side", type=int, help="of the image given to the model; default: the model's")
        command.set_defaults(run=run)
    command.add_argument(
        "--pixel", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="in the image; default: its middle"
    )
    command.add_argument("--layer", help="module with the attention; default: the last one at each stride")
    command = commands.add_parser(
        "predictions", help=draw_predictions.__doc__, parents=[make_parser("")], add_help=False
    )
    command.add_argument("config", help="config file")
    command.add_argument("checkpoint", help="file or URL; has to fit the model exactly")
    command.add_argument("--count", type=int, default=8, help="how many images of the test set; default: 8")
    command.set_defaults(run=draw_predictions)
    for command in commands.choices.values():
        command.add_argument("--out-dir", default="pictures", type=Path, help="where to save; default: pictures")
    args = parser.parse_args(argv)
    args.run(args)


def read_model(args: Namespace) -> tuple[nn.Module, Image.Image, Tensor]:
    """Return the model, the image at the size that the model is given, and that as a tensor (1, 3, H, W)."""
    if not timm.is_model(args.model):
        raise ConfigError(f"model: there is no {args.model!r}{did_you_mean(args.model, timm.list_models())}")
    try:
        image = Image.open(args.image).convert("RGB")
    except OSError as error:
        raise ConfigError(f"{args.image}: cannot be read as an image{similar_path(args.image)}") from error
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval().requires_grad_(False)
    if args.checkpoint:
        print(load_published(model, args.checkpoint))
    else:
        print(f"{args.model}: no --checkpoint, so its weights are random")
    config = model.default_cfg
    short = args.short_side or config["input_size"][-1]
    if short < 32:
        raise ConfigError(f"--short-side: got {short}, expected at least 32")
    # whole cells at every stride, so that a position of a map is a square of the image
    width, height = (max(32, round(side * short / min(image.size) / 32) * 32) for side in image.size)
    args.original_size = image.size
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return model, image, ((x - mean) / std)[None]


def draw_features(args: Namespace) -> None:
    """Draw the maps of a backbone: their three main components as red, green and blue."""
    with Start():
        model, image, x = read_model(args)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
    strides = [x.shape[-1] // features.shape[-1] for features in maps]
    titles = [f"{features.shape[1]} channels, stride {stride}" for features, stride in zip(maps, strides, strict=True)]
    panels = [(title, main_components(features[0])) for title, features in zip(titles, maps, strict=True)]
    save(args, image, panels)


def draw_attention(args: Namespace) -> None:
    """Draw which positions a pixel sees, and how much of each, as the operators themselves tell."""
    with Start():
        model, image, x = read_model(args)
        original_width, original_height = args.original_size
        row, column = args.pixel or (original_height // 2, original_width // 2)
        if not (0 <= row < original_height and 0 <= column < original_width):
            raise ConfigError(f"--pixel: got {row} {column}, expected one of the {original_height} x {original_width}")
        point = (row + 0.5) / original_height, (column + 0.5) / original_width
        layers = find_layers(model, x)
        if args.layer and args.layer not in layers:
            raise ConfigError(f"--layer: no attention is named {args.layer!r}{did_you_mean(args.layer, layers)}")
        if not layers:
            raise ConfigError(f"model: {args.model} has no attention over positions")
    # of those at one stride the last
    chosen = [args.layer] if args.layer else list({size: name for name, size in layers.items()}.values())
    panels = []
    for name in chosen:
        weights = attention_weights(model, x, name, point)
        seen = int((weights > 0).sum())
        panels.append((f"{name}\n{seen} of {weights.numel()} positions", weights))
        print(f"{name}: sees {seen} of {' x '.join(map(str, weights.shape))} positions")
    save(args, image, panels, point)


def save(args: Namespace, image: Image.Image, panels: list[tuple], point: tuple[float, float] | None = None) -> None:
    """Save the image and its panels side by side."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / f"{Path(args.image).stem}_{args.model}_{args.what}.png"
    figure = draw_panels(image, [(args.model, None), *panels], point)
    with replacing(path) as file:
        figure.savefig(file, dpi=100)
    print(f"saved to {path}")


def draw_predictions(args: Namespace) -> None:
    """Draw predictions on images of the test set, with the ground truth at their left."""
    with Start() as start:
        start.cfg = cfg = load_config(args, ("model", "test_dataloader"))
        init_default_scope(cfg.get("default_scope") or "mmengine")
        dataset = DATASETS.build(get_dataset(cfg, "test_dataloader"))
        model, metainfo = build_model(cfg, args.checkpoint)
        if not 0 < args.count:
            raise ConfigError(f"--count: got {args.count}, expected at least 1")
    count = min(args.count, len(dataset))
    for i in tqdm(np.linspace(0, len(dataset) - 1, count).round().astype(int), disable=not sys.stderr.isatty()):
        with torch.no_grad():
            (sample,) = model.test_step(pseudo_collate([dataset[int(i)]]))
        draw(sample, sample.img_path, metainfo, args.out_dir / f"{i:06d}_{Path(sample.img_path).stem}.png", True)
    print(f"{count} of {len(dataset)} images; saved to {args.out_dir}")


if __name__ == "__main__":
    main()
