"""mmdet's ResNet with plugins at every depth and between stages."""

import pytest
import torch

pytest.importorskip("mmdet")

from densezoo.ops.plugins import BAM, SE  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402

import densezoo.openmmlab  # noqa: E402, F401


def build(depth: int = 18, plugins: list | None = None, **options):
    init_default_scope("mmdet")
    options = dict(base_channels=16, norm_eval=False) | options
    return MODELS.build(dict(type="densezoo.PluginResNet", depth=depth, plugins=plugins, **options))


def plugin(name: str, position: str, stages: tuple = (True, True, True, True)) -> dict:
    return dict(cfg=dict(type=f"densezoo.{name}"), position=position, stages=stages)


@pytest.mark.parametrize("depth", [18, 50])
def test_without_plugins_it_is_mmdets(depth):
    from mmdet.models.backbones import ResNet

    ours, theirs = build(depth), ResNet(depth, base_channels=16, norm_eval=False)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 96)
    for out, expected in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("depth", "inside"), [(18, "after_conv2"), (50, "after_conv3")])
def test_plugins_lie_where_they_are_put(depth, inside):
    plugins = [plugin("SE", inside), plugin("BAM", "after_stage", (True, True, True, False))]
    model = build(depth, plugins)
    model.init_weights()
    blocks = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
    assert [name for name, m in model.named_modules() if isinstance(m, SE)] == [
        f"layer{i}.{j}.se" for i, count in enumerate(blocks, 1) for j in range(count)
    ]
    assert [name for name, m in model.named_modules() if isinstance(m, BAM)] == [f"layer{i}.bam" for i in (1, 2, 3)]
    outs = model(torch.randn(2, 3, 64, 96))
    width = 16 if depth == 18 else 64
    assert [tuple(out.shape[1:]) for out in outs] == [(width << i, 16 >> i, 24 >> i) for i in range(4)]
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_plugin_comes_before_the_shortcut_is_added():
    block = build(18, [plugin("SE", "after_conv2")]).layer1[0].eval()
    x = torch.randn(2, 16, 8, 8)
    out = block.norm2(block.conv2(block.relu(block.norm1(block.conv1(x)))))
    torch.testing.assert_close(block(x), (block.se(out) + x).relu())


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    plain, checkpointed = (build(18, [plugin("SE", "after_conv2")], with_cp=with_cp) for with_cp in (False, True))
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    grads = []
    for model in (plain, checkpointed):
        model.eval()
        model(x)[-1].sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("depth", "plugins", "message"),
    [
        (18, [plugin("SE", "after_conv3")], r"position 'after_conv3' for ResNet-18, .*'after_conv2', 'after_stage'\)"),
        (50, [plugin("SE", "after_conv4")], "position 'after_conv4' for ResNet-50, expected one of .*'after_conv3'"),
        (50, [dict(cfg=dict(type="densezoo.SE"))], "got position None for ResNet-50, expected one of"),
        (18, [plugin("SE", "after_stage", (True, True))], r"got stages \(True, True\), expected 4 of them"),
        (18, 2 * [plugin("SE", "after_conv2")], "got two called 'se' in one place, expected each with its 'postfix'"),
        (50, 2 * [plugin("SE", "after_stage")], "got two called 'se' in one place, expected each with its 'postfix'"),
    ],
)
def test_what_plugins_may_be_is_told(depth, plugins, message):
    with pytest.raises(ValueError, match=message):
        build(depth, plugins)


@pytest.mark.parametrize(("depth", "position"), [(18, "after_conv2"), (50, "after_conv3"), (50, "after_stage")])
def test_two_of_a_kind_have_a_postfix(depth, position):
    plugins = [plugin("SE", position), plugin("SE", position)]
    plugins[1]["cfg"]["postfix"] = 2
    layer = build(depth, plugins).layer1
    place = layer if position == "after_stage" else layer[0]
    assert isinstance(place.se, SE) and isinstance(place.se2, SE) and place.se is not place.se2
