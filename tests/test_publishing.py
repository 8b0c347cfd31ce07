"""Published checkpoints: what is written is whole, loads without the training config, and runs nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import densezoo
from densezoo import publishing

SMALL = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), kernel_size=3, mlp_ratio=2.0)
IMAGE = torch.randn(2, 3, 40, 72, generator=torch.Generator().manual_seed(0))


def write(folder: Path, name: str = "nat_mini", **kwargs) -> tuple[Path, torch.nn.Module]:
    model = timm.create_model(name, **SMALL, **kwargs).eval()
    info = publishing.describe_timm(name, SMALL | kwargs, metrics={"top1": 50.0})
    return publishing.save(model.state_dict(), folder / f"{name}-{{hash}}.safetensors", info), model


def change(path: Path, **changes) -> None:
    """Change the sidecar of a published checkpoint."""
    info = json.loads(path.with_suffix(".json").read_text())
    info["densezoo"] |= changes.pop("densezoo", {})
    path.with_suffix(".json").write_text(json.dumps(info | changes))


def test_name_carries_the_hash(tmp_path):
    path, _ = write(tmp_path, num_classes=5)
    digest = publishing.sha256(path)
    assert path.name == f"nat_mini-{digest[:8]}.safetensors"
    info = json.loads(path.with_suffix(".json").read_text())
    assert info["densezoo"]["sha256"] == digest and info["densezoo"]["file"] == path.name
    assert info["densezoo"]["code"]["densezoo"] == densezoo.__version__
    assert {file.name for file in tmp_path.iterdir()} == {path.name, path.with_suffix(".json").name}


KWARGS = [dict(num_classes=5), dict(num_classes=0), dict(out_norms=(0, 1, 2, 3)), dict(in_chans=4)]


@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
def test_load(tmp_path, kwargs):
    path, model = write(tmp_path, **kwargs)
    loaded = densezoo.load(path)
    assert not loaded.training
    image = IMAGE if "in_chans" not in kwargs else torch.cat([IMAGE, IMAGE[:, :1]], 1)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))
        # By the file alone, too.
        path.with_suffix(".json").unlink()
        assert torch.equal(densezoo.load(str(path))(image), model(image))


def test_files_of_timm_load(tmp_path):
    """A folder of timm's own: no `densezoo` in its JSON."""
    path, model = write(tmp_path, num_classes=5)
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(path, folder / "model.safetensors")
    info = json.loads(path.with_suffix(".json").read_text())
    del info["densezoo"]
    (folder / "config.json").write_text(json.dumps(info))
    with torch.no_grad():
        assert torch.equal(densezoo.load(folder)(IMAGE), model(IMAGE))


def test_loads_in_timm(tmp_path):
    path, model = write(tmp_path, num_classes=5)
    again = timm.create_model("nat_mini", **SMALL, num_classes=5, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(again(IMAGE), model(IMAGE))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(architecture="resnot"), ["architecture", "resnot"]),
        (dict(architecture=3), ["architecture"]),
        (dict(model_args=[1]), ["model_args", "list"]),
        (dict(model_args=dict(checkpoint_path="x.pth")), ["model_args", "checkpoint_path"]),
        (dict(model_args=dict(kernel_sise=3)), ["model_args", "kernel_sise"]),
        (dict(model_args=SMALL | dict(depths=[10**9] * 4)), ["depths", "tensors"]),
        (dict(model_args=SMALL | dict(embed_dim=10**6)), ["is not of this model"]),
        (dict(model_args=SMALL | dict(embed_dim="wide")), ["cannot be built"]),
        (dict(num_classes=7, model_args=SMALL), ["head.weight", "(5, 128)", "(7, 128)"]),
        (dict(densezoo=dict(sha256="0" * 64)), ["SHA-256"]),
        (dict(densezoo=dict(library="openmmlab", config=[])), ["densezoo.config"]),
    ],
)
def test_sidecars_that_do_not_fit(tmp_path, changes, words):
    path, _ = write(tmp_path, num_classes=5)
    change(path, **changes)
    with pytest.raises(ValueError) as raised:
        densezoo.load(path)
    assert all(word in str(raised.value) for word in (path.name.split(".")[0], *words))


@pytest.mark.parametrize(
    "model",
    [
        dict(type="os.system", command="mkdir made"),
        dict(type="mmengine.load", file="evil.pkl"),
        dict(type="MaskRCNN", backbone=dict(type="subprocess.run", args=["mkdir", "made"])),
        dict(type="RetinaNet", test_cfg=dict(nms=dict(type="__import__('os').mkdir('made')"))),
        dict(type=["os", "system"]),
    ],
    ids=["function", "loader", "nested", "evaluated", "list"],
)
def test_configs_name_registered_models_alone(tmp_path, monkeypatch, model):
    pytest.importorskip("mmdet")
    monkeypatch.chdir(tmp_path)
    path, _ = write(tmp_path, num_classes=5)
    change(path, densezoo=dict(library="openmmlab", config=dict(model=model, default_scope="mmdet")))
    with pytest.raises(ValueError, match="which no library registers"):
        densezoo.load(path)
    assert not Path("made").exists()


def test_missing_parts(tmp_path):
    path, model = write(tmp_path, num_classes=5)
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        densezoo.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="has no config.json"):
        densezoo.load(tmp_path)
    torch.save(model.state_dict(), tmp_path / "nat.pth")
    with pytest.raises(ValueError, match=r"tools/convert\.py"):
        densezoo.load(tmp_path / "nat.pth")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="bare.json"):
        densezoo.load(tmp_path / "bare.safetensors")
    path.with_suffix(".json").write_text("[" * 100000)
    with pytest.raises(ValueError, match="is no JSON"):
        densezoo.load(path)
    for file in ("../nat.safetensors", "nat.safetensors"):
        (tmp_path / "config.json").write_text(json.dumps(dict(densezoo=dict(file=file))))
        with pytest.raises((ValueError, FileNotFoundError), match="nat.safetensors"):
            densezoo.load(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_importing_stays_light():
    """Loading is imported when it is first used."""
    import subprocess
    import sys

    code = "import sys, densezoo; print('densezoo.publishing' in sys.modules, callable(densezoo.load))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False True\n"
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        densezoo.laod  # noqa: B018


CONFIGS = Path(__file__).parents[1] / "configs"
CHECKED = ("nat/mask-rcnn_nat-tiny_fpn_3x_coco.py", "agent/semantic-fpn_agent-pvt-tiny_40k_ade20k-512x512.py")
WHOLE = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("[!_]*/*.py") if "_in1k" not in path.name)


@pytest.mark.parametrize("config", [pytest.param(c, marks=[] if c in CHECKED else pytest.mark.slow) for c in WHOLE])
def test_configs_survive_as_json(config):
    """The whole model and, from timm, its backbone have the tensors that the config's model has."""
    pytest.importorskip("mmdet")
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(CONFIGS / config)
    info = publishing.describe_config(cfg.to_dict())
    init_default_scope(cfg.default_scope)
    with torch.device("meta"):
        own = {key: value.shape for key, value in MODELS.build(cfg.model).state_dict().items()}
        again = publishing._build_openmmlab(info["densezoo"]["config"], Path(config)).state_dict()
        assert {key: value.shape for key, value in again.items()} == own
        # Backbones without their last stages are none that timm can build.
        if "architecture" in info:
            body = timm.create_model(info["architecture"], **info["model_args"]).state_dict()
            shapes = {key.removeprefix("backbone."): own[key] for key in own if key.startswith("backbone.")}
            assert {key: value.shape for key, value in body.items()} == shapes
