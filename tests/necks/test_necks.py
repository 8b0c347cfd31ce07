"""The necks: the published outputs, their definitions, mmdet's, and any backbone before them."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import parity
import pytest
import timm
import torch
import torch.nn.functional as F
from densezoo.necks import FPN, PAFPN, RFP, SEPC, GatherDistribute, RCNet, SimpleFeaturePyramid
from densezoo.necks.rcnet import CrossScaleShift, FusionNode
from torch import Tensor, nn

import densezoo  # noqa: F401
from densezoo import necks

GOLDENS = Path(parity.__file__).parent / "goldens"
WIDTHS = [16, 32, 48, 64]
SAME = [32] * 3
# Widths of the inputs -> the neck, small; every form with other parts.
NECKS: dict[str, tuple[list[int], Callable[[], nn.Module]]] = {
    "fpn": (WIDTHS, lambda: FPN(WIDTHS, 32, num_outs=5)),
    "fpn-extra": (WIDTHS, lambda: FPN(WIDTHS, 32, 5, start_level=1, add_extra_convs=True, norm="bn")),
    "pafpn": (WIDTHS, lambda: PAFPN(WIDTHS, 32, num_outs=5)),
    "pafpn-extra": (WIDTHS, lambda: PAFPN(WIDTHS, 32, 6, add_extra_convs="on_output", norm="bn")),
    "simple": ([32], lambda: SimpleFeaturePyramid(32, 16, num_outs=5)),
    "sepc-lite": (SAME, lambda: SEPC(SAME, 16, 2, lcconv_deform=True, ibn=True)),
    "sepc": (SAME, lambda: SEPC(SAME, 16, 1, pconv_deform=True, lcconv_deform=True, ibn=True)),
    "rcnet": (WIDTHS, lambda: RCNet(WIDTHS, 32, 4, start_level=1)),
    "rcnet-plain": (WIDTHS, lambda: RCNet(WIDTHS, 32, 4, norm=None, deform=False, shift=False)),
    "gather-n": (WIDTHS, lambda: GatherDistribute(WIDTHS, 8, "n", drop_path_rate=0)),
    "gather-m": (WIDTHS, lambda: GatherDistribute(WIDTHS, 9, "m", drop_path_rate=0)),
    "gather-l": (WIDTHS, lambda: GatherDistribute(WIDTHS, 8, "l", drop_path_rate=0)),
}
each = pytest.mark.parametrize("name", NECKS)
# The forms that trace other code than the rest.
traced = pytest.mark.parametrize("name", ["fpn-extra", "pafpn", "simple", "sepc", "rcnet", "gather-n"])


def build(name: str) -> nn.Module:
    """Return a neck in which every parameter counts: some start at 0."""
    neck = NECKS[name][1]()
    for part, parameter in neck.named_parameters():
        if parameter.ndim > 1:
            std = parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, std=std / 10 if "offset" in part else std)
        else:
            nn.init.normal_(parameter, mean=0.0 if part.endswith("bias") else 1.0, std=0.1)
    return neck


def maps(widths: list[int], size: tuple[int, int], batch: int = 2, up: bool = True) -> list[Tensor]:
    """Return a random map a level, each half as large as the one before, rounded up or down."""
    features = []
    for width in widths:
        features.append(torch.randn(batch, width, *size))
        size = tuple((side + up) // 2 for side in size)
    return features


def flat(outs) -> list[Tensor]:
    """Return all tensors of a neck's outputs in order."""
    return [x for out in outs for x in (out if isinstance(out, tuple) else (out,))]


def loss(outs) -> Tensor:
    """Return a number that every pixel of the outputs counts in."""
    return sum((x.float() * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in flat(outs))


def test_parity_of_sepc():
    golden = parity.load(GOLDENS / "sepc_pconv.json")
    neck = SEPC()
    neck.load_state_dict(parity.state_dict_from(golden))
    with torch.no_grad():
        outs = neck.eval()([parity.fixed_input(name, shape) for name, shape in golden["inputs"].items()])
    for level, pair in enumerate(outs, 3):
        for kind, out in zip(("cls", "loc"), pair, strict=True):
            assert parity.compare(golden["outputs"][f"{kind}{level}"], out) < 2e-6


def test_parity_of_gold_yolo():
    golden = parity.load(GOLDENS / "gold_yolo_n_neck.json")
    neck = GatherDistribute([32, 64, 128, 256], arch="n")
    neck.load_state_dict(parity.state_dict_from(golden))
    features = [parity.fixed_input(name, shape) for name, shape in golden["inputs"].items()]
    with pytest.raises(ValueError, match=r"fuse: the neck is in training mode; call eval\(\)"):
        neck.fuse()
    neck.eval()
    for fused in (False, True):
        if fused:
            neck.fuse()
            neck.fuse()
        with torch.no_grad():
            outs = neck(features)
        for expected, out in zip(golden["outputs"].values(), outs, strict=True):
            assert parity.compare(expected, out) < 2e-6
    assert not any("rbr_dense" in key for key in neck.state_dict())


@each
@pytest.mark.parametrize(("size", "up"), [((16, 24), True), ((19, 29), True), ((19, 29), False)], ids=str)
def test_forward_and_backward(name, size, up):
    neck, widths = build(name), NECKS[name][0]
    features = [x.requires_grad_() for x in maps(widths, size, up=up)]
    for train in (True, False):
        neck.train(train).zero_grad()
        outs = neck(features)
        expect_shapes(name, features, outs)
        loss(outs).backward()
        for part, parameter in neck.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), part
            # A batch norm in training takes away what a bias before it adds.
            assert train or parameter.grad.any(), part
        used = features[getattr(neck, "start_level", 0) :]
        assert all(x.grad.isfinite().all() and x.grad.any() for x in used)


def expect_shapes(name: str, features: list[Tensor], outs: tuple) -> None:
    """Assert that the outputs have the levels' sizes, and the sizes that follow for further levels."""
    sizes = [tuple(x.shape[2:]) for x in features]
    got = [tuple(x.shape[2:]) for x in flat(outs)]
    if name == "simple":
        height, width = sizes[0]
        expected = [(4 * height, 4 * width), (2 * height, 2 * width), (height, width)]
        expected += [tuple((side + 1) // 2 for side in sizes[0])]
    elif name.startswith("sepc"):
        expected = [tuple(max(side - 2, 1) for side in size) for size in sizes for _ in range(2)]
    else:
        expected = sizes[1:] if name.startswith("gather") or name in ("fpn-extra", "rcnet") else sizes
    while len(expected) < len(got):
        expected.append(tuple((side + 1) // 2 for side in expected[-1]))
    assert got == expected
    widths = [x.shape[1] for x in flat(outs)]
    if name.startswith("gather"):
        assert widths == [widths[0], 2 * widths[0], 4 * widths[0]]
    else:
        assert set(widths) == {16 if name == "simple" or name.startswith("sepc") else 32}


@each
def test_images_are_independent_and_memory_layout_is_free(name):
    neck, features = build(name).eval(), maps(NECKS[name][0], (24, 40), batch=3)
    with torch.no_grad():
        outs = flat(neck(features))
        single = flat(neck([x[1:2] for x in features]))
        strided = flat(neck([x.to(memory_format=torch.channels_last) for x in features]))
    for out, one, other in zip(outs, single, strided, strict=True):
        torch.testing.assert_close(one, out[1:2], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other, out, atol=1e-4, rtol=1e-4)


@each
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_autocast(name, train):
    neck, features = NECKS[name][1]().train(train), maps(NECKS[name][0], (24, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = neck(features)
        flat(neck([x.bfloat16() for x in features]))
    loss(outs).backward()
    assert all(x.isfinite().all() for x in flat(outs))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())
    if not train:
        for out, exact in zip(flat(outs), flat(neck(features)), strict=True):
            assert (out.float() - exact).norm() < 0.05 * exact.norm()


@each
def test_whole_neck_in_bfloat16(name):
    neck, features = NECKS[name][1]().eval(), maps(NECKS[name][0], (24, 40))
    with torch.no_grad():
        outs, exact = copy.deepcopy(neck).bfloat16()([x.bfloat16() for x in features]), neck(features)
    for out, expected in zip(flat(outs), flat(exact), strict=True):
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).norm() < 0.05 * expected.norm()


@traced
def test_compile(name):
    neck, features = build(name), maps(NECKS[name][0], (16, 24))
    compiled = torch.compile(copy.deepcopy(neck), fullgraph=True, backend="aot_eager")
    expected, outs = neck(features), compiled(features)
    loss(expected).backward()
    loss(outs).backward()
    for out, other in zip(flat(outs), flat(expected), strict=True):
        assert (out - other).norm() < 1e-3 * other.norm()
    for (part, a), b in zip(neck.named_parameters(), compiled.parameters(), strict=True):
        assert (b.grad - a.grad).norm() <= 1e-3 * a.grad.norm() + 1e-3, part


class Strided(nn.Module):
    """A backbone of strided convolutions before a neck, and the neck."""

    def __init__(self, widths: list[int], neck: nn.Module):
        super().__init__()
        before = [3, *widths[:-1]]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(before, widths, strict=True))
        self.neck = neck

    def forward(self, x):
        features = []
        for conv in self.convs:
            x = conv(x)
            features.append(x)
        return self.neck(features)


@traced
def test_export_with_free_height_and_width(name):
    model, free = Strided(NECKS[name][0], build(name)).eval(), torch.export.Dim.DYNAMIC
    with torch.no_grad():
        shapes = ({2: free, 3: free},)
        program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=shapes).module()
        for size in ((96, 128), (72, 160), (131, 109)):
            x = torch.randn(2, 3, *size)
            for out, expected in zip(flat(program(x)), flat(model(x)), strict=True):
                torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@each
def test_copies(name):
    neck, features = build(name).eval(), maps(NECKS[name][0], (16, 24))
    again = NECKS[name][1]().eval()
    again.load_state_dict(neck.state_dict())
    for other in (again, copy.deepcopy(neck), pickle.loads(pickle.dumps(neck))):
        for a, b in zip(flat(neck(features)), flat(other(features)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FPN([]), r"in_channels: got \[\], expected the widths of 1 levels or more"),
        (lambda: FPN(64), "in_channels: got 64, expected the widths of 1 levels or more"),
        (lambda: FPN([64, 0]), "in_channels: got 0, expected a positive integer"),
        (lambda: FPN([64, 32.0]), "in_channels: got 32.0, expected a positive integer"),
        (lambda: FPN(WIDTHS, 0), "out_channels: got 0, expected a positive integer"),
        (lambda: FPN(WIDTHS, num_outs=3), "num_outs: got 3, expected 4 or more"),
        (lambda: FPN(WIDTHS, start_level=4), "start_level: got 4, expected 0 to 3 for 4 levels"),
        (lambda: FPN(WIDTHS, start_level=1.0), "start_level: got 1.0, expected 0 to 3 for 4 levels"),
        (lambda: FPN(WIDTHS, start_level=-1), "start_level: got -1, expected 0 to 3 for 4 levels"),
        (lambda: FPN(WIDTHS, add_extra_convs="on_top"), "add_extra_convs: got 'on_top', expected False, True or "),
        (lambda: FPN(WIDTHS, norm="ln"), "norm: got 'ln', expected one of None, 'bn', 'gn'"),
        (lambda: PAFPN(WIDTHS, 40, norm="gn"), "out_channels: got 40, expected a multiple of 32"),
        (lambda: SimpleFeaturePyramid(30), "in_channels: got 30, expected a multiple of 4"),
        (lambda: SimpleFeaturePyramid([64, 128]), r"in_channels: got \[64, 128\], expected one width"),
        (lambda: SimpleFeaturePyramid(64, scales=(4, 3)), r"scales: got \(4, 3\), expected some of"),
        (lambda: SimpleFeaturePyramid(64, scales=(1, 2)), r"scales: got \(1, 2\), expected some of"),
        (lambda: SimpleFeaturePyramid(64, scales=4), "scales: got 4, expected some of"),
        (lambda: SimpleFeaturePyramid(None), "in_channels: got None, expected the widths of 1 levels or more"),
        (lambda: SimpleFeaturePyramid(64, num_outs=3), "num_outs: got 3, expected 4 or more"),
        (lambda: SEPC([64, 32]), r"in_channels: got \[64, 32\], expected one width at all levels"),
        (lambda: SEPC(num_pconvs=0), "num_pconvs: got 0, expected a positive integer"),
        (lambda: RCNet(WIDTHS, 8), "out_channels: got 8, expected 16 or more"),
        (lambda: RCNet(WIDTHS, 33), "out_channels: got 33, expected an even number"),
        (lambda: RCNet([64, 32], num_outs=2), "num_outs: got 2, expected 3 or more"),
        (lambda: RCNet([64], num_outs=1, shift=False), "num_outs: got 1, expected 2 or more"),
        (lambda: RCNet(WIDTHS, num_outs=3), "num_outs: got 3, expected 4 or more"),
        (lambda: GatherDistribute(WIDTHS[1:]), r"in_channels: got \[32, 48, 64\], expected four widths"),
        (lambda: GatherDistribute(WIDTHS, arch="x"), "arch: got 'x', expected one of n, s, m, l"),
        (
            lambda: GatherDistribute(WIDTHS, drop_path_rate=1),
            "drop_path_rate: got 1, expected 0 or more and less than 1",
        ),
        (lambda: GatherDistribute(WIDTHS, 0), "out_channels: got 0, expected a positive integer"),
        (lambda: RFP(WIDTHS, nn.Identity()), "rfp_backbone: Identity takes no feedback; expected a backbone of"),
        (
            lambda: RFP([64, 64, 128, 256, 512], timm.create_model("resnet18", features_only=True)),
            "rfp_backbone: FeatureListNet takes no feedback; expected a backbone of densezoo",
        ),
        (lambda: RFP(WIDTHS, zoo_backbone()), r"rfp_backbone: returns maps of \[16, 32, 64, 128\] channels, expected"),
        (lambda: RFP([16], zoo_backbone()), r"in_channels: got \[16\], expected two levels or more"),
        (lambda: RFP(ZOO, zoo_backbone(), aspp_dilations=(1, 3)), r"aspp_dilations: got \(1, 3\), expected a last one"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@each
def test_other_maps_than_said(name):
    neck, features = build(name), maps(NECKS[name][0], (16, 24))
    widths = NECKS[name][0]
    with pytest.raises(ValueError, match=rf"features: got {len(widths) + 1} maps of .*, expected {len(widths)}, fin"):
        neck([features[0], *features])
    with pytest.raises(ValueError, match="features: got .* channels, expected .* as in in_channels"):
        neck([*features[:-1], features[-1][:, 1:]])
    with pytest.raises(ValueError, match="features: got one tensor, expected a sequence of maps"):
        neck(features[0])
    if len(features) > 1:
        with pytest.raises(ValueError, match="features: got maps of sizes .*, expected the finest first"):
            neck([*features[:-1], torch.randn(2, widths[-1], 20, 30)])


@pytest.mark.parametrize("kind", ["FPN", "PAFPN"])
@pytest.mark.parametrize(
    ("options", "norm_cfg"),
    [
        (dict(num_outs=5), None),
        (dict(num_outs=5, start_level=1, add_extra_convs="on_input"), None),
        (dict(num_outs=6, start_level=1, add_extra_convs="on_lateral", relu_before_extra_convs=True), dict(type="BN")),
        (dict(num_outs=6, add_extra_convs="on_output"), dict(type="GN", num_groups=32)),
        (dict(num_outs=5, start_level=1, add_extra_convs=True), None),
    ],
    ids=lambda value: str(value.get("add_extra_convs")) if isinstance(value, dict) and "num_outs" in value else "",
)
def test_fpn_is_mmdets(kind, options, norm_cfg):
    pytest.importorskip("mmdet")
    from mmengine.registry import MODELS, init_default_scope

    import densezoo.openmmlab  # noqa: F401

    init_default_scope("mmdet")
    theirs = MODELS.build(dict(type=kind, in_channels=WIDTHS, out_channels=32, norm_cfg=norm_cfg, **options))
    ours = getattr(necks, kind)(WIDTHS, 32, norm=norm_cfg and norm_cfg["type"].lower(), **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    features = maps(WIDTHS, (37, 50))
    for out, expected in zip(ours.eval()(features), theirs.eval()(features), strict=True):
        torch.testing.assert_close(out, expected)


def test_simple_feature_pyramid_of_some_scales():
    outs = SimpleFeaturePyramid([32], 16, scales=(2, 1), num_outs=3)(maps([32], (7, 9)))
    assert [tuple(out.shape) for out in outs] == [(2, 16, 14, 18), (2, 16, 7, 9), (2, 16, 4, 5)]
    # a 1x1 map has a coarser level too
    assert SimpleFeaturePyramid(32, 16)(maps([32], (1, 1)))[-1].shape == (2, 16, 1, 1)


def test_sepc_starts_undeformed_and_never_deforms_the_finest_level():
    plain, deformed = SEPC(SAME, 16, 1), SEPC(SAME, 16, 1, pconv_deform=True, lcconv_deform=True)
    deformed.load_state_dict(plain.state_dict(), strict=False)
    features = maps(SAME, (40, 56))
    expected = plain(features)
    for pair, other in zip(deformed(features), expected, strict=True):
        for a, b in zip(pair, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for part, parameter in deformed.named_parameters():
        if "offset" in part:
            nn.init.normal_(parameter)
    outs = deformed(features)
    torch.testing.assert_close(outs[0], expected[0])
    for a, b in zip(flat(outs[1:]), flat(expected[1:]), strict=True):
        assert (a - b).abs().max() > 1e-3 * b.abs().max()


def test_integrated_batch_norm_takes_all_levels_together():
    neck = SEPC(SAME, 16, 1, ibn=True)
    features = [x * (i + 1) for i, x in enumerate(maps(SAME, (20, 28)))]
    raw = SEPC(SAME, 16, 1)
    raw.load_state_dict(neck.state_dict(), strict=False)
    kept = []
    for module in (neck.Pconvs[0].bn, neck.lbn, neck.cbn):
        module.register_forward_hook(lambda module, args, out: kept.append((args[0], out)))
    neck(features)
    pixels = sum(x.shape[2] * x.shape[3] for x in features)
    assert kept[0][0].numel() == 2 * 16 * pixels
    for _, out in kept:
        torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(16), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.var((0, 2, 3), correction=0), torch.ones(16), atol=0.1, rtol=0)


def test_fusion_node_starts_as_the_mean():
    node = FusionNode(8, coarser=True, finer=True, norm=None, deform=False)
    node.pre_fusion = node.post_fusion = nn.Identity()
    x, coarser, finer = torch.randn(2, 8, 6, 10), torch.randn(2, 8, 3, 5), torch.randn(2, 8, 12, 20)
    larger = F.interpolate(coarser, size=(6, 10), mode="bilinear")
    expected = ((x + larger) / 2 + F.max_pool2d(finer, 2)) / 2
    torch.testing.assert_close(node(x, coarser, finer), expected)


def test_fusion_node_weighs_positions_after_its_gate_has_seen_them():
    node = FusionNode(8, coarser=True, finer=False, norm=None, deform=False)
    node.post_fusion = nn.Identity()
    for parameter in node.parameters():
        nn.init.normal_(parameter)
    x, coarser = torch.randn(2, 8, 6, 10), torch.randn(2, 8, 3, 5)
    larger = F.interpolate(coarser, size=(6, 10), mode="bilinear")
    ratio = node.weight[0](torch.cat([x.mean((2, 3)), larger.mean((2, 3))], 1)[..., None, None]).sigmoid()
    logits = node.temp * node.spatial_weight(torch.cat([x, larger], 1)) / 8**0.5
    weights = 60 * logits.exp() / logits.exp().sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close(node(x, coarser, None), ratio * x + (1 - ratio) * weights * larger)


def test_cross_scale_shift():
    levels = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(2, 5, 64, 3, 4)
    shifted = CrossScaleShift(64).shift(levels)
    assert shifted.shape == (2, 5, 16, 3, 4)
    for i in range(5):
        for part, neighbour in enumerate((i + 1, i - 1, i + 2, i - 2)):
            assert (shifted[:, i, 4 * part : 4 * part + 4] == neighbour % 5).all()


def test_cross_scale_shift_adds_its_contexts_to_every_level():
    csn, features = CrossScaleShift(32, norm=None).eval(), maps([32] * 5, (32, 48))
    for conv in csn.aggregation:
        nn.init.zeros_(conv[1].weight)
    size = features[1].shape[2:]
    larger = [F.interpolate(f, size=size, mode="bilinear") for f in features[1:]]
    x = torch.stack([F.adaptive_max_pool2d(features[0], size), *larger], 1)
    mean = x.mean(1)
    weights = csn.spatial_context.channel_agg(mean).flatten(2).softmax(2)
    space = csn.spatial_context.trans((mean.flatten(2) * weights).sum(2)[..., None, None])
    mean = x.mean((3, 4)).mT
    weights = csn.scale_context.channel_agg(mean[..., None]).squeeze(3).softmax(2)
    scale = csn.scale_context.trans((mean * weights).sum(2)[..., None, None])
    outs = csn(features)
    out = features[3] + F.adaptive_max_pool2d(x[:, 3] + space + scale, features[3].shape[2:])
    torch.testing.assert_close(outs[3], out, atol=1e-5, rtol=1e-5)
    out = features[0] + F.interpolate(x[:, 0] + space + scale, size=features[0].shape[2:], mode="bilinear")
    torch.testing.assert_close(outs[0], out, atol=1e-5, rtol=1e-5)


def test_gather_distribute_takes_any_widths():
    widths = [24, 40, 56, 72]
    neck = GatherDistribute(widths, arch="s")
    assert neck.out_channels == [64, 128, 256]
    assert [x.shape[1] for x in neck(maps(widths, (24, 32)))] == neck.out_channels


ZOO = [16, 32, 64, 128]


def zoo_backbone(name: str = "nat_mini", depths: tuple[int, ...] = (1, 2, 1, 1), **options) -> nn.Module:
    """Return a small backbone of the zoo, under timm."""
    if name.startswith("eca_resnet"):
        return timm.create_model(name, features_only=True, depths=depths, **options)
    options.update(dict(embed_dims=ZOO) if name.startswith("quadtree") else dict(embed_dim=ZOO[0]))
    return timm.create_model(name, features_only=True, depths=depths, num_heads=(1, 2, 2, 4), **options)


def zoo_rfp(backbone: nn.Module) -> RFP:
    """Return a recursive pyramid whose every part counts, and whose second backbone is a copy of the first."""
    neck = RFP(backbone.feature_info.channels(), copy.deepcopy(backbone), 32, num_outs=5, aspp_out_channels=8)
    for conv in (*neck.rfp_convs, neck.rfp_weight):
        nn.init.normal_(conv.weight, std=0.2)
    return neck


@pytest.mark.parametrize("kind", [FPN, PAFPN, RCNet, GatherDistribute])
def test_after_a_zoo_backbone(kind):
    backbone = zoo_backbone()
    neck = kind(backbone.feature_info.channels(), 32)
    outs = neck(backbone(torch.randn(2, 3, 75, 97)))
    loss(outs).backward()
    assert all(p.grad is not None for p in (*backbone.parameters(), *neck.parameters()))


@pytest.mark.parametrize("name", ["agent_deit_tiny", "nat_isotropic_small", "densezoo_focalnet_tiny_iso"])
def test_simple_feature_pyramid_after_single_scale_backbones(name):
    small = dict(embed_dim=32, num_heads=2) if "focalnet" not in name else dict(embed_dim=32)
    depth = dict(depths=(1,)) if "focalnet" in name else dict(depth=1)
    backbone = timm.create_model(name, features_only=True, **small, **depth)
    neck = SimpleFeaturePyramid(backbone.feature_info.channels(), 16, num_outs=5)
    outs = neck(backbone(torch.randn(1, 3, 96, 112)))
    assert [tuple(x.shape[2:]) for x in outs] == [(24, 28), (12, 14), (6, 7), (3, 4), (2, 2)]


def test_rfp_starts_as_an_fpn():
    backbone = zoo_backbone().eval()
    neck, images = RFP(ZOO, copy.deepcopy(backbone), 32, num_outs=5).eval(), torch.randn(2, 3, 75, 97)
    fpn = FPN(ZOO, 32, num_outs=5)
    assert fpn.load_state_dict(neck.state_dict(), strict=False).missing_keys == []
    features = backbone(images)
    for out, expected in zip(neck((images, *features)), fpn(features), strict=True):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_cp", [False, True], ids=["stored", "recomputed"])
def test_rfp_is_its_definition(with_cp):
    backbone = zoo_backbone()
    neck, images = zoo_rfp(backbone), torch.randn(2, 3, 64, 96)
    neck.rfp_modules[0].model.set_grad_checkpointing(with_cp)
    features = [x.detach() for x in backbone(images)]
    outs = neck((images, *features))
    loss(outs).backward()
    grads = {name: p.grad.clone() for name, p in neck.named_parameters()}
    assert all(grad.any() for grad in grads.values())
    neck.zero_grad()

    fpn = FPN(ZOO, 32, num_outs=5)
    for part in ("lateral_convs", "fpn_convs"):
        setattr(fpn, part, getattr(neck, part))
    first, model = fpn(features), neck.rfp_modules[0].model
    x, second = model.patch_embed(images), []
    for i in range(4):
        if i:
            x = model.levels[i - 1].downsample(x)
        blocks = list(model.levels[i].blocks)
        x = blocks[0](x)
        if i:
            x = x + neck.rfp_convs[i - 1](neck.rfp_aspp(first[i])).permute(0, 2, 3, 1)
        for block in blocks[1:]:
            x = block(x)
        second.append(x.permute(0, 3, 1, 2))
    expected = []
    for old, new in zip(first, fpn(second), strict=True):
        ratio = neck.rfp_weight(new).sigmoid()
        expected.append(ratio * new + (1 - ratio) * old)
    for a, b in zip(outs, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    loss(expected).backward()
    for name, p in neck.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], atol=1e-3, rtol=1e-3, msg=name)


def test_rfp_leaves_nothing_behind():
    backbone = zoo_backbone()
    neck, images = zoo_rfp(backbone), torch.randn(1, 3, 64, 64)
    features = backbone(images)
    neck((images, *features))
    again = copy.deepcopy(neck)
    torch.save(neck, io.BytesIO())
    for a, b in zip(neck.rfp_modules[0](images), features, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="features: got"):
        neck((images, *features[1:]))
    with pytest.raises(RuntimeError):
        neck((images[:, :2], *features))
    for a, b in zip(neck.rfp_modules[0](images), features, strict=True):
        torch.testing.assert_close(a, b)
    # the copy feeds its own backbone
    neck.rfp_modules[0] = nn.Identity()
    again((images, *features))


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("nat_mini", (1, 2, 3)),
        ("dinat_s_tiny", (0, 2, 3)),
        ("densezoo_davit_tiny", (0, 1, 2, 3)),
        ("quadtree_b0", (0, 1, 2, 3)),
        # channels first
        ("eca_resnet18", (0, 1, 2, 3)),
    ],
    ids=str,
)
def test_rfp_on_zoo_backbones(name, levels):
    backbone = zoo_backbone(name, out_indices=levels)
    neck, images = zoo_rfp(backbone), torch.randn(2, 3, 75, 97)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = neck((images, *backbone(images)))
    loss(outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())


@pytest.mark.slow
def test_rfp_compiles_and_exports():
    backbone = zoo_backbone(depths=(1, 1, 1, 1), out_indices=(0, 1)).eval()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone
            self.neck = zoo_rfp(backbone).eval()

        def forward(self, images):
            return self.neck((images, *self.backbone(images)))

    model, images = Model(), torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            for a, b in zip(compiled(images), expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        free = torch.export.Dim.DYNAMIC
        program = torch.export.export(model, (images,), dynamic_shapes=({2: free, 3: free},)).module()
        for size in ((96, 128), (75, 97)):
            x = torch.randn(1, 3, *size)
            for a, b in zip(program(x), model(x), strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("arch", "width"), [("n", 32), ("s", 64), ("m", 96), ("l", 128)])
def test_gather_distribute_has_its_published_widths(arch, width):
    neck = GatherDistribute([width, 2 * width, 4 * width, 8 * width], arch=arch)
    assert neck.out_channels == [width, 2 * width, 4 * width]
    dims = dict(n=352, s=704, m=1056, l=1408)
    assert neck.conv_1x1_n.in_channels == dims[arch]
    assert neck.low_IFM[0].conv.in_channels == dict(n=480, s=960, m=1440, l=1920)[arch]


@pytest.mark.parametrize("name", [name for name in necks.__all__ if name not in ("SAC", "use_sac")])
def test_openmmlab_type(name):
    pytest.importorskip("mmengine")
    from densezoo.openmmlab import MODELS, config_for

    config = dict(type=f"densezoo.{name}", in_channels=ZOO)
    if name == "SEPC":
        config.update(in_channels=SAME)
    if name == "SimpleFeaturePyramid":
        config.update(in_channels=[32])
    if name == "RFP":
        arch = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))
        config.update(rfp_backbone=config_for("nat_mini", arch=arch))
        backbone = MODELS.build(config_for("nat_mini", arch=arch, output_img=True))
        neck = MODELS.build(config)
        neck.init_weights()
        images = torch.randn(1, 3, 64, 64)
        features = backbone(images)
        assert features[0] is images and len(features) == 5
        assert len(neck(features)) == 4
    assert isinstance(MODELS.build(config), getattr(necks, name))
