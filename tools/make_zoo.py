"""Write zoo/index.html: every model in a sortable, filterable table, plots, and its card; see tools/README.md."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
from _files import replacing
from make_cards import ROOT, read_models

# Key -> the name and unit that the page shows.
COSTS = {"params": "parameters, M", "flops": "FLOPs, G", "throughput": "images/s"}
# Key of the facts -> data set and name that the page shows, of the best of a model's results.
RESULTS = {
    "top1": ("ImageNet-1k", "top-1, %"),
    "box_ap": ("COCO", "box AP"),
    "mask_ap": ("COCO", "mask AP"),
    "pq": ("COCO", "PQ"),
    "miou": ("ADE20K", "mIoU"),
}


def row_of(model: dict) -> dict:
    """Return the numbers of a model, those that are known."""
    row = {"params": float(model["millions"]), "flops": model["flops"]}
    row["throughput"] = model["throughput"] and model["throughput"]["inference"]
    for key, (dataset, _) in RESULTS.items():
        found = (result[key] for result in model["results"] if key in result and result["dataset"] == dataset)
        row[key] = max(found, default=None)
    return {key: value for key, value in row.items() if value is not None}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out-dir", type=Path, default=ROOT / "zoo", help="where to write index.html; default: zoo")
    args = parser.parse_args(argv)
    loader = jinja2.FileSystemLoader(ROOT / "tools")
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    try:
        models = read_models()
    except (ValueError, OSError) as error:
        print(f"make_zoo: {error}", file=sys.stderr)
        return 2
    for model in models:
        model["row"] = row_of(model)
    keys = [key for key in (*COSTS, *RESULTS) if any(key in model["row"] for model in models)]
    page = environment.get_template("zoo.html.j2").render(
        models=models,
        machines=sorted({", ".join((t["machine"], t["date"])) for m in models if (t := m["throughput"])}),
        families=sorted({model["config"]["type"].removeprefix("densezoo.") for model in models}),
        columns={key: COSTS[key] if key in COSTS else " ".join(RESULTS[key]) for key in keys},
        costs=[key for key in keys if key in COSTS],
        results=[key for key in keys if key in RESULTS],
    )
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / "index.html"
    with replacing(path) as file:
        file.write_text(page)
    print(f"{len(models)} models in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
