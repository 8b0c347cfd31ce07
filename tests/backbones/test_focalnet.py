"""FocalNet beside timm's, the layouts that its weights were published in, and wider dense models made from them."""

import pytest
import timm
import torch
from densezoo.backbones.focalnet import VARIANTS, AlignedLinear, checkpoint_filter_fn
from timm.models import focalnet as timms
from torch import nn

from densezoo.checkpoints import load_published

# Published sizes with 1000 classes, in millions.
MILLIONS = dict(tiny_srf=28.427, tiny_lrf=28.648, small_srf=49.891, small_lrf=50.342, base_srf=88.148, base_lrf=88.750)
MILLIONS |= dict(tiny_iso=5.880, small_iso=22.376, base_iso=87.237, large_fl3=207.101, large_fl4=207.281)
MILLIONS |= dict(xlarge_fl3=366.082, xlarge_fl4=366.323, huge_fl3=686.564, huge_fl4=689.278)
SMALL = dict(embed_dim=16, depths=(1, 1, 2, 1))


def build(name: str, **kwargs) -> nn.Module:
    return timm.create_model(f"densezoo_focalnet_{name}", **(SMALL | kwargs)).eval()


def build_timms(name: str, **kwargs) -> nn.Module:
    """Build timm's variant: its entry points let no size be changed."""
    ours = VARIANTS[f"densezoo_focalnet_{name}"]
    flags = dict(use_overlap_down="use_conv_embed", use_post_norm="use_postln")
    flags |= dict(use_post_norm_in_modulation="use_postln_in_modulation", layerscale_value="layer_scale")
    arch = {theirs: ours[mine] for theirs, mine in flags.items() if mine in ours}
    arch |= {key: ours[key] for key in ("focal_levels", "focal_windows") if key in ours}
    return timms.FocalNet(**(arch | SMALL | kwargs)).eval()


def randomise(model: nn.Module) -> nn.Module:
    """Draw all parameters: layer scales of 1e-4 would hide the branches."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 0.5, std=0.2)
    return model


def image(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", [name.removeprefix("densezoo_focalnet_") for name in VARIANTS])
def test_published_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(f"densezoo_focalnet_{name}", num_classes=1000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == MILLIONS[name]


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.endswith("_iso")])
def test_classes_and_size_are_timms(name):
    ours, theirs = (timm.get_pretrained_cfg(other) for other in (name, name.removeprefix("densezoo_")))
    for field in ("num_classes", "input_size", "pool_size", "license", "interpolation", "mean", "std"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.tag == theirs.tag


@pytest.mark.parametrize("name", ["tiny_srf", "large_fl3", "xlarge_fl4", "huge_fl4"])
def test_shapes_are_timms(name):
    with torch.device("meta"):
        model, theirs = timm.create_model(f"densezoo_focalnet_{name}"), timm.create_model(f"focalnet_{name}")
    state = checkpoint_filter_fn(theirs.state_dict(), model)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", ["tiny_srf", "small_lrf", "large_fl3", "large_fl4", "xlarge_fl4", "huge_fl3"])
@torch.no_grad()
def test_same_numbers_as_timm(name):
    theirs = randomise(build_timms(name, num_classes=7)).double()
    ours = build(name, num_classes=7).double()
    report = load_published(ours, theirs.state_dict())
    assert report.matched == len(ours.state_dict()) and not report.dropped and not report.resized
    assert report.renamed["layers.2.downsample.proj.bias"] == "layers.1.downsample.proj.bias"
    for size in ((64, 96), (160, 32)):
        x = image(*size)
        torch.testing.assert_close(ours(x), theirs(x))
        for got, expected in zip(
            ours.forward_intermediates(x, intermediates_only=True),
            theirs.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_large_fl4_normalises_the_modulator_of_official_files_alone():
    theirs = randomise(build_timms("large_fl4", num_classes=7)).double()
    ours = build("large_fl4", num_classes=7).double()
    load_published(ours, theirs.state_dict())
    official = {name: value.clone() for name, value in ours.state_dict().items()}
    for name in official:
        if name.endswith(".h.weight"):
            official[name] /= 5
    load_published(ours, official)
    for module in theirs.modules():
        if hasattr(module, "normalize_modulator"):
            module.normalize_modulator = True
    torch.testing.assert_close(ours(image(64, 96)), theirs(image(64, 96)))
    # What was loaded is kept in the official layout.
    copy = build("large_fl4", num_classes=7).double()
    load_published(copy, ours.state_dict())
    assert torch.equal(copy(image(64, 96)), ours(image(64, 96)))


@torch.no_grad()
def test_stem_of_the_dense_layout_sees_one_pixel_further():
    x = image(67, 90)
    padded = nn.functional.pad(x, (0, 2, 0, 1))
    for kwargs, padding in ((dict(num_classes=0), 2), (dict(out_norms=(0, 1, 2, 3)), 3)):
        stem = build("large_fl3", **kwargs).double().patch_embed
        expected = nn.functional.conv2d(padded, stem.proj.weight, stem.proj.bias, stride=4, padding=padding)
        assert expected.shape[2:] == (17, 23)
        torch.testing.assert_close(stem(x), stem.norm(expected.permute(0, 2, 3, 1)))


@torch.no_grad()
def test_wider_windows_keep_the_function():
    source = randomise(build("tiny_lrf")).double()
    wide = build("tiny_lrf", focal_windows=(9, 5, 3, 7)).double()
    report = load_published(wide, source.state_dict())
    resized = [name for name in source.state_dict() if ".focal_layers." in name and "layers.2." not in name[:9]]
    assert report.resized == resized and report.matched == len(source.state_dict())
    torch.testing.assert_close(wide(image(64, 96)), source(image(64, 96)))
    # A window of 9 cut down to 5 holds the centre.
    narrow = build("tiny_lrf", focal_windows=(5, 5, 3, 7)).double()
    load_published(narrow, wide.state_dict())
    kernel = "layers.0.blocks.0.modulation.focal_layers.1.0.weight"
    assert torch.equal(narrow.state_dict()[kernel], wide.state_dict()[kernel][..., 2:-2, 2:-2])


@torch.no_grad()
def test_more_levels_start_closed_and_fewer_are_refused():
    source, model = randomise(build("tiny_srf")), build("tiny_lrf")
    kernel, gates = "layers.1.blocks.0.modulation.focal_layers.2.0.weight", "layers.1.blocks.0.modulation.f."
    before = model.state_dict()[kernel].clone()
    load_published(model, source.state_dict())
    assert torch.equal(model.state_dict()[kernel], before)
    for part in ("weight", "bias"):
        got, given = model.state_dict()[gates + part], source.state_dict()[gates + part]
        assert torch.equal(got[:-2], given[:-1]) and torch.equal(got[-1], given[-1]) and not got[-2].any()
    # A model of fewer levels takes the gates as they are, which do not fit.
    state = checkpoint_filter_fn(model.state_dict(), source)
    with pytest.raises(RuntimeError, match=r"size mismatch for layers\.0\.blocks\.0\.modulation\.f\.weight"):
        source.load_state_dict(state)


def test_classifier_of_either_layout_into_a_dense_model():
    theirs = build_timms("tiny_lrf")
    ours = build("tiny_lrf")
    load_published(ours, theirs.state_dict())
    dense = dict(features_only=True, out_norms=(0, 1, 2, 3), focal_windows=(11, 9, 9, 7))
    models = []
    for state in (ours.state_dict(), {"model": theirs.state_dict()}):
        models.append(build("tiny_lrf", **dense))
        report = load_published(models[-1], state)
        assert len(report.missing) == 8 and len(report.dropped) == 4
    for got, expected in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(got, expected)


def test_checkpoint_filter_fn_leaves_official_layers_alone():
    model = build("tiny_srf")
    state = model.state_dict()
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == state.keys() and all(converted[name] is value for name, value in state.items())


def test_wrong_arguments_are_named():
    for kwargs, named in (
        (dict(focal_levels=(2, 2, 2)), "focal_levels"),
        (dict(focal_levels=(2, 2, 0, 2)), "focal_levels"),
        (dict(focal_windows=9), "focal_windows"),
        (dict(focal_windows=(3, 3, 4, 3)), "focal_windows"),
        (dict(use_conv_embed=True, patch_size=16), "use_conv_embed"),
        (dict(out_norms=(4,)), "out_norms"),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            build("tiny_srf", **kwargs)


@torch.no_grad()
def test_export_of_one_image_with_bounds():
    model, x = build("tiny_srf"), torch.randn(1, 3, 96, 128)
    free = {2: torch.export.Dim("height", min=64, max=512), 3: torch.export.Dim("width", min=64, max=512)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(free,)).module()
    for size in ((64, 64), (100, 130)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_aligned_linear_is_a_linear_layer(dtype):
    aligned, plain = AlignedLinear(6, 11).to(dtype), nn.Linear(6, 11).to(dtype)
    plain.load_state_dict(aligned.state_dict())
    x = torch.randn(2, 3, 6, dtype=dtype)
    results = []
    for layer in (aligned, plain):
        out = layer(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), layer.parameters())])
    torch.testing.assert_close(*results)
