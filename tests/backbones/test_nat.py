"""NAT, DiNAT, DiNAT_s and their isotropic versions: what timm's contract does not cover."""

import pytest
import timm
import torch
import torch.nn.functional as F
from densezoo.backbones import nat, nat_isotropic
from densezoo.backbones.nat import NeighborhoodAttention, checkpoint_filter_fn, spread_dilations
from densezoo.backbones.nat_isotropic import FullAttention
from densezoo.ops import na2d

# Parameters in millions, as counted on the published models.
PARAMETERS = {
    "nat_mini": 19.98,
    "nat_tiny": 27.90,
    "nat_small": 50.74,
    "nat_base": 89.77,
    "dinat_mini": 19.98,
    "dinat_tiny": 27.90,
    "dinat_small": 50.72,
    "dinat_base": 89.77,
    "dinat_large": 200.9,
    "dinat_large_384": 200.9,
    "dinat_large_384_11x11": 201.1,
    "dinat_s_tiny": 28.29,
    "dinat_s_small": 49.61,
    "dinat_s_base": 87.77,
    "dinat_s_large": 196.5,
    "dinat_s_large_384": 196.5,
    "nat_isotropic_small": 22.00,
    "dinat_isotropic_small": 22.00,
    "vitrpb_small": 22.08,
    "nat_isotropic_base": 86.47,
    "dinat_isotropic_base": 86.47,
    "vitrpb_base": 86.63,
}
SMALL = dict(embed_dim=16, depths=(1, 2), num_heads=(1, 2), num_classes=10)
DILATED = SMALL | dict(dilations=((3,), (1, 2)))


def dilations_of(model) -> list[int]:
    return [m.dilation for m in model.modules() if isinstance(m, NeighborhoodAttention)]


def create_meta(name: str, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    count = sum(p.numel() for p in create_meta(name).parameters()) / 1e6
    digits = len(str(PARAMETERS[name]).split(".")[1])
    assert count == pytest.approx(PARAMETERS[name], abs=0.51 * 10**-digits)


@pytest.mark.parametrize("name, like", [("dinat_large_21k", "dinat_large"), ("dinat_s_large_21k", "dinat_s_large")])
def test_22k_weights_differ_in_the_head_alone(name, like):
    (model, other) = (create_meta(n, num_classes=0) for n in (name, like))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert dilations_of(model) == dilations_of(other)
    assert create_meta(name).num_classes == 21841


@pytest.mark.parametrize(
    "name, dilations",
    [
        ("nat_small", [1] * 30),
        ("dinat_tiny", [1, 8, 1] + [1, 4] * 2 + [1, 2] * 9 + [1] * 5),
        ("dinat_mini", [1, 8, 1] + [1, 4] * 2 + [1, 2] * 3 + [1] * 5),
        ("dinat_large_384", [1, 13, 1] + [1, 6] * 2 + [1, 3] * 9 + [1] * 5),
        ("dinat_large_384_11x11", [1, 8, 1] + [1, 4] * 2 + [1, 2] * 9 + [1] * 5),
        ("dinat_s_base", [1, 8] + [1, 4] + [1, 2] * 9 + [1, 1]),
        ("dinat_s_large_384", [1, 13] + [1, 6] + [1, 3] * 9 + [1, 1]),
        ("nat_isotropic_base", [1] * 12),
        ("dinat_isotropic_small", [1, 2] * 6),
    ],
)
def test_published_dilations(name, dilations):
    model = create_meta(name)
    assert dilations_of(model) == dilations
    kernel_sizes = {m.kernel_size for m in model.modules() if isinstance(m, NeighborhoodAttention)}
    assert kernel_sizes == {11 if name.endswith("11x11") else 7}


def test_layer_scale():
    scaled = {name for name in nat.VARIANTS if any("gamma" in k for k in create_meta(name).state_dict())}
    assert scaled == {"nat_small", "nat_base", "dinat_base"}
    block = timm.create_model("nat_small", **SMALL).levels[0].blocks[0]
    assert torch.equal(block.gamma1, torch.full((16,), 1e-5)) and torch.equal(block.gamma2, torch.full((16,), 1e-5))


def test_initial_weights():
    model = timm.create_model("nat_mini", **(SMALL | dict(embed_dim=64, num_heads=(2, 4))))
    attention = model.levels[1].blocks[1].attn
    for weight in (attention.rpb, attention.qkv.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15) and weight.abs().max() < 0.12
    assert not attention.qkv.bias.any() and not model.head.bias.any()


def test_dilations_repeat_to_any_depth():
    coco = [[1, 28], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]
    assert spread_dilations(coco, (3, 4, 18, 5)) == [
        [1, 28, 1],
        [1, 7, 1, 14],
        [1, 3, 1, 5, 1, 7] * 3,
        [1, 3, 1, 3, 1],
    ]
    assert spread_dilations(coco, (1, 2, 3, 1)) == [[1], [1, 7], [1, 3, 1], [1]]
    assert spread_dilations(2, (1, 2)) == [[2], [2, 2]]
    assert dilations_of(timm.create_model("dinat_mini", **DILATED)) == [3, 1, 2]


@pytest.mark.parametrize(
    "dilations", [[[1, 2]], [1, 2], [[1], []], [[1], [0]], [[1], [1.0]], [[1], [True]], 0, True, None, "12", [[1], "2"]]
)
def test_wrong_dilations_are_named(dilations):
    with pytest.raises(ValueError, match=r"dilations: got .* expected a positive int, or 2 lists"):
        nat.NAT(**(SMALL | dict(dilations=dilations)))


def test_wrong_heads_are_named():
    with pytest.raises(ValueError, match="num_heads: got 3, expected a divisor of dim 16"):
        nat.NAT(**(SMALL | dict(num_heads=(3, 2))))
    with pytest.raises(ValueError, match="num_heads: .* expected one a level"):
        nat.NAT(**(SMALL | dict(num_heads=(1, 2, 4))))
    with pytest.raises(ValueError, match="num_heads: got 5"):
        nat_isotropic.NATIsotropic(embed_dim=32, num_heads=5, kernel_size=None)


@pytest.mark.parametrize("height, width", [(21, 30), (5, 30), (20, 9), (3, 4), (1, 1)])
@torch.no_grad()
def test_short_maps_are_padded_before_the_projections(height, width):
    attention = NeighborhoodAttention(16, 2, kernel_size=7, dilation=3)
    torch.nn.init.normal_(attention.qkv.bias)
    x = torch.randn(2, height, width, 16)
    padded = F.pad(x, (0, 0, 0, max(21 - width, 0), 0, max(21 - height, 0)))
    q, k, v = attention.qkv(padded).chunk(3, dim=-1)
    heads = [t.unflatten(-1, (2, 8)) for t in (q, k, v)]
    out = na2d(*heads, 7, dilation=3, rpb=attention.rpb).flatten(3)[:, :height, :width]
    torch.testing.assert_close(attention(x), attention.proj(out))


def test_neighborhood_attention_makes_no_copy_of_the_projections(monkeypatch):
    seen = []
    monkeypatch.setattr(nat, "na2d_qkv", lambda qkv, *args, **kwargs: seen.append(qkv) or qkv[:, :, :, 0])
    attention = NeighborhoodAttention(16, 2, kernel_size=3)
    attention.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    attention(torch.randn(1, 4, 5, 16))
    assert seen[0].data_ptr() == seen[1].data_ptr() and seen[1].shape == (1, 4, 5, 3, 2, 8)


@torch.no_grad()
def test_bias_tables_resize_to_another_kernel():
    source = timm.create_model("dinat_mini", **DILATED)
    model = timm.create_model("dinat_mini", kernel_size=11, **DILATED)
    state = source.state_dict()
    key = "levels.1.blocks.1.attn.rpb"
    converted = checkpoint_filter_fn(state, model)
    assert converted[key].shape == (2, 21, 21)
    torch.testing.assert_close(converted[key], F.interpolate(state[key][None], (21, 21), mode="bicubic")[0])
    model.load_state_dict(converted)
    assert all(converted[k] is v for k, v in state.items() if not k.endswith("rpb"))
    assert all(v is state[k] for k, v in checkpoint_filter_fn(state, source).items())


@pytest.mark.parametrize("height, width", [(4, 4), (6, 3)])
@torch.no_grad()
def test_full_attention(height, width):
    attention = FullAttention(16, 2, map_size=4).double()
    torch.nn.init.normal_(attention.rpb)
    x = torch.randn(2, height, width, 16, dtype=torch.float64)
    out = attention(x)

    table = F.interpolate(attention.rpb[None], (2 * height - 1, 2 * width - 1), mode="bicubic")[0]
    q, k, v = (t.unflatten(-1, (2, 8)) for t in attention.qkv(x).chunk(3, dim=-1))
    for i, j in [(0, 0), (height - 1, 1), (2, width - 1)]:
        scores = torch.einsum("bhd,brchd->bhrc", q[:, i, j], k) / 8**0.5
        scores += table[:, height - 1 - i : 2 * height - 1 - i, width - 1 - j : 2 * width - 1 - j]
        weights = scores.flatten(2).softmax(-1).view_as(scores)
        expected = attention.proj(torch.einsum("bhrc,brchd->bhd", weights, v).flatten(1))
        torch.testing.assert_close(out[:, i, j], expected)
    if (height, width) == (4, 4):
        assert torch.equal(table, attention.rpb)


@torch.no_grad()
def test_published_vitrpb_layout_loads(tmp_path):
    kwargs = dict(embed_dim=32, depth=2, num_heads=2, num_classes=10)
    source = timm.create_model("vitrpb_small", **kwargs).eval()
    state = source.state_dict()
    state |= {f"layers.{i}.attn.relative_position_index": torch.zeros(196, 196, dtype=torch.int64) for i in range(2)}
    file = tmp_path / "vitrpb.pth"
    torch.save(state, file)
    overlay = dict(file=str(file), url="", num_classes=10)
    model = timm.create_model("vitrpb_small", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(x), source(x))
    larger = timm.create_model("vitrpb_small", pretrained=True, pretrained_cfg_overlay=overlay, img_size=256, **kwargs)
    assert larger.layers[0].attn.rpb.shape == (2, 31, 31)


@pytest.mark.parametrize(
    "name, kwargs", [("dinat_mini", DILATED), ("vitrpb_small", dict(embed_dim=32, depth=1, num_heads=2))]
)
@torch.no_grad()
def test_export_of_dilated_and_full_attention(name, kwargs):
    model = timm.create_model(name, features_only=True, **kwargs).eval()
    free = torch.export.Dim.DYNAMIC
    x = torch.randn(2, 3, 96, 288)
    program = torch.export.export(model, (x,), dynamic_shapes=({2: free, 3: free},)).module()
    for height, width in [(96, 288), (67, 50), (320, 33)]:
        x = torch.randn(2, 3, height, width)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)
