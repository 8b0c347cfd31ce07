"""tools/export.py: published checkpoints load everywhere, programs and ONNX files give what the model gives."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tiny import DETECTOR, tool, write_config

import densezoo
from densezoo.checkpoints import load_published
from densezoo.runner import load_weights

export = tool("export").main
SMALL = dict(embed_dims=(8, 8), depths=(1, 1), token_mixers=("pooling", "pooling"))
ARGS = ["--model-args", *(f"{key}={value}".replace(" ", "") for key, value in SMALL.items())]
NAME = "densezoo_poolformer_s12"
TIMM = f"""
custom_imports = dict(imports=["densezoo.openmmlab"])
default_scope = "mmpretrain"
model = dict(
    type="TimmClassifier", model_name="{NAME}", num_classes=4, drop_path_rate=0.1, **{SMALL},
    data_preprocessor=dict(type="ClsDataPreprocessor", num_classes=4),
    loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, num_classes=4),
)
work_dir = "somewhere"
"""
IMAGE = torch.randn(1, 3, 40, 72, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(base: str) -> tuple[str, torch.nn.Module, dict]:
    """Return a config's path and its model, and write what a training with averaging leaves: epoch_3.pth."""
    path = write_config(Path("run.py"), base, Path("nowhere"))
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    state = model.state_dict()
    averages = {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in state.items()}
    raw = {f"module.{key}": value for key, value in state.items()} | {"steps": torch.tensor(3)}
    meta = dict(epoch=3, iter=30, seed=1, dataset_meta=dict(classes=("a", "b")), cfg="import os")
    # mmengine's hook puts the averages in the model's place.
    content = dict(state_dict=averages, ema_state_dict=raw, optimizer=dict(state={0: torch.ones(9)}), meta=meta)
    torch.save(content, "epoch_3.pth")
    load_weights(model, dict(state_dict=averages), "averages")
    return str(path), model, averages


def fails(capsys, *arguments: str) -> str:
    before = {path: path.stat().st_size for path in Path().rglob("*")}
    with pytest.raises(SystemExit) as end:
        export(list(arguments))
    assert end.value.code == 2
    assert {path: path.stat().st_size for path in Path().rglob("*")} == before
    return capsys.readouterr().err


def test_detector(capsys):
    """A detector's published checkpoint, on a machine without its config, in a config, and its backbone in timm."""
    config, model, averages = train(DETECTOR)
    Path("metrics.json").write_text('{"coco/bbox_mAP": 0.5}')
    export(["checkpoint", config, "epoch_3.pth", "--metrics", "metrics.json"])
    (path,) = Path("published").glob("*.safetensors")
    assert f"written to {path}" in capsys.readouterr().out
    assert safetensors.torch.load_file(path).keys() == averages.keys()
    info = json.loads(path.with_suffix(".json").read_text())["densezoo"]
    assert info["metrics"] == {"coco/bbox_mAP": 0.5} and info["training"]["weights"] == "averaged"
    assert info["training"]["epoch"] == 3 and info["data"]["train"]["type"] == "CocoDataset"
    assert info["config"]["model"]["type"] == "MaskRCNN" and "densezoo" in info["code"]

    Path(config).unlink()
    loaded = densezoo.load(path)
    assert loaded.dataset_meta == dict(classes=["a", "b"])
    assert all(torch.equal(value, averages[key]) for key, value in loaded.state_dict().items())
    load_weights(model, safetensors.torch.load_file(path), str(path))
    arch = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), mlp_ratio=2.0, kernel_size=3)
    backbone = timm.create_model("nat_mini", **arch, features_only=True, out_norms=(0, 1, 2, 3)).eval()
    load_published(backbone, path)
    with torch.no_grad():
        assert all(map(torch.equal, backbone(IMAGE), model.backbone(IMAGE)))


def test_timm_classifier_of_a_config():
    config, model, averages = train(TIMM)
    export(["checkpoint", config, "epoch_3.pth", "--out-dir", "out"])
    (path,) = Path("out").glob("run-*.safetensors")
    again = timm.create_model(NAME, **SMALL, num_classes=4, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(again(IMAGE), model.model(IMAGE))
        assert torch.equal(densezoo.load(path)(IMAGE), model.model(IMAGE))
    info = json.loads(path.with_suffix(".json").read_text())
    assert "somewhere" not in json.dumps(info) and info["architecture"] == NAME


def test_timm_name_with_averages():
    torch.manual_seed(0)
    states = [timm.create_model(NAME, **SMALL, num_classes=4).state_dict() for _ in range(2)]
    torch.save(dict(state_dict=states[0], state_dict_ema=states[1], optimizer={}), "last.pth")
    export(["checkpoint", NAME, "last.pth", *ARGS, "num_classes=4"])
    (path,) = Path("published").glob("*.safetensors")
    assert all(torch.equal(value, states[1][key]) for key, value in densezoo.load(path).state_dict().items())


def test_program_and_onnx(capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = timm.create_model(NAME, **SMALL, num_classes=4).eval()
    torch.save(model.state_dict(), "weights.pth")
    export(["checkpoint", NAME, "weights.pth", *ARGS, "num_classes=4"])
    (path,) = Path("published").glob("*.safetensors")
    export(["program", str(path), "--size", "64", "96"])
    export(["onnx", NAME, "weights.pth", "--size", "64", "96", *ARGS, "num_classes=4"])
    assert capsys.readouterr().out.count("largest difference from the model, relative: logits") == 4
    program = torch.export.load(path.with_suffix(".pt2")).module()
    session = onnxruntime.InferenceSession(Path("published", NAME + ".onnx"))
    for images in (IMAGE, torch.randn(3, 3, 33, 65)):
        with torch.no_grad():
            expected = model(images)
        torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-5)
        got = session.run(None, {"images": images.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_differs_is_not_written(monkeypatch, capsys):
    model = timm.create_model(NAME, **SMALL, num_classes=4)
    torch.save(model.state_dict(), "weights.pth")
    monkeypatch.setitem(export.__globals__, "runner", lambda path: lambda images: [torch.zeros(len(images), 4)])
    options = ["--out-dir", ".", "--size", "64", "64", *ARGS, "num_classes=4"]
    error = fails(capsys, "program", NAME, "weights.pth", *options)
    assert "differs from the model at 96x64" in error


def test_mistakes(capsys):
    config, _, averages = train(TIMM)
    checkpoint = ["checkpoint", config, "epoch_3.pth"]
    assert "run.yp" in fails(capsys, "checkpoint", "run.yp", "epoch_3.pth")
    assert "epoch_4.pth: no such file" in fails(capsys, "checkpoint", config, "epoch_4.pth")
    assert "none.json" in fails(capsys, *checkpoint, "--metrics", "none.json")
    Path("broken.json").write_text("{")
    assert "broken.json: is no JSON" in fails(capsys, *checkpoint, "--metrics", "broken.json")
    assert "is no folder" in fails(capsys, *checkpoint, "--out-dir", "broken.json")
    assert "a config says all" in fails(capsys, *checkpoint, "--model-args", "num_classes=3")
    assert "give the checkpoint" in fails(capsys, "onnx", NAME)
    assert "--size: got 8 8, expected 32 or more" in fails(capsys, "onnx", NAME, "x.pth", "--size", "8", "8")
    torch.save(dict(list(averages.items())[1:]), "short.pth")
    assert next(iter(averages)) in fails(capsys, "checkpoint", config, "short.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(export.__globals__, "find_spec", lambda name: name != "onnxscript")
        assert "onnx: needs onnxscript; pip install onnxscript" in fails(capsys, "onnx", NAME, "epoch_3.pth")
    with pytest.raises(SystemExit) as end:
        export(["onxx", NAME])
    assert end.value.code == 2 and "invalid choice: 'onxx'" in capsys.readouterr().err
