"""Heads of `densezoo.heads` in mmdet's detectors; `densezoo.openmmlab` imports this when a config names one."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import ATSSHead, DETRHead, DINOHead, FCOSHead, RetinaHead
from mmdet.models.detectors import DINO
from mmdet.models.layers import DinoTransformerDecoder
from mmdet.models.layers.transformer.utils import coordinate_to_encoding, inverse_sigmoid
from mmdet.models.losses import QualityFocalLoss
from mmdet.models.losses.utils import weight_reduce_loss
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.utils import unpack_gt_instances
from mmdet.utils import reduce_mean
from mmengine.structures import InstanceData
from torch import Tensor, nn

from densezoo.heads.bvr import BVR, RoIBVR
from densezoo.heads.relation import PositionRelation
from densezoo.openmmlab import MODELS


class _Half(nn.Module):
    """Take one half of the channels of a map."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, 1)[self.index]


class _BVRHead:
    """What bridges key points into a dense head of mmdet, the second base, between its towers and its predictions.

    Args:
        bvr: Arguments of `densezoo.heads.bvr.BVR` other than the widths and strides.
        args: The head's own, as are `kwargs`.
    """

    def __init_subclass__(cls):
        MODELS.register_module(module=cls, force=True)

    def __init__(self, *args, bvr: dict | None = None, **kwargs):
        self._bvr = bvr or {}
        super().__init__(*args, **kwargs)

    def _init_layers(self) -> None:
        super()._init_layers()
        strides = [stride[0] for stride in self.prior_generator.strides]
        self.bvr = BVR(self.num_classes, self.in_channels, self.feat_channels, strides, **self._bvr)
        # The head then finds its towers' outputs, one next to the other, where it has its inputs otherwise.
        self.cls_tower, self.reg_tower = (nn.Sequential(*convs) for convs in (self.cls_convs, self.reg_convs))
        self.cls_convs, self.reg_convs = (nn.ModuleList([_Half(i)]) for i in range(2))

    def bridge(self, x: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict]:
        """Return the inputs of the head's predictions and the key points."""
        cls_maps, reg_maps = ([tower(level) for level in x] for tower in (self.cls_tower, self.reg_tower))
        cls_maps, reg_maps, points = self.bvr(x, cls_maps, reg_maps)
        return tuple(torch.cat(pair, 1) for pair in zip(cls_maps, reg_maps, strict=True)), points

    def forward(self, x: Sequence[Tensor]) -> tuple:
        """Return the head's predictions from a pyramid."""
        return super().forward(self.bridge(x)[0])

    def loss(self, x: Sequence[Tensor], batch_data_samples: list) -> dict[str, Tensor]:
        """Return the head's losses and the key points'."""
        x, points = self.bridge(x)
        instances, ignored, metas = unpack_gt_instances(batch_data_samples)
        losses = self.loss_by_feat(*super().forward(x), instances, metas, ignored)
        boxes, labels = [i.bboxes for i in instances], [i.labels for i in instances]
        return losses | _point_losses(self.bvr.loss(points, boxes, labels))


def _point_losses(sums: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    score, offset, count = sums
    count = reduce_mean(count).clamp(min=1)
    return dict(loss_point_score=score / count, loss_point_offset=offset / count)


class BVRRetinaHead(_BVRHead, RetinaHead):
    """RelationNet++ (arXiv 2010.15831) in RetinaNet; arguments as for `_BVRHead`."""


class BVRFCOSHead(_BVRHead, FCOSHead):
    """RelationNet++ (arXiv 2010.15831) in FCOS; arguments as for `_BVRHead`."""


class BVRATSSHead(_BVRHead, ATSSHead):
    """RelationNet++ (arXiv 2010.15831) in ATSS; arguments as for `_BVRHead`."""


@MODELS.register_module(force=True)
class BVRRoIHead(StandardRoIHead):
    """RelationNet++ (arXiv 2010.15831) in Faster R-CNN's second stage, whose box head has shared linear layers alone.

    Args:
        bvr: Arguments of `densezoo.heads.bvr.RoIBVR` other than the widths.
        args: Those of mmdet's StandardRoIHead, as are `kwargs`.

    Raises:
        ValueError: The box head has layers of another kind.
    """

    def __init__(self, *args, bvr: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        head = self.bbox_head
        others = ("shared_convs", "cls_convs", "cls_fcs", "reg_convs", "reg_fcs")
        if not len(getattr(head, "shared_fcs", ())) or any(len(getattr(head, name)) for name in others):
            raise ValueError(
                f"bbox_head: got {type(head).__name__}, expected a Shared2FCBBoxHead, with shared_fcs alone"
            )
        self.bvr = RoIBVR(head.in_channels, head.shared_out_channels, **(bvr or {}))

    def _bbox_forward(self, x: Sequence[Tensor], rois: Tensor) -> dict:
        maps = self.bbox_roi_extractor(x[: self.bbox_roi_extractor.num_inputs], rois)
        head, vectors = self.bbox_head, maps.flatten(1)
        for fc in head.shared_fcs:
            vectors = fc(vectors).relu()
        boxes = [rois[rois[:, 0] == i, 1:] for i in range(len(x[0]))]
        cls_vectors, reg_vectors, points = self.bvr(maps, vectors, boxes)
        scores, deltas = head.fc_cls(cls_vectors), head.fc_reg(reg_vectors)
        return dict(cls_score=scores, bbox_pred=deltas, bbox_feats=maps, points=points)

    def bbox_loss(self, x: Sequence[Tensor], sampling_results: list) -> dict:
        """Return what mmdet's head does, with the losses of key points."""
        results = super().bbox_loss(x, sampling_results)
        # each image's objects come before its background
        counts = [count for res in sampling_results for count in (len(res.pos_priors), len(res.neg_priors))]
        points = []
        for t in results["points"]:
            parts = t.split(counts)
            points.append(torch.cat([*parts[::2], *parts[1::2]]))
        rois = torch.cat([res.pos_priors for res in sampling_results])
        boxes = torch.cat([res.pos_gt_bboxes for res in sampling_results])
        results["loss_bbox"] |= _point_losses(self.bvr.loss(tuple(points), rois, boxes))
        return results


@MODELS.register_module(force=True)
class RelationDINO(DINO):
    """DINO with Relation-DETR's position relation and contrast pipeline (arXiv 2407.11699).

    Each decoder layer's self-attention is biased by the relation of the boxes of the last two layers. In training, a
    second set of queries goes through the same decoder without the relation, and is matched to each object several
    times; nothing of it remains in inference. The rest is mmdet's DINO: of the published code, its encoder that fuses
    all layers' outputs and its scaled position queries, which the paper does not describe, are left out.

    Args:
        num_hybrid_queries: Size of the second set.
        args: Those of mmdet's DINO, as are `kwargs`; `bbox_head` is a `densezoo.RelationDINOHead`.
    """

    def __init__(self, *args, num_hybrid_queries: int = 1500, **kwargs):
        self.num_hybrid_queries = num_hybrid_queries
        super().__init__(*args, **kwargs)

    def _init_layers(self) -> None:
        decoder = self.decoder
        super()._init_layers()
        self.decoder = RelationDecoder(**decoder)
        self.hybrid_embedding = nn.Embedding(self.num_hybrid_queries, self.embed_dims)
        self.hybrid_cls = copy.deepcopy(self.bbox_head.cls_branches[-1])
        self.hybrid_reg = copy.deepcopy(self.bbox_head.reg_branches[-1])

    def init_weights(self) -> None:
        """Start as mmdet's DINO."""
        super().init_weights()
        nn.init.xavier_uniform_(self.hybrid_embedding.weight)
        for own, other in (
            (self.hybrid_cls, self.bbox_head.cls_branches[-1]),
            (self.hybrid_reg, self.bbox_head.reg_branches[-1]),
        ):
            own.load_state_dict(other.state_dict())

    def pre_decoder(
        self, memory: Tensor, memory_mask: Tensor, spatial_shapes: Tensor, batch_data_samples: list | None = None
    ) -> tuple[dict, dict]:
        """Return the inputs of decoder and head, in training with those of the second set as `hybrid`."""
        inputs, head_inputs = super().pre_decoder(memory, memory_mask, spatial_shapes, batch_data_samples)
        if self.training:
            memory, proposals = self.gen_encoder_output_proposals(memory, memory_mask, spatial_shapes)
            scores, boxes = self.hybrid_cls(memory), (self.hybrid_reg(memory) + proposals).sigmoid()
            count = min(self.num_hybrid_queries, scores.shape[1])
            best = scores.amax(-1).topk(count, 1).indices[..., None]
            scores, boxes = (t.gather(1, best.expand(-1, -1, t.shape[2])) for t in (scores, boxes))
            query = self.hybrid_embedding.weight[:count].expand(len(memory), -1, -1)
            inputs["hybrid"] = dict(query=query, reference_points=boxes.detach())
            head_inputs["hybrid"] = dict(enc_outputs_class=scores, enc_outputs_coord=boxes)
        return inputs, head_inputs

    def forward_transformer(self, img_feats: tuple[Tensor, ...], batch_data_samples: list | None = None) -> dict:
        """Return the inputs of the head, in training with those of the second set as `hybrid`."""
        encoder_inputs, decoder_inputs = self.pre_transformer(img_feats, batch_data_samples)
        memory = self.forward_encoder(**encoder_inputs)
        inputs, head_inputs = self.pre_decoder(**memory, batch_data_samples=batch_data_samples)
        hybrid = inputs.pop("hybrid", None)
        head_inputs |= self.forward_decoder(**decoder_inputs | inputs)
        if hybrid:
            hybrid |= dict(dn_mask=None, relate=False)
            head_inputs["hybrid"] |= self.forward_decoder(**decoder_inputs | inputs | hybrid)
        return head_inputs


class RelationDecoder(DinoTransformerDecoder):
    """DINO's decoder, whose self-attention is biased by the relations of boxes from its second layer on."""

    def _init_layers(self) -> None:
        super()._init_layers()
        self.position_relation_embedding = PositionRelation(self.layers[0].self_attn.num_heads)

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        self_attn_mask: Tensor | None,
        reference_points: Tensor,
        valid_ratios: Tensor,
        reg_branches: nn.ModuleList,
        relate: bool = True,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Return all layers' queries (layers, B, N, dim) and boxes (layers + 1, B, N, 4), first those given.

        Args:
            query: (B, N, dim).
            value: Of the encoder, (B, positions, dim).
            self_attn_mask: True where a query may not attend to another, (N, N).
            reference_points: Boxes of the queries, (B, N, 4), cx, cy, w, h, normalised.
            valid_ratios: Of images without padding, (B, levels, 2).
            reg_branches: What refines the boxes after each layer.
            relate: Whether boxes bias the attention.
            kwargs: What the layers take besides.
        """
        queries, references = [], [reference_points]
        scale, mask, boxes = torch.cat([valid_ratios, valid_ratios], -1)[:, None], self_attn_mask, reference_points
        for i, (layer, refine) in enumerate(zip(self.layers, reg_branches, strict=False)):
            scaled = reference_points[:, :, None] * scale
            position = self.ref_point_head(coordinate_to_encoding(scaled[:, :, 0], num_feats=query.shape[2]))
            query = layer(
                query,
                query_pos=position,
                value=value,
                self_attn_mask=mask,
                valid_ratios=valid_ratios,
                reference_points=scaled,
                **kwargs,
            )
            queries.append(self.norm(query))
            if relate and i + 1 < len(self.layers):
                with torch.no_grad():
                    previous = boxes
                    boxes = (refine(queries[-1]) + inverse_sigmoid(reference_points)).sigmoid()
                mask = self.position_relation_embedding(previous, boxes)
                if self_attn_mask is not None:
                    mask = mask.masked_fill(self_attn_mask, -torch.inf)
                mask = mask.flatten(0, 1)
            # the box that is returned keeps its gradient, for the loss of the next layer
            references.append((refine(query) + inverse_sigmoid(reference_points, eps=1e-3)).sigmoid())
            reference_points = references[-1].detach()
        return torch.stack(queries), torch.stack(references)


@MODELS.register_module(force=True)
class RelationDINOHead(DINOHead):
    """DINO's head with the losses of `RelationDINO`'s second set of queries.

    Args:
        hybrid_assign: How many of these queries are matched to each object.
        args: Those of mmdet's DINOHead, as are `kwargs`.
    """

    def __init__(self, *args, hybrid_assign: int = 6, **kwargs):
        self.hybrid_assign = hybrid_assign
        super().__init__(*args, **kwargs)

    def loss(self, hybrid: dict, batch_data_samples: list, **kwargs) -> dict[str, Tensor]:
        """Return DINO's losses, and those of the second set under names with `hybrid_`."""
        losses = super().loss(batch_data_samples=batch_data_samples, **kwargs)
        metas = [sample.metainfo for sample in batch_data_samples]
        instances = [InstanceData.cat([sample.gt_instances] * self.hybrid_assign) for sample in batch_data_samples]
        outs = self(hybrid["hidden_states"], hybrid["references"])
        extra = DETRHead.loss_by_feat(self, *outs, instances, metas)
        enc = self.loss_by_feat_single(hybrid["enc_outputs_class"], hybrid["enc_outputs_coord"], instances, metas)
        extra |= dict(zip(("enc_loss_cls", "enc_loss_bbox", "enc_loss_iou"), enc, strict=True))
        return losses | {f"hybrid_{name}": value for name, value in extra.items()}


@MODELS.register_module(force=True)
class IoUAwareFocalLoss(QualityFocalLoss):
    """Relation-DETR's classification loss: scores of objects are to be their boxes' overlaps, and weigh as much.

    Varifocal loss (arXiv 2008.13367) whose weights get no gradients, in the place that mmdet's detection transformers
    have for a loss of labels and overlaps.

    Args:
        alpha: Weight of objects that are not there is 1 - alpha.
        gamma: Exponent of their scores in it.
        loss_weight: Of the whole.
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0, loss_weight: float = 1.0, use_sigmoid: bool = True):
        super().__init__(use_sigmoid=use_sigmoid, beta=gamma, loss_weight=loss_weight)
        self.alpha = alpha

    def forward(
        self,
        pred: Tensor,
        target: tuple[Tensor, Tensor],
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Return the loss of logits (N, classes), of labels (N,), `classes` for none, and overlaps (N,)."""
        labels, overlaps = target
        objects = F.one_hot(labels, pred.shape[1] + 1)[:, :-1]
        targets = objects * overlaps[:, None]
        weights = (1 - self.alpha) * pred.detach().sigmoid() ** self.beta * (1 - objects) + targets
        loss = F.binary_cross_entropy_with_logits(pred, targets, weights, reduction="none").sum(1)
        return self.loss_weight * weight_reduce_loss(loss, weight, reduction_override or self.reduction, avg_factor)
