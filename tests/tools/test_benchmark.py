"""tools/benchmark.py: what needs no GPU."""

import subprocess
import sys

import pytest
import torch
from tiny import TOOLS, tool

OPS = {
    "what": "ops",
    "command": "python tools/benchmark.py ops",
    "machine": "a GPU",
    "date": "2026-01-01",
    "rows": [
        {"case": "na2d 2, 8x8", "pass": "forward", "us": {"densezoo": 30.0, "eager": 90.0}, "floor_us": 10.0},
        {"case": "na2d 2, 8x8", "pass": "backward", "us": {"eager": 90.0}, "floor_us": 20.0},
    ],
}
MODELS = {
    **OPS,
    "what": "models",
    "rows": [
        {"model": "davit_tiny", "compiled inference": 100.0, "compiled training": 50.0},
        {"model": "densezoo_davit_tiny", "compiled inference": 150.0, "compiled error": "out of memory"},
    ],
}


def test_report(tmp_path):
    tool("_benchmark_report").write([OPS, MODELS], tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| na2d 2, 8x8 | forward | 10.0 | 30.0 | 90.0 | 3.00 | 3.0 |" in text
    # A kernel that could not run leaves its place empty, and the others' times in.
    assert "| na2d 2, 8x8 | backward | 20.0 |  | 90.0 | nan | nan |" in text
    assert "| 1.50x |  |" in text
    for name in ("ops", "models"):
        assert (tmp_path / f"benchmarks_{name}.png").stat().st_size > 1000
    assert {path.name.split("_")[0] for path in tmp_path.iterdir()} == {"benchmarks.md", "benchmarks"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ops", "na3d"], "got na3d, expected of na2d"),
        (["models", "resnet51"], "got resnet51"),
        (["report", "nothing.json"], "nothing.json"),
        pytest.param(
            ["ops"],
            "needs a CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: it would time the operators"),
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    result = subprocess.run([sys.executable, TOOLS / "benchmark.py", *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr, result.stderr
