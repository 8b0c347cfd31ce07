"""Kernels compiled in the background, several at a time, before the first launch that needs them.

A backward kernel takes Triton a second or more, and a network has a dozen. When an operator is first called, what its
passes launch is gathered by running them on fake tensors, and compiled by threads while the first kernels run: Triton
spends its time outside of Python. A launch waits for what is on its way, and compiles what was not foreseen.
"""

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton
from densezoo.ops import backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Calls of an operator that may bring up new kernels: in training on images of many sizes, foreseeing has an end.
CALLS = 128
THREADS = min(8, os.cpu_count() or 1)

_log = logging.getLogger("densezoo")
_here = threading.local()
_calls: Counter[Callable] = Counter()
_foreseen: set[tuple] = set()


@dataclass(frozen=True)
class _Pointer:
    """What Triton asks of a tensor to compile for it."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


class Kernel(JITFunction):
    """A Triton function that is only gathered where an operator is run on fake tensors."""

    def __init__(self, function: Callable, **options):
        super().__init__(function, **options)
        self.gathered: set[tuple] = set()
        self.coming: list[Future] = []

    def run(self, *args, grid, warmup, **constants):
        """Launch the kernel, or gather it."""
        if getattr(_here, "gathers", False):
            return self._gather(args, constants)
        coming, self.coming = self.coming, []
        # Errors are those of the compilation that follows.
        wait(coming)
        return super().run(*args, grid=grid, warmup=warmup, **constants)

    def _gather(self, args: tuple, constants: dict) -> None:
        args = _pointers(args)
        device = driver.active.get_current_device()
        kinds = (_kind(parameter, x) for parameter, x in zip(self.params, args, strict=False))
        key = device, *kinds, *constants.items()
        if key not in self.gathered:
            self.gathered.add(key)
            self.coming.append(_threads().submit(self._compile, device, args, constants))

    def _compile(self, device: int, args: tuple, constants: dict) -> None:
        with torch.cuda.device(device):
            super().run(*args, grid=(1,), warmup=True, **constants)


def kernel(function: Callable | None = None, **options) -> Callable:
    """Make a function a kernel, as `triton.jit` does, that is launched by an operator."""
    if function is None:
        return lambda function: kernel(function, **options)
    return triton.jit(function, **options) if backend.interprets else Kernel(function, **options)


def foresee(forward: Callable, backward: Callable, args: tuple, tensors: int) -> None:
    """Have compiled what an operator launches for these arguments, of which the first are `tensors`, once.

    That is what the forward does and, where a gradient will be asked for, what the backward does.
    """
    if not _is_new(forward, args):
        return
    plain = [x.detach() if isinstance(x, Tensor) else x for x in args]
    with _gathering(), FakeTensorMode() as mode:
        fake = tuple(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in plain)
        output = forward(*fake)
        if _trains(args):
            output = (output,) if isinstance(output, Tensor) else output
            backward(torch.empty_like(output[0]), *fake[:tensors], *output, *fake[tensors:])


def foresee_fake(function: Callable, args: tuple) -> None:
    """Have compiled what `function` launches for fake tensors, as a compiler has them, once."""
    if _is_new(function, args):
        with _gathering():
            function(*args)


def _is_new(function: Callable, args: tuple) -> bool:
    """Return whether a call with such tensors and options, on a GPU, is the first."""
    if _calls[function] >= CALLS or backend.interprets or THREADS < 2:
        return False
    leaves = tree_leaves(args)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if not tensors[0].is_cuda:
        return False
    _calls[function] += 1
    sizes = (n for t in tensors for n in (*t.shape, *t.stride()))
    if any(isinstance(n, torch.SymInt | torch.SymFloat) for n in (*leaves, *sizes)):
        return False
    kinds = ((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves)
    key = function, _trains(args), *kinds
    is_new = key not in _foreseen
    _foreseen.add(key)
    return is_new


def _trains(args: tuple) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


@contextmanager
def _gathering() -> Iterator[None]:
    _here.gathers = True
    try:
        yield
    except Exception:  # nothing is lost: launches compile what was not foreseen
        _log.debug("kernels not foreseen", exc_info=True)
    finally:
        _here.gathers = False


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "densezoo-compile")


def _pointers(x: object) -> object:
    """Return what is of use of a kernel's arguments, which may be tuples."""
    if isinstance(x, Tensor):
        return _Pointer(x.dtype, x.storage_offset() * x.element_size())
    return tuple(map(_pointers, x)) if isinstance(x, tuple) else x


def _kind(parameter, value):
    """Return what Triton makes another kernel for: whether numbers are 1 or divide by 16, and any constant."""
    if isinstance(value, tuple):
        return tuple(_kind(parameter, x) for x in value)
    if isinstance(value, _Pointer):
        return value.dtype, value.address % 16
    if type(value) is int and not parameter.is_constexpr:
        return parameter.do_not_specialize or (value == 1, value % 16 == 0)
    return value
