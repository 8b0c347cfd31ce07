"""Layer normalisation whose backward is one pass over memory also where it is compiled."""

import torch
import torch.nn.functional as F
from densezoo.ops.backend import get_backend, takes_triton
from torch import Tensor, nn

__all__ = ["LayerNorm", "PreNorm", "add_norm", "layer_norm"]


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise the last axis (arXiv 1607.06450).

    torch.compile fuses the forward with what is before and after it, and is left to it. Of the backward it makes one
    pass in NAT, but several where a model has convolutions between its norms, as in DaViT, FocalNet, Agent and FLatten:
    there the norms took longer than the attention between them. The kernel makes one pass; it is taken where a graph is
    compiled for training on a GPU, or where the backend is set to `triton`.

    Args:
        x: (..., C), float16, bfloat16, float32 or float64.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        dtype: Of the result; as torch's own norm by default, that is `x`'s, and float32 under autocast.

    Returns:
        Of `x`'s shape. Sums run in float32 for 16-bit inputs.

    Raises:
        RuntimeError: The backend is set to `triton` and the kernel cannot run on these inputs.
    """
    is_asked_for = get_backend() == "triton" or (torch.compiler.is_compiling() and torch.is_grad_enabled())
    if is_asked_for and takes_triton("layer_norm", x, _unsupported(x)):
        default = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
        return _OnePassBackward.apply(x, weight, bias, eps, dtype or default)
    out = F.layer_norm(x, weight.shape, weight, bias, eps)
    return out if dtype is None else out.to(dtype)


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add a branch to the stream of residuals and normalise the sum for the next branch.

    The values are those of `x + branch` and of `layer_norm` of it, and the kernel is taken where `layer_norm` takes it.
    It adds up the two gradients of the sum on the way, and writes the result in the dtype of `branch` too.

    Args:
        x: (..., C), float16, bfloat16, float32 or float64.
        branch: Of `x`'s shape and any of these dtypes, or None for nothing to add.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        dtype: As `layer_norm` has it.

    Returns:
        The sum (`x` where there is no branch) and its norm.

    Raises:
        RuntimeError: The backend is set to `triton` and the kernel cannot run on these inputs.
    """
    is_asked_for = get_backend() == "triton" or (torch.compiler.is_compiling() and torch.is_grad_enabled())
    if is_asked_for and takes_triton("add_norm", x, _unsupported(x)):
        of_sum = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
        default = torch.float32 if torch.is_autocast_enabled(x.device.type) else of_sum
        return _AddNorm.apply(x, branch, weight, bias, eps, dtype or default)
    x = x if branch is None else x + branch
    return x, layer_norm(x, weight, bias, eps, dtype=dtype)


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


class _AddNorm(torch.autograd.Function):
    """The sum and the norm of standard operators, which the compiler sees through, and the kernel as its backward."""

    @staticmethod
    def forward(
        ctx, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        total = x.view_as(x) if branch is None else x + branch
        # In torch 2.11 a `to` of the same dtype loses the gradient of a compiled function.
        wide = total if total.dtype == torch.float32 else total.float()
        y, mean, rstd = torch.native_layer_norm(wide, weight.shape, weight.float(), bias.float(), eps)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype
        return total, y if y.dtype == dtype else y.to(dtype)

    @staticmethod
    def backward(ctx, grad_sum: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        from densezoo.ops.norm.kernels import add_norm_backward

        total, weight, mean, rstd = ctx.saved_tensors
        of_x, of_branch = ctx.dtypes
        # The dtype of the sum is that of one of the two.
        other = of_x if of_branch is None or of_x != total.dtype else of_branch
        grad, grad_other, sums = add_norm_backward(grad_out, grad_sum, total, weight, mean, rstd, other)
        grads = {None: None, total.dtype: grad} | ({} if other == total.dtype else {other: grad_other})
        grad_branch = grads[of_branch] if of_branch in grads else grad.to(of_branch)
        return grads[of_x], grad_branch, *sums.to(weight.dtype), None, None


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm over the last axis, by `layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis of (..., C)."""
        return layer_norm(input, self.weight, self.bias, self.eps)


class PreNorm(LayerNorm):
    """The norm before a projection: under autocast its result has the dtype that the projection would cast it to."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis of (..., C)."""
        return layer_norm(input, self.weight, self.bias, self.eps, dtype=_projected(input))

    def add(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `x` plus the branch, where there is one, and the norm of that; both (..., C)."""
        return add_norm(x, branch, self.weight, self.bias, self.eps, dtype=_projected(x))


def _projected(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives to a projection's input, None without autocast."""
    device = x.device.type
    # Of tensors without data autocast knows nothing.
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
