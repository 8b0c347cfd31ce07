"""MaxViT beside timm's, and what timm's cannot do."""

import copy

import pytest
import timm
import torch
from densezoo.backbones import maxvit
from densezoo.backbones.maxvit import STYLES, VARIANTS, HalvingPool, SameConv2d, checkpoint_filter_fn
from densezoo.ops import get_backend, set_backend
from timm.layers import create_conv2d
from timm.models import get_arch_pretrained_cfgs

from densezoo.checkpoints import load_published

# Published sizes, in millions.
MILLIONS = dict(tiny_tf_224=30.92, tiny_tf_384=30.98, tiny_tf_512=31.05)
MILLIONS |= dict(small_tf_224=68.93, small_tf_384=69.02, small_tf_512=69.13)
MILLIONS |= dict(base_tf_224=119.5, base_tf_384=119.7, base_tf_512=119.9)
MILLIONS |= dict(large_tf_224=211.8, large_tf_384=212.0, large_tf_512=212.3, xlarge_tf_384=475.3, xlarge_tf_512=475.8)
MILLIONS |= dict(tiny_rw_224=29.06, nano_rw_256=15.45, pico_rw_256=7.46)

SMALL = dict(embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=7)


@pytest.fixture(autouse=True)
def restore_backend():
    before = get_backend()
    yield
    set_backend(before)


def build(name: str, **kwargs):
    return timm.create_model(f"densezoo_maxvit_{name}", **(SMALL | kwargs)).eval()


def fill(model):
    """Draw every parameter and running statistic, so that none is without effect."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", MILLIONS)
def test_published_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(f"densezoo_maxvit_{name}")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert f"{millions:.{len(str(MILLIONS[name]).partition('.')[2])}f}" == str(MILLIONS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_and_preprocessing_are_timms(name):
    ours, theirs = get_arch_pretrained_cfgs(name), get_arch_pretrained_cfgs(name.removeprefix("densezoo_"))
    assert [key.removeprefix("densezoo_") for key in ours] == [key.removesuffix(".untrained") for key in theirs]
    for got, expected in zip(ours.values(), theirs.values(), strict=True):
        for field in ("hf_hub_id", "input_size", "num_classes", "crop_pct", "interpolation", "mean", "std", "license"):
            assert getattr(got, field) == getattr(expected, field), field
        assert (got.crop_mode or "center") == (expected.crop_mode or "center")
        assert got.pool_size == tuple(side // 32 for side in got.input_size[1:])


def timms(name: str, **kwargs):
    """Build timm's model of the size of `build`."""
    dims = (16, 32, 64, 128)
    if VARIANTS[f"densezoo_maxvit_{name}"].get("pre_logits", True):
        kwargs |= dict(head_hidden_size=dims[-1])
    kwargs |= dict(embed_dim=dims, depths=SMALL["depths"], transformer_dim_head=16, num_classes=7)
    return fill(timm.create_model(f"maxvit_{name}", **kwargs))


@pytest.mark.parametrize(
    "name", ["tiny_tf_224", "tiny_tf_384", "tiny_rw_256", "rmlp_nano_rw_256", "rmlp_small_rw_224", "rmlp_base_rw_224"]
)
@torch.no_grad()
def test_same_numbers_as_timm(name):
    theirs, ours = timms(name), build(name)
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    side = int(name[-3:])
    x = torch.randn(1, 3, side, 2 * side if side == 224 else side, dtype=torch.float64)
    ours, theirs = ours.double(), theirs.double()
    # timm keeps the logarithms of offsets in float32.
    close = dict(rtol=1e-6, atol=1e-6) if "rmlp" in name else {}
    final, stages = ours.forward_intermediates(x)
    expected_final, expected = theirs.forward_intermediates(x)
    for got, wanted in zip(stages, expected[1:], strict=True):
        torch.testing.assert_close(got, wanted, **close)
    for pre_logits in (True, False):
        wanted = theirs.forward_head(expected_final, pre_logits=pre_logits)
        torch.testing.assert_close(ours.forward_head(final, pre_logits=pre_logits), wanted, **close)


@pytest.mark.parametrize("name", ["tiny_tf_224", "tiny_rw_224", "rmlp_pico_rw_256"])
def test_own_weights_load_as_they_are(name):
    source, model = fill(build(name)), build(name)
    assert load_published(model, source.state_dict()).renamed == {}
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["tiny_tf_224", "tiny_rw_224"])
@pytest.mark.parametrize("kwargs", [dict(num_classes=0), dict(features_only=True, out_norms=(0, 1, 2, 3))], ids=str)
def test_timms_file_into_every_model(name, kwargs):
    source = timms(name)
    model = build(name, **kwargs)
    report = load_published(model, source.state_dict())
    dense = "out_norms" in kwargs
    left = [key for key in source.state_dict() if key.startswith(("norm.", "head.") if dense else "head.fc.")]
    assert sorted(report.dropped) == sorted(left) and len(report.missing) == 8 * dense


def test_bias_tables_are_resized_to_another_window():
    source, model = fill(build("tiny_tf_224")), build("tiny_tf_384")
    report = load_published(model, source.state_dict())
    tables = [key for key in model.state_dict() if key.endswith("relative_position_bias_table")]
    assert sorted(report.resized) == sorted(tables)
    small, large = (m.stages[1].blocks[0].attn_grid.attn.rel_pos() for m in (source, model))
    assert large.shape == (2, 23, 23)
    torch.testing.assert_close(large[:, 11, 11], small[:, 6, 6], rtol=0.2, atol=0.05)


@pytest.mark.parametrize("size", [(32, 32), (8, 9), (9, 8), (7, 7), (2, 2), (1, 1)], ids=str)
@torch.no_grad()
def test_strided_layers_at_any_size(size, monkeypatch):
    torch.manual_seed(0)
    conv, pool = SameConv2d(6, 6, groups=3), HalvingPool()
    same = create_conv2d(6, 6, 3, stride=2, groups=3, padding="same", bias=True)
    same.load_state_dict(conv.state_dict())
    x = torch.randn(2, 6, *size)
    rows, columns = (torch.arange(side) // 2 for side in size)
    cell = rows[:, None] * size[1] + columns
    means = torch.stack([x[..., cell == i].mean(-1) for i in cell.unique()], -1)
    for exporting in (False, True):
        monkeypatch.setattr(maxvit, "is_exporting", lambda exporting=exporting: exporting)
        torch.testing.assert_close(conv(x), same(x))
        torch.testing.assert_close(pool(x).flatten(2), means)


@torch.no_grad()
def test_windows_as_large_as_the_map_attend_to_all_of_it():
    # Where the window covers the map, blocks and grids are one and the same, whatever the size.
    torch.manual_seed(0)
    block, grid = (fill(build("tiny_tf_224")).stages[1].blocks[0].attn_block.attn for _ in range(2))
    grid.grid = True
    for size in ((7, 7), (3, 6), (1, 1)):
        x = torch.randn(2, *size, 32)
        torch.testing.assert_close(grid(x), block(x))
    x = torch.randn(2, 8, 9, 32)
    assert not torch.allclose(grid(x), block(x), atol=1e-3)


def train_step(block, x):
    leaves = [x.requires_grad_(), *block.parameters()]
    out = block(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    return [out.detach(), *(t.grad for t in leaves), *block.buffers()]


@pytest.mark.parametrize("name", ["tiny_tf_224", "tiny_rw_224"])
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("mode", ["inference", "frozen", "training"])
def test_convolutions_with_kernels(name, block, mode):
    model = fill(build(name, depths=(2, 1, 1, 1)))
    conv = model.stages[0].blocks[block].conv.train(mode == "training")
    # Laid out as the stem's result.
    x = torch.randn(3, conv.pre_norm.num_features, 9, 6).permute(0, 2, 3, 1)
    results = []
    for backend in ("triton", "reference"):
        set_backend(backend)
        each = copy.deepcopy(conv)
        if mode == "inference":
            with torch.no_grad():
                results.append([each(x)])
        else:
            results.append(train_step(each, x.clone()))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(1, expected.abs().max().item()))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [True, False])
def test_convolutions_on_a_gpu(compiled, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = fill(build("tiny_tf_224", depths=(2, 1, 1, 1))).cuda()
    x = torch.randn(4, 3, 75, 96, device="cuda")
    for train in (False, True):
        results = []
        for backend in ("triton", "reference"):
            set_backend(backend)
            each = copy.deepcopy(model).train(train)
            run = torch.compile(each, fullgraph=True) if compiled and backend == "triton" else each
            with torch.set_grad_enabled(train):
                out = run(x)
            if train:
                out.square().mean().backward()
            results.append([out.detach(), *(p.grad for p in each.parameters() if train), *each.buffers()])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3 * max(1e-3, expected.abs().max().item()))


def test_wrong_arguments_are_named():
    for kwargs, named in (
        (dict(style="jax"), f"style: got 'jax', expected one of {', '.join(STYLES)}"),
        (dict(rel_pos="bias"), "rel_pos: got 'bias', expected one of table, mlp"),
        (dict(num_heads=(1, 2)), "num_heads"),
        (dict(num_heads=(1, 2, 5, 8)), "num_heads: got 5 for stage 2"),
        (dict(out_norms=(4,)), "out_norms"),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            build("tiny_tf_224", **kwargs)
