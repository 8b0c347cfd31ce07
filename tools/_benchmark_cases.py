"""What a case of tools/benchmark.py is, of an operator or of a module, and how it is timed on a GPU."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from _benchmark_report import operator_table
from densezoo.ops import set_backend
from torch import Tensor
from triton.testing import do_bench

# Relative RMS error that a kernel may have against its reference, by dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Case:
    """One operator at one shape: inputs that need gradients, and the ways to compute it, ours first.

    Of operators that read where the data says, `gathered` is the bytes that a forward pass reads, every gather counted
    once, beyond those of each input: the same element counts again for each gather that reads it.
    """

    name: str
    inputs: tuple[Tensor, ...]
    ways: dict[str, Callable[..., Tensor]]
    check: Callable[[], float]
    gathered: int = 0


def worst_error(run: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Return the worst relative RMS error of the output and of every gradient against the float64 reference."""
    results = []
    grad = None
    for backend, dtype in (("triton", None), ("reference", torch.float64)):
        set_backend(backend)
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        out = run(*leaves)
        grad = torch.randn_like(out) if grad is None else grad
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    set_backend("auto")
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))


def reference_ways(reference: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """Return an operator's reference as the ways that every user has: eager, and compiled."""
    return {"eager": reference, "compiled": torch.compile(reference, dynamic=False)}


def median_us(function: Callable[[], object]) -> float:
    """Return the median time of `function` on the GPU, in microseconds.

    It is replayed as a CUDA graph, so that what Python takes to launch kernels is left out; the L2 cache is cold.
    """
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        function()
    return do_bench(graph.replay, warmup=20, rep=100, return_mode="median") * 1e3


def copy_bandwidth() -> float:
    """Return the device's copy bandwidth in bytes per microsecond, counting bytes read and bytes written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e3)


def measure(case: Case, bandwidth: float, dtype: torch.dtype) -> list[dict]:
    """Return one row for the forward and one for the backward pass of a case, none where it is wrong."""
    torch._dynamo.reset()
    error = case.check()
    if not error <= TOLERANCE[dtype]:
        wrong = f"error {error:.1e} to the reference in {dtype}, {TOLERANCE[dtype]:.0e} allowed"
        print(f"{case.name}: not timed: {wrong}", file=sys.stderr)
        return []
    inputs = [t.detach().requires_grad_() for t in case.inputs]
    rows = [{"case": case.name, "pass": p, "us": {}, "error": error} for p in ("forward", "backward")]
    for way, run in case.ways.items():
        leaves = [*inputs, *run.parameters()] if isinstance(run, torch.nn.Module) else inputs
        try:
            out = run(*inputs)
            grad = torch.randn_like(out)
            grads = torch.autograd.grad(out, leaves, grad, allow_unused=True, retain_graph=True)
            wanted = [t for t, g in zip(leaves, grads, strict=True) if g is not None]
            rows[0]["us"][way] = median_us(lambda run=run: run(*inputs))
            rows[1]["us"][way] = median_us(
                lambda out=out, wanted=wanted, grad=grad: torch.autograd.grad(out, wanted, grad, retain_graph=True)
            )
            del out, grads
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(run(*inputs), wanted, grad)
            rows[1].setdefault("peak_mib", {})[way] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as e:  # a way that cannot run this shape is a result too
            print(f"{case.name}: {way}: {type(e).__name__}: {str(e).splitlines()[0][:150]}", file=sys.stderr)
    nbytes = sum(t.nbytes for t in inputs)
    rows[0]["floor_us"] = (nbytes + grad.nbytes) / bandwidth
    # Inputs, output and its gradient read, the inputs' gradients written.
    rows[1]["floor_us"] = (2 * nbytes + 2 * grad.nbytes) / bandwidth
    if case.gathered:
        for factor, row in enumerate(rows, start=1):
            row["gathered_us"] = row["floor_us"] + factor * case.gathered / bandwidth
    return rows


def by_dtype(make: Callable, bandwidth: float) -> Iterator[list[dict]]:
    """Yield the rows of each case's kernels in 16 bits and in float32, beside bfloat16's floor."""
    for cases in zip(*(make(dtype, "cuda") for dtype in reversed(TOLERANCE)), strict=True):
        rows = []
        for dtype, case in zip(reversed(TOLERANCE), cases, strict=True):
            way, ours = next(iter(case.ways.items()))
            for i, row in enumerate(measure(replace(case, ways={way: ours}), bandwidth, dtype)):
                rows = rows if len(rows) > i else [*rows, row | {"us": {}}]
                if way in row["us"]:
                    rows[i]["us"][str(dtype).removeprefix("torch.")] = row["us"][way]
        yield rows


def time_cases(makers: Iterable[Callable], dtype: torch.dtype | None) -> tuple[list[dict], str]:
    """Time the cases that `makers` yield; return a row for each pass, and what was measured with.

    Without a `dtype` those are the kernels alone, in each.
    """
    # The backward is timed apart from the forward, so its saved tensors must outlive it.
    torch._functorch.config.donated_buffer = False
    rows = []
    # Graphs are captured on a stream of their own, and a backward runs on that of its forward.
    with torch.cuda.stream(torch.cuda.Stream()):
        bandwidth = copy_bandwidth()
        for make in makers:
            if dtype is None:
                parts = by_dtype(make, bandwidth)
            else:
                parts = (measure(case, bandwidth, dtype) for case in make(dtype, "cuda"))
            for new in filter(None, parts):
                rows += new
                # Comparing takes minutes: what is known is shown at once.
                print(*operator_table(new).splitlines()[2:], sep="\n", file=sys.stderr, flush=True)
    return rows, f"copy bandwidth {bandwidth / 1e6:.2f} TB/s"
