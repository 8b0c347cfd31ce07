"""Write the model cards and README.md's table of models from model_cards/facts/*.yaml and from what the code tells.

FLOPs are those in model_cards/flops.json, G multiply-adds at the size of training, as tools/get_flops.py counts them.
Errors of the comparison with the published implementations are those in model_cards/parity.json, which
tests/backbones/test_parity.py measures. What exports is in model_cards/exports.json, by tests/test_exporting.py. Images
per second are in model_cards/throughput.json, by `tools/benchmark.py report`.

    python tools/make_cards.py            write what is out of date
    python tools/make_cards.py --check    write nothing; name what is out of date and exit with 1
    python tools/make_cards.py --count    first count every model's FLOPs anew, into model_cards/flops.json

A family joins with a facts file named as its module in backbones/.
"""

import argparse
import json
import re
import sys
from collections.abc import Collection
from os.path import commonprefix
from pathlib import Path

import jinja2
import timm
import torch
from _facts import CARDS, STATUSES, flops_differ, load_facts, published_flops
from _files import replacing
from densezoo.backbones import VARIANTS
from get_flops import count_multiply_adds
from tqdm import tqdm

from densezoo.openmmlab import config_for

ROOT = Path(__file__).resolve().parents[1]


def parity_of(name: str, models: Collection[str], errors: dict[str, float]) -> tuple[str | None, float | None]:
    """Return the model of the class of `name` that was compared with the published implementation, and its error.

    `name` itself where it was compared, else that of the most alike name; None where there is none.
    """
    cls = timm.model_entrypoint(name).__annotations__["return"]
    compared = [m for m in models if m in errors and timm.model_entrypoint(m).__annotations__["return"] is cls]
    nearest = max(compared, key=lambda m: (m == name, len(commonprefix([m, name]))), default=None)
    return nearest, errors.get(nearest)


def count_flops(name: str) -> float:
    """Return the G multiply-adds of a model at its size of training, in three digits."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    return float(f"{count_multiply_adds(model, model.default_cfg['input_size']) / 1e9:.3g}")


def describe(name: str, facts: dict, flops: dict[str, float], errors: dict[str, float], throughput: dict) -> dict:
    """Return what the templates say of a model."""
    model = facts["models"][name]
    with torch.device("meta"):
        built = timm.create_model(name)
    statuses = {result["status"] for result in model["results"]}
    return facts | model | dict(
        name=name,
        paper=facts["papers"][model["paper"]],
        note=model.get("note"),
        config=config_for(name),
        millions=f"{sum(p.numel() for p in built.parameters()) / 1e6:.2f}",
        classes=built.num_classes,
        size="x".join(map(str, built.default_cfg["input_size"][1:])),
        flops=flops[name],
        published_flops=(published := published_flops(model)),
        flops_differ=published is not None and flops_differ(flops[name], published),
        features=[(info["num_chs"], info["reduction"]) for info in built.feature_info],
        parity=parity_of(name, facts["models"], errors),
        throughput=throughput.get(name),
        state=", ".join(status for status in STATUSES if status in statuses) or "none published",
    )  # fmt: skip


def read_models() -> list[dict]:
    """Return what the templates say of every model of the facts."""
    flops, errors = (json.loads((CARDS / name).read_text()) for name in ("flops.json", "parity.json"))
    throughput = json.loads(path.read_text()) if (path := CARDS / "throughput.json").is_file() else {}
    models = []
    for path in sorted((CARDS / "facts").glob("*.yaml")):
        facts = load_facts(path)
        models += [describe(name, facts, flops, errors, throughput) for name in facts["models"]]
    return models


def generate() -> tuple[dict[Path, str], str]:
    """Return the text of every card, by path, and README.md's table."""
    loader = jinja2.FileSystemLoader(ROOT / "tools")
    templates = jinja2.Environment(loader=loader, trim_blocks=True, keep_trailing_newline=True)
    models = read_models()
    card = templates.get_template("card.md.j2")
    cards = {CARDS / f"{model['name']}.md": card.render(model) for model in models}
    return cards, templates.get_template("models.md.j2").render(models=models)


def exports_table(stated: dict) -> str:
    """Return README.md's table of what exports, from model_cards/exports.json."""
    rows = ["| model | torch.export | ONNX |", "| --- | --- | --- |"]
    for kind in ("backbones", "models"):
        for name, errors in stated[kind].items():
            rows.append(f"| {name} | {errors['program']:.0e} | {errors['onnx']:.0e} |")
    return "\n".join(rows) + "\n"


def put_table(text: str, name: str, table: str) -> str:
    """Return `text` with `table` between the markers of this name; raise ValueError if they are not there once each."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    found = re.fullmatch(f"(.*{start}\n).*({end}.*)", text, re.DOTALL)
    if not found or any(text.count(marker) != 1 for marker in (start, end)):
        raise ValueError(f"README.md: expected the lines {start} and {end} once each, in this order")
    return found[1] + table + found[2]


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; name what is out of date")
    parser.add_argument("--count", action="store_true", help="first count every model's FLOPs anew; takes minutes")
    args = parser.parse_args()
    if args.count:
        counted = {name: count_flops(name) for name in tqdm(VARIANTS)}
        with replacing(CARDS / "flops.json") as file:
            file.write_text(json.dumps(counted, indent=1) + "\n")
    readme = ROOT / "README.md"
    try:
        texts, table = generate()
        texts[readme] = put_table(readme.read_text(), "models", table)
        if (exports := CARDS / "exports.json").is_file():
            texts[readme] = put_table(texts[readme], "exports", exports_table(json.loads(exports.read_text())))
    except (ValueError, OSError) as error:
        print(f"make_cards: {error}", file=sys.stderr)
        return 2
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    orphans = [path for path in CARDS.glob("*.md") if path not in texts]
    for path in stale + orphans:
        print(f"{path.relative_to(ROOT)}: {'out of date' if path in stale else 'no model of this name in the facts'}")
    if args.check:
        return int(bool(stale or orphans))
    for path in stale:
        with replacing(path) as file:
            file.write_text(texts[path])
    for path in orphans:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
