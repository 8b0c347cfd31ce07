"""Every family as an OpenMMLab backbone: the same features as timm's, in models of mmdet, mmseg and mmpretrain."""

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import parity
import pytest
import timm
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from timm.layers import DropPath

from densezoo import backbones, openmmlab
from densezoo.checkpoints import load_published
from densezoo.openmmlab import MODELS, config_for

CONFIGS = Path(__file__).parents[1] / "configs" / "_base_" / "models"
STAGED = dict(embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], kernel_size=3)
HALVING = dict(embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8])
PYRAMID = dict(embed_dims=[16, 32, 64, 128], depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8])
POOLING = dict(embed_dims=[8, 16, 24, 32], depths=[1, 2, 1, 1])
MOBILE = dict(depths=[1, 2, 2, 2])
RESIDUAL = dict(embed_dims=[16, 16, 32, 32], depths=[1, 2, 1, 1])
ISOTROPIC = dict(embed_dim=16, depth=3, num_heads=2)
# A timm name of every type, and what makes it small.
TYPES = {
    "NAT": ("nat_base", STAGED),
    "DiNAT": ("dinat_tiny", STAGED),
    "DiNAT_s": ("dinat_s_tiny", STAGED),
    "NATIsotropic": ("nat_isotropic_small", ISOTROPIC | dict(kernel_size=3)),
    "DiNATIsotropic": ("dinat_isotropic_base", ISOTROPIC | dict(kernel_size=3)),
    "ViTRPB": ("vitrpb_small", ISOTROPIC | dict(img_size=48)),
    "DaViT": ("densezoo_davit_tiny", HALVING),
    "MaxViT": ("densezoo_maxvit_tiny_tf_224", HALVING | dict(stem_widths=[8, 16])),
    "AgentDeiT": ("agent_deit_tiny", ISOTROPIC),
    "AgentPVT": ("agent_pvt_tiny", PYRAMID),
    "AgentSwin": ("agent_swin_tiny", HALVING | dict(agent_depths=[1, 2, 1, 0])),
    "AgentCSwin": ("agent_cswin_tiny", HALVING),
    "FLattenDeiT": ("flatten_deit_tiny", ISOTROPIC),
    "FLattenPVT": ("flatten_pvt_tiny", PYRAMID),
    "FLattenPVTv2": ("flatten_pvt_v2_b1", PYRAMID),
    "FLattenSwin": ("flatten_swin_tiny", HALVING),
    "FLattenCSwin": ("flatten_cswin_tiny", HALVING),
    "QuadTree": (
        "quadtree_b0",
        dict(embed_dims=[8, 16, 24, 16], depths=[1, 2, 1, 1], num_heads=[1, 2, 3, 4], levels=[3, 3, 2, 2]),
    ),
    "FocalNet": ("densezoo_focalnet_tiny_lrf", dict(embed_dim=16, depths=[1, 2, 1, 1])),
    "PoolFormer": ("densezoo_poolformer_s12", POOLING),
    "PoolFormerV2": ("densezoo_poolformerv2_s12", POOLING),
    "MetaFormer": ("metaformer_ppaa_s12_224", POOLING | dict(embed_dims=[8, 16, 32, 64])),
    "SEResNet": ("se_resnet18", RESIDUAL),
    "CBAMResNet": ("cbam_resnet50", RESIDUAL),
    "BAMResNet": ("bam_resnet18", RESIDUAL),
    "ECAResNet": ("eca_resnet50", RESIDUAL),
    "TripletResNet": ("triplet_resnet50_k3", RESIDUAL),
    "FcaNet": ("fcanet50", RESIDUAL),
    "ECAMobileNetV2": ("eca_mobilenetv2", MOBILE),
    "TripletMobileNetV2": ("triplet_mobilenetv2_k3", MOBILE),
}
# Without norms on their outputs in the published detectors and segmentors.
NORMLESS = ("MaxViT", "AgentPVT", "FLattenPVT")
NORMLESS += tuple(kind for kind, (_, small) in TYPES.items() if small in (RESIDUAL, MOBILE))


def build(kind: str = "NAT", **kwargs) -> torch.nn.Module:
    name, small = TYPES[kind]
    torch.manual_seed(0)
    return MODELS.build(config_for(name, **small | kwargs))


def images(batch: int = 1, size: tuple[int, int] = (64, 96)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def randomise(module: torch.nn.Module) -> None:
    """Make every parameter count: norms and layer scales start as the identity or nearly nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)


def with_gradient(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_every_variant_has_a_config():
    for name in backbones.VARIANTS:
        config = config_for(name)
        archs = MODELS.get(config["type"].removeprefix("densezoo.")).archs
        assert archs[config["arch"]] == backbones.VARIANTS[name].VARIANTS[name]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("norms", [True, False])
def test_same_features_as_timm(kind, norms):
    name, small = TYPES[kind]
    ours = build(kind, **({} if norms else dict(out_norms=()))).eval()
    out_norms = tuple(range(len(ours.out_indices))) if norms and kind not in NORMLESS else ()
    small = small | (dict(agent_sizes=(12, 16, 28, 28)) if kind == "AgentPVT" else {})
    theirs = timm.create_model(name, features_only=True, out_norms=out_norms, **small).eval()
    randomise(theirs)
    report = load_published(ours, theirs.model.state_dict())
    assert report.matched == len(ours.state_dict()) == len(theirs.state_dict())
    outputs = ours(images())
    assert isinstance(outputs, tuple)
    for output, expected, channels, stride in zip(
        outputs, theirs(images()), theirs.feature_info.channels(), theirs.feature_info.reduction(), strict=True
    ):
        assert output.shape == (1, channels, 64 // stride, 96 // stride)
        assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ("nat_mini_dense", "nat_mini"),
        ("davit_tiny_official_dense", "densezoo_davit_tiny"),
        ("agent_pvt_tiny_dense", "agent_pvt_tiny"),
        ("agent_swin_tiny_dense", "agent_swin_tiny"),
    ],
)
@torch.no_grad()
def test_defaults_are_the_published_dense_models(record, name):
    golden = parity.load(Path(__file__).parent / "goldens" / f"{record}.json")
    model = MODELS.build(config_for(name)).eval()
    report = load_published(model, parity.state_dict_from(golden))
    assert report.matched == len(model.state_dict()) and not report.missing and not report.resized
    shape = tuple(golden["inputs"]["image_rect"])
    for i, output in enumerate(model(parity.fixed_input("image_rect", shape))):
        key = next(key for key in (f"rect_features{i}", f"features{i}") if key in golden["outputs"])
        assert parity.compare(golden["outputs"][key], output) < 1e-5, key


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (0, 1), 2])
@pytest.mark.parametrize("norms", [True, False])
def test_builds_what_the_outputs_need(out_indices, norms):
    model = build(out_indices=out_indices, **({} if norms else dict(out_norms=())))
    randomise(model)
    outputs = model(images())
    assert [output.shape[1] for output in outputs] == [16 * 2**i for i in model.out_indices]
    torch.cat([output.pow(3).flatten() for output in outputs]).sum().backward()
    assert with_gradient(model) == set(model.state_dict())
    full = build(out_norms=() if not norms else None).eval()
    load_published(full, {**full.state_dict(), **model.state_dict()})
    for output, i in zip(model.eval()(images()), model.out_indices, strict=True):
        assert torch.equal(output, full(images())[i])


def parts(stage: str, count: int = 4) -> list[tuple[str, ...]]:
    """Return what the names of stem and stages start with."""
    return [("patch_embed.",), *((stage.format(i), f"norm{i}.") for i in range(count))]


PVT_STEM = ("patch_embed1.", "pos_embed1")


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("NAT", parts("levels.{}.")),
        ("DiNAT_s", parts("layers.{}.")),
        ("NATIsotropic", parts("layers.", 1)),
        ("DaViT", parts("stages.{}.")),
        ("MaxViT", parts("stages.{}.")),
        ("FocalNet", parts("layers.{}.")),
        ("PoolFormer", parts("stages.{}.")),
        ("ECAResNet", [("patch_embed.",), *((f"layer{i}.",) for i in range(1, 5))]),
        ("AgentSwin", parts("layers.{}.")),
        ("FLattenDeiT", parts("blocks.", 1)),
        # The stem is the first stage's embedding.
        ("AgentPVT", [PVT_STEM, *((f"patch_embed{i}.", f"pos_embed{i}", f"block{i}.") for i in range(1, 5))]),
        ("QuadTree", [PVT_STEM, *((f"patch_embed{i}.", f"block{i}.", f"norm{i}.") for i in range(1, 5))]),
        ("FLattenPVTv2", [PVT_STEM, *((f"patch_embed{i}.", f"block{i}.", f"norm{i}.") for i in range(1, 5))]),
        (
            "AgentCSwin",
            [("stage1_conv_embed.",), *((f"merge{i}.", f"stage{i + 1}.", f"norm{i}.") for i in range(4))],
        ),
    ],
)
def test_frozen_stages(kind, parts):
    for frozen_stages in range(-1, len(parts)):
        model = build(kind, frozen_stages=frozen_stages, drop_path_rate=0.5)
        randomise(model)
        prefixes = tuple(prefix for part in parts[: frozen_stages + 1] for prefix in part)
        parameters = {name for name, _ in model.named_parameters()}
        frozen = {name for name in parameters if name.startswith(prefixes)}
        assert bool(frozen) == (frozen_stages >= 0)
        for _ in range(2):
            model.train()
            assert model.training
            assert trainable(model) == parameters - frozen
            for name, module in model.named_modules():
                if isinstance(module, DropPath | torch.nn.BatchNorm2d):
                    assert module.training != name.startswith(prefixes), name
        if trainable(model):
            # Stochastic depth may skip a block, so that its parameters get no gradient.
            sum(output.pow(3).mean() for output in model.eval()(images())).backward()
            assert with_gradient(model) == trainable(model)


def test_batch_norms_in_eval_mode():
    for norm_eval in (True, False):
        model = build("CBAMResNet", norm_eval=norm_eval, frozen_stages=1)
        for _ in range(2):
            model.train()
            norms = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
            assert any(".SpatialGate." in name for name in norms)
            for name, norm in norms.items():
                assert norm.training == (not norm_eval and not name.startswith(("patch_embed.", "layer1."))), name
        assert model.training and model.layer2[0].training
        assert "layer2.0.bn1.weight" in trainable(model) and "layer1.0.bn1.weight" not in trainable(model)


def test_frozen_stages_of_a_pruned_model():
    model = build(frozen_stages=4, out_indices=(0, 1)).train()
    assert not trainable(model) and model.training


def test_checkpointing_recomputes_the_same():
    plain, recomputing = build(), build(with_cp=True)
    assert recomputing.grad_checkpointing and not plain.grad_checkpointing
    for model in (plain, recomputing):
        sum(output.pow(3).mean() for output in model.train()(images())).backward()
    for one, other in zip(plain.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_arch_by_name_and_by_arguments():
    assert build(arch="mini").archs.keys() == {"mini", "tiny", "small", "base"}
    with torch.device("meta"):
        named, full = openmmlab.DiNAT("tiny"), openmmlab.DiNAT("dinat_tiny", dilations=[[1], [2], [3], [4]])
        spelled = openmmlab.DiNAT(dict(openmmlab.DiNAT.archs["tiny"]))
    assert [len(level.blocks) for level in named.levels] == [3, 4, 18, 5]
    assert [block.attn.dilation for block in named.levels[0].blocks] == [1, 8, 1]
    assert [block.attn.dilation for block in spelled.levels[0].blocks] == [1, 8, 1]
    assert full.levels[3].blocks[0].attn.dilation == 4


def test_types_can_be_subclassed():
    class Doubled(openmmlab.NAT):
        def forward(self, x):
            return tuple(2 * output for output in super().forward(x))

    torch.manual_seed(0)
    doubled = Doubled("base", **STAGED).eval()
    assert torch.equal(doubled(images())[3], 2 * build().eval()(images())[3])
    assert "Doubled" not in MODELS.module_dict


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        (dict(arch="tinny"), ValueError, ["arch", "tinny", "'tiny'", "mini, tiny, small, base"]),
        (dict(arch="dinat_tiny"), ValueError, ["arch", "'tiny'"]),
        (dict(arch=3), ValueError, ["arch", "3"]),
        (dict(out_indices=(0, 4)), ValueError, ["out_indices", "(0, 4)", "0 to 3"]),
        (dict(out_indices=()), ValueError, ["out_indices"]),
        (dict(out_indices=(0, 1), out_norms=(7,)), ValueError, ["out_norms", "7"]),
        (dict(frozen_stages=5), ValueError, ["frozen_stages", "5", "4"]),
        (dict(drop_path=0.1), TypeError, ["drop_path", "'drop_path_rate'"]),
    ],
)
def test_wrong_arguments(kwargs, error, words):
    with pytest.raises(error) as raised:
        build(**kwargs)
    for word in words:
        assert word in str(raised.value)


def test_config_for():
    assert config_for("nat_tiny") == dict(type="densezoo.NAT", arch="tiny")
    assert config_for("dinat_s_large_384", drop_path_rate=0.3) == dict(
        type="densezoo.DiNAT_s", arch="large_384", drop_path_rate=0.3
    )
    config_for("nat_tiny")["arch"] = "mini"
    assert config_for("nat_tiny")["arch"] == "tiny"
    with pytest.raises(ValueError, match="nat_tinny.*did you mean 'nat_tiny'"):
        config_for("nat_tinny")


@pytest.mark.parametrize("library", ["mmengine", "mmdet", "mmseg", "mmpretrain"])
def test_every_library_finds_the_scope(library):
    models = importlib.import_module(f"{library}.registry").MODELS
    assert models.get("densezoo.DiNAT_s") is openmmlab.DiNAT_s
    with pytest.raises(KeyError, match="densezoo.NAAT"):
        models.build(dict(type="densezoo.NAAT"))


def test_importing_twice_is_harmless():
    model, before = build(), set(MODELS.module_dict)
    again = importlib.reload(openmmlab)
    assert again.MODELS is MODELS and set(MODELS.module_dict) == before
    mmengine.utils.import_modules_from_strings(["densezoo.openmmlab"])
    assert load_published(build(), model.state_dict()).matched == len(model.state_dict())


IMPORT = """
import sys
sys.modules["mmengine"] = None
try:
    import densezoo.openmmlab
except ModuleNotFoundError as error:
    print(error)
del sys.modules["mmengine"]
import densezoo.openmmlab
print(sorted({"mmdet", "mmseg", "mmpretrain", "mmcv.ops"} & set(sys.modules)))
"""


def test_import_is_lean_and_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    message, loaded = done.stdout.splitlines()
    assert message.endswith("pip install 'densezoo[openmmlab]'")
    assert loaded == "[]", done.stderr


def test_a_transformers_too_new_for_mmpretrain(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").touch()
    (tmp_path / "transformers-5.0.0.dist-info").mkdir()
    (tmp_path / "transformers-5.0.0.dist-info/METADATA").write_text("Name: transformers\nVersion: 5.0.0\n")
    imports = "import densezoo.openmmlab; from mmpretrain.models import ImageClassifier; import mmdet.models"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_pretrained_loads_strictly(tmp_path):
    weights = {name: value + 1 for name, value in timm.create_model("nat_base", **STAGED).state_dict().items()}
    torch.save({"model": weights}, path := tmp_path / "nat.pth")
    model = build(init_cfg=ConfigDict(type="Pretrained", checkpoint=str(path), prefix="backbone."))
    assert not torch.equal(model.levels[0].blocks[0].attn.rpb, weights["levels.0.blocks.0.attn.rpb"])
    model.init_weights()
    for name, value in model.state_dict().items():
        assert name.startswith("norm") or torch.equal(value, weights[name])
    weights.pop("levels.0.blocks.0.attn.rpb")
    torch.save({"model": weights}, path)
    with pytest.raises(ValueError, match="nat.pth.*levels.0.blocks.0.attn.rpb"):
        build(init_cfg=dict(type="Pretrained", checkpoint=str(path))).init_weights()
    with pytest.raises(FileNotFoundError, match="nat.pht.*nat.pth"):
        build(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "nat.pht"))).init_weights()
    with pytest.raises(ValueError, match="source"):
        build(init_cfg=dict(type="Pretrained")).init_weights()


def test_initialisation_is_the_familys_own_and_happens_once(tmp_path):
    model = build()
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.save(timm.create_model("nat_base", **STAGED).state_dict(), path := tmp_path / "nat.pth")
    constant = dict(type="Constant", layer="LayerNorm", val=3.0)
    model = build(init_cfg=[dict(type="Pretrained", checkpoint=str(path)), constant])
    model.init_weights()
    assert (model.norm0.weight == 3).all() and (model.patch_embed.norm.weight == 1).all()
    model.norm0.weight.data.fill_(5)
    model.init_weights()
    assert (model.norm0.weight == 5).all()


def test_optimizer_groups():
    init_default_scope("mmengine")
    model = torch.nn.ModuleDict(dict(backbone=build()))
    config = dict(
        optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.5),
        paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={"rpb": dict(decay_mult=0.0)}),
    )
    optimizer = build_optim_wrapper(model, config).optimizer
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (parameter in decayed) != ("norm" in name or "rpb" in name), name


def test_layer_wise_learning_rates():
    init_default_scope("mmpretrain")
    model = classifier()
    config = dict(
        optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.5),
        constructor="LearningRateDecayOptimWrapperConstructor",
        paramwise_cfg=dict(layer_decay_rate=0.5),
    )
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    rates = {group["param_name"]: group["lr"] for group in groups}
    assert rates.keys() == dict(model.named_parameters()).keys()
    assert rates["head.fc.weight"] == 1
    # stem, five blocks and the head
    assert rates["backbone.patch_embed.norm.weight"] == 0.5**6
    assert rates["backbone.levels.0.blocks.0.attn.rpb"] == rates["backbone.levels.0.downsample.norm.weight"] == 0.5**5
    assert rates["backbone.levels.1.blocks.1.attn.rpb"] == 0.5**3
    assert rates["backbone.levels.3.blocks.0.attn.rpb"] == rates["backbone.norm3.weight"] == 0.5


def classifier() -> torch.nn.Module:
    config = dict(
        type="ImageClassifier",
        backbone=config_for("nat_tiny", **STAGED, out_indices=(3,)),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=5, in_channels=128, loss=dict(type="CrossEntropyLoss")),
    )
    return mmengine.MODELS.build(dict(_scope_="mmpretrain", **config))


def assert_trains(model: torch.nn.Module, losses: dict) -> None:
    """Assert that the losses are finite and reach every parameter that is to be trained."""
    total, _ = model.parse_losses(losses)
    assert total.isfinite()
    total.backward()
    missed = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not missed


def test_image_classifier():
    from mmpretrain.structures import DataSample

    init_default_scope("mmpretrain")
    model = classifier()
    samples = [DataSample().set_gt_label(i) for i in (1, 4)]
    assert_trains(model, model.loss(images(2), samples))
    assert [sample.pred_score.shape for sample in model.predict(images(2), samples)] == [(5,), (5,)]


def test_timm_classifier(tmp_path):
    from mmpretrain.structures import DataSample

    init_default_scope("mmpretrain")
    loss = dict(type="LabelSmoothLoss", label_smooth_val=0.1, num_classes=5)
    config = dict(type="TimmClassifier", model_name="dinat_s_tiny", num_classes=5, loss=loss, **STAGED)
    model = mmengine.MODELS.build(dict(_scope_="mmpretrain", **config))
    samples = [DataSample().set_gt_label(i) for i in (1, 4)]
    assert_trains(model, model.loss(images(2), samples))
    assert [sample.pred_score.shape for sample in model.predict(images(2), samples)] == [(5,), (5,)]
    # Its checkpoints are the model's own.
    torch.save({"state_dict": model.state_dict()}, path := tmp_path / "epoch_1.pth")
    other = timm.create_model("dinat_s_tiny", num_classes=5, **STAGED)
    assert load_published(other, path).matched == len(other.state_dict())
    assert load_published(model, path).matched == len(other.state_dict())


def shrunk(name: str, kind: str, **kwargs) -> ConfigDict:
    """Return a base config of a whole model, narrow, with a small backbone."""
    model = Config.fromfile(CONFIGS / name).model
    model.backbone = config_for(TYPES[kind][0], **STAGED, **kwargs)
    return model


@pytest.mark.parametrize("kind", ["NAT", "DiNAT_s"])
def test_mask_rcnn(kind, tmp_path):
    from mmdet.testing import demo_mm_inputs

    init_default_scope("mmdet")
    weights = timm.create_model(TYPES[kind][0], **STAGED).state_dict()
    torch.save(weights, path := tmp_path / "published.pth")
    config = shrunk("mask-rcnn_fpn.py", kind, frozen_stages=1, init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    config.neck.update(in_channels=[16, 32, 64, 128], out_channels=16)
    config.rpn_head.update(in_channels=16, feat_channels=16)
    for extractor in (config.roi_head.bbox_roi_extractor, config.roi_head.mask_roi_extractor):
        extractor.out_channels = 16
    config.roi_head.bbox_head.update(in_channels=16, fc_out_channels=16, num_classes=3)
    config.roi_head.mask_head.update(num_convs=1, in_channels=16, conv_out_channels=16, num_classes=3)
    config.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)
    model = mmengine.MODELS.build(config)
    model.init_weights()
    name = "levels.2.blocks.0.attn.rpb" if kind == "NAT" else "layers.2.blocks.0.attn.rpb"
    assert torch.equal(model.backbone.state_dict()[name], weights[name])
    model.train()
    data = demo_mm_inputs(2, [[3, 64, 96], [3, 80, 64]], num_classes=3, with_mask=True)
    data = model.data_preprocessor(data, training=True)
    assert_trains(model, model.loss(data["inputs"], data["data_samples"]))
    assert all(p.grad is None for p in model.backbone.patch_embed.parameters())
    model.eval()
    with torch.no_grad():
        results = model.predict(data["inputs"], data["data_samples"])
    assert [result.pred_instances.masks.shape[1:] for result in results] == [(64, 96), (80, 64)]


@pytest.mark.parametrize("kind", ["NAT", "DiNAT_s"])
def test_upernet(kind):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    init_default_scope("mmseg")
    config = shrunk("upernet.py", kind, drop_path_rate=0.2)
    config.decode_head.update(in_channels=[16, 32, 64, 128], channels=16, num_classes=4, norm_cfg=dict(type="BN"))
    config.auxiliary_head.update(in_channels=64, channels=16, num_classes=4, norm_cfg=dict(type="BN"))
    model = mmengine.MODELS.build(config)
    model.init_weights()
    meta = dict(img_shape=(64, 96), ori_shape=(64, 96), pad_shape=(64, 96), padding_size=[0, 0, 0, 0])
    samples = [SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=torch.randint(4, (1, 64, 96)))) for _ in range(2)]
    assert_trains(model, model.train().loss(images(2), samples))
    with torch.no_grad():
        results = model.eval().predict(images(2), samples)
    assert [result.pred_sem_seg.shape for result in results] == [(64, 96)] * 2


def test_whole_models_are_refused_by_name():
    init_default_scope("mmpretrain")
    with pytest.raises(ValueError, match="ImageClassifier.*backbone"):
        load_published(classifier(), {"x": torch.ones(1)})
