"""What tools/compare.py makes of the scores in its facts: differences to the plain variation, and their errors."""

from math import sqrt
from statistics import mean, variance

from _compare_variations import VARIATIONS


def scores_of(facts: dict, name: str) -> dict[str, float]:
    """Return the scores of a variation by seed."""
    return facts["variations"].get(name, {}).get("scores", {})


def group_of(plain: str) -> list[str]:
    """Return the names that are compared with a plain variation, itself first."""
    return [name for name, variation in VARIATIONS.items() if variation.plain == plain]


def looks_better(facts: dict, name: str, seeds: list[str]) -> bool:
    """Return whether a variation's mean over these seeds is above the plain one's."""
    own, plain = ([scores_of(facts, n).get(s) for s in seeds] for n in (name, VARIATIONS[name].plain))
    return None not in own + plain and mean(own) > mean(plain)


def spread(facts: dict, plain: str) -> float | None:
    """Return the standard deviation over seeds, pooled over the rows of a kind that have several."""
    rows = [list(scores_of(facts, name).values()) for name in group_of(plain)]
    rows = [row for row in rows if len(row) > 1]
    return sqrt(sum((len(r) - 1) * variance(r) for r in rows) / sum(len(r) - 1 for r in rows)) if rows else None


def difference(facts: dict, name: str) -> tuple[float, float | None] | None:
    """Return the difference to the plain variation on the seeds that both have, and its standard error."""
    plain = VARIATIONS[name].plain
    own, other, deviation = scores_of(facts, name), scores_of(facts, plain), spread(facts, plain)
    seeds = own.keys() & other.keys()
    if not seeds or name == plain:
        return None
    error = None if deviation is None else deviation * sqrt(2 / len(seeds))
    return mean(own[seed] - other[seed] for seed in seeds), error


def added_seeds(facts: dict, seeds: list[str]) -> str:
    """Say how many of those that looked better with `seeds` do so without them."""
    chosen, still = 0, 0
    for name, variation in VARIATIONS.items():
        own, plain = scores_of(facts, name), scores_of(facts, variation.plain)
        others = (own.keys() & plain.keys()) - set(seeds)
        if name != variation.plain and others and looks_better(facts, name, seeds):
            chosen += 1
            still += mean(own[s] - plain[s] for s in others) > 0
    return f"of these {chosen}, {still} are better by the added seeds alone too."
