"""The table, the words and the plot that tools/compare.py makes of what it measured."""

from pathlib import Path
from statistics import mean, stdev

import matplotlib
from _compare_scores import added_seeds, difference, group_of, scores_of, spread
from _compare_variations import PLAIN, VARIATIONS
from _files import replacing

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

METRIC = {name: "mIoU" if name == "upernet" else "AP" for name in PLAIN}
INTRO = """# Modules, necks and heads on the drawn digits

Written by `python tools/compare.py --report` from comparison.json. Every model has ResNet-18 and starts from scratch:
some epochs of {training} images of 128x128 in batches of {batch_size}, one schedule a kind and the same seeds for all,
evaluated once on {validation} images of other writers: COCO's box AP, mIoU for segmentation. Each part stands where its
paper puts it, and is compared with the plain model of its kind. Some hundred steps on small images tell whether a part
trains and what it costs; they do not tell what it gives on COCO with pretrained weights.

- *Difference*: to the plain model, the mean over the seeds that both have, ± its standard error, from the spread over
  seeds of all rows of a kind that have several. Bold: more than twice that error, which among so many rows happens to
  one or two by chance alone.
- All ran with seed{s} {first}; the plain models, and what looked better than they, also with others. To be chosen, a
  part needed luck as well, and the mean over all its seeds has that luck in it:
  {added}
- *Training step*: of {batch_size} images. *Images/s*: predictions with pre- and post-processing, in batches of 8 and
  of 1. Medians of up to {timed} calls on {device}, one model after the other; × is the ratio to the
  plain model.{remark}
- SEPC's last convolutions have no padding, as published, which takes two cells of each level: of the coarsest here
  half. The anchors that are left stand at the top left: 65% of the digits overlap one by half, of the plain one's 92%.
  With padding SEPC-lite learns as the plain model does: AP 0.054 and 0.055 after 150 steps, 0.029 without.
- Dynamic Head computes what the published one does and, but for the biases of its convolutions, mmdet's. It is slow
  from scratch: after 150 steps its AP in Faster R-CNN is 0.02, and 0.07 as plain convolutions over levels, without
  offsets, attention and dynamic ReLU, with outputs as large as the FPN's; the plain model's is 0.39.
- The simple feature pyramid comes from one map, so that its backbone has a stage less.
- Relation-DETR's position relation is not here: DINO needs far more than this budget to learn anything from scratch.

![score and time](comparison.png)
"""
HEADER = ("parameters, M", "{metric} by seed", "mean", "difference", "training step, ms", "images/s, 8", "images/s, 1")


def row(facts: dict, name: str) -> list[str]:
    """Return the cells of a variation."""
    entry = facts["variations"].get(name, {})
    scores, errors = scores_of(facts, name), entry.get("errors", {})
    by_seed = {seed: f"{score:.3f}" for seed, score in scores.items()}
    by_seed |= {seed: f"failed: {text}".replace("|", "\\|") for seed, text in errors.items()}
    values = list(scores.values())
    cells = [
        VARIATIONS[name].title,
        f"{entry['parameters'] / 1e6:.2f}" if "parameters" in entry else "–",
        ", ".join(by_seed[seed] for seed in sorted(by_seed, key=int)) or "–",
        "–" if not values else f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""),
    ]
    found = difference(facts, name)
    text = "–" if found is None else f"{found[0]:+.3f}" + ("" if found[1] is None else f" ± {found[1]:.3f}")
    cells.append(f"**{text}**" if found and found[1] and abs(found[0]) > 2 * found[1] else text)
    times, plain = entry.get("times"), facts["variations"].get(VARIATIONS[name].plain, {}).get("times")
    for key, images in (("step", None), ("predict_8", 8), ("predict_1", 1)):
        if not times:
            cells.append("–")
            continue
        cell = f"{times[key]:.1f}" if images is None else f"{1e3 * images / times[key]:.0f}"
        if plain and plain["device"] == times["device"]:
            ratio = times[key] / plain[key] if images is None else plain[key] / times[key]
            cell += f" (×{ratio:.2f})"
        cells.append(cell)
    return cells


def render(facts: dict) -> str:
    """Return the Markdown text."""
    devices = sorted({e["times"]["device"] for e in facts["variations"].values() if "times" in e})
    text = INTRO.format(
        **facts["budget"],
        timed=facts["timed"],
        remark="".join(f"\n  {line}" for line in facts.get("remarks", [])),
        device=" and ".join(devices) or "no device yet",
        s="s" * (len(facts["seeds"]) > 1),
        first=", ".join(facts["seeds"]),
        added=added_seeds(facts, facts["seeds"]),
    )
    for plain, title in PLAIN.items():
        names = [name for name in group_of(plain) if name in facts["variations"]]
        if not names:
            continue
        header = [title.split(",")[0], *(h.format(metric=METRIC[plain]) for h in HEADER)]
        deviation = spread(facts, plain)
        told = "not known: no row has several seeds" if deviation is None else f"{deviation:.3f}"
        epochs = facts["budget"]["epochs"].get(plain, "–")
        text += f"\n## {header[0]}\n\nEpochs: {epochs}. Standard deviation over seeds: {told}.\n\n"
        for cells in (header, ["---"] * len(header), *(row(facts, name) for name in names)):
            text += f"| {' | '.join(cells)} |\n"
    return text


def plot(facts: dict, out: Path) -> None:
    """Save a picture with the score of each seed, and the time of a prediction, of every variation."""
    names = [name for plain in PLAIN for name in group_of(plain) if scores_of(facts, name)]
    figure, (scores, times) = plt.subplots(1, 2, figsize=(12, 2 + len(names) / 4), sharey=True, layout="constrained")
    for i, name in enumerate(names):
        color, entry = f"C{list(PLAIN).index(VARIATIONS[name].plain)}", facts["variations"][name]
        points = list(scores_of(facts, name).values())
        scores.plot(points, [i] * len(points), "o", color=color, alpha=0.6)
        scores.plot(mean(points), i, "|", color="black", markersize=12)
        if "times" in entry:
            times.barh(i, entry["times"]["predict_8"] / 8, color=color)
    scores.set(xlabel="box AP, or mIoU of segmentors, by seed, and the mean", xlim=(0, 1))
    scores.set_yticks(range(len(names)), [f"{VARIATIONS[name].plain}: {VARIATIONS[name].title}" for name in names])
    scores.invert_yaxis()
    times.set(xlabel="prediction, ms an image, batch 8")
    for axis in (scores, times):
        axis.grid(alpha=0.3)
    with replacing(out) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)


def report(facts: dict, place: Path) -> None:
    """Write the text and the plot beside the facts at `place`."""
    with replacing(place.with_suffix(".md")) as file:
        file.write_text(render(facts))
    plot(facts, place.with_suffix(".png"))
