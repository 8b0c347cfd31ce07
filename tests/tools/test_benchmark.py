"""tools/benchmark.py: what needs no GPU."""

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch
from tiny import tool

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
LATENCY = {
    **OPS,
    "what": "latency",
    "rows": [
        {"model": "nat_tiny", "ms": {"224": 3.0, "1024": 30.25}, "errors": {}},
        {"model": "davit_tiny", "ms": {"64": 1.5}, "errors": {"1024": "out of memory"}},
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
    paths = tmp_path / "benchmarks.md", tmp_path / "benchmarks_throughput.json"
    tool("_benchmark_report").write([OPS, MODELS, LATENCY], *paths)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| na2d 2, 8x8 | forward | 10.0 | 30.0 | 90.0 | 3.00 | 3.0 |" in text
    # A kernel that could not run leaves its place empty, and the others' times in.
    assert "| na2d 2, 8x8 | backward | 20.0 |  | 90.0 | nan | nan |" in text
    assert "| 1.50x |  |" in text
    assert "| model | 64x64 | 224x224 | 1024x1024 |" in text and "| davit_tiny | 1.50 |  |  |" in text
    for name in ("ops", "models", "latency"):
        assert (tmp_path / f"benchmarks_{name}.png").stat().st_size > 1000
    assert {path.name.split("_")[0] for path in tmp_path.iterdir()} == {"benchmarks.md", "benchmarks"}


def run(monkeypatch, *arguments):
    """Run the tool, with its report in the folder of the test."""
    benchmark = tool("benchmark")
    monkeypatch.setattr(benchmark, "BENCHMARKS", Path("benchmarks.md"))
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    benchmark.main()


def test_latency(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["quadtree_a_b0", "test_convnext"]
    run(monkeypatch, "latency", *names, "--sizes", "32", "160", "--out", "out.png", "--json", "out.json")
    captured = capsys.readouterr()
    assert "| model | 32x32 | 160x160 |" in captured.out and "plot saved to out.png" in captured.err
    assert matplotlib.image.imread("out.png").std() > 0.01
    result = json.loads(Path("out.json").read_text())
    assert [row["model"] for row in result["rows"]] == names and "one image" in result["machine"]
    # 25 times the work.
    assert all(0 < row["ms"]["32"] < row["ms"]["160"] and not row["errors"] for row in result["rows"])
    run(monkeypatch, "report", "out.json")
    assert captured.out.strip() in Path("benchmarks.md").read_text() and Path("benchmarks_latency.png").is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", [["ops", "channel_attention"], ["models", "densezoo_poolformer_s12"]])
def test_on_a_gpu(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, *arguments, "--json", "out.json")
    result = json.loads(Path("out.json").read_text())
    assert result["rows"] and capsys.readouterr().out.count("| ") > 2 * len(result["rows"])
    for row in result["rows"]:
        assert row["us"]["densezoo"] > 0 if arguments[0] == "ops" else row["compiled inference"] > 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ops", "na3d"], "got na3d, expected of na2d"),
        (["models", "resnet51"], "got resnet51"),
        (["report", "nothing.json"], "nothing.json"),
        (["latency", "nat_tiny", "--sizes", "224", "8"], "--sizes: got 8, expected 32 or more"),
        (["latency", "nat_tiny", "--out", "no/such/plot.png"], "--out: got no/such/plot.png, expected a .png"),
        pytest.param(
            ["ops"],
            "needs a CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: it would time the operators"),
        ),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err
