"""tools/convert.py: published layouts arrive whole, what became of them is told, and code is run only if trusted."""

import json
import os
import re
from pathlib import Path

import parity
import pytest
import safetensors.torch
import timm
import torch
from tiny import DETECTOR, tool, write_config

import densezoo

convert = tool("convert").main
SMALL = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), kernel_size=3, mlp_ratio=2.0)
ARGS = ["--model-args", *(f"{key}={value}".replace(" ", "") for key, value in SMALL.items())]
GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As it is where only this tool runs.
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")


def published(**kwargs) -> dict[str, torch.Tensor]:
    state = timm.create_model("nat_mini", **SMALL, **kwargs).state_dict()
    return {key: torch.randn(value.shape) for key, value in state.items()}


def fails(capsys, *arguments: str) -> str:
    before = {path: path.stat().st_size for path in Path().rglob("*")}
    with pytest.raises(SystemExit) as end:
        convert(list(arguments))
    assert end.value.code == 2
    assert {path: path.stat().st_size for path in Path().rglob("*")} == before
    return capsys.readouterr().err


def test_official_layout(capsys):
    state = published(num_classes=7)
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, "nat.pth")
    convert(["nat.pth", "nat_mini", "out/nat.safetensors", *ARGS, "num_classes=7"])
    out = capsys.readouterr().out
    assert f"matched: {len(state)} of {len(state)}" in out and f"renamed: {len(state)}" in out
    assert "dropped: none" in out and "missing: none" in out
    # The first of them are shown.
    assert len(re.findall(r"  module\.(\S+) -> \1\n", out)) == 20 and f"... and {len(state) - 20} more" in out
    written = safetensors.torch.load_file("out/nat.safetensors")
    assert written.keys() == state.keys() and all(torch.equal(written[key], state[key]) for key in state)
    info = json.loads(Path("out/nat.json").read_text())
    assert info["architecture"] == "nat_mini" and info["num_classes"] == 7
    assert len(info["densezoo"]["conversion"]["renamed"]) == len(state)
    image = torch.randn(1, 3, 40, 64)
    model = timm.create_model("nat_mini", **SMALL, num_classes=7).eval()
    model.load_state_dict(state)
    assert torch.equal(densezoo.load("out/nat.safetensors")(image), model(image))


@pytest.mark.parametrize(
    ("record", "name", "args"),
    [
        ("nat_mini", "nat_mini", []),
        ("nat_mini_dense", "nat_mini", ["out_norms=0,1,2,3"]),
        ("davit_tiny_official", "densezoo_davit_tiny", []),
        ("davit_tiny_official_dense", "densezoo_davit_tiny", ["out_norms=0,1,2,3"]),
        ("davit_tiny", "densezoo_davit_tiny", []),
        ("quadtree_b0", "quadtree_b0", []),
        ("poolformer_s12_timm", "densezoo_poolformer_s12", []),
        ("focalnet_tiny_srf_official", "densezoo_focalnet_tiny_srf", []),
    ],
)
def test_published_layouts(record, name, args, capsys):
    """Official, dense and timm's, by the names of the golden records; a detector's other parts are dropped."""
    keys = parity.load(GOLDENS / f"{record}.json")["keys"]
    prefix = "backbone." if record.endswith("_dense") else ""
    state = {prefix + key: torch.full(shape, 0.5) if shape else torch.tensor(3) for key, shape in keys.items()}
    if prefix:
        state["neck.weight"] = torch.ones(2)
    torch.save({"state_dict": state}, "published.pth")
    convert(["published.pth", name, "out.safetensors", *(["--model-args", *args] if args else [])])
    out = capsys.readouterr().out
    assert "missing: none" in out and ("  neck.weight" in out) == bool(prefix)
    model = densezoo.load("out.safetensors")
    assert all((value == 0.5).all() for value in model.state_dict().values() if value.is_floating_point())


@pytest.mark.parametrize("name", ["davit", "poolformer"])
def test_classifiers_of_mmpretrain(name, capsys):
    pytest.importorskip("mmpretrain")
    from mmpretrain.models import backbones, heads

    import densezoo.openmmlab  # noqa: F401

    if name == "davit":
        ours, backbone, width = "densezoo_davit_tiny", backbones.DaViT("tiny", out_indices=(3,)), 768
        # mmpretrain pads the stem at the bottom and right alone, for which its weights were not trained.
        backbone.patch_embed.adaptive_padding, backbone.patch_embed.projection.padding = None, (3, 3)
    else:
        ours, backbone, width = "densezoo_poolformer_s12", backbones.PoolFormer("s12"), 512
    classifier = torch.nn.ModuleDict(dict(backbone=backbone, head=heads.LinearClsHead(1000, width)))
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 0.5)
    torch.save({"state_dict": classifier.state_dict(), "meta": {}}, "theirs.pth")
    convert(["theirs.pth", ours, "ours.safetensors"])
    assert "missing: none" in capsys.readouterr().out
    model = densezoo.load("ours.safetensors")
    image = torch.randn(1, 3, 224, 224)  # no map is smaller than a window
    with torch.no_grad():
        features = classifier.eval()["backbone"](image)[-1]
        got = model.forward_intermediates(image, intermediates_only=True, norm=not model.pool_first)[-1]
        if model.pool_first:
            got = model.norm(got.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(got, features, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.head.weight, classifier["head"].fc.weight)


def test_whole_detector(capsys):
    """As mmdet 2 wrote it, with DDP's prefix and the copies of its averaging hook."""
    pytest.importorskip("mmdet")
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    path = write_config(Path("detector.py"), DETECTOR, Path("nowhere"))
    cfg = Config.fromfile(path)
    init_default_scope("mmdet")
    model = MODELS.build(cfg.model)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    state |= {f"module.ema_{key.replace('.', '_')}": value + 1 for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "meta": {}}, "epoch_12.pth")
    convert(["epoch_12.pth", str(path), "detector.safetensors"])
    out = capsys.readouterr().out
    assert f"matched: {len(model.state_dict())} of" in out and f"dropped: {len(model.state_dict())}" in out
    loaded = densezoo.load("detector.safetensors").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())

    short = {key: value for key, value in state.items() if "fc_cls" not in key}
    torch.save({"state_dict": short}, "short.pth")
    assert "roi_head.bbox_head.fc_cls" in fails(capsys, "short.pth", str(path), "short.safetensors")
    body = {key.removeprefix("module.backbone."): value for key, value in state.items() if ".backbone." in key}
    torch.save(body, "body.pth")
    assert "has a backbone alone" in fails(capsys, "body.pth", str(path), "body.safetensors")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("made",)


def test_code_is_run_only_if_trusted(capsys):
    state = published(num_classes=7)
    torch.save({"model": state, "meta": Hostile()}, "hostile.pth")
    arguments = ["hostile.pth", "nat_mini", "out.safetensors", *ARGS, "num_classes=7"]
    error = fails(capsys, *arguments)
    assert "mkdir" in error and "--trust" in error and not Path("made").exists()
    convert([*arguments, "--trust"])
    assert "RUNNING the code in hostile.pth" in capsys.readouterr().err and Path("made").exists()
    assert torch.equal(densezoo.load("out.safetensors").norm.weight, state["norm.weight"])


def test_trust_alone_runs_nothing(capsys):
    torch.save(published(num_classes=7), "plain.pth")
    convert(["plain.pth", "nat_mini", "out.safetensors", "--trust", *ARGS, "num_classes=7"])
    assert "RUNNING" not in capsys.readouterr().err


def test_pickled_modules(capsys):
    model = timm.create_model("nat_mini", **SMALL, num_classes=7)
    torch.save(model, "whole.pth")
    assert "densezoo.backbones.nat.NAT" in fails(capsys, "whole.pth", "nat_mini", "out.safetensors")
    convert(["whole.pth", "nat_mini", "out.safetensors", "--trust", *ARGS, "num_classes=7"])
    assert torch.equal(densezoo.load("out.safetensors").norm.weight, model.norm.weight)


def test_mistakes(capsys):
    torch.save(published(num_classes=7), "nat.pth")
    good = ["nat.pth", "nat_mini", "out.safetensors", *ARGS]
    assert "num_classes=7" in fails(capsys, *good)
    assert "norm0.weight" in fails(capsys, *good, "out_norms=0,1,2,3")
    assert "did you mean 'nat_mini'?" in fails(capsys, "nat.pth", "nat_mimi", "out.safetensors")
    assert "nat.pht: no such file" in fails(capsys, "nat.pht", *good[1:])
    assert "ends with .safetensors" in fails(capsys, "nat.pth", "nat_mini", "out.pth", *ARGS)
    assert "kernel_sise" in fails(capsys, "nat.pth", "nat_mini", "out.safetensors", "--model-args", "kernel_sise=3")
    assert "expected KEY=VALUE" in fails(capsys, "nat.pth", "nat_mini", "out.safetensors", "--model-args", "seven")
    Path("nat.pth").write_bytes(Path("nat.pth").read_bytes()[:1000])
    assert "nat.pth: is damaged" in fails(capsys, *good)
    safetensors.torch.save_file(published(num_classes=7), "same.safetensors")
    assert "is the source itself" in fails(capsys, "same.safetensors", "nat_mini", "same.safetensors", *ARGS)
