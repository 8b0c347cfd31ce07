"""Time the zoo's operators and models against what a user would pick instead, side by side in one run.

    python tools/benchmark.py ops                       every operator, at the shapes of its networks
    python tools/benchmark.py ops na2d --dtype float16 --json na2d.json
    python tools/benchmark.py modules                   attention modules, ours and timm's, eager and compiled
    python tools/benchmark.py models                    tiny models at 224, in images per second
    python tools/benchmark.py models nat_tiny swin_tiny_patch4_window7_224 --dense
    python tools/benchmark.py latency nat_tiny swin_tiny_patch4_window7_224 --sizes 224 512 1024     on a CPU too
    python tools/benchmark.py report *.json             tables and plots of what --json saved, in ops/benchmarks.md,
                                                        and images per second for the cards

Times of operators and modules are medians of many, in microseconds. The floor is the bytes of each input read once and
each output written once over the copy bandwidth measured in the same run. A kernel that disagrees with its float64
reference, or a module with timm's, is not timed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from _benchmark_latency import SIZES, latency_rows
from _benchmark_models import MODELS, model_rows
from _benchmark_modules import MODULES
from _benchmark_ops import OPERATORS, TOLERANCE, Case
from _benchmark_report import operator_table, plot_latency, report, write
from triton.testing import do_bench

from densezoo import __version__

CASES = {"ops": OPERATORS, "modules": MODULES}
BENCHMARKS = Path(__file__).resolve().parents[1] / "ops/benchmarks.md"


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
    """Return one row for the forward and one for the backward pass of a case."""
    torch._dynamo.reset()
    error = case.check()
    if not error <= TOLERANCE[dtype]:
        raise SystemExit(f"{case.name}: not timed: error {error:.1e} to the reference, {TOLERANCE[dtype]:.0e} allowed")
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
    return rows


def time_cases(makers: Iterable[Callable], dtype: torch.dtype) -> tuple[list[dict], str]:
    """Time the cases that `makers` yield; return a row for each pass, and what was measured with."""
    # The backward is timed apart from the forward, so its saved tensors must outlive it.
    torch._functorch.config.donated_buffer = False
    rows = []
    # Graphs are captured on a stream of their own, and a backward runs on that of its forward.
    with torch.cuda.stream(torch.cuda.Stream()):
        bandwidth = copy_bandwidth()
        for make in makers:
            for case in make(dtype, "cuda"):
                rows += (new := measure(case, bandwidth, dtype))
                # Comparing takes minutes: what is known is shown at once.
                print(*operator_table(new).splitlines()[2:], sep="\n", file=sys.stderr, flush=True)
    return rows, f"copy bandwidth {bandwidth / 1e6:.2f} TB/s"


def time_models(names: list[str], dense: bool, mode: str) -> tuple[list[dict], str]:
    """Time models; return a row for each, and how it was measured."""
    rows = []
    for row in model_rows(names, dense, mode):
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    size = "800x1216, batch 2" if dense else "224x224, batch 128"
    return rows, f"images per second, {size}, torch.compile mode {mode}"


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ops", "modules", "models", "latency", "report"])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        help=f"operators, of {', '.join(OPERATORS)}, modules, of {', '.join(MODULES)}, timm models, or files of --json",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=[str(d).removeprefix("torch.") for d in TOLERANCE],
        help="of operators and modules (%(default)s); models run in bfloat16 autocast",
    )
    parser.add_argument("--dense", action="store_true", help="models as dense backbones at 800x1216, batch 2")
    parser.add_argument(
        "--mode",
        default="default",
        choices=["default", "reduce-overhead", "max-autotune"],
        help="how models are compiled; reduce-overhead: as CUDA graphs (%(default)s)",
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="SIDE", help="of latency's images")
    parser.add_argument("--out", type=Path, default=Path("latency.png"), help="latency's plot (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    if args.what == "report":
        try:
            return write([json.loads(Path(name).read_text()) for name in args.names], BENCHMARKS)
        except (OSError, ValueError, KeyError) as e:
            parser.error(f"report: {e}; expected files that --json saved")
    cases = CASES.get(args.what)
    if unknown := set(args.names) - set(cases or timm.list_models()):
        hint = ", ".join(cases) if cases else "timm's and the zoo's models"
        parser.error(f"name: got {', '.join(sorted(unknown))}, expected of {hint}")
    if min(args.sizes) < 32:
        parser.error(f"--sizes: got {min(args.sizes)}, expected 32 or more")
    if args.out.suffix != ".png" or not args.out.parent.is_dir():
        parser.error(f"--out: got {args.out}, expected a .png in a folder that exists")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and args.what != "latency":
        parser.error("needs a CUDA GPU: times on a CPU say nothing about the kernels")

    dtype = args.dtype if cases else "bfloat16 autocast" if on_gpu else "float32"
    if cases:
        makers = [cases[name] for name in args.names or cases]
        rows, measured = time_cases(makers, getattr(torch, args.dtype))
    elif args.what == "models":
        rows, measured = time_models(args.names or list(MODELS), args.dense, args.mode)
    else:
        rows = list(latency_rows(args.names or MODELS, args.sizes, "cuda" if on_gpu else "cpu"))
        measured = "dense backbones, eager, one image"
        print(f"plot saved to {plot_latency(rows, args.out)}", file=sys.stderr)
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    run = {
        "what": args.what,
        "command": " ".join(["python", "tools/benchmark.py", *sys.argv[1:]]),
        "machine": f"{device}, torch {torch.__version__}, triton {version('triton')}, timm "
        f"{timm.__version__}, densezoo {__version__}, {dtype}, {measured}",
        "date": str(date.today()),
        "rows": rows,
    }
    print(report([run]))
    if args.json:
        args.json.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
