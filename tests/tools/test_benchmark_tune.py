"""tools/benchmark.py tune: settings that are faster are found, wrong ones are not."""

import json
import sys
from functools import partial

import pytest
import torch
from densezoo.ops import channel_attention, get_backend, launch
from densezoo.ops.channel import kernels
from tiny import tool


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """The tool with one small case of channel attention."""
    tool_ = tool("_benchmark_tune")
    cases = sys.modules["_benchmark_cases"]

    def make(dtype, device):
        inputs = torch.randn(1, 9, 8, 3, 2, 8, device=device, dtype=dtype).unbind(3)
        check = partial(cases.worst_error, channel_attention, inputs)
        yield cases.Case("channel_attention 1, 9x8, 2x8", inputs, {"densezoo": channel_attention}, check)

    monkeypatch.setitem(tool_.OPERATORS, "channel_attention", make)
    return tool_


def take(monkeypatch, cost):
    """Let a pass take `cost(name, settings)` microseconds; return how many were timed."""
    timed = []

    def median_us(function):
        function()
        name = function.__code__.co_names
        timed.append(name)
        # The pass that calls autograd.grad is the backward.
        return float(cost("backward" if "autograd" in name else "forward", dict(kernels.LAUNCH)))

    monkeypatch.setattr(sys.modules["_benchmark_trial"], "median_us", median_us)
    return timed


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, in the test below")
def test_faster_settings_are_found_and_saved(tune, monkeypatch, tmp_path, capsys):
    table, before = kernels.LAUNCH, dict(kernels.LAUNCH)

    def cost(name, settings):
        return 100 + settings[name].tokens + 10 * abs(settings[name].stages - 2)

    timed = take(monkeypatch, cost)
    path = tmp_path / "sm_90.json"
    path.write_text('{"na2d": {"forward 0": {"warps": 8}}, "channel_attention": {"sums": {"warps": 8}}}')
    monkeypatch.setattr(tune, "tune_operator", partial(tune.tune_operator, device="cpu"))
    tune.tune(["channel_attention"], torch.float32, 7, path)
    best = {name: before[name]._replace(tokens=16, stages=2) for name in ("forward", "backward")}
    assert json.loads(path.read_text()) == {
        "na2d": {"forward 0": {"warps": 8}},
        "channel_attention": {name: setting._asdict() for name, setting in best.items()},
    }
    out = capsys.readouterr().out
    assert f"saved to {path}" in out
    old, new = (f"channels 64, tokens {tokens}, warps 4, stages {stages}" for tokens, stages in ((64, 3), (16, 2)))
    # The second row has what the first one found.
    assert f"| channel_attention | backward | {old} | 348.0 | {new} | 290.0 |" in out
    assert f"| channel_attention | forward | {old} | 290.0 | {new} | 232.0 |" in out
    assert "| channel_attention | sums |" in out and "| the same |" in out
    # What makes the same launches is not timed again.
    assert 8 < len(timed) <= 2 + 2 * 7
    # Nothing is left behind.
    assert kernels.LAUNCH is table and dict(table) == before and get_backend() == "auto"
    assert kernels._problem.cache_info().currsize == 0
    monkeypatch.setattr(launch, "file_here", lambda: path)
    settings = launch.Table("channel_attention", table.defaults)
    assert [settings[name] for name in best] == list(best.values()) and settings["sums"] == before["sums"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, in the test below")
@pytest.mark.parametrize("fault", ["result", "gradient", "error"])
def test_wrong_settings_are_dropped(fault, tune, monkeypatch):
    """Eight warps would be fastest."""
    name, prepare = "backward" if fault == "gradient" else "forward", kernels._prepare

    def wrong(*args):
        problem, query, *others = prepare(*args)
        if kernels.LAUNCH[name].warps == 8:
            if fault == "error":
                raise RuntimeError("it does not compile")
            if fault == "result" or sys._getframe(1).f_code is kernels._write_gradients.__code__:
                query = query * 1.01
        return problem, query, *others

    monkeypatch.setattr(kernels, "_prepare", wrong)
    take(monkeypatch, lambda passed, settings: 100 - 6 * settings[name].warps - 5 * settings[name].stages)
    _, settings = tune.tune_operator("channel_attention", torch.float32, 6, "cpu")
    assert settings[name].warps == 4 and settings[name].stages == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, in the test below")
def test_settings_that_do_not_run_are_replaced(tune, monkeypatch, capsys):
    """As on a GPU with too little shared memory."""
    prepare = kernels._prepare

    def prepare_if_it_fits(*args):
        if kernels.LAUNCH["forward"].tokens > 32:
            raise RuntimeError("shared memory")
        return prepare(*args)

    monkeypatch.setattr(kernels, "_prepare", prepare_if_it_fits)
    take(monkeypatch, lambda name, settings: 100)
    _, settings = tune.tune_operator("channel_attention", torch.float32, 8, "cpu")
    assert settings["forward"].tokens == 32


def test_neighbours(tune):
    na2d = tune.kernels_of("na2d")
    setting = na2d._Launch((1, 8), 64, 32, 512, 8, 1, 128)
    near = [*tune.neighbours(setting, setting)]
    assert near[:2] == [setting._replace(run=run) for run in (2, 8)]
    assert near[2:5] == [setting._replace(registers=registers) for registers in (None, 168, 96)]
    fields = {
        "run": {2, 8},
        "stages": {2},
        "warps": {4},
        "programs": {256, 1024},
        "batch": {16, 64},
        "chunk": {32, 128},
    }
    fields |= {"tile": {(2, 8), (1, 4), (1, 16)}, "registers": {None, 168, 96}}
    assert set(near) == {setting._replace(**{field: n}) for field, values in fields.items() for n in values}
    # On with what was changed last.
    assert next(tune.neighbours(setting, setting._replace(chunk=128))).chunk == 32
    # One warp has no loads in flight.
    quad = tune.kernels_of("quadtree_attention")._Launch(0, 4, 1, 1)
    assert set(tune.neighbours(quad, quad)) == {quad._replace(warps=2), quad._replace(chunk=2), quad._replace(chunk=8)}
    two = quad._replace(warps=2, stages=2)
    assert all(n.warps > 1 or n.stages == 1 for n in tune.neighbours(two, two))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["na3d"], "got na3d, expected of na2d"),
        (["na2d", "--tries", "0"], "--tries: got 0, expected 1 or more"),
        (["na2d", "--out", "settings.png"], "--out: got settings.png, expected a .json"),
        (["na2d", "--write", "--out", "a.json"], "not allowed with argument"),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "tune", *arguments])
    with pytest.raises(SystemExit):
        tool("benchmark").main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [('{"na3d": {}}', "got operator 'na3d'"), ("{", "Expecting")])
def test_a_wrong_file_ends_it_first(text, message, tune, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"settings.json: {message}"):
        tune.tune(["channel_attention"], torch.float32, 1, path)
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written_ends_it_first(tune, tmp_path):
    with pytest.raises(ValueError, match="sm_90.json: its folder cannot be written; --out saves elsewhere"):
        tune.tune(["channel_attention"], torch.float32, 1, tmp_path / "no such folder" / "sm_90.json")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch, capsys):
    path = tmp_path / "settings.json"
    path.write_text("{}")
    monkeypatch.setattr("sys.argv", ["benchmark.py", "tune", "channel_attention", "--tries", "1", "--out", str(path)])
    tool("benchmark").main()
    out = capsys.readouterr().out
    assert f"saved to {path}" in out and set(json.loads(path.read_text())) <= {"channel_attention"}
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| channel_attention | ")]
    assert [row[1] for row in rows] == ["backward", "forward", "sums"]
    assert all(0 < float(row[5].rstrip(" |")) <= float(row[3]) for row in rows)
