"""MobileNetV2 with attention modules, beside torchvision's with the module appended, which is the published layout."""

import pytest
import timm
import torch
import torchvision
from densezoo.backbones.attention_mobilenet import VARIANTS, checkpoint_filter_fn
from densezoo.ops.plugins import ECA, Triplet
from torch import nn

from densezoo.checkpoints import load_published

# Published sizes, in millions; ECA's divided by 2^20.
MILLIONS = dict(eca_mobilenetv2=3.34 * 2**20 / 1e6, triplet_mobilenetv2=3.51, triplet_mobilenetv2_k3=3.506)
SMALL = dict(depths=(1, 2, 4, 2), num_classes=7)


def published(name: str) -> nn.Module:
    """Build the published network, drawn so that every part counts."""
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(num_classes=7)
    for block in model.features[1:18]:
        channels = block.conv[-1].num_features
        if name == "eca_mobilenetv2":
            block.conv.append(ECA(channels, 1 if channels < 96 else 3))
        else:
            block.conv.append(Triplet(channels, 3 if name.endswith("_k3") else 7))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, mean=1.0, std=0.2)
            nn.init.normal_(module.bias, std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval().double()


def image(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_published_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[name], abs=5e-3)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_published_files(name):
    theirs = published(name)
    ours = timm.create_model(name, num_classes=7).eval().double()
    state = theirs.state_dict()
    if name == "triplet_mobilenetv2":
        # Its networks' own file has other names.
        for old, new in ((".cw.conv.", ".ChannelGateH.spatial."), (".hc.conv.", ".ChannelGateW.spatial.")):
            state = {key.replace(old, new): value for key, value in state.items()}
        state = {key.replace(".hw.conv.", ".SpatialGate.spatial."): value for key, value in state.items()}
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    report = load_published(ours, wrapped)
    assert report.matched == len(ours.state_dict()) and not report.dropped
    x = image(65, 96)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.forward_features(x), theirs.features(x))
    features = timm.create_model(name, features_only=True).eval().double()
    dropped = load_published(features, wrapped).dropped
    assert dropped and all(key.startswith(("module.features.18.", "module.classifier.")) for key in dropped)
    y, ends = x, {4: 0, 7: 1, 14: 2, 18: 3}
    for k, block in enumerate(theirs.features, start=1):
        y = block(y)
        if k in ends:
            torch.testing.assert_close(features(x)[ends[k]], y)


def test_kernels_of_eca_by_width():
    with torch.device("meta"):
        model = timm.create_model("eca_mobilenetv2")
    kernels = {m.conv[-1].conv.kernel_size for stage in model.stages[:2] for m in stage}
    assert kernels == {(1,)} and [m.conv[-1].conv.kernel_size for m in model.stages[2]] == [(1,)] * 4 + [(3,)] * 3


def test_stochastic_depth_is_of_blocks_with_a_shortcut():
    model = timm.create_model("eca_mobilenetv2", drop_path_rate=0.2)
    for block in (block for stage in model.stages for block in stage):
        if not block.use_res_connect:
            assert not any(type(m).__name__ == "DropPath" for m in block.modules())
    assert model.stages[3][2].conv[-1].drop_prob == pytest.approx(0.2)


def test_filter_leaves_own_files_alone():
    model = timm.create_model("triplet_mobilenetv2", **SMALL)
    state = model.state_dict()
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == state.keys() and all(value is state[key] for key, value in converted.items())


def test_wrong_arguments_are_named():
    for kwargs, named in (
        (dict(attention="se"), "attention: got 'se', expected one of eca, triplet"),
        (dict(kernel_size=2), "kernel_size: got 2"),
        (dict(embed_dims=(24, 32)), "embed_dims"),
        (dict(end_depths=(1,)), "end_depths"),
        (dict(out_norms=(4,)), "out_norms"),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            timm.create_model("eca_mobilenetv2", **SMALL | kwargs)
