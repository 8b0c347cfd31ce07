"""Kernels as operators that PyTorch knows by name, called without its dispatch where nobody watches.

Where a GPU has too little shared memory for a kernel, its operator falls back to the reference. Triton knows no sooner
than at the first launch, when a compiler may long have taken the operator for granted: it falls back within.
"""

import inspect
from collections.abc import Callable
from functools import wraps

import torch
from densezoo.ops.backend import fall_back
from densezoo.ops.compiling import foresee, foresee_fake
from torch import Tensor
from triton.runtime.errors import OutOfResources

_library = torch.library.Library("densezoo", "FRAGMENT")
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
# What kernels lack, by operator and inputs: where the forward fell back, the backward finds nothing saved.
_lacking: dict[tuple, str] = {}


def define(name: str, function: Callable, fake: Callable) -> Callable:
    """Define the operator `densezoo::<name>` by an annotated function, and what it returns of fake tensors.

    torch.library.custom_op would look for aliases among its tensors at every call.
    """

    def fake_and_foresee(*args):
        foresee_fake(function, args)
        return fake(*args)

    qualified = f"densezoo::{name}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(qualified, schema, lib=_library, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", function, lib=_library)
    torch.library.register_fake(qualified, fake_and_foresee, lib=_library)
    return getattr(torch.ops.densezoo, name).default


def is_watched(tensor: Tensor) -> bool:
    """Return whether the compiler, fake tensors or others of the dispatch, such as a FLOP counter, see operators."""
    is_traced = torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)
    return is_traced or torch._C._len_torch_dispatch_stack() > 0


def register(
    name: str,
    forward: Callable,
    fake_forward: Callable,
    backward: Callable,
    fake_backward: Callable,
    reference: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """Register an operator's kernels as `densezoo::<name>` and `densezoo::<name>_backward`.

    Args:
        name: The operator's name.
        forward: Annotated function of tensors (`Tensor` or `Tensor | None`), then options, to (out, saved...): the
            result, and what the backward needs of the computation; or to out alone, no tuple of one, which torch's
            schemas cannot say.
        fake_forward: The same of fake tensors: empty outputs of the right shapes, dtypes and strides.
        backward: Annotated function of (the gradient of out, tensors..., out, saved..., options...) to one gradient a
            tensor; any tensor stands for that of a missing one. Of one tensor, to its gradient alone.
        fake_backward: The same of fake tensors.
        reference: Differentiable function of what `forward` takes to the result, for GPUs that lack what kernels need.

    Returns:
        A differentiable function of tensors and options to the result. Where kernels lack something it raises
        RuntimeError if the backend in force is `triton`, and takes the reference else.
    """
    parameters = inspect.signature(forward).parameters.values()
    tensors = sum(p.annotation in (Tensor, Tensor | None) for p in parameters)
    options = len(parameters) - tensors

    def inputs_of(args: tuple) -> tuple:
        return args[1 : 1 + tensors] + args[len(args) - options :]

    def refer(*args):
        out, *saved = _as_tuple(fake_forward(*args))
        with torch.no_grad():
            out.copy_(reference(*args))
        # Nothing reads what is saved, but compilers and checks may compare it.
        return (out, *(t.zero_() for t in saved)) if saved else out

    def refer_backward(*args):
        leaves = [t.detach().requires_grad_() if _is_real(t) else t for t in inputs_of(args)]
        # The dispatch of a mode, such as a FLOP counter, leaves autograd out.
        with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(_AUTOGRAD, False):
            out = reference(*leaves)
        grads = fake_backward(*args)
        pairs = [(leaf, grad) for leaf, grad in zip(leaves, _as_tuple(grads), strict=False) if _is_real(leaf)]
        results = torch.autograd.grad(out, [leaf for leaf, _ in pairs], args[0], materialize_grads=True)
        for (_, grad), result in zip(pairs, results, strict=True):
            grad.copy_(result)
        return grads

    forward = _or_reference(name, forward, refer, lambda args: args)
    backward = _or_reference(name, backward, refer_backward, inputs_of)
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
        grads = _as_tuple(function(grad_out, *saved, *ctx.options))
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
        foresee(forward, backward, args, tensors)
        return Eager.apply(*args)[0]

    return call


def _or_reference(name: str, kernels: Callable, reference: Callable, inputs_of: Callable[[tuple], tuple]) -> Callable:
    """Return `kernels`, or `reference` of the same arguments for inputs on which the GPU lacks what a kernel needs."""

    @wraps(kernels)
    def function(*args):
        if not _lacking or (key := _key(name, inputs_of(args))) not in _lacking:
            try:
                return kernels(*args)
            except OutOfResources as error:
                unit = "bytes of " if error.name == "shared memory" else ""
                reason = f"a kernel needs {error.required} {unit}{error.name}, the GPU has {error.limit}"
            fall_back(name, reason)
            _lacking[key := _key(name, inputs_of(args))] = reason
        fall_back(name, _lacking[key])
        return reference(*args)

    return function


def _key(name: str, inputs: tuple) -> tuple:
    """Return what tells an operator's inputs apart, but strides: compilers change them between forward and backward."""
    tensors = ((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in inputs)
    return name, *(tuple(x) if isinstance(x, list) else x for x in tensors)


def _is_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output
