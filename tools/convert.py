"""Convert a published checkpoint, in any layout that the zoo knows, to the zoo's own, as safetensors.

    python tools/convert.py dinat_mini_in1k_224.pth dinat_mini dinat_mini.safetensors
    python tools/convert.py upernet_nat_mini.pth nat_mini dense.safetensors --model-args out_norms=0,1,2,3
    python tools/convert.py mask_rcnn_nat_mini.pth configs/nat/mask-rcnn_nat-mini_fpn_3x_coco.py detector.safetensors

Known are the official layouts, timm's and mmpretrain's, and the whole detectors and segmentors of mmdet 2 and mmseg 0.
A name takes a backbone or a classifier out of them, a config a whole model. All of its tensors have to be found.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from _targets import add_model, build, told_errors
from torch import nn

from densezoo import publishing
from densezoo.checkpoints import LoadReport, read_checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Convert as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="path or URL of the checkpoint")
    add_model(parser, "timm's name of the model that it is of, or a config")
    parser.add_argument("out", type=Path, help="where to write, NAME.safetensors; its sidecar NAME.json lies beside it")
    parser.add_argument("--trust", action="store_true", help="if the checkpoint holds code, run it to read the weights")
    args = parser.parse_args(argv)

    with told_errors():
        if args.out.suffix != ".safetensors" or args.out.is_dir():
            raise ValueError(f"{args.out}: expected the name of a file that ends with .safetensors")
        if args.out.exists() and Path(args.source).exists() and args.out.samefile(args.source):
            raise ValueError(f"{args.out}: is the source itself; give another name")
        content = read(args.source, args.trust)
        model, info = build(args.model, args.model_args)
        report = load(model, content, args.source)
        show(report)
        if report.missing:
            raise ValueError(
                f"{args.source}: {len(report.missing)} of the tensors wanted are not there ({report.missing[0]}, ...): "
                "nothing was written"
            )
        info["densezoo"]["conversion"] = dict(source=Path(args.source).name, **vars(report))
        path = publishing.save(model.state_dict(), args.out, info)
    print(f"{report.matched} tensors written to {path}; densezoo.load({str(path)!r}) gives the model")


def read(source: str, trust: bool) -> Mapping:
    """Return what a checkpoint holds; run code that it holds only if trusted, and say so."""
    try:
        return read_checkpoint(source)
    except ValueError as error:
        if "holds code" not in str(error):
            raise
        if not trust:
            raise ValueError(f"{error}. Or give --trust, which runs it") from error
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"{source}: --trust takes a file that lies on this machine; download it first")
    print(f"--trust: RUNNING the code in {source} to read its weights", file=sys.stderr)
    os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    # code may fail in any way
    except Exception as error:
        raise ValueError(f"{source}: its code fails here ({type(error).__name__}: {error}); it may need the package "
                         "that it was saved with") from error  # fmt: skip
    content = {"model": content} if isinstance(content, nn.Module) else content
    if not isinstance(content, Mapping):
        raise ValueError(f"{source}: holds a {type(content).__name__}, expected a dict of tensors")
    return {key: value.state_dict() if isinstance(value, nn.Module) else value for key, value in content.items()}


def load(model: nn.Module, content: Mapping, name: str) -> LoadReport:
    """Load into a model, with messages that name the file."""
    try:
        return publishing.load_whole(model, content)
    except ValueError as error:
        raise ValueError(str(error).replace("the given state dict", name, 1)) from error


def show(report: LoadReport) -> None:
    """Print what became of every tensor."""
    print(f"matched: {report.matched} of {report.matched + len(report.missing)} tensors of the model")
    show_names("renamed", [f"{old} -> {new}" for old, new in report.renamed.items()])
    show_names("resized", report.resized)
    show_names("dropped", report.dropped)
    show_names("missing", report.missing)


def show_names(what: str, names: Iterable[str], most: int = 20) -> None:
    """Print how many there are and the first of them; the sidecar has all."""
    names = list(names)
    print(f"{what}: {len(names) or 'none'}")
    for name in names[:most]:
        print(f"  {name}")
    if len(names) > most:
        print(f"  ... and {len(names) - most} more, which the sidecar lists")


if __name__ == "__main__":
    main()
