"""DaViT beside timm's, and the layouts that its weights were published in."""

import re

import pytest
import timm
import torch
from densezoo.backbones.davit import VARIANTS, checkpoint_filter_fn
from timm.layers import DropPath
from timm.models import get_arch_pretrained_cfgs

from densezoo.checkpoints import load_published

# Published sizes, in millions; the towers' without a classifier.
MILLIONS = dict(tiny=28.36, small=49.75, base=87.95, large=196.8, large_window12_384=196.8, huge=348.9, giant=1406)
MILLIONS |= dict(base_fl=90.4, huge_fl=360.6)
SMALL = dict(depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))


def build(name: str, **kwargs):
    return timm.create_model(f"densezoo_davit_{name}", embed_dim=16, **SMALL, **kwargs).eval()


@pytest.mark.parametrize("name", [name.removeprefix("densezoo_davit_") for name in VARIANTS])
def test_published_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(f"densezoo_davit_{name}")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert f"{millions:.{len(str(MILLIONS[name]).partition('.')[2])}f}" == str(MILLIONS[name])


@pytest.mark.parametrize("name", [name for name in VARIANTS if timm.is_model(name.removeprefix("densezoo_"))])
def test_weights_and_preprocessing_are_timms(name):
    ours, theirs = get_arch_pretrained_cfgs(name), get_arch_pretrained_cfgs(name.removeprefix("densezoo_"))
    assert [key.removeprefix("densezoo_") for key in ours] == list(theirs)
    for got, expected in zip(ours.values(), theirs.values(), strict=True):
        fields = ["hf_hub_id", "input_size", "num_classes", "interpolation", "mean", "std"]
        if not name.endswith("_fl"):  # Florence-2 takes the whole image, under a licence of its own
            fields += ["crop_pct", "crop_mode", "license"]
        for field in fields:
            assert getattr(got, field) == getattr(expected, field), field


@pytest.mark.parametrize("name", ["tiny", "base_fl"])
@torch.no_grad()
def test_same_numbers_as_timm(name):
    torch.manual_seed(0)
    dims = (16, 32, 64, 128)
    theirs = timm.create_model(f"davit_{name}", embed_dims=dims, **SMALL, num_classes=7).eval().double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.3)
    ours = build(name, num_classes=7).double()
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    # The second size is odd on every map, and divided by no window.
    for size in ((64, 96), (75, 230)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))
        final, stages = ours.forward_intermediates(x)
        for got, expected in zip(stages, theirs.forward_intermediates(x, intermediates_only=True), strict=True):
            torch.testing.assert_close(got, expected)
        pre_logits = ours.forward_head(final, pre_logits=True)
        torch.testing.assert_close(pre_logits, theirs.forward_head(theirs.forward_features(x), pre_logits=True))


def florence_name(name: str) -> str:
    """Return Microsoft's name, in a whole Florence-2, of one of the zoo's parameters."""
    for pattern, theirs in {
        r"^patch_embed\.conv\.": "convs.0.proj.",
        r"^patch_embed\.norm\.": "convs.0.norm.",
        r"^stages\.(\d)\.downsample\.conv\.": r"convs.\1.proj.",
        r"^stages\.(\d)\.downsample\.norm\.": r"convs.\1.norm.",
        r"^stages\.(\d)\.blocks\.(\d)\.0\.": r"blocks.\1.\2.spatial_block.",
        r"^stages\.(\d)\.blocks\.(\d)\.1\.": r"blocks.\1.\2.channel_block.",
        r"spatial_block\.norm1\.": "spatial_block.window_attn.norm.",
        r"channel_block\.norm1\.": "channel_block.channel_attn.norm.",
        r"spatial_block\.attn\.": "spatial_block.window_attn.fn.",
        r"channel_block\.attn\.": "channel_block.channel_attn.fn.",
        r"\.norm2\.": ".ffn.norm.",
        r"\.mlp\.": ".ffn.fn.net.",
        r"\.cpe(\d)\.proj\.": r".conv\1.fn.dw.",
    }.items():
        name = re.sub(pattern, theirs, name)
    return f"vision_tower.{name}"


@pytest.mark.parametrize("out_norms", [(), (1, 3)], ids=str)
def test_florence_2_gives_its_image_tower(out_norms):
    source = build("base_fl")
    state = {florence_name(k): v + 1 for k, v in source.state_dict().items() if not k.startswith(("norm.", "head."))}
    model = build("base_fl", num_classes=0, out_norms=out_norms)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_published(
        model, state | {"language_model.shared.weight": torch.ones(2), "image_projection": torch.ones(1)}
    )
    assert sorted(report.dropped) == ["image_projection", "language_model.shared.weight"]
    assert (
        report.renamed["vision_tower.blocks.2.1.channel_block.conv2.fn.dw.weight"]
        == "stages.2.blocks.1.1.cpe2.proj.weight"
    )
    for name, value in model.state_dict().items():
        # The tower has no norms of outputs: they stay as they were built.
        assert torch.equal(value, before[name] if name.startswith("norm") else source.state_dict()[name] + 1), name


def test_official_file_into_every_model():
    golden = build("tiny", num_classes=7)
    official = {}
    for name, value in golden.state_dict().items():
        for ours, theirs in {
            r"^patch_embed\.conv\.": "patch_embeds.0.proj.",
            r"^patch_embed\.norm\.": "patch_embeds.0.norm.",
            r"^stages\.(\d)\.downsample\.conv\.": r"patch_embeds.\1.proj.",
            r"^stages\.(\d)\.downsample\.norm\.": r"patch_embeds.\1.norm.",
            r"^stages\.(\d)\.blocks\.": r"main_blocks.\1.",
            r"\.cpe1\.": ".cpe.0.",
            r"\.cpe2\.": ".cpe.1.",
            r"^norm\.": "norms.",
        }.items():
            name = re.sub(ours, theirs, name)
        official[name] = value + 1
    head = ["norms.weight", "norms.bias", "head.weight", "head.bias"]
    for kwargs, dropped in (
        (dict(num_classes=7), []),
        (dict(num_classes=0), head[2:]),
        (dict(features_only=True, out_norms=(0, 1, 2, 3)), head),
    ):
        model = build("tiny", **kwargs)
        report = load_published(model, {"model": official})
        assert report.dropped == dropped
        assert len(report.missing) == (8 if "out_norms" in kwargs else 0)
        state = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
        assert torch.equal(state["stages.3.blocks.0.1.attn.qkv.bias"], official["main_blocks.3.0.1.attn.qkv.bias"])


def test_drop_path_rises_with_every_block():
    model = timm.create_model("densezoo_davit_tiny", embed_dim=16, num_heads=(1, 2, 4, 8), drop_path_rate=0.11)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.01 * i for i in range(1, 12)])


def test_wrong_arguments_are_named():
    for kwargs, named in (
        (dict(num_heads=(1, 2, 4)), "num_heads"),
        (dict(num_heads=(1, 3, 4, 8)), "num_heads: got 3 for stage 1"),
        (dict(out_norms=(4,)), "out_norms"),
        (dict(global_pool="catavgmax"), "global_pool"),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            timm.create_model("densezoo_davit_tiny", **(dict(embed_dim=16, num_heads=(1, 2, 4, 8)) | kwargs))
