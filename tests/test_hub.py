"""push_to_hub: the folder loads in timm and by densezoo.load, the card is valid, and nothing is sent unasked."""

import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from test_publishing import IMAGE, SMALL, write
from tiny import DETECTOR, write_config

import densezoo
from densezoo import hub, publishing


@pytest.fixture(autouse=True)
def sent(tmp_path, monkeypatch) -> list:
    """Work in an empty folder, and keep what would be sent."""
    monkeypatch.chdir(tmp_path)
    calls = []

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            calls.append(("create", repo_id, kwargs))

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return "https://example.org"

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(ModelCard, "validate", lambda card: calls.append(("validate", card.data.library_name)))
    return calls


@pytest.mark.parametrize("kwargs", [dict(num_classes=5), dict(out_norms=(0, 1, 2, 3))], ids=["classifier", "dense"])
def test_folder_loads(kwargs, sent, capsys):
    path, model = write(Path("published"), **kwargs)
    folder = densezoo.push_to_hub(path, "someone/nat", license="mit")
    out = capsys.readouterr().out
    assert folder == Path("hub/nat") and not sent and "Nothing was sent" in out
    assert all(name in out for name in ("model.safetensors", "config.json", "README.md", "license: mit"))
    with torch.no_grad():
        assert torch.equal(densezoo.load(folder)(IMAGE), model(IMAGE))
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(IMAGE), model(IMAGE))
        features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()(IMAGE)
        expected = model.forward_intermediates(IMAGE, intermediates_only=True)
        assert all(map(torch.equal, features, expected))
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "densezoo"
    assert card.data.eval_results[0].metric_value == 50.0


def test_detector(capsys):
    pytest.importorskip("mmdet")
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(write_config(Path("detector.py"), DETECTOR, Path("nowhere")))
    init_default_scope("mmdet")
    model = MODELS.build(cfg.model).eval()
    classes = {"classes": ["a", "b"]}
    facts = dict(training=dict(dataset_meta=classes), metrics={"coco/bbox_mAP": 0.3})
    info = publishing.describe_config(cfg.to_dict(), **facts)
    path = publishing.save(model.state_dict(), Path("published/detector-{hash}.safetensors"), info)
    folder = densezoo.push_to_hub(path, "someone/detector")
    loaded = densezoo.load(folder)
    assert type(loaded).__name__ == "MaskRCNN" and loaded.dataset_meta == classes
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        expected = model.backbone(IMAGE)
        assert all(map(torch.equal, loaded.backbone(IMAGE), expected))
        assert all(map(torch.equal, backbone(IMAGE), expected))
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "object-detection" and "MaskRCNN with nat_mini" in card.text


def test_uploads_when_asked(sent):
    path, _ = write(Path("published"), num_classes=5)
    densezoo.push_to_hub(path, "someone/nat", upload=True, private=True)
    files = ["README.md", "config.json", "model.safetensors"]
    assert sent == [
        ("validate", "densezoo"),
        ("create", "someone/nat", dict(private=True, exist_ok=True)),
        ("upload", "someone/nat", files),
    ]


def test_building_again_keeps_the_card(capsys):
    path, _ = write(Path("published"), num_classes=5)
    folder = densezoo.push_to_hub(path, "someone/nat")
    card = (folder / "README.md").read_text() + "\nMy own words.\n"
    (folder / "README.md").write_text(card)
    densezoo.push_to_hub(path, "someone/nat")
    assert "My own words." in (folder / "README.md").read_text() and "stays" in capsys.readouterr().out


def test_mistakes(tmp_path, sent):
    path, _ = write(Path("published"), num_classes=5)

    def fails(match, *args, error=ValueError, **kwargs):
        with pytest.raises(error, match=match):
            densezoo.push_to_hub(*args, **kwargs, upload=True)
        assert not sent and not Path("hub").exists()

    fails("owner/name", path, "nat")
    fails("Repo id must", path, "some one/nat")
    fails("none.safetensors", "none.safetensors", "someone/nat", error=FileNotFoundError)
    fails("none.md", path, "someone/nat", card="none.md", error=FileNotFoundError)
    Path("bare.md").write_text("# A card without a header")
    fails("no YAML header", path, "someone/nat", card="bare.md")
    Path("list.md").write_text("---\n- a\n---\n")
    fails("should be a dict", path, "someone/nat", card="list.md")
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("all my work")
    fails("holds something else .thesis.tex", path, "someone/nat", folder="full")
    assert Path("full/thesis.tex").read_text() == "all my work"
    info = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(info | dict(model_args=SMALL | dict(kernel_size=5), num_classes=5)))
    fails("is not of this model", path, "someone/nat")
