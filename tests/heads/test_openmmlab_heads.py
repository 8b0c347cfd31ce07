"""The heads inside mmdet's and mmseg's: what they add to the heads that they extend, and nothing else."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

import densezoo.openmmlab  # noqa: F401

ANCHORS = dict(type="AnchorGenerator", octave_base_scale=8, scales_per_octave=1, ratios=[1.0], strides=[8, 16, 32])
HEADS = {
    "Retina": dict(anchor_generator=ANCHORS),
    "ATSS": dict(anchor_generator=ANCHORS, norm_cfg=dict(type="GN", num_groups=8)),
    "FCOS": dict(strides=(8, 16, 32), regress_ranges=((-1, 64), (64, 128), (128, 1e8)), norm_on_bbox=True),
}


def build(cfg: dict, **kwargs) -> torch.nn.Module:
    init_default_scope("mmdet")
    model = MODELS.build(ConfigDict(cfg | kwargs))
    if hasattr(model, "init_weights"):
        model.init_weights()
    return model


def test_nothing_is_imported_that_is_not_named():
    code = """
import sys
import densezoo.openmmlab as o
heads = {"densezoo.mmdet_heads", "densezoo.mmseg_heads"}
print(heads & set(sys.modules), o.MODELS.get("densezoo.NAT"), heads & set(sys.modules))
from mmengine.registry import MODELS
print(MODELS.get("densezoo.P2ATHead").__name__, heads & set(sys.modules))
print(all(MODELS.get(f"densezoo.{name}").__name__ == name for name in o._EXTENSIONS))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()[-3:]
    assert first == "set() <class 'densezoo.openmmlab.NAT'> set()"
    assert second == "P2ATHead {'densezoo.mmseg_heads'}"
    assert third == "True"


@pytest.mark.parametrize("name", HEADS)
def test_bvr_head_without_its_bridges_is_the_head(name):
    cfg = dict(num_classes=4, in_channels=16, feat_channels=32, stacked_convs=2, **HEADS[name])
    head = build(dict(type=f"densezoo.BVR{name}Head", **copy.deepcopy(cfg)), bvr=dict(num_heads=4)).eval()
    plain = build(dict(type=f"{name}Head", **copy.deepcopy(cfg))).eval()
    state = head.state_dict()
    renamed = {
        key: state[key.replace("cls_convs", "cls_tower").replace("reg_convs", "reg_tower")]
        for key in plain.state_dict()
    }
    plain.load_state_dict(renamed)
    maps = tuple(torch.randn(2, 16, *size) for size in ((8, 12), (4, 6), (2, 3)))
    bridged = head(maps)
    head.bvr.forward = lambda maps, cls_maps, reg_maps: (cls_maps, reg_maps, {})
    for a, b, c in zip(head(maps), plain(maps), bridged, strict=True):
        for own, expected, other in zip(a, b, c, strict=True):
            torch.testing.assert_close(own, expected)
            assert not torch.equal(other, expected)


def test_bvr_head_starts_its_key_points_as_published():
    head = build(
        dict(type="densezoo.BVRRetinaHead", num_classes=4, in_channels=16, feat_channels=32), bvr=dict(num_heads=4)
    )
    for kind, convs in head.bvr.keypoint_head.keypoint_cls_heads.items():
        assert convs[-1].bias.sigmoid().allclose(torch.tensor(0.01)), kind
    assert head.retina_cls.bias.sigmoid().allclose(torch.tensor(0.01))


def test_bvr_roi_head_asks_for_linear_layers_alone():
    extractor = dict(
        type="SingleRoIExtractor", roi_layer=dict(type="RoIAlign", output_size=7), out_channels=16, featmap_strides=[4]
    )
    box_head = dict(type="ConvFCBBoxHead", in_channels=16, roi_feat_size=7, num_classes=4, num_shared_convs=1)
    with pytest.raises(
        ValueError, match="bbox_head: got ConvFCBBoxHead, expected a Shared2FCBBoxHead, with shared_fcs alone"
    ):
        build(dict(type="densezoo.BVRRoIHead", bbox_roi_extractor=extractor, bbox_head=box_head))


def decoders():
    from mmdet.models.layers import DinoTransformerDecoder

    from densezoo.mmdet_heads import RelationDecoder

    layer = dict(
        self_attn_cfg=dict(embed_dims=32, num_heads=4),
        cross_attn_cfg=dict(embed_dims=32, num_heads=4, num_levels=1),
        ffn_cfg=dict(embed_dims=32, feedforward_channels=16),
    )
    made = [
        kind(num_layers=3, layer_cfg=copy.deepcopy(layer), post_norm_cfg=None).eval()
        for kind in (RelationDecoder, DinoTransformerDecoder)
    ]
    for parameter in made[0].parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(made[0].position_relation_embedding.pos_proj[0].weight, std=2.0)
    made[1].load_state_dict({k: v for k, v in made[0].state_dict().items() if "relation" not in k})
    return made


def decoder_inputs(count: int = 9) -> dict:
    generator = torch.Generator().manual_seed(0)
    linears = [torch.nn.Linear(32, 4) for _ in range(4)]
    return dict(
        query=torch.randn(2, count, 32, generator=generator),
        value=torch.randn(2, 20, 32, generator=generator),
        key_padding_mask=None,
        self_attn_mask=None,
        reference_points=torch.rand(2, count, 4, generator=generator) * 0.6 + 0.2,
        spatial_shapes=torch.tensor([[4, 5]]),
        level_start_index=torch.tensor([0]),
        valid_ratios=torch.ones(2, 1, 2),
        reg_branches=torch.nn.ModuleList(linears),
    )


def test_decoder_without_relations_is_dino():
    relation, dino = decoders()
    inputs = decoder_inputs()
    expected = dino(**inputs)
    for own, other, plain in zip(relation(**inputs, relate=False), relation(**inputs), expected, strict=True):
        torch.testing.assert_close(own, plain)
        assert not torch.allclose(other, plain, atol=1e-3)
    # the first layer knows no boxes
    torch.testing.assert_close(relation(**inputs)[0][0], expected[0][0])


def test_relations_keep_queries_apart():
    relation, _ = decoders()
    inputs, mask = decoder_inputs(), torch.zeros(9, 9, dtype=torch.bool)
    mask[4:, :4] = True  # the last five do not see the first four
    queries, boxes = relation(**inputs | dict(self_attn_mask=mask))
    other = inputs["query"].clone()
    other[:, :4] = 3
    queries2, boxes2 = relation(**inputs | dict(self_attn_mask=mask, query=other))
    torch.testing.assert_close(queries2[:, :, 4:], queries[:, :, 4:])
    torch.testing.assert_close(boxes2[:, :, 4:], boxes[:, :, 4:])
    assert not torch.allclose(queries2[:, :, :4], queries[:, :, :4])


@pytest.mark.parametrize("objects", [2, 0])
def test_hybrid_queries_are_matched_several_times(objects):
    assigner = dict(
        type="HungarianAssigner",
        match_costs=[dict(type="FocalLossCost", weight=2.0), dict(type="BBoxL1Cost", weight=5.0, box_format="xywh")],
    )
    head = build(
        dict(
            type="densezoo.RelationDINOHead",
            num_classes=4,
            embed_dims=8,
            num_pred_layer=3,
            as_two_stage=True,
            hybrid_assign=3,
            sync_cls_avg_factor=True,
            loss_cls=dict(type="densezoo.IoUAwareFocalLoss"),
            train_cfg=dict(assigner=assigner),
        )
    )
    counts = []
    targets = head.get_targets
    head.get_targets = lambda *args: counts.append(targets(*args)) or counts[-1]
    boxes, labels = torch.tensor([[3.0, 4, 20, 30], [8, 8, 60, 50]]), torch.tensor([1, 3])
    instances = InstanceData(bboxes=boxes[:objects], labels=labels[:objects])
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo=dict(img_shape=(64, 64)), gt_instances=instances)
    hidden, references = torch.randn(2, 1, 12, 8), [torch.rand(1, 12, 4) for _ in range(3)]
    scores, boxes = torch.randn(1, 12, 4), torch.rand(1, 12, 4)
    hybrid = dict(hidden_states=hidden, references=references, enc_outputs_class=scores, enc_outputs_coord=boxes)
    losses = head.loss(
        hybrid,
        [sample],
        hidden_states=hidden,
        references=references,
        enc_outputs_class=scores,
        enc_outputs_coord=boxes,
        # of the 12 queries the objects, and as many that are none, are there to learn from noise
        dn_meta=dict(num_denoising_queries=2 * objects, num_denoising_groups=1),
    )
    assert [count[4] for count in counts] == 3 * [objects] + 3 * [3 * objects]
    assert all(loss.isfinite().all() for loss in losses.values())
    names = {name for name in losses if name.startswith("hybrid_")}
    assert names == {f"hybrid_{layer}loss_{part}" for layer in ("", "d0.", "enc_") for part in ("cls", "bbox", "iou")}


def test_classification_loss():
    loss = build(dict(type="densezoo.IoUAwareFocalLoss", alpha=0.25, gamma=2.0))
    logits = torch.randn(3, 2, requires_grad=True)
    labels, overlaps = torch.tensor([1, 2, 0]), torch.tensor([0.7, 0.0, 0.4])
    targets = torch.tensor([[0, 0.7], [0, 0], [0.4, 0]])
    p = logits.sigmoid()
    weights = torch.where(targets > 0, targets, 0.75 * p.detach() ** 2)
    expected = F.binary_cross_entropy(p, targets, weights, reduction="sum") / 5
    value = loss(logits, (labels, overlaps), torch.ones(3), avg_factor=5)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (value, expected)))


def test_p2at_weighs_its_auxiliary_losses():
    init_default_scope("mmseg")
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    cfg = dict(type="densezoo.P2ATHead", in_channels=[8] * 4, in_index=[0, 1, 2, 3], channels=16, num_classes=3)
    head = MODELS.build(cfg | dict(aux_weight=0.4, decoder=dict(num_heads=2, key_dim=4))).eval()
    maps = [torch.randn(2, 8, s, s) for s in (16, 8, 4, 2)]
    samples = [
        SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 3, (1, 64, 64))), metainfo=dict(img_shape=(64, 64)))
        for _ in range(2)
    ]
    losses = head.loss(maps, samples, {})
    x, fused = head.decoder(maps)
    assert losses["loss_ce"] == head.loss_by_feat(head.conv_seg(x), samples)["loss_ce"]
    for i in range(2):
        expected = head.loss_by_feat(head.aux_segs[i](fused[i]), samples)["loss_ce"]
        torch.testing.assert_close(losses[f"aux_{i}.loss_ce"], 0.4 * expected)
    assert head(maps).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("name", ["MEUHead", "P2ATHead"])
@pytest.mark.parametrize("levels", [{}, dict(in_index=[0, 1, 2]), dict(in_index=3)], ids=str)
def test_segmentation_heads_ask_for_a_level_each(name, levels):
    with pytest.raises(ValueError, match=r"in_index: got .*, expected a level for each width of in_channels"):
        build(dict(type=f"densezoo.{name}", in_channels=[8] * 4, channels=8, num_classes=3, **levels))


def test_sepc_head_asks_for_pairs_of_maps():
    head = build(dict(type="densezoo.SEPCRetinaHead", num_classes=3, in_channels=8))
    with pytest.raises(ValueError, match="x: got one map a level, expected SEPC's pairs"):
        head(5 * [torch.zeros(2, 8, 4, 4)])
    with pytest.raises(ValueError, match="stacked_convs: got 4, expected 0"):
        build(dict(type="densezoo.SEPCRetinaHead", num_classes=3, in_channels=8, stacked_convs=4))


def test_dyhead_without_biases_in_its_convolutions_is_mmdets():
    theirs = build(dict(type="mmdet.DyHead", in_channels=32, out_channels=32, num_blocks=2, zero_init_offset=False))
    ours = build(dict(type="densezoo.DyHead", in_channels=32, out_channels=32, num_blocks=2))
    names = {
        "dyhead_blocks": "dyhead_tower",
        "spatial_conv_high": "DyConv.0",
        "spatial_conv_mid": "DyConv.1",
        "spatial_conv_low": "DyConv.2",
        "spatial_conv_offset": "offset",
        "norm": "bn",
        "scale_attn_module": "AttnConv",
        "task_attn_module.conv1.conv": "relu.fc.0",
        "task_attn_module.conv2.conv": "relu.fc.2",
    }
    state = theirs.state_dict()
    for key, value in state.items():
        for name, own in names.items():
            key = key.replace(f"{name}.", f"{own}.")
        parameter = ours.get_parameter(key)
        torch.nn.init.normal_(parameter, std=0.2)
        value.copy_(parameter.detach().view(value.shape))
    maps = tuple(torch.randn(2, 32, *size) for size in ((16, 20), (8, 10), (4, 5)))
    for out, expected in zip(ours(maps), theirs(maps), strict=True):
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
