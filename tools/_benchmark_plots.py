"""Plots of what tools/benchmark.py measured."""

from pathlib import Path

from _files import replacing
from matplotlib.figure import Figure


def plot_operators(rows: list[dict], out: Path) -> Path:
    """Draw each way's time over the floor, of every case and pass."""
    ways = list(dict.fromkeys(way for row in rows for way in row["us"]))
    figure = Figure(figsize=(14, 0.22 * len(rows) / 2 + 2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name in zip(axes, ("forward", "backward"), strict=True):
        some = [row for row in rows if row["pass"] == name]
        for way in ways:
            points = [(row["us"][way] / row["floor_us"], i) for i, row in enumerate(some) if way in row["us"]]
            axis.plot(*zip(*points, strict=True), "o", label=way, markersize=4 if way != ways[0] else 6)
        axis.set(xscale="log", xlabel="time over the memory floor", title=name)
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(range(len(some)), [row["case"] for row in some], fontsize=7)
    axes[0].invert_yaxis()
    axes[1].legend()
    return save(figure, out)


def plot_models(rows: list[dict], out: Path) -> Path:
    """Draw the images per second of each model, compiled."""
    names = [row["model"] for row in rows]
    figure = Figure(figsize=(12, 0.25 * len(rows) + 2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, what in zip(axes, ("inference", "training"), strict=True):
        axis.barh(range(len(rows)), [row.get(f"compiled {what}", 0) for row in rows], color="tab:blue")
        axis.set(xlabel="images per second, compiled", title=what)
        axis.set_yticks(range(len(rows)), names, fontsize=8)
    axes[0].invert_yaxis()
    return save(figure, out)


def plot_latency(rows: list[dict], out: Path) -> Path:
    """Draw each model's time against the size of the image."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        axis.plot([int(size) for size in row["ms"]], list(row["ms"].values()), "o-", label=row["model"])
    axis.set(xscale="log", yscale="log", xlabel="height and width of the image", ylabel="ms an image")
    ticks = sorted({int(size) for row in rows for size in row["ms"]})
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return save(figure, out)


def save(figure: Figure, out: Path) -> Path:
    """Save a figure whole or not at all."""
    with replacing(out) as file:
        figure.savefig(file, dpi=110)
    return out
