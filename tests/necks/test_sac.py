"""Switchable atrous convolution: mmcv's, and in the place of a backbone's convolutions."""

import copy

import pytest
import timm
import torch
from densezoo.necks import SAC, use_sac
from torch import nn

import densezoo  # noqa: F401


def randomize(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    module.weight_gamma.uniform_(0.1, 1)
    module.weight_beta.uniform_(-0.1, 0.1)
    return module


@pytest.mark.parametrize("use_deform", [False, True])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_is_mmcvs(stride, dilation, use_deform):
    pytest.importorskip("mmcv")
    from mmengine.registry import MODELS

    import densezoo.openmmlab  # noqa: F401

    options = dict(stride=stride, padding=dilation, dilation=dilation, bias=False, use_deform=use_deform)
    import mmcv.ops  # noqa: F401

    theirs = randomize(MODELS.get("SAC")(8, 12, 3, **options))
    ours = SAC(8, 12, stride, dilation, bias=False, use_deform=use_deform)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    x = torch.randn(2, 8, 11, 14)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_deform", [False, True])
def test_gradients_and_lower_precision(use_deform):
    module, x = randomize(SAC(4, 6, 2, use_deform=use_deform)), torch.randn(2, 4, 7, 9, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad.any() and all(p.grad is not None and p.grad.any() for p in module.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (module(x).float() - module(x)).isfinite().all()
    exact = module(x)
    half = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - exact).norm() < 0.05 * exact.norm()


def test_what_it_cannot_take_is_told():
    with pytest.raises(ValueError, match="out_channels: got 0, expected a positive integer"):
        SAC(4, 0)
    with pytest.raises(ValueError, match=r"x: got a map of \(2, 5\), expected 3x3 pixels at least"):
        SAC(4, 6)(torch.randn(1, 4, 2, 5))


@pytest.mark.parametrize("use_deform", [False, True])
def test_compile_and_export(use_deform):
    module, x = randomize(SAC(4, 6, use_deform=use_deform)).eval(), torch.randn(2, 4, 9, 12)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), atol=1e-4, rtol=1e-4)
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(module, (x,), dynamic_shapes=({2: free, 3: free},)).module()
    for size in ((9, 12), (13, 6)):
        x = torch.randn(2, 4, *size)
        torch.testing.assert_close(program(x), module(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_deform", [False, True])
@pytest.mark.parametrize("name", ["nat_mini", "resnet18"])
def test_a_backbone_computes_what_it_did(name, use_deform):
    options = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)) if name == "nat_mini" else {}
    backbone = timm.create_model(name, features_only=True, **options).eval()
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        expected = backbone(images)
        # two convolutions in the tokenizer, one between levels; two a block
        assert use_sac(backbone, use_deform) == (5 if name == "nat_mini" else 16)
        for out, other in zip(backbone(images), expected, strict=True):
            torch.testing.assert_close(out, other, atol=1e-3, rtol=1e-3)
    assert use_sac(backbone) == 0
