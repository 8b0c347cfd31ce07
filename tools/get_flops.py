"""Count the parameters and the floating-point operations of a model of timm's or of the zoo's, at any image size.

    python tools/get_flops.py nat_tiny dinat_tiny
    python tools/get_flops.py nat_tiny --size 800 1216

Counted are the multiply-adds of convolutions, matrix products and the zoo's attention, as most papers do, for one
image; nothing is computed, so that the size costs neither time nor memory.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import densezoo.ops
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

# They tell what the operators count.
for file in Path(densezoo.ops.__file__).parent.glob("*/kernels.py"):
    import_module(f"densezoo.ops.{file.parent.name}.kernels")


@torch.no_grad()
def count_multiply_adds(model: nn.Module, image_size: Sequence[int]) -> int:
    """Return the multiply-adds of a model (parameters on any device, or on none: "meta") for one image.

    Args:
        model: It stays as it is.
        image_size: (channels, height, width).
    """
    # Of tensors on a GPU, if pretended ones, the operators' kernels are counted and not the references.
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        tensors = {name: torch.empty(b.shape, dtype=b.dtype, device="cuda") for name, b in model.named_buffers()}
        for name, p in model.named_parameters():
            tensors[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cuda"), p.requires_grad)
        torch.func.functional_call(model, tensors, torch.empty(1, *image_size, device="cuda"))
    return counter.get_total_flops() // 2


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="model", help="timm's name")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="by default that of training")
    args = parser.parse_args()
    if unknown := [name for name in args.models if not timm.is_model(name)]:
        parser.error(f"model: got {unknown[0]!r}; see timm.list_models() for the names that timm and the zoo know")
    table = Table("model", "image", "parameters, M", "multiply-adds, G")
    for name in args.models:
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        channels, *size = model.default_cfg["input_size"]
        size = args.size or size
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        operations = count_multiply_adds(model, (channels, *size)) / 1e9
        table.add_row(name, "x".join(map(str, size)), f"{parameters:.2f}", f"{operations:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
