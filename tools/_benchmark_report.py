"""Tables of what tools/benchmark.py measured."""

import json
import statistics
from pathlib import Path

from _benchmark_models import RIVALS, SWIN
from _benchmark_plots import plot_latency, plot_models, plot_operators
from _facts import CARDS
from _files import replacing
from densezoo.backbones import VARIANTS

# Of operators and of modules, the way that the others are compared with.
OURS = ("densezoo", "densezoo compiled")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def operator_table(rows: list[dict]) -> str:
    """Return the passes of operators: times, ours over the floor, and the other ways over ours.

    Beside the floor stands what it would be if every gather went to memory, where a case has any.
    """
    ways = list(dict.fromkeys(way for row in rows for way in row["us"]))
    others = ways[1:]
    floors = {"floor": "floor_us"}
    if any("gathered_us" in row for row in rows):
        floors["gathered"] = "gathered_us"
    over = [f"ours / {floor}" for floor in floors]
    header = ["case", "pass", *floors, *ways, *over, *(f"{w} / ours" for w in others)]
    table = []
    for row in rows:
        us, ours = row["us"], row["us"].get(ways[0], float("nan"))
        times = [f"{us[w]:.1f}" if w in us else "" for w in ways]
        ratios = [f"{us[w] / ours:.1f}" if w in us else "" for w in others]
        limits = [row.get(key, row["floor_us"]) for key in floors.values()]
        over = [f"{ours / limit:.2f}" for limit in limits]
        table.append([row["case"], row["pass"], *(f"{limit:.1f}" for limit in limits), *times, *over, *ratios])
    return markdown(header, table)


def model_table(rows: list[dict], dense: bool = False) -> str:
    """Return the models: images per second, peak memory, and the ratio to what a user would take instead.

    Of dense backbones that is Swin, the detectors' usual one.
    """
    columns = [f"{way} {what}" for way in ("eager", "compiled") for what in ("inference", "training", "peak MiB")]
    ratios = ("compiled inference", "compiled training")
    by_name = {row["model"]: row for row in rows}
    table = []
    for row in rows:
        rival = by_name.get(SWIN if dense and row["model"] != SWIN else RIVALS.get(row["model"]), {})
        cells = [row["model"], *(f"{row[c]:.0f}" if c in row else "" for c in columns), rival.get("model", "")]
        table.append(cells + [f"{row[c] / rival[c]:.2f}x" if c in row and c in rival else "" for c in ratios])
    return markdown(["model", *columns, "beside", *ratios], table)


def latency_table(rows: list[dict]) -> str:
    """Return the models: ms an image by size, empty where a model does not run."""
    sizes = sorted({size for row in rows for size in (*row["ms"], *row["errors"])}, key=int)
    table = [[row["model"], *(f"{row['ms'][size]:.2f}" if size in row["ms"] else "" for size in sizes)] for row in rows]
    return markdown(["model", *(f"{size}x{size}" for size in sizes)], table)


def is_dense(run: dict) -> bool:
    """Return whether a run of models was one of dense backbones."""
    return "--dense" in run["command"].split()


def report(runs: list[dict]) -> str:
    """Return the tables of runs, with where and how they were measured."""
    parts = []
    for run in runs:
        parts.append(f"{run['machine']}, {run['date']}\n\n`{run['command']}`")
        if run["what"] in ("models", "latency"):
            is_models = run["what"] == "models"
            parts.append(model_table(run["rows"], is_dense(run)) if is_models else latency_table(run["rows"]))
            continue
        by_operator = {}
        for row in run["rows"]:
            by_operator.setdefault(row["case"].split()[0], []).append(row)
        for rows in by_operator.values():
            parts.append(operator_table(rows))
        over = [row["us"][way] / row["floor_us"] for row in run["rows"] for way in OURS if way in row["us"]]
        if over:
            parts.append(f"Median over the floor: {statistics.median(over):.2f}")
    return "\n\n".join(parts)


def read(path: Path) -> dict:
    """Return a run that --json saved.

    Raises:
        OSError: There is no such file.
        ValueError: It holds something else; the message names it.
    """
    try:
        run = json.loads(path.read_text())
        report([run])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    return run


def throughput_of(runs: list[dict]) -> dict[str, dict]:
    """Return what runs measured of the zoo's classifiers, by name; of two measurements the later one."""
    found = {}
    for run in runs:
        if run["what"] != "models" or is_dense(run):
            continue
        for row in run["rows"]:
            way = "compiled" if "compiled inference" in row else "eager"
            speeds = {what: round(row[f"{way} {what}"]) for what in ("inference", "training") if f"{way} {what}" in row}
            if row["model"] in VARIANTS and "inference" in speeds:
                found[row["model"]] = speeds | dict(way=way, machine=run["machine"], date=run["date"])
    return found


def write(runs: list[dict], out: Path, throughput: Path = CARDS / "throughput.json") -> None:
    """Write the report of runs to `out`, with plots beside it, and what the cards say of models to `throughput`."""
    parts = [
        "# Measured speed\n\nTimes are medians in microseconds; the floor is what reading each input and writing each "
        "output once would take. Of operators that gather where the data says, `gathered` is the floor with every "
        "gather counted once, as if it went to memory: less time than that is the caches'. What pools a map and then "
        "scales it reads it twice: SE and ECA are at 1.5 times the floor forward at best, CBAM, which pools twice, at "
        "2. What limits the kernels: [profiles.md](profiles.md). Generated by `python tools/benchmark.py report`."
    ]
    for what in ("ops", "modules"):
        if rows := [row for run in runs if run["what"] == what for row in run["rows"]]:
            parts.append(f"![{what}]({plot_operators(rows, out.with_name(f'benchmarks_{what}.png')).name})")
    for what, dense in (("models", False), ("models_dense", True)):
        models = [run for run in runs if run["what"] == "models" and is_dense(run) == dense]
        rows = {}
        for row in (row for run in models for row in run["rows"]):
            # Of two measurements the later one.
            rows[row["model"]] = rows.get(row["model"], {}) | row
        if rows:
            parts.append(f"![{what}]({plot_models([*rows.values()], out.with_name(f'benchmarks_{what}.png')).name})")
    if latency := [row for run in runs if run["what"] == "latency" for row in run["rows"]]:
        parts.append(f"![latency]({plot_latency(latency, out.with_name('benchmarks_latency.png')).name})")
    with replacing(out) as file:
        file.write_text("\n\n".join([*parts, report(runs)]) + "\n")
    print(f"saved to {out}")
    if found := throughput_of(runs):
        known = json.loads(throughput.read_text()) if throughput.is_file() else {}
        with replacing(throughput) as file:
            file.write_text(json.dumps(known | found, indent=1, sort_keys=True) + "\n")
        print(f"throughput of {len(found)} models saved to {throughput}; now run tools/make_cards.py")
