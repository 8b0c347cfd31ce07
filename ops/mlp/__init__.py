"""The MLP of transformer blocks: Linear, GELU, Linear, in inference without a pass over memory for the GELU."""

from collections.abc import Callable

import timm.layers
import torch
import torch.nn.functional as F
from densezoo.ops.backend import takes_triton
from densezoo.ops.precision import autocast_dtype
from torch import Tensor, nn

__all__ = ["Mlp", "mlp"]


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, approximate: str = "none"
) -> Tensor:
    """Apply a Linear, GELU (arXiv 1606.08415) and a second Linear to the last axis.

    Without gradients, on a GPU, in 16 bits, and up to 128 channels of input and output, all of it is one kernel; of
    wider MLPs in bfloat16 the first product applies the GELU. In bfloat16 either kind of GELU is then right to 6e-4
    times the number that it is applied to. Elsewhere it is the three operators of torch.

    Args:
        x: (..., C), any floating dtype; under autocast all arguments are taken in its dtype.
        weight1: (hidden, C).
        bias1: (hidden,).
        weight2: (D, hidden).
        bias2: (D,).
        approximate: Which GELU, as in torch: `none` is the exact one, `tanh` the other.

    Returns:
        (..., D). Sums run in float32 for 16-bit inputs.

    Raises:
        ValueError: `approximate` is neither, or an argument's shape is wrong; the message names it.
        RuntimeError: The backend is set to `triton`, and a kernel that applies cannot run.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: got {approximate!r}, expected 'none' or 'tanh'")
    hidden, out = weight1.shape[0], weight2.shape[0]
    expected = {"weight1": (hidden, x.shape[-1]), "bias1": (hidden,), "weight2": (out, hidden), "bias2": (out,)}
    for (name, shape), tensor in zip(expected.items(), (weight1, bias1, weight2, bias2), strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape} for x of {tuple(x.shape)}")
    if _takes_kernels(x, out):
        return _mlp_fused(x, weight1, bias1, weight2, bias2, approximate)
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate=approximate), weight2, bias2)


def _takes_kernels(x: Tensor, out: int) -> bool:
    """Return whether an MLP takes its kernels from `x` to a width of `out`, in the backend in force."""
    if torch.is_grad_enabled():
        return False
    dtype, is_narrow = autocast_dtype(x) or x.dtype, _is_narrow(x, out)
    applies = dtype == torch.bfloat16 or (dtype == torch.float16 and is_narrow)
    return applies and takes_triton("mlp", x, None)


def _is_narrow(x: Tensor, out: int) -> bool:
    return max(x.shape[-1], out) <= 128


def _mlp_fused(x: Tensor, *args) -> Tensor:
    from densezoo.ops.mlp.kernels import mlp_hidden, mlp_narrow

    *parameters, approximate = args
    dtype = autocast_dtype(x) or x.dtype
    tensors = (x.reshape(-1, x.shape[-1]), *parameters)
    rows, weight1, bias1, weight2, bias2 = (t if t.dtype == dtype else t.to(dtype) for t in tensors)
    if _is_narrow(x, weight2.shape[0]):
        out = mlp_narrow(rows, weight1, bias1, weight2, bias2, approximate)
    else:
        out = F.linear(mlp_hidden(rows, weight1, bias1), weight2, bias2)
    return out.view(*x.shape[:-1], out.shape[-1])


class Mlp(timm.layers.Mlp):
    """timm's MLP, by `mlp` where that has kernels.

    Args:
        dim: Width of the input and of the output.
        hidden: Width between.
        act_layer: The activation. With another one than GELU, and where layers were replaced or have hooks, each layer
            is called, as in timm.
    """

    def __init__(self, dim: int, hidden: int, act_layer: Callable[[], nn.Module] = nn.GELU):
        super().__init__(dim, hidden, act_layer=act_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Take (..., dim) to the same shape."""
        fc1, act, fc2 = self.fc1, self.act, self.fc2
        is_plain = _is_plain(fc1, nn.Linear) and _is_plain(act, nn.GELU) and _is_plain(fc2, nn.Linear)
        if is_plain and _takes_kernels(x, fc2.out_features):
            return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, approximate=act.approximate)
        return super().forward(x)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module does what its class does and nothing more."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)
