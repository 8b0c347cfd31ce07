"""tools/compare.py: what it compares, two runs of it, and the table of made-up results."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from tiny import TOOLS, tool  # noqa: E402

variations = tool("_compare_variations")
reporting = tool("_compare_report")
scoring = tool("_compare_scores")
NAMES = list(variations.VARIATIONS)


def compare(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, TOOLS / "compare.py", *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True
    )


@functools.cache
def built(name: str) -> tuple[dict, list]:
    """Return the shapes of a variation's parameters and what is to be the same for all."""
    from mmengine.registry import MODELS, init_default_scope

    cfg = variations.config_of(name)
    init_default_scope(cfg.default_scope)
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    budget = [cfg.train_cfg, cfg.optim_wrapper.optimizer, cfg.optim_wrapper.clip_grad, cfg.param_scheduler]
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return shapes, [*budget, cfg.train_dataloader.batch_size, cfg.train_dataloader.sampler]


@pytest.mark.parametrize("name", NAMES)
def test_every_variation_builds_and_differs_from_the_plain_one(name):
    shapes, budget = built(name)
    assert (shapes == built(variations.VARIATIONS[name].plain)[0]) == (name in variations.PLAIN)
    assert budget == built(variations.VARIATIONS[name].plain)[1]


def test_every_attention_module_is_compared():
    from densezoo.ops import plugins

    types = set(re.findall(r"densezoo\.(\w+)", str([v.changes for v in variations.VARIATIONS.values()])))
    assert set(plugins.__all__) <= types


def test_sac_is_put_into_both_backbones():
    from densezoo.necks import SAC
    from mmengine.registry import MODELS, init_default_scope

    cfg = variations.config_of("rfp-sac")
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    variations.VARIATIONS["rfp-sac"].prepare(model)
    for part in (model.backbone, model.neck.rfp_modules[0]):
        # the four 3x3 convolutions of each stage but the first
        assert sum(isinstance(m, SAC) for m in part.modules()) == 12


@pytest.mark.slow
def test_two_variations_from_end_to_end(tmp_path):
    """Two steps on a few images, after runs that fail, and then one more seed."""
    data, out = tmp_path / "digits", tmp_path / "results/digits.json"
    tool("draw_digits").draw(data, training=16, validation=4)
    common = ("--data-root", data, "--out", out, "--work-dir", tmp_path / "runs", "--jobs", "2")
    one_epoch = ("--cfg-options", "train_cfg.max_epochs=1")

    failing = compare("eca", *common, *one_epoch, "optim_wrapper.optimizer.lr=-1", cwd=tmp_path)
    assert failing.returncode == 0, failing.stdout + failing.stderr
    text = out.with_suffix(".md").read_text()
    assert text.count("failed: ValueError: Invalid learning rate: -1") == 2

    first = compare("eca", *common, *one_epoch, "--more-seeds", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    facts = json.loads(out.read_text())
    assert facts["budget"] == dict(epochs={"faster-rcnn": 1}, batch_size=8, training=16, validation=4)
    assert list(facts["variations"]) == ["faster-rcnn", "eca"]
    for entry in facts["variations"].values():
        assert list(entry["scores"]) == ["0"] and 0 <= entry["scores"]["0"] <= 1
        assert entry["errors"] == {}
        assert all(entry["times"][key] > 0 for key in ("step", "predict_1", "predict_8"))
    sizes = [entry["parameters"] for entry in facts["variations"].values()]
    # ECA has one kernel of 3 to 7 weights a block
    assert 8 * 3 <= sizes[1] - sizes[0] <= 8 * 7

    # The plain one has seed 1 already.
    facts["variations"]["faster-rcnn"]["scores"]["1"] = 0.5
    # New times leave no remark on the old ones.
    facts["variations"]["eca"].pop("times")
    facts["remarks"] = ["Measured beside other work."]
    out.write_text(json.dumps(facts))
    second = compare("eca", *common, *one_epoch, "--seeds", "0", "1", "--more-seeds", cwd=tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert re.findall(r"\d+: (\S+, seed \d)", second.stdout) == ["eca, seed 1"]
    facts_again = json.loads(out.read_text())
    assert "remarks" not in facts_again
    again = facts_again["variations"]
    assert list(again["eca"]["scores"]) == ["0", "1"]
    again["eca"]["scores"].pop("1")
    assert all(entry.pop("times") for entry in again.values())
    facts["variations"]["faster-rcnn"].pop("times")
    assert again == facts["variations"]
    text = out.with_suffix(".md").read_text()
    assert "| ECA | " in text and "RetinaNet" not in text
    assert out.with_suffix(".png").stat().st_size > 1000

    out.with_suffix(".md").unlink()
    assert compare("--report", "--out", out, cwd=tmp_path).returncode == 0
    assert out.with_suffix(".md").read_text() == text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ecaa"], "error: ecaa: there is no such variation; did you mean eca?"),
        (["--report", "--out", "none.json"], "error: --out none.json: there are no results to report"),
        (["--report", "--out", __file__], f"error: --out {__file__}: holds something else"),
    ],
)
def test_bad_input_is_told_in_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        tool("compare").main(args)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def entry(*scores: float, step: float | None = None, **errors: str) -> dict:
    made = dict(digest="", parameters=12_345_678, scores={str(i): s for i, s in enumerate(scores)}, errors=errors)
    if step:
        made["times"] = dict(device="a GPU", step=step, predict_8=step / 2, predict_1=step / 4)
    return made


@pytest.fixture
def facts() -> dict:
    return dict(
        budget=dict(epochs={"faster-rcnn": 2, "upernet": 3}, batch_size=8, training=2000, validation=200),
        seeds=["0"],
        timed=10,
        variations={
            "faster-rcnn": entry(0.70, 0.71, 0.72, step=80),
            "se": entry(0.74, 0.73, 0.75, step=100),
            "cbam": entry(0.71, 0.69, 0.72),
            "eca": entry(0.69, step=80),
            "das": {**entry(), "errors": {"0": "RuntimeError: a | b"}},
            "upernet": entry(0.5),
        },
    )


def rows(facts: dict) -> dict[str, list[str]]:
    lines = [line for line in reporting.render(facts).splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in (re.split(r"(?<!\\)\|", line.strip("| ")) for line in lines)} | {
        "": [line.count(" | ") for line in lines]
    }


def test_table(facts):
    table = {name.strip(): [str(cell).strip() for cell in cells] for name, cells in rows(facts).items()}
    # each has as many cells as the header
    assert set(table.pop("")) == {"7"}
    plain = table["Faster R-CNN, FPN"]
    assert plain[:4] == ["12.35", "0.700, 0.710, 0.720", "0.710 ± 0.010", "–"]
    assert plain[4:] == ["80.0 (×1.00)", "200 (×1.00)", "50 (×1.00)"]
    # the variances are 1e-4, 1e-4 and 7/3 e-4; the error that of a difference of two means of three
    error = ((1e-4 + 1e-4 + 7e-4 / 3) / 3) ** 0.5 * (2 / 3) ** 0.5
    assert table["SE"][2:4] == ["0.740 ± 0.010", f"**+0.030 ± {error:.3f}**"]
    assert table["SE"][4:] == ["100.0 (×1.25)", "160 (×0.80)", "40 (×0.80)"]
    assert table["CBAM"][3:] == [f"-0.003 ± {error:.3f}", "–", "–", "–"]
    # one seed: compared with the plain one's same seed
    assert table["ECA"][1:4] == ["0.690", "0.690", f"-0.010 ± {error * 3**0.5:.3f}"]
    assert table["DAS, after stages"] == ["12.35", "failed: RuntimeError: a \\| b"] + ["–"] * 5
    assert table["UPerNet"][:4] == ["12.35", "0.500", "0.500", "–"]


def test_words_and_plot(facts, tmp_path):
    facts["variations"]["upernet"] = entry(0.5, step=30)
    reporting.report(facts, tmp_path / "digits.json")
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert (tmp_path / "digits.md").read_text() == reporting.render(facts)
    text = reporting.render(facts)
    assert "seed 0; the plain models" in text and "on a GPU" in text
    # SE and CBAM looked better with seed 0; with the others only SE is
    assert "of these 2, 1 are better by the added seeds alone too" in text
    assert "Epochs: 2. Standard deviation over seeds: 0.012." in text
    assert "Epochs: 3. Standard deviation over seeds: not known" in text
    assert not scoring.looks_better(facts, "eca", ["0"])
    assert not scoring.looks_better(facts, "das", ["0"])
    assert scoring.looks_better(facts, "cbam", ["0"])


def test_table_without_any_result(facts, tmp_path):
    facts["variations"] = {"faster-rcnn": dict(digest="", scores={}, errors={})}
    assert "| Faster R-CNN, FPN | – | – | – | – | – | – | – |" in reporting.render(facts)
    reporting.report(facts, tmp_path / "digits.json")
    assert (tmp_path / "digits.png").is_file()
