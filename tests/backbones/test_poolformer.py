"""PoolFormer and its relatives beside timm's, and the layouts that their weights were published in."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from densezoo.backbones.poolformer import VARIANTS, RandomMixing, checkpoint_filter_fn
from torch import nn

from densezoo.checkpoints import load_published

# Published sizes, in millions; those of the hybrids and of PoolFormerV2 to the digit that the papers give.
MILLIONS = dict(poolformer_s12=11.915, poolformer_s24=21.389, poolformer_s36=30.863, poolformer_m36=56.173)
MILLIONS |= dict(poolformer_m48=73.473, metaformer_id_s12=11.9, metaformer_random_s12_224=11.9)
MILLIONS |= dict(metaformer_pppa_s12_224=14.0, metaformer_ppaa_s12_224=16.5, metaformer_pppf_s12_224=11.9)
MILLIONS |= dict(metaformer_ppff_s12_224=12.2, poolformerv2_s12=11.9, poolformerv2_s24=21.3, poolformerv2_s36=30.8)
MILLIONS |= dict(poolformerv2_m36=56.1, poolformerv2_m48=73.3)
SMALL = dict(embed_dims=(8, 16, 32, 64), depths=(1, 1, 2, 1), num_classes=7)
HYBRIDS = [name for name in VARIANTS if name.startswith("metaformer_")]


def build(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, **(SMALL | kwargs)).eval().double()


def build_timms(name: str) -> nn.Module:
    """Build timm's variant: its entry points let no size be changed."""
    theirs = timm.create_model(name.removeprefix("densezoo_"))
    first, mlp = theirs.stages[0].blocks[0], theirs.stages[0].blocks[0].mlp
    v2 = "v2" in name
    return randomise(
        type(theirs)(
            dims=SMALL["embed_dims"],
            depths=SMALL["depths"],
            num_classes=7,
            norm_layers=type(first.norm1),
            use_mlp_head=False,
            **({} if v2 else dict(downsample_norm=None, mlp_act=type(mlp.act), mlp_bias=True)),
            **({} if v2 else dict(layer_scale_init_values=1.0, res_scale_init_values=None)),
        )
    )


def randomise(model: nn.Module) -> nn.Module:
    """Draw all parameters: layer scales of 1e-5 would hide the branches."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 0.5, std=0.3)
    return model.eval().double()


def image(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def official(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's state dict under the names and in the shapes of the official files."""
    indices, index = {}, 0
    for i, stage in enumerate(model.stages):
        if i:
            indices[f"stages.{i}.downsample.conv."] = f"network.{index}.proj."
            index += 1
        if stage.pos_embed is not None:
            indices[f"stages.{i}.pos_embed"] = f"network.{index}.pos_embed"
            index += 1
        indices[f"stages.{i}.blocks."] = f"network.{index}."
        indices[f"norm{i}."] = f"norm{index}."
        index += 1
    indices["patch_embed.conv."] = "patch_embed.proj."
    state = {}
    for name, value in model.state_dict().items():
        ours = next(filter(name.startswith, indices), "")
        name = indices.get(ours, "") + name.removeprefix(ours)
        if name.endswith((".fc1.weight", ".fc2.weight")):
            value = value[..., None, None]
        elif name.endswith(".pos_embed"):
            side = int(value.shape[1] ** 0.5)
            value = value.mT.unflatten(2, (side, side))
        if not name.endswith("norm.order"):
            state[name] = value
    return state


@pytest.mark.parametrize("name", VARIANTS)
def test_published_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    millions, published = sum(p.numel() for p in model.parameters()) / 1e6, MILLIONS[name.removeprefix("densezoo_")]
    assert f"{millions:.{len(str(published).partition('.')[2])}f}" == str(published)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("densezoo_")])
def test_preprocessing_is_timms(name):
    ours, theirs = (timm.get_pretrained_cfg(other) for other in (name, name.removeprefix("densezoo_")))
    for field in ("tag", "num_classes", "input_size", "crop_pct", "interpolation", "mean", "std", "license"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.hf_hub_id == theirs.hf_hub_id if "v2" in name else ours.url.endswith(f"{name[9:]}.pth.tar")


@pytest.mark.parametrize("name", ["densezoo_poolformer_s12", "densezoo_poolformerv2_s12"])
@torch.no_grad()
def test_same_numbers_as_timm(name):
    theirs, ours = build_timms(name), build(name)
    assert not load_published(ours, theirs.state_dict()).dropped
    for size in ((64, 96), (75, 162)):
        x = image(*size)
        torch.testing.assert_close(ours(x), theirs(x))
        for got, expected in zip(
            ours.forward_intermediates(x, intermediates_only=True),
            theirs.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            ours.forward_head(ours.forward_features(x), pre_logits=True),
            theirs.forward_head(theirs.forward_features(x), pre_logits=True),
        )


@torch.no_grad()
def test_each_layout_keeps_its_own_head(tmp_path):
    x, source = image(64, 96), randomise(build("densezoo_poolformer_s12"))
    (last,) = source.forward_intermediates(x, indices=1, intermediates_only=True)
    weight, bias = source.norm.weight, source.norm.bias
    before = F.linear(F.group_norm(last, 1, weight, bias).mean((2, 3)), source.head.weight, source.head.bias)
    after = F.linear(F.layer_norm(last.mean((2, 3)), (64,), weight, bias, 1e-6), source.head.weight, source.head.bias)
    assert (before - after).abs().max() > 0.01
    torch.testing.assert_close(source(x), before)

    names = {
        r"^patch_embed\.": "stem.",
        r"\.layer_scale_(\d)$": r".layer_scale\1.scale",
        r"^norm\.": "head.norm.",
        r"^head\.(weight|bias)": r"head.fc.\1",
    }
    timms = {}
    for name, value in source.state_dict().items():
        for ours, theirs in names.items():
            name = re.sub(ours, theirs, name)
        if not name.endswith("norm.order"):
            timms[name] = value
    model = build("densezoo_poolformer_s12")
    for state, expected in ((timms, after), (official(source), before), (timms, after)):
        assert load_published(model, state).matched == len(source.state_dict())
        torch.testing.assert_close(model(x), expected)
    # Neither a file that does not fit nor one of the other layout's parts changes it.
    with pytest.raises(RuntimeError):
        model.load_state_dict({"head.weight": torch.zeros(3)}, strict=False)
    torch.testing.assert_close(model(x), after)
    # It is kept by saving and by copying.
    torch.save(model.state_dict(), tmp_path / "model.pth")
    reloaded = build("densezoo_poolformer_s12")
    load_published(reloaded, tmp_path / "model.pth")
    for other in (reloaded, copy.deepcopy(model)):
        torch.testing.assert_close(other(x), after)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(7, "catavgmax")


@pytest.mark.parametrize("name", ["densezoo_poolformer_s12", *HYBRIDS])
@torch.no_grad()
def test_official_files(name):
    source = randomise(build(name))
    state, model = official(source), build(name)
    assert load_published(model, {"state_dict": state}).matched == len(source.state_dict())
    assert torch.equal(model(image(64, 96)), source(image(64, 96)))
    dense = build(name, features_only=True, out_norms=(1, 2, 3))
    report = load_published(dense, state)
    assert {key.split(".")[0] for key in report.missing} == {"norm1", "norm2", "norm3"}
    assert set(report.dropped) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_official_dense_file_with_fewer_norms():
    """The published RetinaNets, which start from the second stage, have no norm on the first."""
    source = randomise(build("densezoo_poolformer_s12", out_norms=(1, 2, 3)))
    state = official(source)
    assert {key.split(".")[0] for key in state if key.startswith("norm")} == {"norm2", "norm4", "norm6"}
    model = build("densezoo_poolformer_s12", out_norms=(1, 2, 3))
    report = load_published(model, {f"backbone.{name}": value for name, value in state.items()})
    assert report.renamed["backbone.norm4.weight"] == "norm2.weight" and not report.resized and not report.dropped
    for got, expected in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(got, expected)


@torch.no_grad()
def test_official_hybrid():
    """Stages computed from the official file by the paper's formulas, at the size that they are made for."""
    model = randomise(build("metaformer_pppa_s12_224"))
    state, x = official(model), image(224, 224)
    x, last = model.forward_intermediates(x, indices=[2, 3], intermediates_only=True)

    def part(name):
        return state[f"network.7.0.{name}"]

    def norm(x, i):
        return F.layer_norm(x, (64,), part(f"norm{i}.weight"), part(f"norm{i}.bias"))

    x = F.conv2d(x, state["network.5.proj.weight"], state["network.5.proj.bias"], stride=2, padding=1)
    x = (x + state["network.6.pos_embed"]).flatten(2).mT
    q, k, v = (norm(x, 1) @ part("token_mixer.qkv.weight").mT).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    y = ((32**-0.5 * q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + part("layer_scale_1") * F.linear(y, part("token_mixer.proj.weight"), part("token_mixer.proj.bias"))
    y = F.gelu(F.linear(norm(x, 2), part("mlp.fc1.weight").flatten(1), part("mlp.fc1.bias")))
    x = x + part("layer_scale_2") * F.linear(y, part("mlp.fc2.weight").flatten(1), part("mlp.fc2.bias"))
    torch.testing.assert_close(last, x.mT.unflatten(2, (7, 7)))


@pytest.mark.parametrize("name", ["metaformer_ppff_s12_224", "metaformer_random_s12_224"])
@torch.no_grad()
def test_matrices_over_positions(name):
    mixer = build(name).stages[3].blocks[0].token_mixer
    x = torch.randn(2, 7, 7, 5, dtype=torch.float64)
    expected = torch.einsum("oi,bic->boc", mixer.matrix(), x.flatten(1, 2)).unflatten(1, (7, 7))
    torch.testing.assert_close(mixer(x), expected)
    # What is the same everywhere, a resized map is too.
    flat = mixer(torch.ones(1, 14, 21, 3, dtype=torch.float64))
    corner = mixer(torch.ones(1, 7, 7, 3, dtype=torch.float64))[0, 0, 0]
    assert flat.shape == (1, 14, 21, 3)
    torch.testing.assert_close(flat[0, 0, 0], corner)


def test_random_mixing():
    first, again, other = RandomMixing(7, seed=0), RandomMixing(7, seed=0), RandomMixing(7, seed=1)
    assert torch.equal(first.random_matrix, again.random_matrix)
    assert not torch.equal(first.random_matrix, other.random_matrix)
    torch.testing.assert_close(first.random_matrix.sum(1), torch.ones(49))
    assert not list(first.parameters()) and list(first.state_dict()) == ["random_matrix"]


def test_filter_leaves_own_files_alone():
    for name in ("densezoo_poolformer_s12", "densezoo_poolformerv2_s12", "metaformer_ppaa_s12_224"):
        model = build(name)
        state = model.state_dict()
        converted = checkpoint_filter_fn(dict(state), model)
        assert converted.keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in converted.items())


def test_wrong_arguments_are_named():
    for kwargs, named in (
        (dict(token_mixers=("pooling",) * 3), "token_mixers"),
        (dict(token_mixers=("pooling", "pooling", "pooling", "conv")), "token_mixers: got conv"),
        (dict(token_mixers=("attention", "pooling", "pooling", "pooling")), "embed_dims: got 8 for stage 0"),
        (dict(embed_dims=64), "embed_dims"),
        (dict(version=3), "version"),
        (dict(out_norms=(4,)), "out_norms"),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            build("densezoo_poolformer_s12", **kwargs)


@pytest.mark.parametrize("dtype, allowed", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@torch.no_grad()
def test_small_layer_scales_under_autocast(dtype, allowed):
    """Taken into the weights of the MLP, those of the larger sizes would be less than float16 holds."""
    block = build("densezoo_poolformer_s12", layer_scale=1e-7).stages[0].blocks[0].float()
    nn.init.normal_(block.norm2.bias)
    x = torch.full((1, 4, 4, 8), 1e-6)
    expected = block(x) - x
    with torch.autocast("cpu", dtype):
        got = block(x) - x
    assert (got - expected).norm() < allowed * expected.norm()


def test_stochastic_depth_leaves_whole_branches_out():
    block = build("densezoo_poolformer_s12", drop_path_rate=0.5).stages[-1].blocks[0].train()
    randomise(block).train()
    x = torch.randn(16, 3, 3, 64, dtype=torch.float64)
    kept = (block(x) != x).flatten(1).any(1)
    assert 0 < kept.sum() < 16
