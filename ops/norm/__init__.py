"""Layer normalisation whose backward is one pass over memory also where it is compiled."""

import torch
import torch.nn.functional as F
from densezoo.ops.backend import get_backend, is_exporting, takes_triton
from densezoo.ops.precision import autocast_dtype
from densezoo.ops.shapes import check_tensors
from torch import Tensor, nn

__all__ = ["LayerNorm", "PreNorm", "layer_norm"]


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise the last axis (arXiv 1607.06450).

    torch.compile fuses the forward with what is before and after it, and is left to it. Of the backward it makes
    several passes where a model has convolutions between its norms, as in DaViT, FocalNet, Agent and FLatten: there the
    norms took longer than the attention between them. The kernel makes one pass; it is taken where a graph is compiled
    for training on a GPU, or where the backend is set to `triton`.

    Args:
        x: (..., C), float16, bfloat16, float32 or float64.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        dtype: Of the result; as torch's own norm by default, that is `x`'s, and float32 under autocast.

    Returns:
        Of `x`'s shape. Sums run in float32 for 16-bit inputs.

    Raises:
        ValueError: An argument's shape or dtype is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernel cannot run on these inputs.
    """
    check_tensors(x=x, weight=weight, bias=bias)
    if not x.dim() or not x.shape[-1] or not x.is_floating_point():
        raise ValueError(f"x: got {x.dtype} of shape {tuple(x.shape)}, expected floating (..., C), C not 0")
    for name, t in (("weight", weight), ("bias", bias)):
        if t.shape != x.shape[-1:]:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected ({x.shape[-1]},), the channels of x")
    is_compiling = torch.compiler.is_compiling() and not is_exporting()
    is_asked_for = get_backend() == "triton" or (is_compiling and torch.is_grad_enabled())
    # torch.compile would store what has four axes as it likes convolutions to, rows innermost.
    rows = x.reshape(-1, x.shape[-1]) if is_asked_for or is_compiling else x
    if is_asked_for and takes_triton("layer_norm", x, _unsupported, x):
        default = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
        return _OnePassBackward.apply(rows, weight, bias, eps, dtype or default).view(x.shape)
    out = F.layer_norm(rows, weight.shape, weight, bias, eps).view(x.shape)
    return out if dtype is None else out.to(dtype)


def _unsupported(x: Tensor) -> str | None:
    """Return why the kernel cannot take `x`, or None where it can."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {x.dtype} (kernel: float16, bfloat16, float32)"
    if not 8 <= x.shape[-1] <= 4096:
        return f"{x.shape[-1]} channels (kernel: 8 to 4096)"
    return None


class _OnePassBackward(torch.autograd.Function):
    """The norm of standard operators, which the compiler sees through, and the kernel as its backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        # In float32, as autocast and the kernels of torch have it.
        y, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        # In torch 2.11 a `to` of the same dtype loses the gradient of a compiled function.
        return y if y.dtype == dtype else y.to(dtype)

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        from densezoo.ops.norm.kernels import layer_norm_backward

        x, weight, mean, rstd = ctx.saved_tensors
        grad_x, sums = layer_norm_backward(grad_out, x, weight, mean, rstd)
        return grad_x, *sums.to(weight.dtype), None, None


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm over the last axis, by `layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis of (..., C)."""
        return layer_norm(input, self.weight, self.bias, self.eps)


class PreNorm(LayerNorm):
    """The norm before a projection: under autocast its result has the dtype that the projection would cast it to."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis of (..., C)."""
        return layer_norm(input, self.weight, self.bias, self.eps, dtype=autocast_dtype(input))
