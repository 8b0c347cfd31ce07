"""The MLP of transformer blocks: Linear, GELU, Linear, on a GPU in 16 bits without a pass over memory for the GELU."""

import timm.layers
import torch
import torch.nn.functional as F
from densezoo.ops.backend import get_backend, takes_triton
from torch import Tensor, nn

__all__ = ["Mlp", "mlp"]


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, approximate: str = "none"
) -> Tensor:
    """Apply a Linear, GELU (arXiv 1606.08415) and a second Linear to the last axis.

    The first product and the GELU are one kernel, and so are the second's gradient, the GELU's and the first bias's.
    They are taken on a GPU in float16 and bfloat16, or where the backend is set to `triton`; elsewhere it is the three
    operators of torch. In bfloat16 either GELU is right to 6e-4 times the number that it is applied to.

    Args:
        x: (..., C), float16, bfloat16, float32 or float64; under autocast all arguments are taken in its dtype.
        weight1: (hidden, C).
        bias1: (hidden,).
        weight2: (D, hidden).
        bias2: (D,).
        approximate: Which GELU, as in torch: `none` is the exact one, `tanh` the other.

    Returns:
        (..., D). Sums run in float32 for 16-bit inputs.

    Raises:
        ValueError: `approximate` is neither, or an argument's shape is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: got {approximate!r}, expected 'none' or 'tanh'")
    hidden, out = weight1.shape[0], weight2.shape[0]
    expected = {"weight1": (hidden, x.shape[-1]), "bias1": (hidden,), "weight2": (out, hidden), "bias2": (out,)}
    for (name, shape), tensor in zip(expected.items(), (weight1, bias1, weight2, bias2), strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape} for x of {tuple(x.shape)}")
    if takes_kernels(x):
        return _mlp_triton(x, weight1, bias1, weight2, bias2, approximate)
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate=approximate), weight2, bias2)


def takes_kernels(x: Tensor) -> bool:
    """Return whether `mlp` runs its kernels on `x`, in the backend in force."""
    dtype = _product_dtype(x)
    # cuBLAS is better at products in float32.
    is_asked_for = get_backend() == "triton" or (x.is_cuda and dtype in (torch.float16, torch.bfloat16))
    return is_asked_for and takes_triton("mlp", x, _unsupported(dtype))


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a Linear takes `x`."""
    device = x.device.type
    # Of tensors without data autocast knows nothing, and float64 it leaves alone.
    if device in ("cpu", "cuda") and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _unsupported(dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot take inputs of this dtype, or None where they can."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {dtype} (kernels: float16, bfloat16, float32)"
    return None


def _mlp_triton(x: Tensor, *args) -> Tensor:
    from densezoo.ops.mlp.kernels import mlp_activated, mlp_whole

    *parameters, approximate = args
    dtype = _product_dtype(x)
    tensors = (t if t.dtype == dtype else t.to(dtype) for t in (x.reshape(-1, x.shape[-1]), *parameters))
    if torch.is_grad_enabled():
        out = _FusedGelu.apply(*tensors, approximate)
    else:
        rows, weight1, bias1, weight2, bias2 = tensors
        if dtype.itemsize == 2 and max(rows.shape[1], weight2.shape[0]) <= 128:
            out = mlp_whole(rows, weight1, bias1, weight2, bias2, approximate)
        else:
            out = F.linear(mlp_activated(rows, weight1, bias1, approximate), weight2, bias2)
    return out.view(*x.shape[:-1], out.shape[-1])


class _FusedGelu(torch.autograd.Function):
    """The kernels between products of standard operators, which the compiler sees through."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, approximate: str) -> Tensor:
        from densezoo.ops.mlp.kernels import mlp_hidden

        pre, act = mlp_hidden(x, weight1, bias1, approximate)
        ctx.save_for_backward(x, weight1, weight2, pre, act)
        ctx.approximate = approximate
        return torch.addmm(bias2, act, weight2.t())

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        from densezoo.ops.mlp.kernels import mlp_hidden_backward

        x, weight1, weight2, pre, act = ctx.saved_tensors
        grad_pre, grad_bias1 = mlp_hidden_backward(grad_out, weight2, pre, ctx.approximate)
        if grad_bias1.dtype != x.dtype:
            grad_bias1 = grad_bias1.to(x.dtype)
        grad_weight1, grad_weight2 = torch.mm(grad_pre.t(), x), torch.mm(grad_out.t(), act)
        return torch.mm(grad_pre, weight1), grad_weight1, grad_bias1, grad_weight2, grad_out.sum(0), None


class Mlp(timm.layers.Mlp):
    """timm's MLP, by `mlp` where it is the plain one.

    Args:
        dim: Width of the input and of the output.
        hidden: Width between.
        act_layer: The activation; other ones than GELU are timm's, as are layers that were replaced or have hooks.
    """

    def __init__(self, dim: int, hidden: int, act_layer=nn.GELU):
        super().__init__(dim, hidden, act_layer=act_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Take (..., dim) to the same shape."""
        fc1, act, fc2 = self.fc1, self.act, self.fc2
        is_plain = _is_plain(fc1, nn.Linear) and _is_plain(act, nn.GELU) and _is_plain(fc2, nn.Linear)
        if is_plain and takes_kernels(x):
            return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, approximate=act.approximate)
        return super().forward(x)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module does what its class does and nothing more."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and not any(hooks)
