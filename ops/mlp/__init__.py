"""The MLP of transformer blocks: Linear, GELU, Linear, without a pass over memory for the GELU."""

from collections.abc import Callable

import timm.layers
import torch
import torch.nn.functional as F
from densezoo.ops.backend import get_backend, is_exporting, takes_triton
from densezoo.ops.precision import autocast_dtype
from densezoo.ops.shapes import check_tensors
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Mlp", "mlp"]

# The most channels of input and output for which one kernel makes the MLP, those for which it does in training besides
# (fewer would leave much of a tile of 256 empty), and the most for which the backward's makes the hidden map again, in
# less time than it takes to write and read it; measured on an H200.
NARROW = 128
TRAINED = range(192, 257)
MADE_AGAIN = 64


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, approximate: str = "none"
) -> Tensor:
    """Apply a Linear, GELU (arXiv 1606.08415) and a second Linear to the last axis.

    Without gradients, on a GPU, in 16 bits, and up to 128 channels of input and output, all of it is one kernel; of
    wider MLPs in bfloat16 the first product applies the GELU. With gradients, where a graph is compiled for training on
    a GPU or the backend is set to `triton`, MLPs as narrow, and those of 192 to 256 channels, with the exact GELU are
    one kernel forward, and one backward but for some products of cuBLAS. In bfloat16 either kind of GELU is then right
    to 6e-4 times the number that it is applied to. Elsewhere it is the three operators of torch.

    Args:
        x: (..., C), any floating dtype; under autocast all arguments are taken in its dtype.
        weight1: (hidden, C), of `x`'s dtype unless autocast is on, as all that follow.
        bias1: (hidden,).
        weight2: (D, hidden).
        bias2: (D,).
        approximate: Which GELU, as in torch: `none` is the exact one, `tanh` the other.

    Returns:
        (..., D). Sums run in float32 for 16-bit inputs.

    Raises:
        ValueError: `approximate` is neither, or an argument's shape or dtype is wrong; the message names it.
        RuntimeError: The backend is set to `triton`, and a kernel that applies cannot run.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: got {approximate!r}, expected 'none' or 'tanh'")
    _check(x, weight1, bias1, weight2, bias2)
    if _takes_kernels(x, weight2.shape[0], approximate):
        return _mlp_fused(x, weight1, bias1, weight2, bias2, approximate)
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate=approximate), weight2, bias2)


def _check(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> None:
    parameters = dict(weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    check_tensors(x=x, **parameters)
    if not x.dim() or not x.is_floating_point():
        raise ValueError(f"x: got {x.dtype} of shape {tuple(x.shape)}, expected floating (..., C)")
    hidden, out = (weight.shape[0] if weight.dim() else 0 for weight in (weight1, weight2))
    shapes = (hidden, x.shape[-1]), (hidden,), (out, hidden), (out,)
    for (name, t), shape in zip(parameters.items(), shapes, strict=True):
        if t.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {shape} for x of {tuple(x.shape)}")
        if t.dtype != x.dtype and autocast_dtype(x) is None:
            raise ValueError(f"{name}: got {t.dtype}, expected x's: {x.dtype} (or any dtype in autocast)")


def _takes_kernels(x: Tensor, out: int, approximate: str) -> bool:
    """Return whether an MLP takes its kernels from `x` to a width of `out`, in the backend in force."""
    dtype, width = autocast_dtype(x) or x.dtype, max(x.shape[-1], out)
    if torch.is_grad_enabled():
        is_compiling = torch.compiler.is_compiling() and not is_exporting()
        is_asked_for = get_backend() == "triton" or is_compiling
        applies = is_asked_for and approximate == "none" and (width <= NARROW or width in TRAINED)
        applies = applies and dtype in (torch.bfloat16, torch.float16)
    else:
        applies = dtype == torch.bfloat16 or (dtype == torch.float16 and width <= NARROW)
    return applies and takes_triton("mlp", x)


def _mlp_fused(x: Tensor, *args) -> Tensor:
    from densezoo.ops.mlp.kernels import mlp_hidden, mlp_narrow

    *parameters, approximate = args
    dtype = autocast_dtype(x) or x.dtype
    tensors = (x.reshape(-1, x.shape[-1]), *parameters)
    # In torch 2.11 a `to` of the same dtype loses the gradient of a compiled function.
    rows, weight1, bias1, weight2, bias2 = (t if t.dtype == dtype else t.to(dtype) for t in tensors)
    if torch.is_grad_enabled():
        out = _Trained.apply(rows, weight1, bias1, weight2, bias2)
    elif max(x.shape[-1], weight2.shape[0]) <= NARROW:
        out = mlp_narrow(rows, weight1, bias1, weight2, bias2, approximate)
    else:
        out = F.linear(mlp_hidden(rows, weight1, bias1), weight2, bias2)
    return out.view(*x.shape[:-1], out.shape[-1])


class _Trained(torch.autograd.Function):
    """The MLP of rows, with a kernel as its backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        from densezoo.ops.mlp.kernels import mlp_narrow, mlp_training

        width, saved = max(x.shape[1], weight2.shape[0]), ()
        if width <= MADE_AGAIN:
            out = mlp_narrow(x, weight1, bias1, weight2, bias2, "none")
        else:
            out, *saved = mlp_training(x, weight1, bias1, weight2, bias2)
        ctx.save_for_backward(x, weight1, bias1, weight2, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor, ...]:
        from densezoo.ops.mlp.kernels import mlp_backward

        x, weight1, bias1, weight2, *saved = ctx.saved_tensors
        hidden = saved[0] if saved else None
        grad_x, grad_hidden, act, sums = mlp_backward(grad_out, x, weight1, bias1, weight2, hidden)
        grad_bias1, grad_bias2 = sums.to(x.dtype).split((weight1.shape[0], weight2.shape[0]))
        return grad_x, grad_hidden.t() @ x, grad_bias1, grad_out.t() @ act, grad_bias2


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
        if is_plain and _takes_kernels(x, fc2.out_features, act.approximate):
            return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, approximate=act.approximate)
        return super().forward(x)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module does what its class does and nothing more."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)
