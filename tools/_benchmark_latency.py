"""Latency against input size for tools/benchmark.py, on a GPU or a CPU."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from _benchmark_models import build
from torch.utils.benchmark import Timer
from tqdm import tqdm

SIZES = (224, 384, 512, 768, 1024)


def latency_rows(names: Sequence[str], sizes: Sequence[int], device: str, seconds: float = 1.0) -> Iterator[dict]:
    """Time the dense backbone of each model on one square image of each size: eager, channels last.

    In bfloat16 autocast on a GPU, in float32 on a CPU.

    Args:
        names: timm's names.
        sizes: Heights and widths of the images.
        device: "cuda" or "cpu".
        seconds: How long to repeat each.

    Yields:
        The model's name, the median times in ms by size, and by size why it does not run: "model", "ms", "errors".
    """
    with tqdm(total=len(names) * len(sizes)) as progress:
        for name in names:
            row = {"model": name, "ms": {}, "errors": {}}
            for size in sizes:
                progress.set_description(f"{name} at {size}")
                try:
                    row["ms"][str(size)] = latency_ms(name, size, device, seconds)
                except Exception as e:  # what cannot run this size is a result too
                    row["errors"][str(size)] = f"{type(e).__name__}: {str(e).splitlines()[0][:150]}"
                    progress.write(f"{name} at {size}: {row['errors'][str(size)]}")
                progress.update()
            yield row


def latency_ms(name: str, size: int, device: str, seconds: float) -> float:
    """Return the median time in ms of a dense backbone on an image of `size` x `size`."""
    model = build(name, True, (size, size), device).eval()
    x = torch.randn(1, 3, size, size, device=device).to(memory_format=torch.channels_last)
    precision = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()
    with torch.inference_mode(), precision:
        model(x)
        # It waits for the GPU, and would take one thread.
        timer = Timer("model(x)", globals=dict(model=model, x=x), num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=seconds).median * 1e3
