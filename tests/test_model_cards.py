"""The cards and README.md's table are what the facts and the code say, and the facts are complete."""

import json
import re
import sys
from pathlib import Path

import pytest
import timm
import yaml
from huggingface_hub import ModelCard

pytest.importorskip("mmengine")

from densezoo.backbones import FAMILIES
from tiny import tool

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import make_cards

sys.path.pop(0)

ROOT = Path(__file__).parents[1]
FACTS = sorted((ROOT / "model_cards" / "facts").glob("*.yaml"))
LINK = re.compile(r"\]\((?!https://)([^)]+)\)")


@pytest.fixture(scope="module")
def generated() -> tuple[dict[Path, str], str]:
    return make_cards.generate()


def test_cards_are_up_to_date(generated):
    cards, _ = generated
    assert {path: path.read_text() for path in (ROOT / "model_cards").glob("*.md")} == cards


def test_readme_is_up_to_date(generated):
    readme = (ROOT / "README.md").read_text()
    assert readme == make_cards.put_table(readme, "models", generated[1])


def test_links_lead_somewhere(generated):
    cards, table = generated
    for folder, text in [(ROOT, table)] + [(path.parent, text) for path, text in cards.items()]:
        for link in LINK.findall(text):
            assert (folder / link).is_file(), link


def flops(module) -> list:
    """Return the variants of a family, all but the first of each class marked slow."""
    seen = set()
    for name in module.VARIANTS:
        cls = timm.model_entrypoint(name).__annotations__["return"]
        yield pytest.param(name, marks=pytest.mark.slow if cls in seen else ())
        seen.add(cls)


@pytest.mark.parametrize("name", [name for module in FAMILIES for name in flops(module)])
def test_flops_are_those_counted(name):
    assert json.loads((ROOT / "model_cards" / "flops.json").read_text())[name] == make_cards.count_flops(name)


def test_flops_are_the_published_ones_but_for_these():
    counted = json.loads((ROOT / "model_cards" / "flops.json").read_text())
    published = {
        name: flops
        for path in FACTS
        for name, model in make_cards.load_facts(path)["models"].items()
        if (flops := make_cards.published_flops(model)) is not None
    }
    differing = {name for name, flops in published.items() if make_cards.flops_differ(counted[name], flops)}
    maxvit = ("tiny_tf_384", "tiny_tf_512", "small_tf_384", "small_tf_512", "base_tf_512", "large_tf_512")
    maxvit += ("nano_rw_256", "rmlp_pico_rw_256")
    assert differing == {"flatten_cswin_small", *(f"densezoo_maxvit_{name}" for name in maxvit)}
    assert all(abs(counted[name] / published[name] - 1) < 0.02 for name in differing)


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_facts_cover_the_family(path):
    (family,) = (module for module in FAMILIES if module.__name__.endswith(f".{path.stem}"))
    facts = make_cards.load_facts(path)
    assert facts["models"].keys() == family.VARIANTS.keys()
    assert {model["paper"] for model in facts["models"].values()} == facts["papers"].keys()
    for name, model in facts["models"].items():
        weights = timm.get_pretrained_cfg(name)
        assert model["weights"] == weights.url or weights.hf_hub_id and weights.hf_hub_id in model["weights"]
        assert weights.license in (None, model.get("license", facts["license"]))
        for result in model["results"]:
            assert result["metrics"] and re.match("https://|$", result["weights"])
            assert all(0 < value < 100 for *_, value in result["metrics"])


def test_configs_and_results_name_each_other():
    named = {
        ROOT / "configs" / result["config"]: (name, result["dataset"])
        for path in FACTS
        for name, model in make_cards.load_facts(path)["models"].items()
        for result in model["results"]
        if "config" in result
    }
    for config, (name, dataset) in named.items():
        assert f"_{name.removeprefix('densezoo_').replace('_', '-')}_" in f"_{config.stem}"
        assert {"ImageNet-1k": "in1k", "COCO": "coco", "ADE20K": "ade20k"}[dataset] in config.stem
    configs = {config for folder in {path.parent for path in named} for config in folder.glob("*.py")}
    assert named.keys() <= configs
    # Recipes that were published without results.
    without = r"mask-rcnn_quadtree-b\d_fpn_3x_coco|flatten-pvt-(medium|large|v2-b3|v2-b4)_in1k"
    # The recipes of other depths, and of another detector than the paper's.
    without += r"|(se|cbam|bam|triplet)-resnet(18|34|101|152)_in1k|faster-rcnn_(se|cbam|bam)-resnet(50|101)_fpn_1x_coco"
    assert all(re.fullmatch(without, config.stem) for config in configs - named.keys())


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*.md")), ids=lambda path: path.stem)
def test_header_is_hugging_faces(path):
    card = ModelCard.load(path)
    assert card.data.license and card.data.library_name == "densezoo"
    values = [f" {result.metric_value} |" for result in card.data.eval_results or []]
    # What the header says is what the card's table shows.
    shown = card.text.replace(",", " |")
    assert all(value in shown for value in values)
    if values:
        assert card.data.model_name == path.stem
        assert all(result.source_url for result in card.data.eval_results)
    else:
        assert "No results are published" in card.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {a: {wieghts: b}}", "x.yaml: a: got 'wieghts', expected one of: paper"),
        ("modles: {}", "x.yaml: got 'modles'"),
        ("models: {a: {weights: b, results: [{top_1: 3}]}}", "x.yaml: a: results: got 'top_1'"),
        ("models: {a: {weights: b, results: [{top1: 3, status: done}]}}", "x.yaml: a: status: got 'done'"),
    ],
)
def test_unknown_facts_are_refused(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_cards.load_facts(path)


@pytest.fixture
def small_root(tmp_path, monkeypatch) -> Path:
    """A tree with the facts of one model, which the tool takes for the project."""
    cards = tmp_path / "model_cards"
    (cards / "facts").mkdir(parents=True)
    facts = yaml.safe_load((ROOT / "model_cards" / "facts" / "nat.yaml").read_text())
    facts["models"] = {"nat_mini": facts["models"]["nat_mini"]}
    (cards / "facts" / "nat.yaml").write_text(yaml.safe_dump(facts))
    (cards / "flops.json").write_text('{"nat_mini": 2.69}')
    (cards / "parity.json").write_text('{"nat_mini": 6.4e-07}')
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "README.md").write_text("Models\n<!-- models -->\nold\n<!-- /models -->\nend\n")
    monkeypatch.setattr(make_cards, "ROOT", tmp_path)
    monkeypatch.setattr(make_cards, "CARDS", cards)
    return tmp_path


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["make_cards.py", *arguments])
    return make_cards.main()


def test_check_names_what_differs_and_writing_mends_it(small_root, monkeypatch, capsys):
    card, orphan = small_root / "model_cards" / "nat_mini.md", small_root / "model_cards" / "nat_none.md"
    orphan.write_text("left over")
    assert run(monkeypatch, "--check") == 1
    out = capsys.readouterr().out
    assert all(f"{name}:" in out for name in ("README.md", "model_cards/nat_mini.md", "model_cards/nat_none.md"))
    assert orphan.exists() and not card.exists()

    assert run(monkeypatch) == 0
    assert card.exists() and not orphan.exists()
    readme = (small_root / "README.md").read_text()
    assert readme.startswith("Models\n<!-- models -->\n| model |") and readme.endswith("|\n<!-- /models -->\nend\n")
    detectors = "Mask R-CNN 3x 46.5 / 41.7<br>Cascade Mask R-CNN 3x 50.3 / 43.6"
    assert f"| 19.98 | 2.69 | 81.8 | {detectors} | UPerNet 160k 45.1 / 46.4 |" in readme
    assert "| 6e-07 |" in readme
    assert run(monkeypatch, "--check") == 0

    facts = small_root / "model_cards" / "facts" / "nat.yaml"
    facts.write_text(facts.read_text().replace("81.8", "81.9"))
    capsys.readouterr()
    assert run(monkeypatch, "--check") == 1
    assert "model_cards/nat_mini.md: out of date" in capsys.readouterr().out


def test_throughput_is_that_of_the_last_benchmark(small_root, monkeypatch):
    card = small_root / "model_cards" / "nat_mini.md"
    assert run(monkeypatch) == 0
    assert "\n- Throughput: not measured\n\n" in card.read_text()

    path = small_root / "model_cards" / "throughput.json"
    write = tool("_benchmark_report").write
    command = "python tools/benchmark.py models"
    rows = [
        {"model": "nat_mini", "eager inference": 900.0, "compiled inference": 1800.4, "compiled training": 600.0},
        {"model": "nat_tiny", "eager inference": 500.0, "compiled error": "out of memory"},
        {"model": "nat_small", "eager error": "out of memory", "compiled error": "out of memory"},
        {"model": "swin_tiny_patch4_window7_224", "compiled inference": 3000.0},
    ]
    first = dict(what="models", command=command, machine="a GPU", date="2026-01-01", rows=rows)
    dense = dict(first, command=f"{command} nat_mini --dense", rows=[{"model": "nat_mini", "compiled inference": 20.0}])
    write([first, dense], small_root / "benchmarks.md", path)
    measured = json.loads(path.read_text())
    assert measured.keys() == {"nat_mini", "nat_tiny"}
    assert measured["nat_tiny"] == dict(inference=500, way="eager", machine="a GPU", date="2026-01-01")
    assert run(monkeypatch, "--check") == 1 and run(monkeypatch) == 0
    line = "1800 images per second in inference, 600 in training, compiled (a GPU, 2026-01-01)"
    assert f"\n- Throughput: {line}\n\n" in card.read_text()

    # A later run replaces what it measures, and leaves the rest.
    later = dict(first, date="2026-02-02", rows=[{"model": "nat_mini", "compiled inference": 2000.0}])
    write([later], small_root / "benchmarks.md", path)
    assert json.loads(path.read_text())["nat_tiny"] == measured["nat_tiny"]
    assert run(monkeypatch) == 0
    line = "2000 images per second in inference, compiled (a GPU, 2026-02-02)"
    assert f"\n- Throughput: {line}\n\n" in card.read_text()


def test_readme_without_markers_is_refused_and_kept(small_root, monkeypatch, capsys):
    readme = small_root / "README.md"
    readme.write_text("no markers")
    assert run(monkeypatch) == 2
    assert "README.md: expected the lines <!-- models -->" in capsys.readouterr().err
    assert readme.read_text() == "no markers"
