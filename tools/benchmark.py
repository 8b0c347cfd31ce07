"""Time the zoo's operators and models against what a user would pick instead, side by side in one run.

    python tools/benchmark.py ops                       every operator, at the shapes of its networks
    python tools/benchmark.py ops na2d --dtype float16 --json na2d.json
    python tools/benchmark.py ops --dtype all           the kernels alone, in each dtype
    python tools/benchmark.py modules                   attention modules, ours and timm's, eager and compiled
    python tools/benchmark.py models                    tiny models at 224, in images per second
    python tools/benchmark.py models nat_tiny swin_tiny_patch4_window7_224 --dense
    python tools/benchmark.py latency nat_tiny swin_tiny_patch4_window7_224 --sizes 224 512 1024     on a CPU too
    python tools/benchmark.py tune na2d --write         try launch settings, and save what is faster for such GPUs
    python tools/benchmark.py report *.json             tables and plots of what --json saved, in ops/benchmarks.md,
                                                        and images per second for the cards

Times of operators and modules are medians of many, in microseconds. The floor is the bytes of each input read once and
each output written once over the copy bandwidth measured in the same run. Where the data says what is read, in
quadtree_attention and ms_deform_attn, `gathered` is that floor with the gathered bytes counted once a gather: keys and
values once for each four children of a query, and the values once for each corner of a sampled point; in the backward
once to read them and once to add to their gradients. A kernel that disagrees with its float64 reference, or a module
with timm's, is not timed. tune changes one setting of a kernel at a time, at most --tries for each entry of its table,
and keeps what is faster over the cases of ops; --out FILE.json saves it elsewhere.
"""

import argparse
import json
import os
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from _benchmark_cases import TOLERANCE, time_cases
from _benchmark_latency import SIZES, latency_rows
from _benchmark_models import MODELS, model_rows
from _benchmark_modules import MODULES
from _benchmark_ops import OPERATORS
from _benchmark_plots import plot_latency
from _benchmark_report import read, report, write
from _benchmark_tune import tune
from _files import replacing
from densezoo.ops.launch import file_here

from densezoo import __version__

CASES = {"ops": OPERATORS, "modules": MODULES, "tune": OPERATORS}
BENCHMARKS = Path(__file__).resolve().parents[1] / "ops/benchmarks.md"


def time_models(names: list[str], dense: bool, mode: str) -> tuple[list[dict], str]:
    """Time models; return a row for each, and how it was measured."""
    rows = []
    for row in model_rows(names, dense, mode):
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    size = "800x1216, batch 2" if dense else "224x224, batch 128"
    return rows, f"images per second, {size}, torch.compile mode {mode}"


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add what there is to time, and the report, each with its options."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="what")
    dtypes = [str(d).removeprefix("torch.") for d in TOLERANCE]
    parts = {}
    for what, about, kind, names in (
        ("ops", "operators", "operator", OPERATORS),
        ("modules", "attention modules", "module", MODULES),
        ("models", "whole models", "model", ["timm's and the zoo's models"]),
        ("latency", "backbones by the size of the image", "model", ["timm's and the zoo's models"]),
        ("tune", "launch settings", "operator", OPERATORS),
        ("report", "tables and plots of saved rows", "file", ["files of --json"]),
    ):
        parts[what] = part = commands.add_parser(what, help=about)
        part.add_argument("names", nargs="*", metavar=kind, help=", ".join(names))
        if what in ("ops", "modules", "tune"):
            choices = [*dtypes, "all"] if what == "ops" else dtypes
            part.add_argument("--dtype", default="bfloat16", choices=choices, help="of the inputs (%(default)s)")
        if what not in ("tune", "report"):
            part.add_argument("--json", type=Path, help="also write the rows here")
    parts["models"].add_argument("--dense", action="store_true", help="as dense backbones at 800x1216, batch 2")
    parts["models"].add_argument(
        "--mode",
        default="default",
        choices=["default", "reduce-overhead", "max-autotune"],
        help="how they are compiled; reduce-overhead: as CUDA graphs (%(default)s)",
    )
    parts["latency"].add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="SIDE", help="of the images")
    parts["latency"].add_argument("--out", type=Path, default=Path("latency.png"), help="the plot (%(default)s)")
    output = parts["tune"].add_mutually_exclusive_group()
    output.add_argument("--out", type=Path, help="a .json for the settings (not saved)")
    output.add_argument("--write", action="store_true", help="save the settings where the kernels take them from")
    parts["tune"].add_argument("--tries", type=int, default=16, help="settings tried in place of one (%(default)s)")


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_commands(parser)
    args = parser.parse_args()
    if args.what == "report":
        try:
            # All are read before anything is written.
            if runs := [read(Path(name)) for name in args.names]:
                return write(runs, BENCHMARKS)
            parser.error("report: got no files, expected those that --json saved")
        except (OSError, ValueError) as e:
            parser.error(f"report: {e}; expected files that --json saved")
    cases = CASES.get(args.what)
    if unknown := set(args.names) - set(cases or timm.list_models()):
        hint = ", ".join(cases) if cases else "timm's and the zoo's models"
        parser.error(f"name: got {', '.join(sorted(unknown))}, expected of {hint}")
    if args.what == "tune" and args.tries < 1:
        parser.error(f"--tries: got {args.tries}, expected 1 or more")
    if args.what == "latency" and min(args.sizes) < 32:
        parser.error(f"--sizes: got {min(args.sizes)}, expected 32 or more")
    for option in ("out", "json"):
        path, kind = getattr(args, option, None), ".png" if (args.what, option) == ("latency", "out") else ".json"
        if path and (path.suffix != kind or path.is_dir() or not os.access(path.parent, os.W_OK)):
            parser.error(f"--{option}: got {path}, expected a {kind} in a folder that can be written")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and args.what != "latency":
        parser.error("needs a CUDA GPU: times on a CPU say nothing about the kernels")

    if args.what == "tune":
        try:
            return tune(args.names, getattr(torch, args.dtype), args.tries, file_here() if args.write else args.out)
        except ValueError as e:
            parser.error(f"tune: {e}")
    dtype = "bfloat16 autocast" if on_gpu else "float32"
    if cases:
        dtype = args.dtype.replace("all", "each dtype")
        makers = [cases[name] for name in args.names or cases]
        rows, measured = time_cases(makers, None if args.dtype == "all" else getattr(torch, args.dtype))
    elif args.what == "models":
        rows, measured = time_models(args.names or list(MODELS), args.dense, args.mode)
    else:
        rows = list(latency_rows(args.names or MODELS, args.sizes, "cuda" if on_gpu else "cpu"))
        measured = "dense backbones, eager, one image"
        print(f"plot saved to {plot_latency(rows, args.out)}", file=sys.stderr)
    words = [word for word in sys.argv[1:] if word not in ("--json", str(args.json))]
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    run = {
        "what": "dtypes" if dtype == "each dtype" else args.what,
        "command": " ".join(["python", "tools/benchmark.py", *words]),
        "machine": f"{device}, torch {torch.__version__}, triton {version('triton')}, timm "
        f"{timm.__version__}, densezoo {__version__}, {dtype}, {measured}",
        "date": str(date.today()),
        "rows": rows,
    }
    print(report([run]))
    if args.json:
        with replacing(args.json) as file:
            file.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
