"""Published layouts load completely; anything else is refused, with a message that names it and the model untouched."""

import argparse
import functools
import http.server
import logging
import os
import pickle
import re
import threading
import zipfile
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path

import numpy as np
import parity
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import densezoo  # noqa: F401  (registers the backbones)
from densezoo.checkpoints import LoadReport, convert_published, load_published, read_checkpoint, read_state_dict

SMALL = dict(embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3)
HEAD = ["norm.weight", "norm.bias", "head.weight", "head.bias"]


def build(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("nat_mini", **SMALL | dict(num_classes=7) | kwargs)


def features(**kwargs) -> nn.Module:
    return build(features_only=True, **kwargs)


def published(**kwargs) -> dict[str, torch.Tensor]:
    """Return a published state dict, with values that no freshly built model has."""
    state = build(**kwargs).state_dict()
    generator = torch.Generator().manual_seed(1)
    return OrderedDict((key, torch.randn(value.shape, generator=generator)) for key, value in state.items())


def dense(**kwargs) -> dict[str, torch.Tensor]:
    model = features(out_norms=(0, 1, 2, 3), **kwargs)
    return {key.removeprefix("model."): value + 1 for key, value in model.state_dict().items()}


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def refuses(source, *words: str, model: nn.Module | None = None, error: type = ValueError) -> None:
    """Assert that loading raises, says every word, and changes nothing."""
    model = model or build()
    before = copy_of(model)
    with pytest.raises(error) as raised:
        load_published(model, source)
    for word in words:
        assert word in str(raised.value)
    assert_equal(model.state_dict(), before)


STATE = published()
WRAPPED = {
    "bare": STATE,
    "model": {"model": STATE},
    "state_dict": {"state_dict": STATE, "epoch": 3, "optimizer": {"state": {}}},
    "averaged": {"state_dict": published(num_classes=9), "state_dict_ema": STATE},
    "ddp": prefixed(STATE, "module."),
    "compiled": {"model": prefixed(STATE, "_orig_mod.module.")},
    "nested": {"model": {"state_dict": prefixed(STATE, "module.")}},
    "with counters": {**STATE, "epoch": 3},
}


@pytest.mark.parametrize("source", WRAPPED.values(), ids=WRAPPED)
def test_wrappings_are_removed(source):
    model = build()
    report = load_published(model, source)
    assert_equal(model.state_dict(), STATE)
    assert (report.matched, report.dropped, report.missing) == (len(STATE), [], [])


def test_renamed_maps_published_names_to_the_models():
    report = load_published(build(), prefixed(STATE, "module."))
    assert report.renamed == {f"module.{key}": key for key in STATE}
    assert load_published(build(), STATE).renamed == {}


def training_checkpoint() -> dict:
    """Return what a training run leaves behind: a whole detector, and bookkeeping of several kinds."""
    state = prefixed(dense(), "backbone.") | {"neck.weight": torch.ones(2), "data_preprocessor.mean": torch.ones(3)}
    meta = dict(best=np.float64(0.5), classes=("a",), palette=np.arange(3), args=argparse.Namespace(lr=0.1))
    return dict(meta=meta, state_dict=state, optimizer=dict(state={0: torch.ones(1)}))


def test_takes_the_backbone_of_a_whole_detector(tmp_path):
    torch.save(training_checkpoint(), path := tmp_path / "epoch_3.pth")
    model = features(out_norms=(0, 1, 2, 3))
    report = load_published(model, path)
    assert report.dropped == ["neck.weight", "data_preprocessor.mean"]
    assert report.matched == len(dense()) and not report.missing
    assert_equal(model.model.state_dict(), dense())


def test_reads_what_mmengine_saves(tmp_path):
    logs = pytest.importorskip("mmengine.logging")
    hub = logs.MessageHub("test")
    hub.update_scalar("train/loss", 0.5)
    hub.update_info("iter", 3)
    torch.save(training_checkpoint() | {"message_hub": hub.state_dict()}, path := tmp_path / "epoch_3.pth")
    assert load_published(features(out_norms=(0, 1, 2, 3)), path).matched == len(dense())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", [str, Path])
def test_reads_files(tmp_path, suffix, kind):
    path = tmp_path / f"nat.{suffix}"
    safetensors.torch.save_file(STATE, path) if suffix == "safetensors" else torch.save({"model": STATE}, path)
    model = build()
    assert load_published(model, kind(path)).matched == len(STATE)
    assert_equal(model.state_dict(), STATE)


def test_reads_the_old_format_and_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(STATE, tmp_path / "nat.pth", _use_new_zipfile_serialization=False)
    assert_equal(read_state_dict("~/nat.pth"), STATE)


def test_a_checkpoint_is_read_with_all_that_it_holds(tmp_path):
    torch.save(dict(state_dict=STATE, meta=dict(epoch=3), history=np.arange(3)), tmp_path / "run.pth")
    content = read_checkpoint(tmp_path / "run.pth")
    assert content.keys() == {"state_dict", "meta", "history"} and content["meta"] == dict(epoch=3)
    assert_equal(content["state_dict"], STATE)
    with pytest.raises(ValueError, match="source: got dict, expected a path or a URL"):
        read_checkpoint(content)


def test_classifier_into_a_model_without_one():
    model = build(num_classes=0)
    assert load_published(model, STATE) == LoadReport(len(STATE) - 2, {}, HEAD[2:], [], [])
    assert torch.equal(model.norm.weight, STATE["norm.weight"])


def test_classifier_into_a_dense_model():
    model = features(out_norms=(0, 2))
    report = load_published(model, STATE)
    fresh = [f"norm{i}.{name}" for i in (0, 2) for name in ("weight", "bias")]
    assert report == LoadReport(len(STATE) - 4, {}, HEAD, fresh, [])
    assert torch.equal(model.model.norm0.weight, torch.ones(16))
    assert torch.equal(model.model.levels[3].blocks[0].attn.rpb, STATE["levels.3.blocks.0.attn.rpb"])


@pytest.mark.parametrize("norms", [(), (1,)])
def test_dense_into_a_model_with_fewer_norms(norms):
    report = load_published(features(out_norms=norms), dense())
    assert {key.split(".")[0] for key in report.dropped} == {f"norm{i}" for i in range(4) if i not in norms}
    assert not report.missing


@pytest.mark.parametrize("state", [STATE, dense()], ids=["classifier", "dense"])
def test_stages_that_are_not_built_are_dropped(state):
    model = features(out_indices=(0, 1))
    report = load_published(model, state)
    assert report.matched == len(model.state_dict()) and not report.missing
    assert set(report.dropped) == set(state) - set(model.model.state_dict())
    assert "levels.1.downsample.norm.weight" in report.dropped and "levels.3.blocks.0.attn.rpb" in report.dropped


@pytest.mark.parametrize(
    "name",
    "nat_mini nat_mini_dense dinat_tiny_dense dinat_s_tiny dinat_s_tiny_dense quadtree_b0 quadtree_b0_dense".split(),
)  # fmt: skip
def test_published_layouts(name):
    keys = parity.load(Path(__file__).parent / "goldens" / f"{name}.json")["keys"]
    state = {key: torch.full((1,), 0.5).expand(shape) for key, shape in keys.items()}
    kwargs = dict(features_only=True, out_norms=(0, 1, 2, 3)) if name.endswith("_dense") else {}
    model = timm.create_model(name.removesuffix("_dense"), **kwargs)
    assert load_published(model, state) == LoadReport(len(keys), {}, [], [], [])
    assert all((value == 0.5).all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("record", "name", "kwargs"),
    [
        ("davit_tiny", "densezoo_davit_tiny", {}),
        ("davit_tiny_official", "densezoo_davit_tiny", {}),
        ("davit_tiny_official_dense", "densezoo_davit_tiny", dict(out_norms=(0, 1, 2, 3))),
        ("maxvit_tiny_tf_224", "densezoo_maxvit_tiny_tf_224", {}),
        ("agent_deit_tiny", "agent_deit_tiny", {}),
        ("agent_pvt_tiny", "agent_pvt_tiny", {}),
        ("agent_pvt_tiny_dense", "agent_pvt_tiny", dict(num_classes=0)),
        ("agent_swin_tiny", "agent_swin_tiny", {}),
        ("agent_swin_tiny_dense", "agent_swin_tiny", dict(out_norms=(0, 1, 2, 3))),
        ("agent_cswin_tiny", "agent_cswin_tiny", {}),
        ("flatten_pvt_tiny", "flatten_pvt_tiny", {}),
        ("flatten_pvt_v2_b0", "flatten_pvt_v2_b0", {}),
        ("flatten_swin_tiny", "flatten_swin_tiny", {}),
        ("flatten_cswin_tiny", "flatten_cswin_tiny", {}),
    ],
)
def test_published_layouts_of_other_families(record, name, kwargs):
    keys = parity.load(Path(__file__).parent / "goldens" / f"{record}.json")["keys"]
    state = {f"module.{key}": torch.tensor(0.5 if shape else 3).expand(shape) for key, shape in keys.items()}
    model = timm.create_model(name, **kwargs)
    report = load_published(model, {"model": state, "epoch": 3})
    # Nothing but what the code computes or never uses.
    unused = r"relative_position_index|attn_mask|^module\.norm\.(weight|bias)"
    assert all(re.search(unused, key) for key in report.dropped) and not report.missing and not report.resized
    assert report.matched == len(keys) - len(report.dropped) == len(model.state_dict())
    assert all((value == 0.5).all() for key, value in model.state_dict().items() if "num_batches" not in key)


def test_conversion_keeps_what_does_not_fit_and_what_is_not_of_the_zoo():
    other = nn.Sequential(nn.Linear(2, 2))
    assert_equal(convert_published(other, {"state_dict": prefixed(STATE, "backbone.")}), prefixed(STATE, "backbone."))
    state = {**STATE, "head.weight": torch.zeros(9, 4), "foreign.weight": torch.zeros(1)}
    assert_equal(convert_published(build(), {"model": prefixed(state, "module.")}), state)


def test_other_kernel_size_resizes_the_bias_tables():
    report = load_published(build(kernel_size=5), STATE)
    assert report.resized == [key for key in STATE if key.endswith("rpb")]
    assert "5 resized" in str(report)


def test_keeps_dtype_and_mode():
    model = build().to(torch.bfloat16).eval()
    load_published(model, STATE)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16} and not model.training
    assert torch.equal(model.norm.weight, STATE["norm.weight"].bfloat16())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_loads_into_wrapped_models(wrap):
    model = build()
    assert load_published(wrap(model), STATE).matched == len(STATE)
    assert_equal(model.state_dict(), STATE)


def test_report_says_what_happened(caplog, tmp_path):
    torch.save(STATE, path := tmp_path / "nat.pth")
    with caplog.at_level(logging.INFO, logger="densezoo"):
        report = load_published(features(out_norms=(0,)), path)
    text = (
        f"loaded {len(STATE) - 4} of {len(STATE) - 2} tensors, 4 dropped ({', '.join(HEAD)}), "
        "2 keep their initial values (norm0.weight, norm0.bias)"
    )
    assert str(report) == text
    assert [record.getMessage() for record in caplog.records] == [f"{path}: {text}"]


class Renaming(nn.Module):
    """A backbone whose family, this module, renames keys, splits one and drops one."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.norm = nn.LayerNorm(2)


def checkpoint_filter_fn(state_dict, model):
    state_dict.pop("index")
    state_dict["query.weight"], state_dict["value.weight"] = state_dict.pop("qv").chunk(2)
    return {key.replace("ln.", "norm."): value for key, value in state_dict.items()}


def test_family_conversion():
    state = {"ln.weight": torch.zeros(2), "ln.bias": torch.ones(2), "index": torch.ones(1)}
    state["qv"] = torch.arange(8.0).view(4, 2)
    model = Renaming()
    report = load_published(model, prefixed(state, "module."))
    assert report.matched == 4 and report.dropped == ["module.index"] and not report.missing
    assert report.renamed["module.ln.weight"] == "norm.weight" and "module.qv" in report.renamed
    assert torch.equal(model.value.weight, state["qv"][2:])
    refuses({"ln.weight": torch.ones(2)}, "the given state dict", "Renaming", "index", model=Renaming())


def test_missing_file_names_its_neighbour(tmp_path):
    torch.save(STATE, tmp_path / "nat_mini.pth")
    refuses(tmp_path / "nat_mimi.pth", "nat_mimi.pth", "nat_mini.pth", error=FileNotFoundError)
    refuses(tmp_path / "no" / "nat.pth", "no/nat.pth", "no folder", error=FileNotFoundError)
    refuses(tmp_path, str(tmp_path), "folder")
    refuses(3, "source", "int")


def write_truncated(path: Path) -> None:
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_damaged(path: Path) -> None:
    torch.save(STATE, path)
    data = bytearray(path.read_bytes())
    place = data.index(b"data.pkl") + 80
    data[place : place + 200] = os.urandom(200)
    path.write_bytes(data)


def write_bomb(path: Path) -> None:
    torch.save({"weight": torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as plain:
        records = {record.filename: plain.read(record) for record in plain.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def write_endless(path: Path) -> None:
    endless = {}
    endless["model"] = endless
    torch.save(endless, path)


@pytest.mark.parametrize(
    ("write", "word"),
    [
        (write_truncated, "damaged"),
        (write_damaged, "damaged"),
        (write_bomb, "compressed"),
        (write_endless, "no tensors"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_text("<html>404</html>"), "damaged"),
        (lambda path: torch.save([torch.ones(1)], path), "list"),
        (lambda path: torch.save({"epoch": 3}, path), "epoch"),
    ],
    ids=["truncated", "damaged", "bomb", "endless", "empty", "page", "list", "no tensors"],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_unreadable_files(tmp_path, write, word, suffix):
    write(path := tmp_path / f"nat.{suffix}")
    refuses(path, path.name, *([word] if suffix == "pth" else []))


def test_truncated_safetensors(tmp_path):
    safetensors.torch.save_file(STATE, path := tmp_path / "nat.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    refuses(path, "nat.safetensors", "damaged")


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_code_is_never_run(tmp_path, writer):
    made = tmp_path / "made"
    writer({"model": STATE, "meta": Hostile(made)}, path := tmp_path / "hostile.pth")
    refuses(path, "hostile.pth", "mkdir" if writer is torch.save else "hostile.pth")
    assert not made.exists()


def test_names_the_code_that_it_refuses(tmp_path):
    torch.save(build(), path := tmp_path / "whole_model.pth")
    refuses(path, "whole_model.pth", "refused", "densezoo.backbones.nat.NAT", "state_dict()")


def changed(**tensors) -> dict[str, torch.Tensor]:
    state = dict(STATE) | tensors
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (changed(**{"levels.0.blocks.0.attn.rpb": None}), ["26 of 27", "levels.0.blocks.0.attn.rpb", "missing"]),
        (changed(surplus=torch.ones(1)), ["1 that the model has not", "surplus"]),
        (changed(**{"norm.weight": torch.ones(4)}), ["norm.weight", "(4,)", "(128,)"]),
        (changed(**{"norm.weight": torch.ones(128, dtype=torch.int8)}), ["norm.weight", "int8", "float32"]),
        (changed(**{"norm.weight": torch.ones(128).to_sparse()}), ["norm.weight", "sparse"]),
        (changed(**{"norm.weight": torch.ones(128, device="meta")}), ["norm.weight", "meta"]),
        (published(num_classes=9), ["head.weight", "(9, 128)", "(7, 128)", "num_classes=9", "num_classes=0"]),
        (published(in_chans=4), ["patch_embed.proj.0.weight", "in_chans=4"]),
        (published(num_classes=0), ["head.weight", "num_classes=0"]),
        (dense(), ["norm.weight", "features_only=True", "out_norms=(0, 1, 2, 3)"]),
        ({"backbone.levels.0.x": torch.ones(1)}, ["0 of 27", "backbone.levels.0.x"]),
    ],
    ids="part surplus shape quantised sparse meta classes channels headless dense foreign".split(),
)
def test_partial_matches(tmp_path, source, words):
    words = [word.replace("27", str(len(STATE))).replace("26", str(len(STATE) - 1)) for word in words]
    words = [word.removeprefix("backbone.") for word in words]
    refuses(source, "the given state dict", *words)


def test_partial_matches_name_the_file(tmp_path):
    torch.save(published(num_classes=9), path := tmp_path / "nine.pth")
    refuses(path, "nine.pth", "num_classes=9")


def test_dense_norms_come_all_or_none():
    model = features(out_norms=(0, 1, 2, 3))
    some = {key: value for key, value in dense().items() if not key.startswith("norm2")}
    refuses(some, "norm2.weight", model=model)
    none = {key: value for key, value in dense().items() if not key.startswith("norm")}
    refuses(none, "norm0.weight", "out_norms=()", model=model)


def test_stages_are_dropped_only_where_the_model_pruned_them():
    refuses(STATE, "levels.3.blocks", model=build(depths=(1, 2, 1), num_heads=(1, 2, 4)))


def test_names_the_model_that_the_checkpoint_is_of():
    with torch.device("meta"):
        layout = timm.create_model("dinat_s_tiny").state_dict()
    state = {key: torch.ones(1).expand(value.shape) for key, value in layout.items()}
    refuses(prefixed(state, "module."), "layers.0.blocks", "layout of dinat_s_tiny")


def test_models_that_cannot_be_loaded():
    with torch.device("meta"):
        model = build()
    with pytest.raises(ValueError, match="meta device"):
        load_published(model, STATE)
    detector = nn.Module()
    detector.backbone = build()
    refuses(STATE, r".backbone", model=detector)
    refuses(STATE, "Linear", model=nn.Linear(1, 1))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a folder over HTTP; torch hub's cache is another one."""
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "site")
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield tmp_path / "site", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_downloads_once_and_checks_the_hash(server, tmp_path):
    site, url = server
    torch.save(STATE, site / "nat.pth")
    digest = sha256((site / "nat.pth").read_bytes()).hexdigest()[:8]
    for name in ("nat.pth", f"nat-{digest}.pth"):
        (site / "nat.pth").replace(site / name)
        assert load_published(build(), f"{url}/{name}?download=1").matched == len(STATE)
        assert (tmp_path / "hub" / "checkpoints" / name).is_file()
        (site / name).replace(site / "nat.pth")
        model = build()
        load_published(model, f"{url}/{name}")
        assert_equal(model.state_dict(), STATE)


def test_files_of_the_hub_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, *_, **__: torch.save({"x": STATE}, path))
    for name in ("nat_mini", "nat_tiny"):
        refuses(f"https://huggingface.co/owner/{name}/resolve/main/model.bin", "no tensors")
        assert (tmp_path / "checkpoints" / f"owner--{name}--model.bin").is_file()


def test_failed_downloads_leave_nothing(server, tmp_path):
    site, url = server
    torch.save(STATE, site / "nat-01234567.pth")
    refuses(f"{url}/nat-01234567.pth", "nat-01234567.pth", "hash")
    refuses(f"{url}/none.pth", f"{url}/none.pth", "404", error=FileNotFoundError)
    refuses("http://127.0.0.1:1/nat.pth", "cannot be downloaded", error=FileNotFoundError)
    refuses("nowhere://nat.pth", "nowhere", error=FileNotFoundError)
    assert not list((tmp_path / "hub").rglob("*.*"))


def test_unreadable_downloads_say_where_they_lie(server, tmp_path):
    site, url = server
    (site / "nat.pth").write_text("<html>moved</html>")
    refuses(f"{url}/nat.pth", url, str(tmp_path / "hub" / "checkpoints" / "nat.pth"))
