"""QuadTree beyond the contract of all backbones: its dense layout, its arguments, and maps of odd sides."""

import pytest
import timm
import torch
from densezoo.backbones.quadtree import LevelMix, QuadTreeAttention, ValueBranch
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


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(4, 6), (5, 4), (3, 1)])
def test_branches_are_those_of_maps(height, width):
    """Odd sides end with a repeated row or column."""
    branch, x = ValueBranch(3, nn.GELU), torch.randn(2, 3, height, width)
    norm, act, quad_conv, next_norm, next_act, proj = branch
    for parameter in branch.parameters():
        nn.init.normal_(parameter)
    expected = act(nn.GroupNorm.forward(norm, x))
    expected = torch.cat((expected, expected[:, :, -1:]), 2) if height % 2 else expected
    expected = torch.cat((expected, expected[..., -1:]), 3) if width % 2 else expected
    expected = proj(next_act(nn.GroupNorm.forward(next_norm, quad_conv(expected))))
    torch.testing.assert_close(branch(x.flatten(2).mT, (height, width)), expected.flatten(2).mT)


def test_levels_are_weighted_and_encoded():
    mix = LevelMix(2, 3).double()
    sizes = (7, 5), (4, 3), (2, 2)
    values = [torch.randn(1, *size, 2, dtype=torch.float64) for size in sizes]
    weights = mix.weight.softmax(0).flip(0)
    for i, (weighted, encoding) in enumerate(zip(*mix([v.flatten(1, 2) for v in values], sizes), strict=True)):
        torch.testing.assert_close(weighted, weights[i] * values[i])
        local = mix.get_vs[2 - i](values[i].permute(0, 3, 1, 2))
        torch.testing.assert_close(encoding, (weights[i] * local).permute(0, 2, 3, 1))
