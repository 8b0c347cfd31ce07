"""Agent attention's hosts: published sizes, what the classifiers' files become, DeiT's tokens, the dense models."""

import sys
import types
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import timm
import torch
import torch.nn.functional as F
from densezoo.backbones.agent import AGENT_BIASES, VARIANTS, AgentAttention, AgentPVT, pool_map
from densezoo.backbones.staged import resize_table
from torch import nn

from densezoo.checkpoints import load_published

# Counted from the published code, in millions.
MILLIONS = dict(deit_tiny=6.02, deit_small=22.65, deit_small_448=23.07, deit_base=87.20)
MILLIONS |= dict(pvt_tiny=11.57, pvt_small=20.64, pvt_medium=35.92, pvt_medium_256=36.08, pvt_large=48.74)
MILLIONS |= dict(swin_tiny=28.90, swin_small=49.67, swin_small_288=49.71, swin_base=88.10, swin_base_384=88.31)
MILLIONS |= dict(cswin_tiny=20.46, cswin_small=32.81, cswin_base=73.25, cswin_base_384=73.33)
HALVING = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
SMALL = {
    "deit": dict(embed_dim=16, depth=2, num_heads=2),
    "pvt": dict(embed_dims=(16, 32, 64, 128), depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
    "swin": HALVING | dict(agent_depths=(1, 1, 1, 0)),
    "cswin": HALVING,
}


def build(name: str, **kwargs) -> nn.Module:
    model = timm.create_model(f"agent_{name}", **(dict(num_classes=7) | SMALL[name.split("_")[0]] | kwargs)).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return model


@pytest.mark.parametrize("name", [name.removeprefix("agent_") for name in VARIANTS])
def test_published_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(f"agent_{name}")
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == f"{MILLIONS[name]:.2f}"


@pytest.mark.parametrize("size", [(14, 14), (5, 8), (3, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("agents", [3, 7, 9])
def test_agents_are_adaptive_averages(size, agents):
    x = torch.randn(2, *size, 4, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), agents).permute(0, 2, 3, 1)
    torch.testing.assert_close(pool_map(x, agents), expected)


@pytest.mark.parametrize("name", ["deit_tiny", "pvt_tiny", "swin_tiny", "cswin_tiny"])
def test_published_file_loads_through_timm_and_alone(name, tmp_path, monkeypatch):
    source = build(name)

    class CfgNode(dict):
        """What yacs saves: a dict with attributes."""

        __module__ = "yacs.config"
        __qualname__ = "CfgNode"

    settings = CfgNode(MODEL=CfgNode(NAME=name))
    settings.__dict__["__immutable__"] = True
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", types.ModuleType("yacs.config"))
    sys.modules["yacs.config"].CfgNode = CfgNode
    state = source.state_dict()
    if name == "swin_tiny":
        state["layers.3.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
        state["layers.2.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    # Where a download would lie.
    path = tmp_path / "checkpoints" / Path(urlsplit(source.default_cfg["url"]).path).name
    path.parent.mkdir()
    torch.save(dict(model=state, optimizer={}, lr_scheduler={}, epoch=1, config=settings), path)
    monkeypatch.undo()

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    kwargs = SMALL[name.split("_")[0]] | dict(num_classes=7, pretrained_cfg_overlay=dict(num_classes=7))
    loaded = timm.create_model(f"agent_{name}", pretrained=True, **kwargs)
    other = build(name)
    nn.init.zeros_(other.head.weight)
    assert load_published(other, path).matched == len(source.state_dict())
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value) and torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("name", "larger", "tables"),
    [
        ("deit_small", "deit_small_448", ("pos_embed", "ah_bias", "aw_bias", "ha_bias", "wa_bias")),
        ("pvt_medium", "pvt_medium_256", ("pos_embed", "ah_bias", "aw_bias", "ha_bias", "wa_bias")),
        ("swin_base", "swin_base_384", ("bias_table", "ah_bias", "aw_bias", "ha_bias", "wa_bias")),
        ("cswin_base", "cswin_base_384", ("ah_bias", "aw_bias", "ha_bias", "wa_bias")),
    ],
)
def test_position_tables_are_resized_to_another_image(name, larger, tables):
    source, model = build(name), build(larger)
    resized = set(load_published(model, source.state_dict()).resized)
    assert resized == {key for key in model.state_dict() if any(table in key for table in tables)}
    for key, value in model.state_dict().items():
        published = source.state_dict()[key]
        if key.endswith(("ah_bias", "wa_bias")):
            axis, size = (3, value.shape[3]) if value.shape[3] > 1 else (2, value.shape[2])
            expected = F.interpolate(published.movedim(axis, -1).flatten(0, -2)[None], size, mode="linear")
            torch.testing.assert_close(value.movedim(axis, -1).flatten(0, -2), expected[0])
        elif key == "pos_embed":
            assert torch.equal(value[:, 0], published[:, 0])
        elif key not in resized:
            assert torch.equal(value, published), key


@torch.no_grad()
def test_deit_pools_tokens():
    model, x = build("deit_tiny"), torch.randn(2, 3, 64, 96)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 25, 16)
    torch.testing.assert_close(model(x), model.head(tokens[:, 0]))
    for pool, pooled in (("avg", tokens[:, 1:].mean(1)), ("max", tokens[:, 1:].amax(1)), ("", tokens)):
        model.reset_classifier(0, pool)
        torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(5, "token")
    assert model(x).shape == (2, 5) and model.get_classifier().out_features == model.num_classes == 5
    with pytest.raises(ValueError, match="global_pool: got 'catavgmax'"):
        model.reset_classifier(5, "catavgmax")


@torch.no_grad()
def test_dense_models_pool_more_agents():
    x = torch.randn(1, 3, 224, 224)
    plain = build("pvt_tiny").forward_intermediates(x, intermediates_only=True)
    same = build("pvt_tiny", agent_sizes=(3, 4, 7, 7)).forward_intermediates(x, intermediates_only=True)
    assert all(map(torch.equal, plain, same))
    more = build("pvt_tiny", agent_sizes=AgentPVT.DENSE_AGENT_SIZES).forward_intermediates(x, intermediates_only=True)
    assert not torch.allclose(plain[0], more[0], rtol=1e-3)
    for name, sizes in (("pvt_tiny", (12, 16, 28, 28)), ("swin_tiny", (9, 12, 14))):
        model = build(name, out_norms=(0, 1, 2, 3))
        found = [module.agent_size for module in model.modules() if isinstance(module, AgentAttention)]
        assert tuple(found) == sizes


def test_what_is_not_decayed():
    def spared(name: str, **kwargs) -> set[str]:
        return {key.rsplit(".")[-1] for key in build(name, **kwargs).no_weight_decay()}

    assert spared("deit_tiny") == {"pos_embed", "cls_token"}
    assert spared("pvt_tiny") == spared("cswin_tiny") == set()
    assert spared("swin_tiny") == {"relative_position_bias_table"}
    assert spared("swin_tiny", out_norms=(0, 1, 2, 3)) == {"relative_position_bias_table", *AGENT_BIASES}


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side, size", [(7, (12, 19)), (14, (9, 5)), (1, (3, 4)), (5, (5, 8))])
def test_products_resize_as_interpolate_does(side, size, mode):
    table = torch.randn(2, 3, side, side, dtype=torch.float64)
    expected = F.interpolate(table.requires_grad_(), size, mode=mode, align_corners=False)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, table, grad)
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        leaf = table.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            got = resize_table(leaf, {2: size[0], 3: size[1]}, mode)
        pairs = (got, expected), (torch.autograd.grad(got, leaf, grad.to(dtype))[0], expected_grad)
        for ours, theirs in pairs:
            assert ours.dtype == dtype and (ours - theirs).norm() < allowed * theirs.norm()
    flat = resize_table(table.detach().movedim(1, -1), {1: size[0], 2: size[1]}, mode)
    torch.testing.assert_close(flat.movedim(-1, 1), expected.detach())


TWO_STAGES = dict(depths=(1, 1), embed_dims=(64, 128), num_heads=(1, 2), mlp_ratios=(8, 8), agent_nums=(9, 16))


@pytest.mark.parametrize(
    "name, kwargs",
    [("agent_deit_tiny", dict(depth=1)), ("agent_pvt_tiny", TWO_STAGES)],
)
@torch.no_grad()
def test_export_of_one_image_with_bounds(name, kwargs):
    model, x = timm.create_model(name, **kwargs).eval(), torch.randn(1, 3, 96, 128)
    free = {2: torch.export.Dim("height", min=64, max=512), 3: torch.export.Dim("width", min=64, max=512)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(free,)).module()
    for size in ((64, 64), (100, 130)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_named():
    for name, kwargs, named in (
        ("deit_tiny", dict(agent_num=50), "agent_nums: got 50"),
        ("deit_tiny", dict(num_heads=3), "num_heads: got 3"),
        ("pvt_tiny", dict(agent_sizes=(3, 4)), "agent_sizes"),
        ("swin_tiny", dict(agent_depths=(1,)), "agent_depths"),
        ("cswin_tiny", dict(agent_nums=(9,)), "agent_nums"),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            build(name, **kwargs)
