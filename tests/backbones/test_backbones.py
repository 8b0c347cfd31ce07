"""timm's model contract, for every variant that densezoo registers: a new family joins through `densezoo.backbones`."""

import functools
import inspect
import math
import re
import subprocess
import sys

import pytest
import timm
import torch
from densezoo.backbones import VARIANTS, attention_mobilenet, attention_resnet, davit, maxvit, poolformer
from densezoo.backbones.agent import AgentDeiT
from densezoo.backbones.attention_resnet import AttentionResNet
from densezoo.backbones.cswin import CSwin
from densezoo.backbones.poolformer import PoolFormer
from densezoo.backbones.pvt import PVT
from densezoo.backbones.quadtree import QuadTree
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

# timm has weights on the Hub, or the same preprocessing, of its own: these families' own tests compare it.
TIMMS = (davit, maxvit, poolformer)
UNTRAINED = {
    *(f"densezoo_davit_{size}" for size in ("large", "large_window12_384", "huge", "giant")),
    *(f"densezoo_maxvit_{size}_256" for size in ("pico_rw", "tiny_rw", "rmlp_small_rw")),
    *(f"flatten_pvt_{size}" for size in ("small", "medium", "large", "v2_b1", "v2_b2", "v2_b3", "v2_b4")),
    "quadtree_a_b0",
    "metaformer_random_s12_224",
    *(f"flatten_{size}" for size in ("deit_tiny", "cswin_small", "cswin_base", "cswin_base_384")),
    *attention_mobilenet.VARIANTS,
    *(name for name in attention_resnet.VARIANTS if not re.fullmatch(r"se_resnet50|fcanet\d+", name)),
}
# Parameters that only tell how positions differ; PoolFormer pools those around a position less itself.
POSITIONS = r"\.rel_pos\.|\.a[nhw]_bias$|^stages\.3\.blocks\.\d\.(norm1\.|layer_scale_1)"


@functools.cache
def architecture(name: str) -> dict:
    """Return every constructor keyword of a variant, and its class under `cls`."""
    cls = timm.model_entrypoint(name).__annotations__["return"]
    defaults = {k: p.default for k, p in inspect.signature(cls).parameters.items()}
    return defaults | VARIANTS[name].VARIANTS[name] | dict(cls=cls)


def shrunk(name: str, blocks: int = 2, levels: int | None = 2) -> dict:
    """Return keywords that shrink a variant but keep its design: fewer blocks a level, levels (None: all) and heads."""
    arch = architecture(name)
    small = {}
    if "depth" in arch:
        small["depth"] = blocks
    else:
        all_levels = len(arch["depths"])
        small |= {k: v[:levels] for k, v in arch.items() if isinstance(v, tuple) and len(v) == all_levels}
        small["depths"] = tuple(min(depth, blocks) for depth in small["depths"])
    # Without heads, half of the width or an eighth.
    heads = arch.get("num_heads", 2 if "embed_dims" in arch else 8)
    divisor = heads if isinstance(heads, int) else math.gcd(*heads)
    for key in {"embed_dim", "embed_dims", "num_heads"} & arch.keys():
        value = small.get(key, arch[key])
        small[key] = value // divisor if isinstance(value, int) else tuple(v // divisor for v in value)
    if "stem_widths" in arch:
        small["stem_widths"] = (16, 32)
    return small


def build(name: str, blocks: int = 2, levels: int | None = 2, **kwargs) -> nn.Module:
    """Build a shrunk variant; parameters of the same place in two models are the same."""
    model = timm.create_model(name, **(dict(num_classes=10) | shrunk(name, blocks, levels) | kwargs))
    torch.manual_seed(0)
    for parameter in model.parameters():  # layer scales of 1e-5 and zero biases would hide mistakes
        nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.5)
    return model


def image(*size: int, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, *(size or (64, 96)), generator=torch.Generator().manual_seed(1))


def nchw(model: nn.Module, features: torch.Tensor) -> torch.Tensor:
    if isinstance(model, AgentDeiT):  # a class token, then the map of an image of 64x96
        features = features[:, 1:].unflatten(1, (4, 6))
    return features.permute(0, 3, 1, 2) if model.output_fmt == "NHWC" else features


def side(name: str, size: int, reduction: int) -> int:
    """Return the side of a map: rounded up, but PVT's patches and the stems of CSwin and PoolFormer leave a rest."""
    cls = architecture(name)["cls"]
    if issubclass(cls, (CSwin, PoolFormer)):
        size = (size + 1) // 4 * 4
    return size // reduction if issubclass(cls, PVT) and not cls.overlapping else math.ceil(size / reduction)


def pooled_norm(model: nn.Module) -> nn.Module:
    """Return the norm that follows the pooling."""
    return model.norm if model.pool_first else nn.Identity()


def design(name: str) -> str:
    """Return a variant's shrunk keywords, where of numbers it counts alone whether they are 0."""

    def kind(value):
        if isinstance(value, tuple | list):
            return sorted({str(kind(v)) for v in value})
        return bool(value) if isinstance(value, int | float) else value

    return str({k: kind(v) for k, v in (architecture(name) | shrunk(name)).items()})


def first_of_each(key) -> pytest.MarkDecorator:
    """Parametrise over every variant, all but the first of those with the same key marked slow."""
    seen, params = set(), []
    for name in VARIANTS:
        params.append(pytest.param(name, marks=[pytest.mark.slow] if key(name) in seen else []))
        seen.add(key(name))
    return pytest.mark.parametrize("name", params)


every_variant = pytest.mark.parametrize("name", VARIANTS)
every_design = first_of_each(design)
every_class = first_of_each(lambda name: architecture(name)["cls"])


def test_import_registers_beside_timm():
    script = """if True:
        import sys, time, warnings
        import timm
        from timm.models import _registry as registry
        before = dict(registry._model_entrypoints)
        warnings.simplefilter("error")
        start = time.process_time()
        import densezoo
        took = time.process_time() - start
        for name in densezoo.backbones.VARIANTS:
            assert name not in before and timm.is_model(name), name
        assert before.items() <= registry._model_entrypoints.items()
        roots = {name.split(".")[0] for name in sys.modules}
        assert not roots & {"mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain"}, roots
        assert not [name for name in sys.modules if name.startswith("densezoo") and name.endswith(".kernels")]
        assert took < 0.5, took
    """
    subprocess.run([sys.executable, "-c", script], check=True)


@every_variant
def test_default_cfg(name):
    with torch.device("meta"):
        model = timm.create_model(name, **shrunk(name, 1, None)).eval()
        cfg, size = model.default_cfg, model.default_cfg["input_size"]
        assert cfg["license"] and cfg["architecture"] == name
        filters = "bilinear" if VARIANTS[name] in (attention_resnet, attention_mobilenet) else "bicubic"
        assert cfg["interpolation"] == filters
        assert timm.is_model_pretrained(name) == (name not in UNTRAINED)
        if VARIANTS[name] not in TIMMS:
            # timm caches a download under the last part of its path.
            assert name in UNTRAINED or re.fullmatch(r"https://.+/[^/?]+(\?.*)?", cfg["url"])
            whole = size[-1] in (288, 384) and "cswin" not in name
            assert cfg["crop_pct"] == (1.0 if whole else 0.875)
            assert (cfg["mean"], cfg["std"]) == (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
        state = model.state_dict()
        assert state[cfg["first_conv"] + ".weight"].shape[1] == 3
        assert model.num_classes == cfg["num_classes"]
        # Published without a classifier: Florence-2's image towers, and one FocalNet.
        assert model.num_classes or re.fullmatch(r"densezoo_davit_\w+_fl|densezoo_focalnet_huge_fl4", name)
        if model.num_classes:
            assert state[cfg["classifier"] + ".weight"].shape == (model.num_classes, model.num_features)
            assert model.get_classifier().out_features == model.num_classes
        if isinstance(model, AgentDeiT):  # it pools no map
            assert cfg["pool_size"] is None
        else:
            assert nchw(model, model.forward_features(torch.empty(1, *size))).shape[2:] == cfg["pool_size"]
        features = model.forward_features(torch.empty(1, 3, 32, 32))
        assert model.forward_head(features).shape == (1, cfg["num_classes"] or model.num_features)
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)


@pytest.mark.parametrize("name", sorted(UNTRAINED))
def test_weights_that_were_not_published_are_refused(name):
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True, **shrunk(name, 1))


@every_design
def test_features_only(name):
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True, **shrunk(name, 1, None)).eval()
        info = model.feature_info
        for height, width in [(32, 32), (33, 70), (224, 96)]:
            outputs = model(torch.empty(2, 3, height, width))
            shapes = [
                (2, c, side(name, height, r), side(name, width, r))
                for c, r in zip(info.channels(), info.reduction(), strict=True)
            ]
            assert [tuple(out.shape) for out in outputs] == shapes
    model = build(name, features_only=True).eval()
    last = len(model.feature_info.channels()) - 1
    with torch.no_grad():
        some = build(name, features_only=True, out_indices=(last,)).eval()(image(33, 70))
        torch.testing.assert_close(some[0], model(image(33, 70))[last], rtol=0, atol=0)


@every_design
def test_backward_reaches_every_parameter(name):
    model = build(name, levels=None)
    for size in [(32, 32), (65, 96)]:
        model.zero_grad()
        logits = model(image(*size))
        assert logits.shape == (2, 10) and logits.isfinite().all()
        logits.square().mean().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        unreached = {key for key, parameter in model.named_parameters() if not parameter.grad.any()}
        if isinstance(model, AgentDeiT):
            # Of the last block only the class token is read.
            unreached -= {f"blocks.1.attn.{key}" for key in ("na_bias", "ha_bias", "wa_bias", "dwc.weight", "dwc.bias")}
        if isinstance(model, QuadTree):
            # The weight of a single level is 1 whatever is learned.
            unreached -= {f"block4.{i}.attn.py_att.weight" for i in range(2)}
            if size == (32, 32):
                # So is the only score of a single position; type A leaves that position out.
                idle = r"attn\.[qk]_proj\." if hasattr(model.block4[0].attn, "py_att") else r"(norm1|attn)\."
                unreached -= {key for key in unreached if re.match(rf"block4\.\d\.{idle}", key)}
        # A batch norm takes out what the bias before it adds: the gradient is 0 but for rounding (BAM).
        unreached -= {key for key in unreached if re.search(r"\.gate_\w_(fc_0|conv_reduce0|conv_di_\d)\.bias$", key)}
        if size == (32, 32):
            # The last map is a single position.
            unreached -= {key for key in unreached if re.search(POSITIONS, key)}
        assert not unreached


@every_design
def test_dense_layout(name):
    stages = len(build(name).feature_info)
    model = build(name, out_norms=tuple(range(stages)))
    plain = {k for k in build(name).state_dict() if not k.startswith(("norm.", "head."))}
    # PVTv2 has norms at the end of its stages anyhow.
    own_norms = isinstance(model, PVT) and model.overlapping
    norms = set() if own_norms else {f"norm{i}.{part}" for i in range(stages) for part in ("weight", "bias")}
    assert set(model.state_dict()) == plain | norms and model.num_classes == 0

    features = build(name, out_norms=tuple(range(stages)), features_only=True)
    with torch.no_grad():
        raw = build(name).eval().forward_intermediates(image(), intermediates_only=True)
        normed = model.eval().forward_intermediates(image(), intermediates_only=True)
        for out, got, other in zip(normed, features.eval()(image()), raw, strict=True):
            torch.testing.assert_close(got, out, rtol=0, atol=0)
            # QuadTree's dense layout has another attention.
            assert torch.equal(out, other) == (own_norms and not isinstance(model, QuadTree))
    sum(out.square().mean() for out in features.train()(image())).backward()
    assert all(p.grad is not None for p in features.parameters())
    pruned = build(name, out_norms=tuple(range(stages)), features_only=True, out_indices=(stages - 1,))
    if not own_norms:
        assert {k.split(".")[1] for k in pruned.state_dict() if k.startswith("model.norm")} == {f"norm{stages - 1}"}
    with pytest.raises(ValueError, match="out_norms"):
        build(name, out_norms=(stages,))


@every_design
@torch.no_grad()
def test_forward_intermediates(name):
    model, x = build(name).eval(), image()
    features = model.forward_features(x)
    final, every = model.forward_intermediates(x)
    stages = len(model.feature_info)
    assert torch.equal(final, features) and len(every) == stages
    assert all(out.is_contiguous() for out in every)

    for indices, expected in [(1, every[-1:]), ([-1], every[-1:]), ([0], every[:1]), (stages, every)]:
        for stop_early in (False, True):
            got = model.forward_intermediates(x, indices=indices, stop_early=stop_early, intermediates_only=True)
            assert len(got) == len(expected) and all(map(torch.equal, got, expected))

    *_, normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed, nchw(model, features))
    assert torch.equal(normed, every[-1]) == (model.pool_first or isinstance(model, PVT | AttentionResNet))
    channels_last = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert all(map(torch.equal, channels_last, [out.permute(0, 2, 3, 1) for out in every]))
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")

    as_dict = model.forward_intermediates(x, output_dict=True)
    assert torch.equal(as_dict["image_features"], final) and len(as_dict["image_intermediates"]) == stages
    as_dict = model.forward_intermediates(x, output_dict=True, intermediates_only=True)
    assert as_dict.keys() == {"image_intermediates"}


@every_class
@torch.no_grad()
def test_prune_intermediate_layers(name):
    x = image()
    _, every = build(name).eval().forward_intermediates(x)
    for last in range(len(every)):
        model = build(name).eval()
        assert model.prune_intermediate_layers([last], prune_norm=True) == [last]
        assert torch.equal(model.forward_intermediates(x)[1][last], every[last])
        assert nchw(model, model.forward_features(x)).shape[1] == model.num_features == every[last].shape[1]
        assert isinstance(model.get_classifier(), nn.Identity)
    kept = build(name).eval()
    kept.prune_intermediate_layers(1, prune_norm=False, prune_head=False)
    assert torch.equal(kept(x), build(name).eval()(x))


@every_class
@torch.no_grad()
def test_classifier_and_pooling(name):
    model, x = build(name).eval().double(), image().double()
    if isinstance(model, AgentDeiT):
        pytest.skip("it pools tokens: test_agent.py")
    features = model.forward_features(x)
    pooled, unpooled = pooled_norm(model)(nchw(model, features).mean((2, 3))), pooled_norm(model)(features)
    torch.testing.assert_close(model(x), model.head(pooled))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    assert model.num_classes == 0
    model.reset_classifier(0, "")
    assert torch.equal(model(x), unpooled)
    model.reset_classifier(5, "max")
    assert torch.equal(model(x), model.head(pooled_norm(model)(nchw(model, features).amax((2, 3)))))
    assert model.num_classes == 5 and model.head.weight.dtype == torch.float64 and not model.head.training
    if model.pool_first:
        with pytest.raises(ValueError, match="global_pool: got 'catavgmax'"):
            model.reset_classifier(5, "catavgmax")
    else:
        model.reset_classifier(5, "catavgmax")
        assert model(x).shape == (2, 5) and model.head_hidden_size == 2 * model.num_features

    torch.testing.assert_close(build(name, num_classes=0).eval().double()(x), pooled)
    assert torch.equal(build(name, num_classes=0, global_pool="").eval().double()(x), unpooled)


@every_design
@torch.no_grad()
def test_input_layouts(name):
    model, x = build(name).eval(), image(48, 80)
    expected = model(x)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    channels_last = x.contiguous(memory_format=torch.channels_last)
    for other in (strided, channels_last):
        torch.testing.assert_close(model(other), expected, rtol=1e-4, atol=1e-4)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(channels_last), expected, rtol=1e-4, atol=1e-4)
    assert build(name, in_chans=1).eval()(image(channels=1)).shape == (2, 10)


@pytest.mark.parametrize(
    "name",
    [
        "vitrpb_small",
        "densezoo_maxvit_tiny_tf_224",
        "metaformer_random_s12_224",
        *(f"agent_{host}_tiny" for host in ("deit", "pvt", "swin", "cswin")),
        *(f"flatten_{host}" for host in ("deit_tiny", "pvt_tiny", "pvt_v2_b0", "swin_tiny", "cswin_tiny")),
    ],
)
def test_image_size(name):
    def shapes(**kwargs) -> dict[str, torch.Size]:
        with torch.device("meta"):
            model = timm.create_model(name, **shrunk(name, blocks=1, levels=None), **kwargs)
        return {key: value.shape for key, value in model.state_dict().items()}

    assert shapes() == shapes(img_size=224) != shapes(img_size=64) == shapes(img_size=[64, 64])
    for size in ((64, 96), (64,), 16, 64.0, "64"):
        with pytest.raises(ValueError, match=f"img_size: got {re.escape(repr(size))}, expected one side"):
            shapes(img_size=size)


@every_design
def test_drop_path(name):
    model = build(name, drop_path_rate=0.3, drop_rate=0.5)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.3)
    with torch.no_grad():
        assert torch.equal(model.eval()(image()), build(name).eval()(image()))
        model.train()
        assert not torch.equal(model(image()), model(image()))


@every_design
def test_grad_checkpointing(name):
    gradients = []
    for enable in (False, True):
        model = build(name, drop_path_rate=0.2)
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing is enable
        torch.manual_seed(2)
        model(image()).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected)


@every_class
def test_layer_decay_groups(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    no_decay = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    assert no_decay <= parameters.keys()

    groups = param_groups_layer_decay(model, no_weight_decay_list=no_decay, layer_decay=0.8)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(parameters)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert all(decay[id(p)] == 0 for n, p in parameters.items() if n in no_decay or p.dim() == 1)
    # PyTorch lists the tables of the model itself (DeiT's, PVT's position embeddings) before all modules.
    scales = [scale[id(p)] for n, p in parameters.items() if "." in n]
    assert scales == sorted(scales) and scales[-1] == 1 and scales[0] == min(scales)
    blocks = sum(architecture(name)["depths"]) if "depths" in architecture(name) else architecture(name)["depth"]
    assert len(set(scales)) >= blocks + 1 + bool(model.num_classes)  # the stem, the blocks, the head

    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert sorted(n for names in coarse.values() for n in names) == sorted(parameters)


@every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    model = build(name)
    with torch.autocast("cpu", dtype=dtype):
        logits = model(image())
    assert logits.dtype == dtype and logits.isfinite().all()
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_class
@torch.no_grad()
def test_pretrained_file(name, tmp_path):
    source = build(name).eval()
    file = tmp_path / "published.pth"
    torch.save({"model": source.state_dict()}, file)

    def load(**kwargs):
        overlay = dict(file=str(file), url="", num_classes=10)
        return timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **(shrunk(name) | dict(num_classes=10) | kwargs)
        ).eval()

    assert torch.equal(load()(image()), source(image()))
    adapted = load(in_chans=1, num_classes=3)
    assert adapted(image(channels=1)).shape == (2, 3)
    # A one-channel stem holds the sum over the colours.
    grey = source.forward_features(image(channels=1).repeat(1, 3, 1, 1))
    torch.testing.assert_close(adapted.forward_features(image(channels=1)), grey, rtol=1e-3, atol=1e-3)
    features = load(features_only=True)(image())
    assert all(map(torch.equal, features, source.forward_intermediates(image(), intermediates_only=True)))

    state = source.state_dict()
    state.popitem()
    torch.save(state, file)
    with pytest.raises(RuntimeError, match="Missing key"):
        load()


@every_class
def test_pretrained_download(name, tmp_path, monkeypatch, caplog):
    """The file comes from timm as it was saved, and gaps pass there where the classifier is left out."""
    state = build(name).state_dict()
    file = tmp_path / "checkpoints" / "published.pth"
    file.parent.mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))

    def load(**kwargs):
        overlay = dict(url="https://densezoo.invalid/published.pth", hf_hub_id=None, num_classes=10)
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **shrunk(name), **kwargs)

    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 300}, file)
    with caplog.at_level("INFO", "densezoo"):
        loaded = load(num_classes=10).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert f"published.pth: {len(state)} of {len(state)} tensors" in caplog.text

    gone = next(key for key in state if not key.startswith(("head.", "norm")))
    for damaged, words in (
        ({key: value for key, value in state.items() if key != gone}, f"{gone} is missing"),
        (state | {"another.weight": torch.zeros(1)}, "another.weight is unknown"),
    ):
        torch.save({"state_dict": damaged}, file)
        for kwargs in (dict(features_only=True), dict(num_classes=3)):
            with pytest.raises(ValueError, match=rf"published\.pth: \d+ of \d+ tensors .*{re.escape(words)}"):
                load(**kwargs)


@every_class
def test_compile(name):
    model = build(name, blocks=1).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        x = image(40, 64, batch=batch)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1

    model.train()
    x = image(40, 64)
    compiled(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@every_class
@torch.no_grad()
def test_export_with_free_height_and_width(name):
    model = build(name, blocks=1, features_only=True).eval()
    # Named ranges are stricter than Dim.DYNAMIC: any guard that they do not prove is an error.
    sides = {2: torch.export.Dim("height", min=33, max=512), 3: torch.export.Dim("width", min=33, max=512)}
    program = torch.export.export(model, (image(96, 128),), dynamic_shapes=(sides,)).module()
    for size in [(96, 128), (67, 224), (33, 48)]:
        torch.testing.assert_close(program(image(*size)), model(image(*size)), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@every_class
def test_gpu_matches_cpu(name):
    """As near to float64 as the CPU is, or to a thousandth."""
    model, x = build(name), image(65, 96)
    gradients = []
    for device, dtype in [("cpu", torch.float64), ("cpu", torch.float32), ("cuda", torch.float32)]:
        model.to(device, dtype).zero_grad()
        # cuDNN's convolutions round float32 to TF32 unless told otherwise.
        with torch.backends.cudnn.flags(allow_tf32=False):
            logits = model(x.to(device, dtype))
            logits.square().mean().backward()
        # Clones: moving the model moves its gradients in place.
        gradients.append([logits.detach().cpu()] + [p.grad.cpu().clone() for p in model.parameters()])
    for exact, cpu, gpu in zip(*gradients, strict=True):
        assert (gpu - exact).norm() <= 1e-3 * exact.norm() + 4 * (cpu - exact).norm() + 1e-6


@pytest.mark.gpu
@every_class
def test_gpu_compile_and_autocast(name):
    model, x = build(name).cuda(), image(65, 96).cuda()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-2)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype=dtype):
            logits = model(x)
        assert logits.isfinite().all()
