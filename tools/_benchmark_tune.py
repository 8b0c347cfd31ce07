"""Launch settings for tools/benchmark.py tune: what is faster of each setting's neighbours, one field at a time."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from _benchmark_ops import OPERATORS
from _benchmark_report import markdown
from _benchmark_trial import Trial, kernels_of
from _files import replacing
from densezoo.ops.launch import Table, entry_name, read
from tqdm import tqdm

# The most registers of a thread.
REGISTERS = (None, 168, 128, 96)
# Two in a hundred faster is better. As much slower on the longest cases is worse, whatever the others take.
GAIN = 1.02


def neighbours(setting: tuple, came_from: tuple) -> Iterator[tuple]:
    """Yield the settings that differ from a NamedTuple in one field by one step.

    The first field is the one in which it differs from another, `came_from`: what got faster may get faster still.
    """
    fields = [*reversed(setting._fields)]
    first = next((i for i, f in enumerate(fields) if getattr(setting, f) != getattr(came_from, f)), 0)
    for field in fields[first:] + fields[:first]:
        value = getattr(setting, field)
        if field == "registers":
            choices = [registers for registers in REGISTERS if registers != value]
        elif field == "stages":
            choices = [stages for stages in (value - 1, value + 1) if 1 <= stages <= 5]
        elif isinstance(value, tuple):
            steps = [(i, n) for i, side in enumerate(value) for n in (side // 2, side * 2) if n]
            choices = [(*value[:i], n, *value[i + 1 :]) for i, n in steps]
        else:
            # 0 is a number that follows from others.
            choices = [n for n in (value // 2, value * 2) if n and (field != "warps" or n <= 8)]
        for choice in choices:
            near = setting._replace(**{field: choice})
            # Triton 3.6 leaves out a barrier for one warp with loads in flight.
            if getattr(near, "warps", 0) != 1 or getattr(near, "stages", 1) == 1:
                yield near


def faster(trial: Trial, cases: Sequence[int], now: dict[int, float]) -> dict[int, float] | None:
    """Return the times of cases with the settings on trial, None where they are wrong or not faster than `now`."""
    new = {}
    try:
        for case in cases:
            new[case] = trial.time(case)
            if sum(new.values()) > GAIN * sum(now[c] for c in new):
                return None
        if not GAIN * sum(new.values()) < sum(now[c] for c in new):
            return None
        for case in cases:
            trial.check(case)
    except Exception:  # what does not compile, fit on the GPU or agree
        return None
    return new


def tune_operator(operator: str, dtype: torch.dtype, tries: int, device: str = "cuda") -> tuple[list[list[str]], dict]:
    """Try neighbours of each setting that an operator's cases use.

    Args:
        operator: Its name.
        dtype: Of the inputs.
        tries: At most so many an entry.
        device: "cuda", but for tests.

    Returns:
        A row of the report for each entry, and all settings, the faster ones where there are.
    """
    trial, now, users, rows = Trial(operator, dtype, device), {}, {}, []
    with trial.in_force():
        for case in range(len(trial.cases)):
            trial.used.clear()
            try:
                now[case] = trial.time(case)
            except Exception as error:  # a GPU on which the settings in the code do not fit
                now[case] = float("inf")
                tqdm.write(f"{trial.cases[case].name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            for key in trial.used:
                users.setdefault(key, []).append(case)
        with tqdm(total=tries * len(users), desc=operator) as progress:
            for key in sorted(users, key=entry_name):
                cases = sorted(users[key], key=now.get, reverse=True)
                old = best = previous = trial.get(key)
                before, seen = sum(now[c] for c in cases), {old}
                while len(seen) <= tries:
                    near = next((n for n in neighbours(best, previous) if n not in seen), None)
                    if near is None:
                        break
                    progress.set_postfix_str(f"{entry_name(key)}: {', '.join(map(str, near))}")
                    seen.add(near)
                    trial[key] = near
                    if new := faster(trial, cases, now):
                        best, previous, now = near, best, now | new
                    trial[key] = best
                    progress.update()
                progress.update(tries + 1 - len(seen))
                texts = [", ".join(f"{field} {n}" for field, n in s._asdict().items()) for s in (old, best)]
                texts[1] = texts[1] if best != old else "the same"
                times = [f"{us:.1f}" for us in (before, sum(now[c] for c in cases))]
                rows.append([operator, entry_name(key), texts[0], times[0], texts[1], times[1]])
    return rows, dict(trial)


def tune(operators: Sequence[str], dtype: torch.dtype, tries: int, out: Path | None) -> None:
    """Tune operators, all that have a table of settings by default, print a report, and save what is faster to `out`.

    Raises:
        ValueError: An operator has no table, or `out` is no file of settings or cannot be written.
    """
    tunable = [name for name in OPERATORS if isinstance(getattr(kernels_of(name), "LAUNCH", None), Table)]
    if others := set(operators) - set(tunable):
        raise ValueError(f"name: got {min(others)}, expected one with a table of settings: {', '.join(tunable)}")
    if out and not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out}: its folder cannot be written; --out saves elsewhere")
    try:
        content, rows = read(out) if out else {}, []
    except (OSError, ValueError) as error:
        raise ValueError(f"{out}: {error}") from None
    # Graphs are captured on a stream of their own, and a backward runs on that of its forward.
    with torch.cuda.stream(torch.cuda.Stream() if torch.cuda.is_available() else None):
        for name in operators or tunable:
            more, settings = tune_operator(name, dtype, tries)
            rows += more
            defaults = kernels_of(name).LAUNCH.defaults
            content[name] = {entry_name(k): s._asdict() for k, s in settings.items() if s != defaults[k]}
            found = {name: part for name, part in content.items() if part}
            # Tuning takes minutes: what is known is saved at once.
            if out and (found or out.is_file()):
                with replacing(out) as file:
                    file.write_text(json.dumps(found, indent=1) + "\n")
    header = ["operator", "entry", "settings", "us of its cases", "faster settings", "us of its cases"]
    print(markdown(header, rows))
    if out:
        print(f"saved to {out}" if out.is_file() else "nothing is faster: nothing saved")
