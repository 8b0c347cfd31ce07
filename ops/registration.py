"""Kernels as operators that PyTorch knows by name, called without its dispatch where nobody watches."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor


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
    operator = torch.library.custom_op(f"densezoo::{name}", forward, mutates_args=())
    operator.register_fake(fake_forward)
    operator_backward = torch.library.custom_op(f"densezoo::{name}_backward", backward, mutates_args=())
    operator_backward.register_fake(fake_backward)

    def save(ctx, inputs, output) -> None:
        output = _as_tuple(output)
        ctx.options = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors], *output)
        ctx.mark_non_differentiable(*output[1:])

    def gradients(function: Callable, ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = function(grad_out, *saved, *ctx.options)
        present = (None if t is None else grad for t, grad in zip(saved[:tensors], grads, strict=True))
        return *present, *(None for _ in ctx.options)

    operator.register_autograd(
        lambda ctx, grad_out, *_: gradients(operator_backward, ctx, grad_out), setup_context=save
    )

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
        # The compiler, fake tensors and whoever watches the dispatch, such as a FLOP counter, see the operator.
        is_traced = torch.compiler.is_compiling() or type(args[0]) not in (Tensor, torch.nn.Parameter)
        if is_traced or torch._C._len_torch_dispatch_stack():
            return _as_tuple(operator(*args))[0]
        return Eager.apply(*args)[0]

    return call


def _as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output
