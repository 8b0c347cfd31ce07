"""How tools/compare.py times training steps and predictions."""

import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from _compare_variations import VARIATIONS
from _files import replacing
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope

TIMED = 10  # calls at most, of which the median counts
SECONDS = 1  # after which no more calls begin
BATCHES = (1, 8)


def measure(configs: dict[str, tuple[Config, Path]], out: Path) -> dict:
    """Time variations one after the other on one device, with the weights in the files; write `out` as it goes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    times = {}
    # The first one is timed twice: what a process does only once counts for none.
    for name, (cfg, weights) in [*list(configs.items())[:1], *configs.items()]:
        init_default_scope(cfg.default_scope)
        try:
            times[name] = dict(device=kind, **measure_one(name, cfg, weights, device))
        except Exception:
            # Its row stays without times; the log tells why.
            traceback.print_exc()
        with replacing(out) as file:
            file.write_text(json.dumps(times))
    return times


def measure_one(name: str, cfg: Config, weights: Path, device: str) -> dict[str, float]:
    """Return the milliseconds of a training step and of predictions, pre- and post-processing included."""
    model = MODELS.build(cfg.model)
    VARIATIONS[name].prepare(model)
    checkpoint = torch.load(weights, weights_only=True, map_location="cpu")
    model.load_state_dict(checkpoint["state_dict"])
    model.to(device).eval()
    images = DATASETS.build(cfg.val_dataloader.dataset)
    times = {}
    for batch in BATCHES:
        data = pseudo_collate([images[i % len(images)] for i in range(batch)])
        with torch.inference_mode():
            times[f"predict_{batch}"] = median_ms(lambda data=data: model.test_step(data), device)
    images = DATASETS.build(cfg.train_dataloader.dataset)
    data = pseudo_collate([images[i % len(images)] for i in range(cfg.train_dataloader.batch_size)])
    optimizer = build_optim_wrapper(model.train(), cfg.optim_wrapper)
    return times | dict(step=median_ms(lambda: model.train_step(data, optimizer), device))


def median_ms(call: Callable[[], object], device: str) -> float:
    """Return the median time of a call in milliseconds."""
    times = []
    # The first two warm up.
    while len(times) < 3 or len(times) < TIMED + 2 and sum(times) < 1e3 * SECONDS:
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[2:])
