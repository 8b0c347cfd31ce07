"""ResNets with attention modules: where the module sits, the published sizes, and the published layouts."""

import re

import pytest
import timm
import torch
from densezoo.backbones.attention_resnet import VARIANTS, AttentionResNet, checkpoint_filter_fn
from densezoo.ops.plugins import BAM, CBAM, ECA, FCA, SE, Triplet
from torch import nn

from densezoo.checkpoints import load_published

# Published sizes, in millions.
MILLIONS = dict(se_resnet50=28.072, cbam_resnet50=28.090, cbam_resnet101=49.33, bam_resnet50=25.915)
MILLIONS |= dict(eca_resnet18=11.690, eca_resnet34=21.798, eca_resnet50=25.557, eca_resnet101=44.549)
MILLIONS |= dict(eca_resnet152=60.193, triplet_resnet18=11.692, triplet_resnet50=25.562, triplet_resnet18_k3=11.69)
MILLIONS |= dict(triplet_resnet50_k3=25.56, fcanet34=21.955, fcanet50=28.072)
SMALL = dict(embed_dims=(16, 16, 32, 32), depths=(1, 2, 1, 1), num_classes=7)
FIRSTS = ("se_resnet18", "cbam_resnet50", "eca_resnet50", "triplet_resnet50", "fcanet50", "bam_resnet50")
# Names of the modules in the published code.
NAMES = dict(se="se", cbam="cbam", eca="eca", triplet="triplet_attention", fca="att")


def build(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL | kwargs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 0.5, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval().double()


def image(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def published(model: nn.Module, name: str, resnet_file: bool = True) -> dict[str, torch.Tensor]:
    """Return a model's state dict under the names of the published files."""
    attention, rules = VARIANTS[name]["attention"], {r"^patch_embed\.": "", r"^head\.": "fc."}
    if attention == "bam":
        for i in (1, 2, 3):
            rules[rf"^layer{i}\.{SMALL['depths'][i - 1]}\."] = f"bam{i}."
    else:
        rules[r"\.se\."] = f".{NAMES[attention]}."
    if attention == "triplet" and resnet_file:
        for ours, theirs in (("cw", "ChannelGateH"), ("hc", "ChannelGateW"), ("hw", "SpatialGate")):
            rules[rf"\.{ours}\.conv\."] = f".{theirs}.spatial."
    state = {}
    for key, value in model.state_dict().items():
        for pattern, replacement in rules.items():
            key = re.sub(pattern, replacement, key)
        state[key] = value
    for key, module in model.named_modules():
        if isinstance(module, FCA):
            basis = module.rows[:, :, None] * module.columns[:, None]
            weight = basis.repeat_interleave(module.fc[0].in_features // len(basis), 0)
            # The released ones went through half precision.
            state[f"{key.removesuffix('.se')}.att.dct_layer.weight"] = weight.half().float()
    return state


@pytest.mark.parametrize("name", MILLIONS)
def test_published_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    millions, expected = sum(p.numel() for p in model.parameters()) / 1e6, MILLIONS[name]
    assert round(millions, len(str(expected).partition(".")[2])) == expected


@pytest.mark.parametrize("name", FIRSTS)
@torch.no_grad()
def test_where_the_module_sits(name):
    """After the last norm of each block, before the shortcut is added; BAM after each stage but the last."""
    model, x = build(name), image(75, 96)
    arch = VARIANTS[name]
    kinds = dict(se=SE, cbam=CBAM, bam=BAM, eca=ECA, triplet=Triplet, fca=FCA)
    attention = kinds[arch["attention"]]
    counted = [sum(isinstance(m, attention) for m in layer.modules()) for layer in list(model.children())[1:5]]
    assert counted == ([1, 1, 1, 0] if attention is BAM else list(SMALL["depths"]))

    y = model.patch_embed.maxpool(model.patch_embed.bn1(model.patch_embed.conv1(x)).relu())
    for i, expected in enumerate(model.forward_intermediates(x, intermediates_only=True), start=1):
        for block in getattr(model, f"layer{i}"):
            if isinstance(block, BAM):
                y = block(y)
                continue
            branch = y
            for j in range(1, 4 if arch["bottleneck"] else 3):
                branch = getattr(block, f"conv{j}")(branch if j == 1 else branch.relu())
                branch = getattr(block, f"bn{j}")(branch)
            if attention is not BAM:
                branch = block.se(branch)
            y = (branch + (y if block.downsample is None else block.downsample(y))).relu()
        torch.testing.assert_close(expected, y)
    torch.testing.assert_close(model(x), model.head(y.mean((2, 3))))


@torch.no_grad()
def test_without_a_module_it_is_timms_resnet():
    theirs = timm.create_model("resnet18", num_classes=7).eval().double()
    ours = AttentionResNet(depths=(2, 2, 2, 2), bottleneck=False, attention=None, num_classes=7).eval().double()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # the branches' last norms start at 0
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    assert load_published(ours, theirs.state_dict()).matched == len(ours.state_dict())
    torch.testing.assert_close(ours(image(64, 96)), theirs(image(64, 96)))


@torch.no_grad()
def test_same_numbers_as_timms_resnet_with_the_module():
    theirs = timm.create_model("resnet50", num_classes=7, block_args=dict(attn_layer=SE)).eval().double()
    ours = timm.create_model("se_resnet50", num_classes=7).eval().double()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # the branches' last norms start at 0
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    assert load_published(ours, theirs.state_dict()).matched == len(ours.state_dict())
    torch.testing.assert_close(ours(image(64, 96)), theirs(image(64, 96)))
    assert ours.forward_features(image(64, 96)).shape == theirs.forward_features(image(64, 96)).shape


def test_kernel_sizes_and_frequencies():
    with torch.device("meta"):
        eca, triplet, fca = (timm.create_model(name) for name in ("eca_resnet18", "triplet_resnet50_k3", "fcanet34"))
    assert [getattr(eca, f"layer{i}")[0].se.conv.kernel_size for i in range(1, 5)] == [(3,), (5,), (7,), (7,)]
    assert all(m.conv.conv.kernel_size == (3, 3) for m in (triplet.layer4[0].se.cw, triplet.layer1[0].se.hw))
    assert [getattr(fca, f"layer{i}")[0].se.rows.shape[1] for i in range(1, 5)] == [56, 28, 14, 7]


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
@pytest.mark.parametrize("name", FIRSTS)
@torch.no_grad()
def test_published_files(name, wrap):
    source = build(name)
    state = published(source, name)
    model = build(name, num_classes=7)
    nn.init.zeros_(model.patch_embed.conv1.weight)
    report = load_published(model, wrap(state))
    assert report.matched == len(source.state_dict()) and not report.missing
    assert all(key.endswith("dct_layer.weight") for key in report.dropped)
    assert bool(report.dropped) == (name == "fcanet50")
    assert torch.equal(model(image(64, 96)), source(image(64, 96)))

    # The backbone of a detector, into one.
    dense = build(name, features_only=True, out_indices=(1, 2))
    detector = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("fc.")}
    load_published(dense, detector | {"neck.weight": torch.ones(1)})
    features = source.forward_intermediates(image(64, 96), indices=[1, 2], intermediates_only=True)
    assert all(map(torch.equal, dense(image(64, 96)), features))


def test_other_published_names():
    """Triplet attention's root file has other names than its ResNet's, and files of torch 0.4.0 no counts."""
    source = build("triplet_resnet50")
    state = published(source, "triplet_resnet50", resnet_file=False)
    assert "layer1.0.triplet_attention.cw.conv.conv.weight" in state
    counts = [key for key in state if key.endswith("num_batches_tracked")]
    assert counts
    for key in counts:
        del state[key]
    model = build("triplet_resnet50")
    assert load_published(model, state).matched == len(source.state_dict())


def test_frequencies_of_another_network_are_refused():
    state = published(build("fcanet50"), "fcanet50")
    state["layer2.0.att.dct_layer.weight"] = state["layer2.0.att.dct_layer.weight"].flip(0)
    with pytest.raises(ValueError, match="dct_layer.weight: .* other frequencies"):
        load_published(build("fcanet50"), state)


@pytest.mark.parametrize("name", FIRSTS)
def test_filter_leaves_own_files_alone(name):
    model = build(name)
    state = model.state_dict()
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == state.keys()
    assert all(value is state[key] for key, value in converted.items())


def test_fcanet_built_without_memory_computes_its_frequencies():
    with torch.device("meta"):
        model = timm.create_model("fcanet50", **SMALL)
    source = build("fcanet50").float()
    model.load_state_dict(source.state_dict(), assign=True)
    torch.testing.assert_close(model.eval()(image(64, 64).float()), source(image(64, 64).float()))


def test_wrong_arguments_are_named():
    for kwargs, named in (
        (dict(attention="sea"), "attention: got 'sea', expected one of se, cbam"),
        (dict(kernel_sizes=(3, 3, 3, 3)), "kernel_sizes: .* expected None, as 'se' has no such kernels"),
        (dict(attention="eca", kernel_sizes=(3, 3)), "kernel_sizes"),
        (dict(attention="eca", kernel_sizes=(3, 4, 3, 3)), "kernel_size: got 4"),
        (dict(embed_dims=64), "embed_dims"),
        (dict(embed_dims=(12, 16, 32, 32)), "reduction"),
        (dict(out_norms=(4,)), "out_norms"),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            timm.create_model("se_resnet18", **SMALL | kwargs)
