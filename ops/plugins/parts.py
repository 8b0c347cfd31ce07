"""What several attention modules share."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from densezoo.ops.backend import is_exporting, takes_triton
from densezoo.ops.shapes import positive
from torch import Tensor, nn


def odd(name: str, value: int) -> int:
    """Return `value`, or raise ValueError, starting with `name`, where it is no positive odd integer."""
    if positive(name, value) % 2 == 0:
        raise ValueError(f"{name}: got {value}, expected an odd number, so that the map keeps its size")
    return value


def reduced(channels: int, reduction: int) -> int:
    """Return the width of a bottleneck, `channels` / `reduction`; ValueError where that is no integer."""
    if positive("channels", channels) % positive("reduction", reduction):
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        raise ValueError(f"reduction: got {reduction} for {channels} channels, expected one of {divisors}")
    return channels // reduction


def squeeze_mlp(channels: int, reduction: int, **factory) -> nn.Sequential:
    """Return SE's excitation, (B, C) to weights (B, C) between 0 and 1, without biases."""
    hidden = reduced(channels, reduction)
    return nn.Sequential(
        nn.Linear(channels, hidden, bias=False, **factory),
        nn.ReLU(),
        nn.Linear(hidden, channels, bias=False, **factory),
        nn.Sigmoid(),
    )


def max_mean(x: Tensor, dim: int) -> Tensor:
    """Reduce one axis of a map (B, C, H, W) to (B, 2, ...): its maximum, then its mean."""
    return torch.stack([x.amax(dim), x.mean(dim)], 1)


def map_unsupported(x: Tensor) -> str | None:
    """Return why the kernels that pool and scale maps cannot take x (B, C, H, W), or None where they can."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {x.dtype} (kernels: float16, bfloat16, float32)"
    # Asked of a graph to export it would limit the sizes that the graph serves.
    if not is_exporting() and (x.numel() == 0 or x.shape[1:].numel() >= 2**31):
        return f"shape {tuple(x.shape)} (kernels: 1 to 2^31 - 1 numbers an image)"
    return None


def _conv_unsupported(x: Tensor) -> str | None:
    is_narrow = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return None if is_narrow else f"dtype {x.dtype} (kernels: float16, bfloat16, float32)"


class MapConv(nn.Conv2d):
    """The convolution of two maps to one, in a kernel of its own on a GPU, where cuDNN's are made for more channels."""

    def __init__(self, kernel_size: int, **factory):
        super().__init__(2, 1, odd("kernel_size", kernel_size), padding=kernel_size // 2, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, 2, H, W) to (B, 1, H, W)."""
        if takes_triton("map_conv", x, _conv_unsupported, x):
            from densezoo.ops.plugins.kernels import map_conv_triton

            out = map_conv_triton(x, self.weight)
            # Fusing the norm into the convolution makes a bias of it.
            return out if self.bias is None else out + self.bias
        return super().forward(x)


class MapNorm(nn.BatchNorm2d):
    """The norm of one map, trained on a GPU as a column of numbers: for a map PyTorch starts one program a channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, 1, H, W) to the same shape."""
        if not (self.training and x.is_cuda):
            return super().forward(x)
        # The numbers in any order have the same mean and variance.
        is_turned = x.stride(-2) < x.stride(-1)
        in_order = x.mT if is_turned else x
        out = super().forward(in_order.reshape(-1, 1)).view(in_order.shape)
        return out.mT if is_turned else out

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept the column."""


def map_conv(kernel_size: int, **factory) -> nn.Sequential:
    """Return the convolution `conv` and norm `bn` that make one map (B, 1, H, W) of the two of `max_mean`."""
    conv, norm = MapConv(kernel_size, **factory), MapNorm(1, momentum=0.01, **factory)
    return nn.Sequential(OrderedDict(conv=conv, bn=norm))


def _are_alike(gates: Sequence[nn.Sequential]) -> bool:
    """Return whether nothing has replaced a part of `map_conv`, and the norms' settings are the same."""
    if any(type(gate.conv) is not MapConv or type(gate.bn) is not MapNorm for gate in gates):
        return False
    settings = {(gate.bn.training, gate.bn.momentum, gate.bn.eps) for gate in gates}
    return len(settings) == 1 and all(gate.bn.momentum and gate.bn.running_mean is not None for gate in gates)


def map_gates(gates: Sequence[nn.Sequential], maps: Sequence[Tensor], share: float = 1.0) -> list[Tensor]:
    """Take each map (B, 2, H, W) through its `map_conv`, a sigmoid and a factor to (B, 1, H, W), together on a GPU."""
    if not (_are_alike(gates) and takes_triton("map_gates", maps[0], _conv_unsupported, maps[0])):
        return [gate(x).sigmoid() * share for gate, x in zip(gates, maps, strict=True)]
    from densezoo.ops.plugins.kernels import map_gates_triton

    norms = [gate.bn for gate in gates]
    training = norms[0].training
    if training and any(x.shape[0] * x.shape[2] * x.shape[3] == 1 for x in maps):
        raise ValueError("a norm in training: got maps of one number, expected more")
    known = [] if training else norms
    outs, stats = map_gates_triton(
        maps,
        [gate.conv.weight for gate in gates],
        [norm.weight for norm in norms],
        [norm.bias for norm in norms],
        [norm.running_mean for norm in known],
        [norm.running_var for norm in known],
        share,
        norms[0].eps,
    )
    if training:
        with torch.no_grad():
            running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
            found = stats[:2].to(running[0].dtype).view(-1, 1).unbind()
            torch._foreach_lerp_(running, found, norms[0].momentum)
            torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    return outs


def init_as_published(module: nn.Module) -> None:
    """Start as CBAM's and BAM's networks do: Kaiming normal convolutions of the outputs' number, biases 0."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out")
        if getattr(m, "bias", None) is not None:
            nn.init.zeros_(m.bias)


def pooled_basis(basis: Tensor, size: int | torch.SymInt) -> Tensor:
    """Return what applies `basis` (n, cells) to an axis of `size` after adaptive average pooling, (n, size)."""
    cells = basis.shape[1]
    # An exported graph serves all sizes.
    if not torch.compiler.is_exporting() and size == cells:
        return basis
    cell = torch.arange(cells, device=basis.device)[:, None]
    position = torch.arange(size, device=basis.device)
    start, end = cell * size // cells, ((cell + 1) * size + cells - 1) // cells
    pooling = ((position >= start) & (position < end)).to(basis.dtype) / (end - start)
    # Not by a matrix product, whose precision autocast would lower.
    return (basis[:, :, None] * pooling).sum(1)
