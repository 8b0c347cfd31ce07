"""The attention modules' cases for tools/benchmark.py: on outputs of ResNet-50's stages, beside timm's modules.

The floor is that of the operators: forward one map read and one written, backward three read and one written. What
pools a map before it scales it reads it twice. Compiled for a GPU, SE and ECA take 3 passes over the map forward and 4
backward: where memory is all that counts, 1.5 times the floor and 1. With kernels of their own CBAM, which pools twice,
takes 4 and 6, 2 and 1.5; Triplet, which pools along three axes, 3 and 5, 1.5 and 1.25.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial

import torch
from _benchmark_cases import Case
from densezoo.ops import get_backend, set_backend
from densezoo.ops.plugins import CBAM, ECA, SE, Triplet
from timm.layers import EcaModule, SEModule
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

# Channels and side of the first and the third stage's outputs at 224.
SHAPES = (
    (256, 56, torch.contiguous_format),
    (1024, 14, torch.contiguous_format),
    (256, 56, torch.channels_last),
)


def module_cases(
    kind: type[nn.Module],
    dtype: torch.dtype,
    device: str,
    batch: int = 128,
    shapes: Sequence[tuple[int, int, torch.memory_format]] = SHAPES,
) -> Iterator[Case]:
    """A module in training, parameters in `dtype` as its input, eager and compiled, ours and timm's.

    Where ours has kernels, what torch.compile makes of it without them is another way.
    """
    for channels, side, layout in shapes:
        ours = kind(channels, device=device, dtype=dtype)
        for parameter in ours.parameters():
            nn.init.normal_(parameter, std=0.2)  # some start at 0
        modules = {"densezoo": ours}
        if kind in TIMM:
            modules["timm"] = timm_module(ours, channels)
        ways = {}
        for name, module in modules.items():
            ways |= {f"{name} compiled": torch.compile(module, dynamic=False), f"{name} eager": module}
        if kind in (CBAM, Triplet):
            ways["reference compiled"] = CompiledReference(ours)
        x = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=layout)
        case = f"{kind.__name__} {batch}, {channels}x{side}x{side}"
        case += ", channels last" if layout is torch.channels_last else ""
        yield Case(case, (x,), ways, partial(worst_difference, list(modules.values()), x[:2]))


class CompiledReference(nn.Module):
    """A module as torch.compile makes it of plain PyTorch."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = torch.compile(module, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        before = get_backend()
        set_backend("reference")
        try:
            return self.module(x)
        finally:
            set_backend(before)


TIMM: dict[type[nn.Module], Callable[[int], nn.Module]] = {
    SE: lambda channels: SEModule(channels, rd_channels=channels // 16, bias=False),
    ECA: lambda channels: EcaModule(channels),
    CBAM: lambda channels: CbamModule(channels, mlp_bias=True),
}


@torch.no_grad()
def timm_module(ours: nn.Module, channels: int) -> nn.Module:
    """Return timm's module with the weights of ours, which has them in the same order."""
    theirs = TIMM[type(ours)](channels)
    for target, source in zip(theirs.parameters(), ours.parameters(), strict=True):
        # timm's CBAM has the mean before the maximum.
        target.copy_((source.flip(1) if source.ndim == 4 else source).view_as(target))
    return theirs.to(next(ours.parameters()))


def worst_difference(modules: Sequence[nn.Module], x: Tensor) -> float:
    """Return the worst relative RMS difference of outputs and gradients of `x` to the first module's, in float64.

    In narrower types the positions of maxima differ, and with them the gradients.
    """
    results, grad = [], torch.randn_like(x, dtype=torch.float64)
    for module in modules:
        leaf = x.detach().double().requires_grad_()
        out = deepcopy(module).double()(leaf)
        results.append([out, *torch.autograd.grad(out, leaf, grad)])
    first, *others = results
    pairs = [(a, b) for found in others for a, b in zip(found, first, strict=True)]
    return max((((a - b).norm() / b.norm()).item() for a, b in pairs), default=0.0)


MODULES: dict[str, Callable[[torch.dtype, str], Iterator[Case]]] = {
    kind.__name__: partial(module_cases, kind) for kind in (SE, ECA, CBAM, Triplet)
}
