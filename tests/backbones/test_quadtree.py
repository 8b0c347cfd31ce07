"""QuadTree beyond the contract of all backbones: its dense layout, its arguments, and maps of odd sides."""

import pytest
import timm
import torch
import torch.nn.functional as F
from densezoo.backbones.quadtree import LevelMix, QuadConv, QuadTreeAttention, spread
from torch import nn

TINY = dict(embed_dims=(8, 16, 20, 16), num_heads=(1, 2, 5, 4), depths=(1, 1, 1, 1), num_classes=10)


def attentions(**kwargs) -> list[QuadTreeAttention]:
    model = timm.create_model("quadtree_b0", **(TINY | kwargs))
    return [module for module in model.modules() if isinstance(module, QuadTreeAttention)]


@pytest.mark.parametrize(
    "kwargs, topk, act",
    [
        ({}, 8, nn.GELU),
        ({"out_norms": (0, 1, 2, 3)}, 32, nn.ReLU),
        ({"out_norms": (3,), "topk": 8, "value_act": "gelu"}, 8, nn.GELU),
        ({"topk": 16, "value_act": "relu"}, 16, nn.ReLU),
    ],
)
def test_layouts_have_their_attention(kwargs, topk, act):
    modules = attentions(**kwargs)
    assert [module.levels for module in modules] == [4, 3, 2, 1]
    assert {module.topk for module in modules} == {topk}
    found = {type(branch[i]) for module in modules for branch in module.value_branchs for i in (1, 4)}
    assert found == {act}


@pytest.mark.parametrize("height, width", [(4, 6), (5, 7), (1, 2)])
def test_quads_take_the_nearest(height, width):
    x = torch.randn(2, 3, (height + 1) // 2, (width + 1) // 2)
    assert torch.equal(spread(x, height, width), F.interpolate(x, (height, width), mode="nearest"))


def test_type_a_has_projections_alone():
    keys = attentions(attn_type="A")[0].state_dict()
    assert {key.split(".")[0] for key in keys} == {"q_proj", "k_proj", "v_proj", "proj"}


@pytest.mark.parametrize(
    "kwargs, named",
    [
        ({"levels": (4, 3, 2)}, "levels"),
        ({"levels": (4, 3, 2, 0)}, "levels"),
        ({"levels": 4}, "levels"),
        ({"topk": 0}, "topk"),
        ({"topk": (8, 8, 8, 8)}, "topk"),
        ({"attn_type": "C"}, "attn_type"),
        ({"value_act": "silu"}, "value_act"),
        ({"num_heads": (1, 2, 3, 4)}, "num_heads"),
        ({"out_norms": (4,)}, "out_norms"),
    ],
)
def test_wrong_arguments_are_named(kwargs, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        timm.create_model("quadtree_b0", **(TINY | kwargs))


def test_initial_weights_are_the_published():
    torch.manual_seed(0)
    model = timm.create_model("quadtree_b1", depths=(1, 1, 1, 1))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.weight[0, 0].numel() / module.groups
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
            assert not module.bias.any()
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
    weights = torch.cat([m.weight for m in model.modules() if isinstance(m, LevelMix)])
    assert len(weights.unique()) == len(weights) == 10


def test_odd_sides_end_with_a_repeated_row_or_column():
    conv, x = QuadConv(3), torch.randn(2, 3, 5, 4)
    expected = nn.functional.conv2d(torch.cat((x, x[:, :, -1:]), 2), conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(conv(x), expected)
    assert conv(x[..., :3]).shape == (2, 3, 3, 2)


def test_encoding_is_copied_to_all_descendants():
    mix = LevelMix(2, 3).double()
    values = [torch.randn(1, 2, *size, dtype=torch.float64) for size in ((7, 5), (4, 3), (2, 2))]
    with torch.no_grad():
        weighted, encoding = mix(values)
        weights = mix.weight.softmax(0).flip(0)
        for weight, value, out in zip(weights, values, weighted, strict=True):
            torch.testing.assert_close(out, weight * value)
        local = [w * conv(v) for w, conv, v in zip(weights, reversed(mix.get_vs), values, strict=True)]
    for row in range(7):
        for column in range(5):
            ancestors = [x[0, :, row >> level, column >> level] for level, x in enumerate(local)]
            torch.testing.assert_close(encoding[0, :, row, column], sum(ancestors))
