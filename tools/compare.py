"""Train the zoo's attention modules, necks and heads on the drawn digits, each in ResNet-18, and compare.

    python tools/compare.py                           all, with seed 0; what looks better, also with seeds 1 and 2
    python tools/compare.py se pafpn --more-seeds     two of them and what they are compared with, with seed 0 alone
    python tools/compare.py --report                  write the table and the plot anew

Results are kept in a JSON file as they come, and what it has is not trained again: a run that was stopped goes on, and
other seeds are added. A failed run is reported in the table and tried again the next time. The table and the plot lie
beside that file. Times are measured last, one model after the other.
"""

import argparse
import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path

# Asking for GPUs then leaves CUDA alone, which copies of this process could not use otherwise.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import cv2
import torch
from _common import Options, Start
from _compare_report import report
from _compare_variations import VARIATIONS
from _comparison import Comparison
from _errors import ConfigError

OUT = Path(__file__).resolve().parents[1] / "configs/demo/comparison.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(VARIATIONS)} (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="for all of them (0)")
    parser.add_argument("--more-seeds", type=int, nargs="*", default=[1, 2],
                        help="for what looks better than the plain model, and for that (1 2)")  # fmt: skip
    parser.add_argument("--jobs", type=int, help="trainings at a time (8 a GPU, as cores allow; 1 without a GPU)")
    parser.add_argument("--data-root", type=Path, default=Path("data/digits"), help="folder of the set (%(default)s)")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/compare"), help="for the runs (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON of the results (configs/demo/comparison.json)")
    parser.add_argument("--report", action="store_true", help="train nothing, only write the table and the plot")
    parser.add_argument("--cfg-options", nargs="+", action=Options, default={}, metavar="KEY=VALUE",
                        help="changes to all configs")  # fmt: skip
    args = parser.parse_args(argv)
    with Start():
        for name in args.names:
            if name not in VARIATIONS:
                near = difflib.get_close_matches(name, VARIATIONS, 1) or VARIATIONS
                raise ConfigError(f"{name}: there is no such variation; did you mean {' or '.join(near)}?")
        if args.report and not args.out.is_file():
            raise ConfigError(f"--out {args.out}: there are no results to report; run without --report first")
        facts = read(args.out)
        if not args.report:
            # Threads of this process would be missing in its copies.
            torch.set_num_threads(1)
            cv2.setNumThreads(0)
            Comparison(args, facts).run()
            facts = read(args.out)
    report(facts, args.out)
    print(f"table: {args.out.with_suffix('.md')}, plot: {args.out.with_suffix('.png')}")


def read(place: Path) -> dict:
    """Return the facts in a file, none where there is no file."""
    try:
        facts = json.loads(place.read_text()) if place.exists() else {"variations": {}}
        return facts | {"variations": facts["variations"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "holds something else than results of this tool; move it away, or choose another file"
        raise ConfigError(f"--out {place}: {what}") from error


if __name__ == "__main__":
    main()
