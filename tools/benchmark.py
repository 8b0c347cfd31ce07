"""Time the zoo's operators against what a user would pick instead, side by side in one run.

    python tools/benchmark.py ops                       every operator, at the shapes of its networks
    python tools/benchmark.py ops na2d --dtype float16 --json na2d.json

Times are medians of many, in microseconds. The floor is the bytes of each input read once and each output written once
over the copy bandwidth measured in the same run. A kernel that disagrees with its float64 reference is not timed.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _benchmark_ops import OPERATORS, TOLERANCE, Case

from densezoo import __version__


def median_us(function: Callable[[], object]) -> float:
    """Return the median time of `function` on the GPU, in microseconds."""
    from triton.testing import do_bench

    return do_bench(function, warmup=20, rep=100, return_mode="median") * 1e3


def copy_bandwidth() -> float:
    """Return the device's copy bandwidth in bytes per microsecond, counting bytes read and bytes written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_us(lambda: target.copy_(source))


def measure(case: Case, bandwidth: float, dtype: torch.dtype) -> list[dict]:
    """Return one row for the forward and one for the backward pass of a case."""
    torch._dynamo.reset()
    error = case.check()
    if not error <= TOLERANCE[dtype]:
        raise SystemExit(f"{case.name}: not timed: error {error:.1e} to the reference, {TOLERANCE[dtype]:.0e} allowed")
    inputs = [t.detach().requires_grad_() for t in case.inputs]
    rows = [{"case": case.name, "pass": p, "us": {}, "error": error} for p in ("forward", "backward")]
    for way, run in case.ways.items():
        try:
            out = run(*inputs)
            grad = torch.randn_like(out)
            wanted = [t for t, g in zip(inputs, torch.autograd.grad(out, inputs, grad, allow_unused=True), strict=True)
                      if g is not None]
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = run(*inputs)
            rows[0]["us"][way] = median_us(lambda run=run: run(*inputs))
            rows[1]["us"][way] = median_us(
                lambda out=out, wanted=wanted, grad=grad: torch.autograd.grad(out, wanted, grad, retain_graph=True)
            )
            rows[1].setdefault("peak_mib", {})[way] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as e:  # a way that cannot run this shape is a result too
            print(f"{case.name}: {way}: {type(e).__name__}: {str(e).splitlines()[0][:150]}", file=sys.stderr)
    nbytes = sum(t.nbytes for t in inputs)
    rows[0]["floor_us"] = (nbytes + grad.nbytes) / bandwidth
    # Inputs, output and its gradient read, the inputs' gradients written.
    rows[1]["floor_us"] = (2 * nbytes + 2 * grad.nbytes) / bandwidth
    return rows


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table: times, and ours over the floor and against each other way."""
    ways = list(dict.fromkeys(way for row in rows for way in row["us"]))
    header = ["case", "", "floor", *ways, "over the floor", *(f"{w} / {ways[0]}" for w in ways[1:])]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for row in rows:
        ours = row["us"].get(ways[0], float("nan"))
        times = [f"{row['us'][w]:.1f}" if w in row["us"] else "" for w in ways]
        ratios = [f"{row['us'][w] / ours:.1f}" if w in row["us"] else "" for w in ways[1:]]
        cells = [row["case"], row["pass"], f"{row['floor_us']:.1f}", *times, f"{ours / row['floor_us']:.2f}", *ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ops"])
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"of {', '.join(OPERATORS)}; all by default")
    parser.add_argument("--dtype", default="bfloat16", choices=[str(d).removeprefix("torch.") for d in TOLERANCE])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    if unknown := set(args.operators) - set(OPERATORS):
        parser.error(f"operator: got {', '.join(sorted(unknown))}, expected of {', '.join(OPERATORS)}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU: times on a CPU say nothing about the kernels")

    # The backward is timed apart from the forward, so its saved tensors must outlive it.
    torch._functorch.config.donated_buffer = False
    bandwidth = copy_bandwidth()
    dtype = getattr(torch, args.dtype)
    rows = []
    for name in args.operators or OPERATORS:
        for case in OPERATORS[name](dtype, "cuda"):
            rows += (new := measure(case, bandwidth, dtype))
            # Comparing takes minutes: what is known is shown at once.
            print(*table(new).splitlines()[2:], sep="\n", file=sys.stderr, flush=True)
    machine = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"densezoo {__version__}, {args.dtype}, copy bandwidth {bandwidth / 1e6:.2f} TB/s"
    )
    print(f"{machine}\n\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"\nmedian over the floor: {statistics.median(r['us']['densezoo'] / r['floor_us'] for r in rows):.2f}")


if __name__ == "__main__":
    main()
