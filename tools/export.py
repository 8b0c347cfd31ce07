"""Export a model: as a published checkpoint, as a torch.export program, or as ONNX.

    python tools/export.py checkpoint CONFIG work_dirs/run/epoch_12.pth --metrics work_dirs/run/metrics.json
    python tools/export.py onnx published/mask-rcnn_nat-tiny_fpn_3x_coco-0123abcd.safetensors --size 800 1216
    python tools/export.py program nat_tiny nat_tiny.pth --model-args features_only=True

Programs and ONNX take any batch, height and width; before they are written they are compared with the model, ONNX in
onnxruntime, at other sizes. Averaged weights are taken where a checkpoint has them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from _files import replacing
from _targets import add_model, build, is_config, told_errors
from torch import Tensor, nn

from densezoo import exporting, publishing
from densezoo.checkpoints import read_checkpoint, read_state_dict


def main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    forms = parser.add_subparsers(dest="form", required=True)
    for form in ("checkpoint", "program", "onnx"):
        sub = forms.add_parser(form)
        add_model(sub, "a config or timm's name" + ("" if form == "checkpoint" else ", or a published checkpoint"))
        sub.add_argument("checkpoint", nargs=None if form == "checkpoint" else "?", help="file or URL of the weights")
        sub.add_argument("--out-dir", type=Path, default=Path("published"), help="where to write; default: published")
        if form == "checkpoint":
            sub.add_argument("--metrics", type=Path, help="the JSON that tools/test.py wrote about these weights")
        else:
            sub.add_argument("--size", nargs=2, type=int, default=(224, 224), metavar=("HEIGHT", "WIDTH"),
                             help="of the images that it is traced with; default: 224 224")  # fmt: skip
    args = parser.parse_args(argv)
    with told_errors():
        if args.out_dir.exists() and not args.out_dir.is_dir():
            raise ValueError(f"--out-dir {args.out_dir}: is no folder")
        path = publish(args) if args.form == "checkpoint" else export(args)
    print(f"written to {path}")


def publish(args: argparse.Namespace) -> Path:
    """Write a published checkpoint."""
    metrics = None
    if args.metrics:
        try:
            metrics = json.loads(args.metrics.read_text())
        except ValueError as error:
            raise ValueError(f"--metrics {args.metrics}: is no JSON: {error}") from error
    content = read_checkpoint(args.checkpoint)
    meta = content.get("meta") if isinstance(content.get("meta"), dict) else {}
    known = ("epoch", "iter", "seed", "experiment_name", "dataset_meta")
    averaged = any(key in content for key in ("ema_state_dict", "state_dict_ema", "model_ema"))
    training = {key: meta[key] for key in known if meta.get(key) is not None}
    training |= dict(checkpoint=Path(args.checkpoint).name, weights="averaged" if averaged else "as trained")
    model, info = build(args.model, args.model_args, metrics=metrics, training=training)
    load(model, args.checkpoint, content)
    print(f"weights of {args.checkpoint}: {training['weights']}")
    name = Path(args.model).stem if is_config(args.model) else args.model
    return publishing.save(model.state_dict(), args.out_dir / f"{name}-{{hash}}.safetensors", info)


def load(model: nn.Module, checkpoint: str, content: dict) -> None:
    """Load all of a model's weights."""
    try:
        report = publishing.load_whole(model, read_state_dict(content))
    except ValueError as error:
        raise ValueError(str(error).replace("the given state dict", checkpoint, 1)) from error
    if report.missing:
        raise ValueError(f"{checkpoint}: has not all of the model's tensors: {report.missing[0]}, ... are missing")


def export(args: argparse.Namespace) -> Path:
    """Write a program or an ONNX file, and compare it with the model."""
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if args.form == "onnx" and not find_spec(name)]
    if absent:
        raise ValueError(f"onnx: needs {', '.join(absent)}; pip install {' '.join(absent)}")
    published = Path(args.model).exists() and not is_config(args.model)
    if min(args.size) < 32:
        raise ValueError(f"--size: got {args.size[0]} {args.size[1]}, expected 32 or more")
    if published:
        model = publishing.load(args.model)
    elif args.checkpoint is None:
        raise ValueError(f"{args.model}: give the checkpoint of its weights too")
    else:
        model, _ = build(args.model, args.model_args)
        load(model, args.checkpoint, read_checkpoint(args.checkpoint))
    module, names = exporting.exportable(model)
    program = exporting.to_program(module, args.size)
    path = args.out_dir / (Path(args.model).stem + (".onnx" if args.form == "onnx" else ".pt2"))
    args.out_dir.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        if args.form == "onnx":
            exporting.to_onnx(program, file, names)
        else:
            torch.export.save(program, file)
        compare(module, runner(file), args.size, names)
    return path


def runner(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Return what runs an exported file on images."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda images: exporting.flat(module(images))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(np.asarray(x)) for x in session.run(None, {"images": images.numpy()})]


def compare(module: nn.Module, run: Callable, size: Sequence[int], names: Sequence[str]) -> None:
    """Compare an exported file with the model on other images than it was traced with, and print how far they are.

    Raises:
        ValueError: They differ.
    """
    height, width = size
    for batch, *other in ((1, height + 32, width), (3, max(32, height - 17), width + 40)):
        images = exporting.sample(module, (batch, *other))
        errors = exporting.differences(module, run, images, names)
        shown = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
        print(f"{batch} images of {other[0]}x{other[1]}: largest difference from the model, relative: {shown}")
        if not exporting.agree(errors):
            raise ValueError(f"the exported model differs from the model at {other[0]}x{other[1]}: {shown}")


if __name__ == "__main__":
    sys.exit(main())
