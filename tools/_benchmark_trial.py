"""The cases of tools/benchmark.py under launch settings on trial."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch
from _benchmark_cases import TOLERANCE, median_us
from _benchmark_ops import OPERATORS
from densezoo.ops.launch import Table
from torch import Tensor
from triton.runtime.jit import KernelInterface

from densezoo import ops


def kernels_of(operator: str) -> ModuleType:
    """Return the module of an operator's kernels."""
    return import_module(f"{getattr(ops, operator).__module__}.kernels")


@contextmanager
def recorded() -> Iterator[list]:
    """Give a list to which each launch of a kernel adds its name, grid, sizes and constants."""
    launches, launch = [], KernelInterface.__getitem__

    def record(kernel, grid):
        def run(*args, **constants):
            sizes = [arg for arg in args if not isinstance(arg, Tensor)]
            launches.append((kernel.fn.__name__, grid, sizes, constants))
            return launch(kernel, grid)(*args, **constants)

        return run

    KernelInterface.__getitem__ = record
    try:
        yield launches
    finally:
        KernelInterface.__getitem__ = launch


class Trial(dict[Hashable, tuple]):
    """An operator's settings to try out, while `in_force` in place of the table of its kernels.

    Attributes:
        cases: The operator's.
        used: Keys that were looked up.
    """

    def __init__(self, operator: str, dtype: torch.dtype, device: str):
        self.kernels = kernels_of(operator)
        self.table: Table = self.kernels.LAUNCH
        self.table.overlay()
        super().__init__(self.table)
        self.cases, self.allowed = list(OPERATORS[operator](dtype, device)), TOLERANCE[dtype]
        self.used: set[Hashable] = set()
        self._expected: dict[int, list[Tensor]] = {}
        # By case, pass and launches: most settings change one pass of some cases.
        self._times: dict[tuple[int, str, str], float] = {}

    def __getitem__(self, key: Hashable) -> tuple:
        self.used.add(key)
        return super().__getitem__(key)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Let the kernels take these settings, and in the end their own again."""
        backend = ops.get_backend()
        self.kernels.LAUNCH = self
        try:
            yield
        finally:
            self.kernels.LAUNCH = self.table
            self._forget_plans()
            ops.set_backend(backend)

    def _forget_plans(self) -> None:
        """Empty the caches of the kernels' module: what is in them was made with other settings."""
        for value in vars(self.kernels).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    def check(self, case: int) -> None:
        """Raise ValueError where a case disagrees with its float64 reference."""
        error = self.cases[case].check()
        # Whatever kernels lack is an error here.
        ops.set_backend("triton")
        if not error <= self.allowed:
            raise ValueError(f"error {error:.1e} to the reference, {self.allowed:.0e} allowed")

    def time(self, case: int) -> float:
        """Return the time of a case's forward and backward in microseconds.

        Raises:
            ValueError: Its results are wrong.
            Exception: A kernel does not compile or fit.
        """
        self._forget_plans()
        ops.set_backend("triton")
        function = next(iter(self.cases[case].ways.values()))
        inputs = [t.detach().requires_grad_() for t in self.cases[case].inputs]
        with recorded() as forward:
            out = function(*inputs)
        grad = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
        with recorded() as backward:
            results = [out.detach(), *torch.autograd.grad(out, inputs, grad, retain_graph=True)]
        if case not in self._expected:
            self.check(case)
            self._expected[case] = results
        # The reference has no room for all that is timed.
        for a, b in zip(results, self._expected[case], strict=True):
            if not (a.float() - b.float()).norm() <= self.allowed * b.float().norm():
                raise ValueError("results differ from those of other settings")
        passes = {
            ("forward", str(forward)): lambda: function(*inputs),
            ("backward", str(backward)): lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True),
        }
        for launches, run in passes.items():
            if (case, *launches) not in self._times:
                self._times[case, *launches] = median_us(run)
        return sum(self._times[case, *launches] for launches in passes)
