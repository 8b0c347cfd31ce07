"""tools/benchmark.py: what needs no GPU."""

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch
from densezoo.ops import get_backend, set_backend
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
MODULES = {
    **OPS,
    "what": "modules",
    "rows": [
        {"case": "SE 2, 8x4x4", "pass": name, "us": {"densezoo compiled": 15.0, "timm eager": 30.0}, "floor_us": 10.0}
        for name in ("forward", "backward")
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
    tool("_benchmark_report").write([OPS, MODULES, MODELS, LATENCY], *paths)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| na2d 2, 8x8 | forward | 10.0 | 30.0 | 90.0 | 3.00 | 3.0 |" in text
    # A kernel that could not run leaves its place empty, and the others' times in.
    assert "| na2d 2, 8x8 | backward | 20.0 |  | 90.0 | nan | nan |" in text
    assert "| 1.50x |  |" in text
    assert "| model | 64x64 | 224x224 | 1024x1024 |" in text and "| davit_tiny | 1.50 |  |  |" in text
    # Of modules, ours is the compiled way.
    assert "| SE 2, 8x4x4 | forward | 10.0 | 15.0 | 30.0 | 1.50 | 2.0 |" in text and "floor: 1.50" in text
    for name in ("ops", "modules", "models", "latency"):
        assert (tmp_path / f"benchmarks_{name}.png").stat().st_size > 1000
    assert {path.name.split("_")[0] for path in tmp_path.iterdir()} == {"benchmarks.md", "benchmarks"}


def test_gathered_bytes_stand_beside_the_floor():
    rows = [
        {"case": "gathers", "pass": "forward", "us": {"densezoo": 30.0}, "floor_us": 10.0, "gathered_us": 60.0},
        {"case": "does not", "pass": "forward", "us": {"densezoo": 30.0}, "floor_us": 10.0},
    ]
    table = tool("_benchmark_report").operator_table(rows)
    assert "| case | pass | floor | gathered | densezoo | ours / floor | ours / gathered |" in table
    assert "| gathers | forward | 10.0 | 60.0 | 30.0 | 3.00 | 0.50 |" in table
    assert "| does not | forward | 10.0 | 10.0 | 30.0 | 3.00 | 3.00 |" in table


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
@pytest.mark.parametrize(
    ("what", "name"), [("ops", "channel_attention"), ("modules", "ECA"), ("models", "densezoo_poolformer_s12")]
)
def test_on_a_gpu(what, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, what, name, "--json", "out.json")
    result = json.loads(Path("out.json").read_text())
    assert result["rows"] and capsys.readouterr().out.count("| ") > 2 * len(result["rows"])
    for row in result["rows"]:
        assert min((row.get("us") or {name: row["compiled inference"]}).values()) > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ops", "na3d"], "got na3d, expected of na2d"),
        (["modules", "SE", "BAM"], "got BAM, expected of SE, ECA, CBAM, Triplet"),
        (["models", "resnet51"], "got resnet51"),
        (["models", "resnet18", "--json", "no/such/rows.json"], "--json: got no/such/rows.json, expected a .json"),
        (["latency", "nat_tiny", "--json", "no/such/rows.json"], "--json: got no/such/rows.json, expected a .json"),
        (["latency", "nat_tiny", "--json", "rows.txt"], "--json: got rows.txt, expected a .json in a folder"),
        (["report", "nothing.json"], "nothing.json"),
        (["report"], "report: got no files, expected those that --json saved"),
        (["tune", "na2d", "--dtype", "all"], "argument --dtype: invalid choice: 'all'"),
        (["ops", "na2d", "--dense"], "unrecognized arguments: --dense"),
        (["latency", "nat_tiny", "--dtype", "float16"], "unrecognized arguments: --dtype float16"),
        (["report", "right.json", "--json", "out.json"], "unrecognized arguments: --json out.json"),
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


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "3", '{"what": "ops"}', '{"what": "ops", "rows": []}', OPS | {"rows": [{}]}], ids=repr
)
def test_a_report_of_wrong_files_leaves_the_old_one(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {"benchmarks.md": "old", "benchmarks_ops.png": "old", "right.json": json.dumps(OPS)}
    before["wrong.json"] = content if isinstance(content, str) else json.dumps(content)
    for name, text in before.items():
        Path(name).write_text(text)
    with pytest.raises(SystemExit):
        run(monkeypatch, "report", "right.json", "wrong.json")
    message = capsys.readouterr().err
    assert "wrong.json: " in message and "expected files that --json saved" in message
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["SE", "ECA", "CBAM", "Triplet"])
def test_modules_compute_the_same(name, layout):
    (case,) = tool("_benchmark_modules").MODULES[name](torch.float32, "cpu", batch=3, shapes=[(32, 6, layout)])
    assert case.name.startswith(f"{name} 3, 32x6x6") and list(case.ways)[0] == "densezoo compiled"
    assert case.inputs[0].is_contiguous(memory_format=layout)
    assert ("timm eager" in case.ways) == (name != "Triplet")
    assert case.check() < 1e-5
    if "timm eager" in case.ways:
        next(case.ways["timm eager"].parameters()).data.neg_()
        assert case.check() > 1e-3


def test_modules_with_kernels_are_compared_with_plain_pytorch(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    modules = tool("_benchmark_modules")
    for name, make in modules.MODULES.items():
        (case,) = make(torch.float32, "cpu", batch=2, shapes=[(32, 6, torch.contiguous_format)])
        assert ("reference compiled" in case.ways) == (name in ("CBAM", "Triplet"))
    ours, plain = case.ways["densezoo compiled"], case.ways["reference compiled"]
    assert [*plain.parameters()] == [*ours.parameters()]
    set_backend("triton")
    try:
        torch.testing.assert_close(plain(*case.inputs), ours(*case.inputs))
        monkeypatch.setattr(ours, "forward", lambda x: get_backend())
        assert plain(None) == "reference" and get_backend() == "triton"
    finally:
        set_backend("auto")


def timed_on_a_cpu(monkeypatch):
    """Return the module of cases with the GPU's clock and memory out of the way, and what it times."""
    cases, timed = tool("_benchmark_cases"), []
    monkeypatch.setattr(cases, "median_us", lambda function: timed.append(function()) or 1.0)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, int)
    return cases, timed


def test_kernels_in_each_dtype(monkeypatch):
    cases, timed = timed_on_a_cpu(monkeypatch)

    def make(dtype, device):
        for size in (3, 5):
            x = torch.randn(size, dtype=dtype)
            yield cases.Case(f"twice {size}", (x,), {"densezoo": lambda x: 2 * x, "eager": None}, lambda: 0.0)

    rows = [row for rows in cases.by_dtype(make, 1.0) for row in rows]
    assert [row["pass"] for row in rows] == 2 * ["forward", "backward"]
    # bfloat16's: input and output, and twice as much.
    assert [row["floor_us"] for row in rows] == [12.0, 24.0, 20.0, 40.0]
    assert all(list(row["us"].items()) == [("bfloat16", 1.0), ("float16", 1.0), ("float32", 1.0)] for row in rows)
    assert [out.dtype for out in timed[::2]] == 2 * [torch.bfloat16, torch.float16, torch.float32]
    table = tool("_benchmark_report").operator_table(rows)
    assert "| ours / floor | float16 / ours | float32 / ours |" in table


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    cases, timed = timed_on_a_cpu(monkeypatch)

    def make(dtype, device):
        x, error = torch.randn(3, dtype=dtype), 1e-3
        yield cases.Case("twice", (x,), {"densezoo": lambda x: 2 * x}, lambda: error)

    (rows,) = cases.by_dtype(make, 1.0)
    assert [list(row["us"]) for row in rows] == 2 * [["bfloat16", "float16"]]
    assert "twice: not timed: error 1.0e-03 to the reference in torch.float32, 1e-05 allowed" in capsys.readouterr().err
    assert len(timed) == 4


def test_gradients_of_a_modules_parameters_are_timed(monkeypatch):
    cases, timed = timed_on_a_cpu(monkeypatch)
    cbam = tool("_benchmark_modules").MODULES["CBAM"]
    (case,) = cbam(torch.float32, "cpu", batch=2, shapes=[(32, 6, torch.contiguous_format)])
    case.ways = {way: run for way, run in case.ways.items() if way.endswith("eager")}
    forward, backward = cases.measure(case, 1.0, torch.float32)
    assert forward["us"] == backward["us"] == {"densezoo eager": 1.0, "timm eager": 1.0}
    assert [len(grads) for grads in timed[1::2]] == [1 + 7] * 2
    torch.testing.assert_close(timed[0], timed[2])
    assert backward["floor_us"] == 2 * forward["floor_us"] == 4 * case.inputs[0].nbytes
