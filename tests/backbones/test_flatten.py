"""Focused linear attention's hosts: published sizes, and what their files become."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest
import timm
import torch
from densezoo.backbones.flatten import VARIANTS
from torch import nn

from densezoo.checkpoints import load_published

# Counted from the published code, in millions. None was published of DeiT: 6.1 in the paper, 6.15 as it is read here.
MILLIONS = dict(deit_tiny=6.15, pvt_tiny=12.15, pvt_small=21.67, pvt_medium=37.24, pvt_large=50.65)
MILLIONS |= dict(pvt_v2_b0=3.59, pvt_v2_b1=12.93, pvt_v2_b2=22.55, pvt_v2_b3=38.27, pvt_v2_b4=51.84)
MILLIONS |= dict(swin_tiny=29.19, swin_small=50.51, swin_base=88.97, swin_base_384=91.43)
MILLIONS |= dict(cswin_tiny=21.20, cswin_small=35.45, cswin_base=74.87, cswin_base_384=78.37)
PVT = dict(embed_dims=(16, 32, 64, 128), depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
HALVING = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))


def build(name: str, **kwargs) -> nn.Module:
    small = PVT if name.startswith("pvt") else HALVING
    model = timm.create_model(f"flatten_{name}", **(dict(num_classes=7) | small | kwargs)).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return model


@pytest.mark.parametrize("name", [name.removeprefix("flatten_") for name in VARIANTS])
def test_published_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(f"flatten_{name}")
    # FLatten-PVT's file counts a final norm that is never applied.
    unused = 2 * model.num_features if name.startswith("pvt") and "v2" not in name else 0
    millions = (sum(p.numel() for p in model.parameters()) + unused) / 1e6
    assert f"{millions:.2f}" == f"{MILLIONS[name]:.2f}"


def test_final_norm_of_pvt_is_left_out():
    source, model = build("pvt_tiny"), build("pvt_tiny")
    nn.init.zeros_(model.head.weight)
    norm = {"norm.weight": torch.ones(128), "norm.bias": torch.ones(128)}
    report = load_published(model, {"model": source.state_dict() | norm})
    assert report.dropped == list(norm) and torch.equal(model.head.weight, source.head.weight)


def test_averaged_weights_of_a_download_come_first(tmp_path, monkeypatch):
    source = build("cswin_tiny")
    path = tmp_path / "checkpoints" / Path(urlsplit(source.default_cfg["url"]).path).name
    path.parent.mkdir()
    state = source.state_dict()
    torch.save(dict(model={k: v + 1 for k, v in state.items()}, state_dict_ema=state, epoch=1), path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    kwargs = HALVING | dict(num_classes=7, pretrained_cfg_overlay=dict(num_classes=7))
    loaded = timm.create_model("flatten_cswin_tiny", pretrained=True, **kwargs).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_pvt_v2_has_the_norms_of_its_outputs():
    source = build("pvt_v2_b1")
    dense = build("pvt_v2_b1", out_norms=(0, 1, 2, 3))
    report = load_published(dense, source.state_dict())
    assert report.dropped == ["head.weight", "head.bias"] and not report.missing
    state = source.state_dict()
    state.pop("norm2.weight")
    with pytest.raises(ValueError, match="norm2.weight"):
        load_published(dense, state)


@pytest.mark.parametrize(("name", "tables"), [("swin_base", ("bias_table",)), ("cswin_base", ())])
def test_position_tables_are_resized_to_another_image(name, tables):
    source, model = build(name), build(f"{name}_384")
    resized = set(load_published(model, source.state_dict()).resized)
    assert resized == {k for k in model.state_dict() if k.endswith(("positional_encoding", *tables))}
    key = "layers.0.blocks.0.attn" if name == "swin_base" else "stage1.0.attns.0"
    small, large = (m.state_dict()[f"{key}.positional_encoding"] for m in (source, model))
    assert large.shape == (1, 96 * 96, 16)
    expected = nn.functional.interpolate(
        small.unflatten(1, (56, 56)).permute(0, 3, 1, 2), size=(96, 96), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(large, expected.flatten(2).mT)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_activations_stay_finite_under_autocast(dtype):
    # The cubes and sums of focused attention leave half precision's range long before the activations do.
    model = build("swin_tiny")
    for module in model.modules():
        if hasattr(module, "qkv") and hasattr(module, "positional_encoding"):
            module.qkv.weight.mul_(20)
    x = torch.randn(1, 3, 96, 96)
    with torch.autocast("cpu", dtype=dtype):
        got = model.forward_features(x)
    expected = model.forward_features(x)
    assert got.isfinite().all() and (got - expected).norm() < 0.1 * expected.norm()


def test_wrong_arguments_are_named():
    for name, kwargs, named in (
        ("pvt_tiny", dict(num_heads=(1, 2)), "num_heads"),
        ("pvt_v2_b1", dict(out_norms=(4,)), "out_norms"),
        ("swin_tiny", dict(num_heads=(3, 6, 12, 24)), "num_heads: got 3"),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            build(name, **kwargs)
