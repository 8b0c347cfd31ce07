"""Models as torch.export programs and as ONNX, with free batch, height and width.

What is exported takes one tensor, `images` (B, 3, H, W) in float32. A timm model takes them as its training did. A
detector or segmentor of OpenMMLab takes pixels as its pipelines load them (BGR, 0 to 255): the program normalises and
pads them, and gives every image the same number of detections, of which those with score 0 are none. Images for a
detector are larger than its last level's stride, after SEPC than three times that. Programs hold operators of torch and
torchvision alone, so they run where densezoo and OpenMMLab are not installed.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

# Differences of two runtimes in float32, relative to the size of an output; labels may change where scores are equal.
TOLERANCE, LABELS_TOLERANCE = 1e-3, 0.02


def exportable(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the module that is exported of a model, in eval mode, and the names of its outputs.

    Args:
        model: A model of timm's, or a detector, segmentor or classifier of OpenMMLab's; it stays as it is.

    Raises:
        ValueError: There is no form of it for export; says which there are.
    """
    if type(model).__name__ == "TimmClassifier":
        model = model.model
    if hasattr(model, "data_preprocessor"):
        model = copy.deepcopy(model).eval()
        _free_sizes(model)
        bbox_head, roi_head = getattr(model, "bbox_head", None), getattr(model, "roi_head", None)
        if type(roi_head).__name__ in ("StandardRoIHead", "CascadeRoIHead"):
            names = ["boxes", "scores", "labels"] + ["masks"] * roi_head.with_mask
            return TwoStageDetector(model), names
        if type(getattr(bbox_head, "bbox_coder", None)).__name__ == "DeltaXYWHBBoxCoder":
            return DenseDetector(model), ["boxes", "scores", "labels"]
        if hasattr(model, "decode_head") and hasattr(model, "encode_decode"):
            if type(model).__name__ == "EncoderDecoder" and hasattr(model.decode_head, "cls_seg"):
                return Segmentor(model), ["logits", "labels"]
        heads = (roi_head, bbox_head, getattr(model, "decode_head", None))
        head = next((part for part in heads if part is not None), None)
        kind = type(model).__name__ + (f" with {type(head).__name__}" if head is not None else "")
        raise ValueError(
            f"{kind} has no form for export; there are forms for detectors with anchors (RetinaNet, ATSS), with an RPN "
            "(Faster, Mask and Cascade R-CNN), and segmentors of one head (UPerNet, Semantic FPN)"
        )
    features = getattr(model, "feature_info", None) is not None and not hasattr(model, "forward_head")
    names = [f"feature{i}" for i in range(len(model.feature_info.channels()))] if features else ["logits"]
    return copy.deepcopy(model).eval(), names


@torch.no_grad()
def to_program(model: nn.Module, size: Sequence[int] = (224, 224)) -> ExportedProgram:
    """Export a model with free batch, height and width.

    Args:
        model: As for `exportable`, or what that returned.
        size: Height and width of the images that it is traced with.
    """
    module = exportable(model)[0] if hasattr(model, "data_preprocessor") else model
    images = torch.randn(2, in_channels(module), *size)
    free = {axis: Dim.DYNAMIC for axis in (0, 2, 3)}
    with _Subsampling():
        return torch.export.export(module.eval(), (images,), dynamic_shapes=(free,))


class _Subsampling(TorchFunctionMode):
    """Takes pooling of single positions, as FPN's for its last level, as slicing: pooling would fix sizes as even."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.max_pool2d and args[1] == 1 and isinstance(kwargs.get("stride"), int):
            return args[0][:, :, :: kwargs["stride"], :: kwargs["stride"]]
        return function(*args, **kwargs)


def in_channels(module: nn.Module) -> int:
    """Return the number of channels that the first convolution takes."""
    return next(part.in_channels for part in module.modules() if isinstance(part, nn.Conv2d))


def to_onnx(program: ExportedProgram, path: str | Path, output_names: Sequence[str]) -> None:
    """Write an exported program as ONNX; the axes are called batch, height and width.

    Raises:
        ValueError: The program has an operation that torch.onnx cannot translate.
    """
    axes = {0: "batch", 2: "height", 3: "width"}
    names = dict(input_names=["images"], output_names=list(output_names), dynamic_shapes=(axes,))
    table = {torch.ops.aten.remainder.Scalar: _remainder}
    try:
        onnx = torch.onnx.export(program, **names, dynamo=True, verbose=False, custom_translation_table=table)
    except torch.onnx.OnnxExporterError as error:
        # The cause says which operation; the error itself is pages of advice on the exporter.
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"the model has no ONNX form, but a torch.export program: {reason}") from error
    onnx.save(str(path))


def _remainder(x, divisor):
    """Translate a remainder whose divisor may be a size, which torch's own translation does not take."""
    from onnxscript import opset18 as op

    divisor = op.CastLike(divisor, x)
    if x.dtype.is_integer():
        return op.Mod(x, divisor)
    return op.Sub(x, op.Mul(op.Floor(op.Div(x, divisor)), divisor))


class Preprocess(nn.Module):
    """What OpenMMLab's data preprocessors do to a batch: reverse the channels, normalise, pad to a multiple."""

    def __init__(self, preprocessor: nn.Module):
        super().__init__()
        self.flip = bool(getattr(preprocessor, "channel_conversion", False) or getattr(preprocessor, "to_rgb", False)
                         or getattr(preprocessor, "_channel_conversion", False))  # fmt: skip
        normalize = getattr(preprocessor, "_enable_normalize", hasattr(preprocessor, "mean"))
        self.register_buffer("mean", preprocessor.mean.clone() if normalize else torch.zeros(1, 1, 1))
        self.register_buffer("std", preprocessor.std.clone() if normalize else torch.ones(1, 1, 1))
        self.divisor = getattr(preprocessor, "pad_size_divisor", 1) or 1

    def forward(self, images: Tensor) -> Tensor:
        """Return the batch that the network takes."""
        if self.flip:
            images = images.flip(1)
        images = (images - self.mean) / self.std
        height, width = ((size + self.divisor - 1) // self.divisor * self.divisor for size in images.shape[2:])
        return F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))


class Segmentor(nn.Module):
    """A segmentor with one head, without its test-time windows: logits (B, classes, H, W) and labels (B, H, W)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.preprocess, self.model = Preprocess(model.data_preprocessor), model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Segment images (B, 3, H, W)."""
        x = self.preprocess(images)
        head = self.model.decode_head
        logits = head(self.model.extract_feat(x))
        logits = F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=head.align_corners)
        logits = logits[:, :, : images.shape[2], : images.shape[3]]
        if logits.shape[1] == 1:
            return logits, (logits.sigmoid() > head.threshold)[:, 0].long()
        return logits, logits.argmax(1)


class DenseDetector(nn.Module):
    """A one-stage detector with anchors: boxes (B, K, 4) in pixels, scores (B, K) and labels (B, K), the best first."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.preprocess, self.model = Preprocess(model.data_preprocessor), model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect in images (B, 3, H, W)."""
        head, cfg = self.model.bbox_head, self.model.bbox_head.test_cfg
        outputs = head(self.model.extract_feat(self.preprocess(images)))
        boxes, scores, labels = _dense_candidates(head, *outputs, cfg=cfg, size=images.shape[2:])
        # A score below the threshold never outdoes one above it.
        scores = scores * _large_enough(boxes, cfg)
        keep = _nms(boxes.flatten(0, 1), scores.flatten(), _groups(labels, head.num_classes), _iou(cfg.nms))
        return _best(boxes, scores * keep.view_as(scores), labels, cfg.max_per_img)


class TwoStageDetector(nn.Module):
    """Faster, Mask or Cascade R-CNN: as `DenseDetector`, and masks (B, K, side, side) of each box's inside, 0 to 1."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.preprocess, self.model = Preprocess(model.data_preprocessor), model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect in images (B, 3, H, W)."""
        size, roi_head = images.shape[2:], self.model.roi_head
        features = self.model.extract_feat(self.preprocess(images))
        proposals, valid = self.propose(features, size)
        boxes, scores = self.classify(features, proposals, valid, size)
        boxes, scores, labels = _multiclass_nms(boxes, scores, roi_head.test_cfg)
        if not roi_head.with_mask:
            return boxes, scores, labels
        return boxes, scores, labels, self.segment(features, boxes, labels)

    def propose(self, features: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the RPN's boxes (B, P, 4), and which of them are any (B, P)."""
        head, cfg = self.model.rpn_head, self.model.rpn_head.test_cfg
        boxes, scores, levels = _dense_candidates(head, *head(features), cfg=cfg, size=size, by_level=True)
        scores = scores * _large_enough(boxes, cfg)
        keep = _nms(boxes.flatten(0, 1), scores.flatten(), _groups(levels, len(features)), _iou(cfg.nms))
        boxes, scores, _ = _best(boxes, scores * keep.view_as(scores), levels, cfg.max_per_img)
        return boxes, scores > 0

    def classify(
        self, features: Sequence[Tensor], proposals: Tensor, valid: Tensor, size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return boxes (B, P, classes or 1, 4) and scores (B, P, classes)."""
        batch, count = proposals.shape[:2]
        roi_head = self.model.roi_head
        heads, extractors = roi_head.bbox_head, roi_head.bbox_roi_extractor
        if not isinstance(heads, nn.ModuleList):
            heads, extractors = [heads], [extractors]
        boxes, total = proposals.flatten(0, 1), 0
        for i, (head, extractor) in enumerate(zip(heads, extractors, strict=True)):
            logits, deltas = head(_extract(extractor, features, boxes.view(batch, count, 4)))
            total = total + logits
            deltas = deltas.unflatten(-1, (-1, 4))
            if i < len(heads) - 1 and not head.reg_class_agnostic:
                label = logits[:, :-1].argmax(-1)
                deltas = deltas.gather(1, label[:, None, None].expand(-1, 1, 4))
            boxes = _decode(head.bbox_coder, boxes[:, None], deltas, size)
            if i < len(heads) - 1:
                boxes = boxes[:, 0]
        scores = (total / len(heads)).softmax(-1)[:, :-1] * valid.flatten()[:, None]
        return boxes.unflatten(0, (batch, count)), scores.unflatten(0, (batch, count))

    def segment(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return the masks of boxes (B, K, 4) of known classes."""
        roi_head = self.model.roi_head
        heads, extractors = roi_head.mask_head, roi_head.mask_roi_extractor
        if not isinstance(heads, nn.ModuleList):
            heads, extractors = [heads], [extractors]
        total = 0
        for head, extractor in zip(heads, extractors, strict=True):
            masks = head(_extract(extractor, features, boxes)).sigmoid()
            if masks.shape[1] > 1:
                index = labels.flatten()[:, None, None, None].expand(-1, 1, *masks.shape[2:])
                masks = masks.gather(1, index)
            total = total + masks[:, 0]
        return (total / len(heads)).unflatten(0, (boxes.shape[0], boxes.shape[1]))


def _dense_candidates(
    head: nn.Module,
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    factors: Sequence[Tensor] | None = None,
    *,
    cfg: dict,
    size: Sequence[int],
    by_level: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best boxes (B, N, 4) of all levels with their scores and labels (B, N), `nms_pre` of each level.

    Scores under the threshold become 0, as do those that fill up a small level. With `by_level` the labels are levels.
    """
    found = []
    for level, (cls, delta) in enumerate(zip(logits, deltas, strict=True)):
        batch, _, height, width = cls.shape
        cls = cls.permute(0, 2, 3, 1).reshape(batch, -1, head.cls_out_channels)
        cls = cls.sigmoid() if head.use_sigmoid_cls else cls.softmax(-1)[..., :-1]
        classes = cls.shape[-1]
        delta = delta.permute(0, 2, 3, 1).reshape(batch, -1, 4)
        anchors = head.prior_generator.single_level_grid_priors((height, width), level, delta.dtype, delta.device)
        # Filled up, so that there are as many as wanted at any size.
        flat = F.pad(cls.flatten(1), (0, cfg.nms_pre))
        score, index = flat.topk(cfg.nms_pre)
        anchor = (index // classes).clamp(max=anchors.shape[0] - 1)
        label = torch.full_like(index, level) if by_level else index % classes
        box = _decode(head.bbox_coder, anchors[anchor], delta.gather(1, anchor[..., None].expand(-1, -1, 4)), size)
        score = score * (score > cfg.get("score_thr", 0))
        if factors is not None:
            factor = factors[level].permute(0, 2, 3, 1).reshape(batch, -1).sigmoid()
            score = score * factor.gather(1, anchor)
        found.append((box, score, label))
    boxes, scores, labels = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return boxes, scores, labels


def _decode(coder: object, boxes: Tensor, deltas: Tensor, size: Sequence[int]) -> Tensor:
    """Move boxes (..., 4) by deltas (..., 4) as mmdet's DeltaXYWHBBoxCoder does, within an image of `size`."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    centre, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    limit = abs(math.log(16 / 1000))
    shift = sides * deltas[..., :2]
    if coder.add_ctr_clamp:
        shift = shift.clamp(-coder.ctr_clamp, coder.ctr_clamp)
        sides = sides * deltas[..., 2:].clamp(max=limit).exp()
    else:
        sides = sides * deltas[..., 2:].clamp(-limit, limit).exp()
    low, high = centre + shift - sides / 2, centre + shift + sides / 2
    x1, y1, x2, y2 = low[..., 0], low[..., 1], high[..., 0], high[..., 1]
    if coder.clip_border:
        height, width = size
        x1, x2, y1, y2 = x1.clamp(0, width), x2.clamp(0, width), y1.clamp(0, height), y2.clamp(0, height)
    return torch.stack([x1, y1, x2, y2], -1)


def _large_enough(boxes: Tensor, cfg: dict) -> Tensor:
    smallest = cfg.get("min_bbox_size", -1)
    return ((boxes[..., 2:] - boxes[..., :2]) > smallest).all(-1) if smallest >= 0 else torch.ones_like(boxes[..., 0])


def _iou(cfg: dict) -> float:
    if cfg.get("type", "nms") != "nms" or cfg.get("class_agnostic"):
        raise ValueError(f"test_cfg: nms: got {dict(cfg)}, expected type='nms' by class, which is what can be exported")
    return float(cfg["iou_threshold"])


def _groups(labels: Tensor, count: int) -> Tensor:
    """Return a number (B * N,) for each image and label (B, N): boxes of different ones leave each other alone."""
    image = torch.arange(labels.shape[0], device=labels.device)[:, None]
    return (image * count + labels).flatten()


def _nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Return which boxes (N, 4) stay (N,)."""
    # Moved apart, as in mmcv.
    offsets = groups * (boxes.max() + 1)
    kept = torchvision.ops.nms(boxes + offsets[:, None], scores, iou_threshold)
    return torch.zeros_like(scores).index_fill(0, kept, 1.0)


def _best(boxes: Tensor, scores: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    scores, index = scores.topk(count)
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return boxes, scores, labels.gather(1, index)


def _multiclass_nms(boxes: Tensor, scores: Tensor, cfg: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best detections of boxes (B, P, classes or 1, 4) with scores (B, P, classes)."""
    batch, count, classes = scores.shape
    # Two more, of nothing: runtimes differ in what they make of no boxes, and a program expects two or more.
    flat = F.pad(scores.flatten(), (0, 2), value=1.0)
    index = (flat > cfg.score_thr).nonzero()[:, 0]
    every = F.pad(boxes.expand(-1, -1, classes, -1).flatten(0, 2), (0, 0, 0, 2))
    group = index // (count * classes) * classes + index % classes
    candidates, candidate_scores = every[index], flat[index]
    kept = index[_nms(candidates, candidate_scores, group, _iou(cfg.nms)).nonzero()[:, 0]]
    mask = torch.zeros_like(flat).index_fill(0, kept, 1.0)
    scores = (flat * mask)[:-2].view(batch, count * classes)
    scores, index = scores.topk(cfg.max_per_img)
    boxes = boxes.expand(-1, -1, classes, -1).flatten(1, 2)
    return boxes.gather(1, index[..., None].expand(-1, -1, 4)), scores, index % classes


def _extract(extractor: nn.Module, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Return the features (B * N, C, side, side) of boxes (B, N, 4), each from the level of its size."""
    features = features[: extractor.num_inputs]
    image = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)[:, None, None]
    rois = torch.cat([image.expand(-1, boxes.shape[1], 1), boxes], -1).flatten(0, 1)
    level = None
    if len(features) > 1:
        sides = rois[:, 3:] - rois[:, 1:3]
        scale = sides.prod(-1).sqrt()
        level = (scale / extractor.finest_scale + 1e-6).log2().floor().clamp(0, len(features) - 1)
    total = 0
    for i, (feature, layer) in enumerate(zip(features, extractor.roi_layers, strict=True)):
        own = rois if level is None else rois * F.pad((level == i).to(rois)[:, None].expand(-1, 4), (1, 0), value=1.0)
        pooled = torchvision.ops.roi_align(
            feature, own, layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned
        )
        total = pooled if level is None else total + pooled * (level == i).to(pooled)[:, None, None, None]
    return total


class _AdaptivePool(nn.Module):
    """nn.AdaptiveAvgPool2d as two matrix products, which export at any size."""

    def __init__(self, output_size: Sequence[int]):
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.weights(*sizes, x) for sizes in zip(self.output_size, x.shape[2:], strict=True))
        return rows @ x @ columns.mT

    def weights(self, bins: int, size: int, x: Tensor) -> Tensor:
        """Return (bins, size): the share that each position has in each bin's mean."""
        i, position = torch.arange(bins, device=x.device)[:, None], torch.arange(size, device=x.device)
        start, stop = i * size // bins, ((i + 1) * size + bins - 1) // bins
        inside = ((position >= start) & (position < stop)).to(x)
        return inside / inside.sum(1, keepdim=True)


def _free_sizes(model: nn.Module) -> None:
    """Replace the modules that would fix their sizes as those traced with."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                size = child.output_size
                setattr(module, name, _AdaptivePool(size if isinstance(size, tuple | list) else (size, size)))
            elif type(child).__name__ == "Upsample" and not child.size:
                # mmseg's, which rounds sizes in Python
                mode = dict(mode=child.mode, align_corners=child.align_corners)
                setattr(module, name, nn.Upsample(scale_factor=child.scale_factor, **mode))


def flat(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return what a module gave as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def sample(module: nn.Module, size: Sequence[int]) -> Tensor:
    """Return images (B, 3, H, W) of noise, the same each time: of pixels where the module normalises them."""
    batch, *sides = size
    images = torch.randn(batch, in_channels(module), *sides, generator=torch.Generator().manual_seed(0))
    return (images * 60 + 120).clamp(0, 255) if hasattr(module, "preprocess") else images


@torch.no_grad()
def differences(module: nn.Module, run: Callable, images: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return how far the outputs of an exported module lie from its own, relative to their size.

    Of labels, the share that differs. Detections are compared with the nearest one of the same label, and those without
    one count among the labels; the last ones are left out where others of the same score may take their place.
    """
    expected, got = flat(module(images)), run(images)
    if [tuple(x.shape) for x in expected] != [tuple(x.shape) for x in got]:
        return dict.fromkeys(names, math.inf)
    if names[0] != "boxes":
        return {name: _difference(*pair) for name, *pair in zip(names, expected, got, strict=True)}
    errors = dict.fromkeys(names, 0.0)
    for (boxes, scores, labels, *masks), (other_boxes, other_scores, other_labels, *other_masks) in zip(
        zip(*expected, strict=True), zip(*got, strict=True), strict=True
    ):
        sure = (scores > scores[-1] + TOLERANCE if scores[-1] > 0 else scores > 0).nonzero()[:, 0]
        if not len(sure):
            continue
        distance = (boxes[sure, None] - other_boxes).abs().amax(-1) / max(images.shape[2:])
        distance, partner = (distance + (labels[sure, None] != other_labels)).min(1)
        found = distance < 10 * TOLERANCE
        pairs = {"labels": (~found).float().mean()[None], "boxes": distance[found]}
        sure, partner = sure[found], partner[found]
        pairs["scores"] = (scores[sure] - other_scores[partner]).abs()
        for mask, other in zip(masks, other_masks, strict=True):
            pairs["masks"] = (mask[sure] - other[partner]).abs().flatten(1).amax(1)
        for name, error in pairs.items():
            errors[name] = max([errors[name], *error.tolist()])
    return errors


def agree(errors: Mapping[str, float]) -> bool:
    """Return whether what `differences` found is no more than two runtimes differ."""
    return all(error < (LABELS_TOLERANCE if name == "labels" else TOLERANCE) for name, error in errors.items())


def _difference(expected: Tensor, got: Tensor) -> float:
    if not expected.is_floating_point():
        return (expected != got).float().mean().item()
    return ((expected - got).abs().max() / expected.abs().max()).item()
