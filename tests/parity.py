"""Numerical parity with the published implementations, without their code or weights.

A golden file (`goldens/<model>.json`) records, for one published model:

- `keys`: every parameter and persistent buffer of the published checkpoint layout, name -> shape;
- `computed`: the names in that layout that hold derived constants (index tables, masks), not weights;
- `inputs`: the shape of each named input, drawn by `fixed_input`;
- `outputs`: a `digest` of each named output that the published implementation produced, in eval mode,
  float32 on a CPU, after every weight was set by `weight_for`.

To check an implementation: build the published-layout state dict with `state_dict_from(golden)`, convert it to
your own layout, load it strictly, run the same inputs, and compare with `compare`.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

SAMPLES = 64  # values kept of each output, at evenly spaced flat positions


def _rng(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def weight_for(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the float32 tensor that the published key `name` of `shape` is set to (int64 0 for a counter)."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    x = _rng(name).standard_normal(shape, dtype=np.float32) if shape else np.float32(_rng(name).standard_normal())
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        x = 1 + 0.1 * np.abs(x)
    elif leaf == "running_mean":
        x = 0.1 * x
    elif any(
        s in name
        for s in (
            "rpb",
            "bias_table",
            "pos_embed",
            "an_bias",
            "na_bias",
            "ah_bias",
            "aw_bias",
            "ha_bias",
            "wa_bias",
            "ac_bias",
            "ca_bias",
            "positional_encoding",
            "relative_position",
        )
    ):
        x = 0.5 * x
    elif len(shape) >= 2:
        x = x / math.sqrt(max(1, math.prod(shape[1:])))
    elif leaf == "bias":
        x = 0.1 * x
    else:
        x = 1 + 0.1 * x
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).reshape(shape)


def fixed_input(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the standard-normal float32 input called `name`."""
    return torch.from_numpy(_rng("input:" + name).standard_normal(shape, dtype=np.float32))


def digest(t: torch.Tensor) -> dict:
    """Summarise a tensor: shape, l2 norm, mean, and SAMPLES values at evenly spaced flat positions."""
    f = t.detach().to(torch.float64).cpu().flatten()
    idx = torch.linspace(0, f.numel() - 1, min(SAMPLES, f.numel())).round().long()
    return {"shape": list(t.shape), "l2": f.norm().item(), "mean": f.mean().item(), "values": f[idx].tolist()}


def compare(expected: dict, got: torch.Tensor) -> float:
    """Return the relative error of `got` against a digest: the larger of the sample error and the norm error.

    Raises ValueError where the shapes differ.
    """
    g = digest(got)
    if g["shape"] != expected["shape"]:
        raise ValueError(f"shape {g['shape']}, expected {expected['shape']}")
    e, v = np.array(expected["values"]), np.array(g["values"])
    if not np.isfinite(v).all():
        return math.inf
    return max(float(np.linalg.norm(v - e) / np.linalg.norm(e)), abs(g["l2"] - expected["l2"]) / expected["l2"])


def fill_(module: torch.nn.Module, computed: tuple[str, ...] = ()) -> list[str]:
    """Set every floating-point entry of a published module's state dict by `weight_for`, in place.

    A name containing one of the strings in `computed` is left as it is. Returns the names left alone.
    """
    state, left = module.state_dict(), []
    for name, t in state.items():
        if any(s in name for s in computed) or not (t.is_floating_point() or name.endswith("num_batches_tracked")):
            left.append(name)
        else:
            t.copy_(weight_for(name, tuple(t.shape)))
    return left


def record(
    path: str | Path,
    module: torch.nn.Module,
    inputs: dict[str, tuple[int, ...]],
    outputs: dict[str, torch.Tensor],
    source: str,
    computed: list[str],
) -> None:
    """Write a golden file for a published module already filled and run."""
    keys = {k: list(v.shape) for k, v in module.state_dict().items()}
    Path(path).write_text(
        json.dumps(
            {
                "source": source,
                "keys": keys,
                "computed": computed,
                "inputs": {k: list(v) for k, v in inputs.items()},
                "outputs": {k: digest(v) for k, v in outputs.items()},
            },
            indent=None,
            separators=(",", ":"),
        )
        + "\n"
    )


def load(path: str | Path) -> dict:
    """Read a golden file."""
    return json.loads(Path(path).read_text())


def state_dict_from(golden: dict) -> dict[str, torch.Tensor]:
    """Return the published-layout state dict of a golden file, without its computed entries."""
    skip = set(golden["computed"])
    return {k: weight_for(k, tuple(s)) for k, s in golden["keys"].items() if k not in skip}
