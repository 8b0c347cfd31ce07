"""Kernels as operators that PyTorch knows by name, called without its dispatch where nobody watches."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

_library = torch.library.Library("densezoo", "FRAGMENT")


def define(name: str, function: Callable, fake: Callable) -> Callable:
    """Define the operator `densezoo::<name>` by an annotated function, and what it returns of fake tensors.

    torch.library.custom_op would look for aliases among its tensors at every call.
    """
    qualified = f"densezoo::{name}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(qualified, schema, lib=_library, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", function, lib=_library)
    torch.library.register_fake(qualified, fake, lib=_library)
    return getattr(torch.ops.densezoo, name).default


def is_watched(tensor: Tensor) -> bool:
    """Return whether the compiler, fake tensors or others of the dispatch, such as a FLOP counter, see operators."""
    is_traced = torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)
    return is_traced or torch._C._len_torch_dispatch_stack() > 0


def register(
    name: str, forward: Callable, fake_forward: Callable, backward: Callable, fake_backward: Callable
) -> Callable[..., Tensor]:
    """Register an operator's kernels as `densezoo::<name>` and `densezoo::<name>_backward`.

    Args:
        name: The operator's name.
        forward: Annotated function of tensors (`Tensor` or `Tensor | None`), then options, to (out, saved...): the
            result, and what the backward needs of the computation; or to out alone, no tuple of one, which torch's
            schemas cannot say.
        fake_forward: The same of fake tensors: empty outputs of the right shapes, dtypes and strides.
        backward: Annotated function of (the gradient of out, tensors..., out, saved..., options...) to one gradient a
            tensor; any tensor stands for that of a missing one.
        fake_backward: The same of fake tensors.

    Returns:
        A differentiable function of tensors and options to the result.
    """
    parameters = inspect.signature(forward).parameters.values()
    tensors = sum(p.annotation in (Tensor, Tensor | None) for p in parameters)
    operator = define(name, forward, fake_forward)
    operator_backward = define(f"{name}_backward", backward, fake_backward)

    def save(ctx, inputs, output) -> None:
        output = _as_tuple(output)
        ctx.options = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors], *output)
        ctx.mark_non_differentiable(*output[1:])
        # No zeros in the place of the gradients of what the backward needs.
        ctx.set_materialize_grads(False)

    def gradients(function: Callable, ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = function(grad_out, *saved, *ctx.options)
        present = (None if t is None else grad for t, grad in zip(saved[:tensors], grads, strict=True))
        return *present, *(None for _ in ctx.options)

    @torch.autograd.function.once_differentiable
    def traced_backward(ctx, grad_out, *_):
        return gradients(operator_backward, ctx, grad_out)

    torch.library.register_autograd(f"densezoo::{name}", traced_backward, setup_context=save, lib=_library)

    class Eager(torch.autograd.Function):
        """The operator without torch.library's dispatch, which costs more time than a small launch."""

        @staticmethod
        def forward(ctx, *args):
            output = _as_tuple(forward(*args))
            save(ctx, args, output)
            return output

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad_out, *_):
            return gradients(backward, ctx, grad_out)

    def call(*args) -> Tensor:
        if is_watched(args[0]):
            return _as_tuple(operator(*args))[0]
        return Eager.apply(*args)[0]

    return call


def _as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output
