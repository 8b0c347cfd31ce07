"""mmcv's operators without a compiler.

mmcv's Python layer takes its operators from a compiled module, `mmcv._ext`. Where that module is missing, or was built
for another torch and does not load, importing this one puts a replacement in its place, made of torchvision's and
torch's operators; best before mmdet or mmseg are imported, which warn otherwise. A compiled module that loads is left
alone.

On a GPU, ms_deform_attn runs the kernels of `densezoo.ops`, where `densezoo.ops.set_backend` does not say otherwise.

The functions below carry mmcv's names, arguments and semantics, those of its CUDA kernels, on every device; tensors
named output, grad_*, ious, dets, ... are written in place. They differ from mmcv's on purpose in these points:

- Half precision is computed in fp32 (nms, softnms, nms_match, bbox_overlaps, the focal losses,
  ms_deform_attn, max RoIAlign, RoIPool, CARAFE); average RoIAlign and the deformable convolutions run in half precision
  on a GPU, as mmcv's do, and in fp32 on a CPU. All take bfloat16 and float64 too.
- Where mmcv reads past the end of a tensor: a label without a class weight (background, ignored) has the weight 1 in
  the sigmoid focal loss, and a label equal to the number of classes has no softmax focal loss.
- An empty bin of max RoIAlign (a box without area) is 0, as it is in average RoIAlign.
- Equal scores keep the order of the boxes in nms and nms_match.

Every other operator of mmcv raises NotImplementedError when it is called.
"""

import ast
import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from densezoo.ops.backend import takes_triton
from densezoo.ops.deformable import unsupported as ms_deform_attn_unsupported

_REBUILD = (
    "build mmcv with its operators against this torch, which takes a C++ compiler and, for a GPU, the CUDA toolkit: "
    "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation --no-binary onedl-mmcv onedl-mmcv"
)
_TINY = torch.finfo(torch.float32).tiny  # mmcv takes logarithms no lower, in every dtype

_operators: dict[str, Callable] = {}


def install() -> ModuleType:
    """Make `mmcv._ext` importable and return it: mmcv's compiled module where it loads, otherwise the replacement.

    Parts of mmdet and mmseg that were imported without their operators get them now. Calling it again changes nothing.

    Raises:
        ImportError: mmcv itself does not import.
    """
    mmcv = importlib.import_module("mmcv")
    try:
        return importlib.import_module("mmcv._ext")
    except Exception as error:  # a library built for another torch fails in many ways
        if not (isinstance(error, ModuleNotFoundError) and error.name == "mmcv._ext"):
            warnings.warn(
                f"mmcv's compiled operators do not load with torch {torch.__version__} ({error}); those of densezoo "
                f"take their place. To use mmcv's, {_REBUILD}",
                stacklevel=2,
            )
    module = ModuleType("mmcv._ext", __doc__)
    # mmengine and mmcv look for the operators with importlib.util.find_spec and pkgutil.find_loader.
    module.__spec__ = ModuleSpec("mmcv._ext", __spec__.loader, origin=__file__)
    module.__file__ = __file__
    module.__getattr__ = _absent
    vars(module).update(_operators)
    sys.modules["mmcv._ext"] = mmcv._ext = module
    _repeat_failed_imports()
    return module


def _repeat_failed_imports() -> None:
    """Give the OpenMMLab modules that are here already what they failed to import from mmcv, for their stubs."""
    modules = [module for name, module in sys.modules.items() if name.startswith(("mmcv.", "mmdet.", "mmseg."))]
    stubs = {}
    for module in modules:
        source = Path(module.__file__).read_bytes() if getattr(module, "__file__", None) else b""
        guarded = b"except ImportError" in source or b"except ModuleNotFoundError" in source
        attempts = [node for node in ast.parse(source).body if isinstance(node, ast.Try)] if guarded else []
        for node in (node for attempt in attempts for node in attempt.body if isinstance(node, ast.ImportFrom)):
            if not node.level and node.module.split(".")[0] != "mmcv":
                continue
            # what this version of mmcv does not have keeps its stub
            with suppress(ImportError, AttributeError):
                origin = importlib.import_module("." * node.level + (node.module or ""), module.__package__)
                for alias in node.names:
                    name, operator = alias.asname or alias.name, getattr(origin, alias.name)
                    stub = vars(module).get(name)
                    if stub is not None and stub is not operator:
                        stubs[id(stub)] = stub, operator
                    setattr(module, name, operator)
    # a stub may have been imported from there
    for module in modules:
        for name, value in list(vars(module).items()):
            if id(value) in stubs:
                setattr(module, name, stubs[id(value)][1])


def _absent(name: str) -> Callable:
    """Stand for an operator that is not here: mmcv looks up every name at import, so only the call may fail."""
    if name.startswith("_"):
        raise AttributeError(f"module 'mmcv._ext' has no attribute {name!r}")

    def operator(*args, **kwargs):
        raise NotImplementedError(f"mmcv's operator {name!r} is not among those that densezoo supplies; {_REBUILD}")

    return operator


def _operator(function: Callable) -> Callable:
    """Enter `function` under its name in the replacement; like a compiled operator it ignores autograd and autocast."""

    @functools.wraps(function)
    def operator(*args, **kwargs):
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    _operators[function.__name__] = operator
    return operator


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors with those of half precision in fp32."""
    return [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in tensors]


def _native(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors in the dtypes of torchvision's kernels: fp16 on a GPU only, no bfloat16."""
    return [x if x.is_cuda and x.dtype == torch.float16 else _wide(x)[0] for x in tensors]


def _recomputed_grads(function: Callable, inputs: tuple[Tensor, ...], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Run `function` again on the inputs, widened, and return their gradients."""
    inputs = [x.detach().requires_grad_() for x in _wide(*inputs)]
    with torch.enable_grad():
        output = function(*inputs)
    return torch.autograd.grad(output, inputs, *_wide(grad_output))


def get_compiler_version() -> str:
    """Return what stands for mmcv's compiler in environment reports."""
    return f"none (operators of densezoo on torchvision {torchvision.__version__})"


def get_compiling_cuda_version() -> str:
    """Return what stands for mmcv's CUDA version in environment reports: torch's."""
    return torch.version.cuda or "not available"


_operators.update(get_compiler_version=get_compiler_version, get_compiling_cuda_version=get_compiling_cuda_version)


@_operator
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices (K,) of the boxes (N, 4) kept, by falling score; sides are x2 - x1 + offset."""
    boxes, scores = _wide(boxes, scores)
    # torchvision compares with a double threshold, mmcv with a float one.
    return torchvision.ops.nms(
        boxes + boxes.new_tensor([0, 0, offset, offset]), scores, float(np.float32(iou_threshold))
    )


@_operator
def softnms(
    boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float, min_score: float, method: int,
    offset: int,
) -> Tensor:  # fmt: skip
    """Soft-NMS (arXiv 1704.04503) with method 0 naive, 1 linear, 2 gaussian, on a CPU.

    Writes the kept boxes and their decayed scores into the first K rows of dets (N, 5) and returns their indices (K,).
    """
    boxes, scores = (x.detach().numpy() for x in _wide(boxes, scores))
    iou_threshold, sigma, min_score = (boxes.dtype.type(x) for x in (iou_threshold, sigma, min_score))
    lower, upper = boxes[:, :2], boxes[:, 2:] + boxes.dtype.type(offset)
    areas, scores = (upper - lower).prod(1), scores.copy()
    order, end = np.arange(len(boxes)), len(boxes)
    for i in range(len(boxes)):
        if i == end:
            break
        best = i + scores[order[i:end]].argmax()
        order[i], order[best] = order[best], order[i]
        rest = order[i + 1 : end]
        top = order[i]
        sides = np.minimum(upper[top], upper[rest]) - np.maximum(lower[top], lower[rest])
        intersection = sides.clip(min=0).prod(1)
        union = areas[top] + areas[rest] - intersection
        iou = np.divide(intersection, union, out=np.zeros_like(union), where=union != 0)
        if method == 2:
            scores[rest] *= np.exp(-(iou * iou) / sigma)
        else:
            scores[rest] *= np.where(iou >= iou_threshold, 1 - iou if method == 1 else 0, 1).astype(iou.dtype)
        # Boxes from the end fill the gaps, as in mmcv: the order decides between equal scores.
        kept = ~(scores[rest] < min_score)
        count = kept.sum()
        rest[:count][~kept[:count]] = rest[count:][kept[count:]][::-1]
        end = i + 1 + count
    kept = torch.from_numpy(order[:end].copy())
    dets[:end] = torch.from_numpy(np.concatenate([boxes, scores[:, None]], 1))[kept]
    return kept


@_operator
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Return for each box that NMS keeps, by falling score, its index and those of the boxes that it suppresses.

    Args:
        dets: Boxes and scores, (N, 5).
        iou_threshold: A box is suppressed at this IoU already, unlike in `nms`.
    """
    (dets,) = _wide(dets)
    rest = dets[:, 4].argsort(descending=True, stable=True)
    groups = []
    while rest.numel():
        matched = torchvision.ops.box_iou(dets[rest[:1], :4], dets[rest, :4])[0] >= iou_threshold
        matched[0] = True  # a box without area has no IoU with itself
        groups.append(rest[matched].tolist())
        rest = rest[~matched]
    return groups


@_operator
def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Write the overlaps of boxes (M, 4) and (N, 4), over the union (mode 0) or the first box (mode 1).

    `ious` is (M, N), or (M,) if aligned. Sides are x2 - x1 + offset.
    """
    (first, second), out = _wide(bboxes1, bboxes2), ious
    if not aligned:
        first = first[:, None]
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2]) + offset
    intersection = sides.clamp(min=0).prod(-1)
    base = (first[..., 2:] - first[..., :2] + offset).prod(-1)
    if mode == 0:
        base = base + (second[..., 2:] - second[..., :2] + offset).prod(-1) - intersection
    # Only mmcv's GPU kernel bounds the denominator.
    out.copy_(intersection / (base.clamp(min=offset) if base.is_cuda else base))


def _bilinear(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return flat indices and weights, both (4, ...), of RoIAlign's bilinear sampling at y and x in a map."""
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.long(), x.long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    y, x = y - top, x - left
    indices = torch.stack([top * width + left, top * width + right, bottom * width + left, bottom * width + right])
    return indices, torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x]) * inside


@_operator
def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, aligned_height: int,
    aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """RoIAlign (arXiv 1703.06870) of input (B, C, H, W) in rois (R, 5) into output (R, C, height, width).

    Args:
        pool_mode: 0 takes the greatest sample of a bin and writes where it was taken into argmax_y and argmax_x (-1
            for an empty bin); 1 averages.
        aligned: Shift the boxes by half a pixel; otherwise they are at least one pixel wide and high.
    """
    size = (aligned_height, aligned_width)
    if pool_mode == 1:
        (input,) = _native(input)
        rois = rois.to(input.dtype)
        output.copy_(torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))
        return
    (input,), height, width = _wide(input), *input.shape[2:]
    boxes = rois[:, 1:].flip(1).to("cpu", input.dtype) * spatial_scale - (0.5 if aligned else 0)  # y2, x2, y1, x1
    start, sides = boxes[:, 2:], boxes[:, :2] - boxes[:, 2:]
    bins = (sides if aligned else sides.clamp(min=1)) / boxes.new_tensor(size)
    counts = torch.full_like(bins, sampling_ratio) if sampling_ratio > 0 else bins.ceil().clamp(min=0)
    for out, empty in (output, 0), (argmax_y, -1), (argmax_x, -1):
        out.fill_(empty)
    for n, image in enumerate(rois[:, 0].tolist()):
        y, x = (
            start[n, i]
            + torch.arange(side)[:, None] * bins[n, i]
            + (torch.arange(count).to(bins) + 0.5) * bins[n, i] / count
            for i, (side, count) in enumerate(zip(size, counts[n].int().tolist(), strict=True))
        )
        y, x = torch.broadcast_tensors(y[:, None, :, None], x[None, :, None, :])
        if not y.numel():
            continue
        y, x = y.flatten(2).to(input.device), x.flatten(2).to(input.device)  # (height, width, samples)
        features = input[int(image)].flatten(1)
        samples = sum(features[:, i] * w for i, w in zip(*_bilinear(y, x, height, width), strict=True))
        best = samples.argmax(-1, keepdim=True)
        for out, value in (output, samples), (argmax_y, y.expand_as(samples)), (argmax_x, x.expand_as(samples)):
            out[n] = value.gather(-1, best).squeeze(-1)


@_operator
def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, aligned_height: int,
    aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """Add the gradient of `roi_align_forward` to grad_input (B, C, H, W)."""
    _, channels, height, width = grad_input.shape
    if pool_mode == 1:
        (grad,) = _native(grad_output)
        rois = rois.to(grad.dtype)
        grad_input += torch.ops.torchvision._roi_align_backward(
            grad, rois, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned
        )
        return
    grad, y, x = _wide(grad_output, argmax_y, argmax_x)
    indices, weights = _bilinear(y, x, height, width)
    planes = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)  # (R, C)
    indices += planes[:, :, None, None] * height * width
    grad = grad * weights * (y != -1)
    total = grad.new_zeros(grad_input.numel()).index_add_(0, indices.flatten(), grad.flatten())
    grad_input += total.view_as(grad_input)


@_operator
def roi_pool_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax: Tensor, pooled_height: int, pooled_width: int,
    spatial_scale: float,
) -> None:  # fmt: skip
    """RoIPool (arXiv 1504.08083) of input (B, C, H, W) in rois (R, 5) into output and argmax (R, C, height, width).

    Unlike torchvision's it keeps the fractions of the scaled corners. argmax is the flat index in the map, -1 for an
    empty bin. A box without area writes nothing.
    """
    (input,), size = _wide(input), input.shape[-1:-3:-1]
    boxes = _wide(rois)[0].cpu()
    start, end = boxes[:, 1:3] * spatial_scale, (boxes[:, 3:5] + 1) * spatial_scale
    edges = []  # of the columns, then the rows: (R, pooled, 2)
    for i, pooled in enumerate((pooled_width, pooled_height)):
        bins, steps = (end - start)[:, i, None] / pooled, torch.arange(pooled)
        low, high = (steps * bins + start[:, i, None]).floor(), ((steps + 1) * bins + start[:, i, None]).ceil()
        edges.append(torch.stack([low, high], -1).clamp(0, size[i]).long().tolist())
    for n in (end > start).all(1).nonzero().flatten().tolist():
        features = input[int(boxes[n, 0])]
        values, x = (torch.stack(z, -1) for z in zip(*(_peak(features, *edge) for edge in edges[0][n]), strict=True))
        for row, edge in enumerate(edges[1][n]):
            value, y = _peak(values.transpose(1, 2), *edge)  # (C, width)
            left = x.gather(1, y.clamp(min=0)[:, None]).squeeze(1)
            output[n, :, row] = value
            argmax[n, :, row] = torch.where((y < 0) | (left < 0), -1, y * size[0] + left)


def _peak(x: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Return the maximum along the last dimension from start to end and its first place; 0 and -1 if end <= start."""
    if end <= start:
        return x.new_zeros(x.shape[:-1]), x.new_full(x.shape[:-1], -1, dtype=torch.long)
    value, index = x[..., start:end].max(-1)
    return value, index + start


@_operator
def roi_pool_backward(
    grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor, pooled_height: int, pooled_width: int,
    spatial_scale: float,
) -> None:  # fmt: skip
    """Add the gradient of `roi_pool_forward` to grad_input (B, C, H, W)."""
    (grad,) = _native(grad_output)
    rois = rois.to(grad.dtype)
    grad_input += torch.ops.torchvision._roi_pool_backward(
        grad, rois, argmax, spatial_scale, pooled_height, pooled_width, *grad_input.shape
    )


@_operator
def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, kW: int, kH: int,
    dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int, group: int, deformable_group: int,
    im2col_step: int,
) -> None:  # fmt: skip
    """Deformable convolution (arXiv 1703.06211) of input (B, C, H, W) into output; im2col_step has no effect."""
    x, w, o = _native(input, weight, offset)
    output.copy_(torchvision.ops.deform_conv2d(x, o, w, None, (dH, dW), (padH, padW), (dilationH, dilationW)))


@_operator
def deform_conv_backward_input(
    input: Tensor, offset: Tensor, gradOutput: Tensor, gradInput: Tensor, gradOffset: Tensor, weight: Tensor,
    columns: Tensor, kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """Add the gradient of `deform_conv_forward` to gradInput and write that of the offsets."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _deform_conv_grads(gradOutput, input, weight, offset, None, geometry)
    gradInput += grads[0]
    gradOffset.copy_(grads[2])


@_operator
def deform_conv_backward_parameters(
    input: Tensor, offset: Tensor, gradOutput: Tensor, gradWeight: Tensor, columns: Tensor, ones: Tensor, kW: int,
    kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int, group: int, deformable_group: int,
    scale: float, im2col_step: int,
) -> None:  # fmt: skip
    """Add scale times the gradient of `deform_conv_forward` to gradWeight."""
    # torchvision computes all gradients at once, from a weight that this one does not depend on.
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    gradWeight.add_(_deform_conv_grads(gradOutput, input, gradWeight, offset, None, geometry)[1], alpha=scale)


def _deform_conv_grads(
    grad: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, geometry: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Return the gradients of input, weight, offset, mask and bias.

    Args:
        geometry: Stride, padding and dilation, height before width, then groups and deformable groups.
    """
    modulated, mask = mask is not None, offset.new_zeros(len(input), 1) if mask is None else mask
    grad, input, weight, offset, mask = _native(grad, input, weight, offset, mask)
    bias = weight.new_zeros(len(weight))
    return torch.ops.torchvision._deform_conv2d_backward(grad, input, weight, offset, mask, bias, *geometry, modulated)


def _first_numbers(x: Tensor, output: Tensor) -> Tensor:
    """Return a view of each image's first numbers in memory, as a map of the output's size.

    mmcv's modulated kernels read larger offsets and masks so, on which mmdet's DyHead relies.
    """
    channels, size = x.shape[1], output.shape[2:]
    return x.flatten(1)[:, : channels * size.numel()].unflatten(1, (channels, *size))


@_operator
def modulated_deform_conv_forward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor, output: Tensor,
    columns: Tensor, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
    dilation_h: int, dilation_w: int, group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """Modulated deformable convolution (arXiv 1811.11168) of input (B, C, H, W) into output."""
    x, w, b, o, m = _native(input, weight, bias, _first_numbers(offset, output), _first_numbers(mask, output))
    geometry = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    output.copy_(torchvision.ops.deform_conv2d(x, o, w, b if with_bias else None, *geometry, m))


@_operator
def modulated_deform_conv_backward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor, columns: Tensor,
    grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor, grad_offset: Tensor, grad_mask: Tensor,
    grad_output: Tensor, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
    dilation_h: int, dilation_w: int, group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """Add the gradients of `modulated_deform_conv_forward` to those given; write those of offset and mask."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    first = (_first_numbers(x, grad_output) for x in (offset, mask))
    grads = _deform_conv_grads(grad_output, input, weight, *first, geometry)
    grad_input += grads[0]
    grad_weight += grads[1]
    for x, grad in ((grad_offset, grads[2]), (grad_mask, grads[3])):
        x.zero_()
        _first_numbers(x, grad_output).copy_(grad)
    if with_bias:
        grad_bias += grads[4]


def _check_labels(target: Tensor, num_classes: int) -> None:
    if target.numel() and (label := target.max().item()) > num_classes:
        raise ValueError(f"target: got label {label}, expected at most num_classes = {num_classes} (background)")


def _label_weights(target: Tensor, weight: Tensor) -> Tensor:
    """Return the class weight of each label (N,), and 1 for a label that has none."""
    known = (target >= 0) & (target < len(weight))
    return torch.where(known, weight[target.clamp(0, len(weight) - 1)], 1)


def _sigmoid_focal_terms(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return p and log(p) of each logit, 1 - p and log(1 - p), and whether the logit is its row's label, all (N, C)."""
    (input,) = _wide(input)
    p = input.sigmoid()
    positive = torch.arange(input.shape[1], device=input.device) == target[:, None]
    return p, p.clamp(min=_TINY).log(), 1 - p, (1 - p).clamp(min=_TINY).log(), positive


@_operator
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (arXiv 1708.02002) of logits (N, C) into output (N, C).

    Args:
        target: Labels (N,); C and negative labels are background.
        weight: A factor for the rows of each label, (C,), or empty.
    """
    _check_labels(target, input.shape[1])
    p, log_p, q, log_q, positive = _sigmoid_focal_terms(input, target)
    loss = -torch.where(positive, alpha * q**gamma * log_p, (1 - alpha) * p**gamma * log_q)
    output.copy_(loss * _label_weights(target, weight)[:, None] if weight.numel() else loss)


@_operator
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each loss of `sigmoid_focal_loss_forward` with respect to its logit."""
    p, log_p, q, log_q, positive = _sigmoid_focal_terms(input, target)
    grad = -torch.where(
        positive, alpha * q**gamma * (q - gamma * p * log_p), (1 - alpha) * p**gamma * (gamma * q * log_q - p)
    )
    grad_input.copy_(grad * _label_weights(target, weight)[:, None] if weight.numel() else grad)


def _softmax_focal_terms(softmax: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the probability of each row's label and the factor of its loss, 0 where there is no such class; (N,)."""
    known = (target >= 0) & (target < softmax.shape[1])
    p = softmax.gather(1, target.clamp(0, softmax.shape[1] - 1)[:, None]).squeeze(1)
    factor = alpha * known
    return p, factor * _label_weights(target, weight) if weight.numel() else factor


@_operator
def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of softmax probabilities (N, C) and labels (N,), negative where ignored, into output (N,).

    Args:
        weight: A factor for the rows of each label, (C,), or empty.
    """
    _check_labels(target, input.shape[1])
    p, factor = _softmax_focal_terms(*_wide(input), target, weight, alpha)
    output.copy_(-factor * (1 - p) ** gamma * p.clamp(min=_TINY).log())


@_operator
def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivatives of the losses of `softmax_focal_loss_forward` with respect to the logits, (N, C)."""
    (softmax,) = _wide(input)
    p, factor = _softmax_focal_terms(softmax, target, weight, alpha)
    q = 1 - p
    # The bound keeps gamma < 1 finite where p is 1.
    slope = gamma * q.clamp(min=_TINY) ** (gamma - 1) * p * p.clamp(min=_TINY).log()
    buff.copy_(factor * (slope - q**gamma))
    positive = torch.arange(softmax.shape[1], device=softmax.device) == target[:, None]
    grad_input.copy_((factor * (slope - q**gamma))[:, None] * (positive.to(softmax.dtype) - softmax))


def _sample_level(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention within one level.

    Args:
        value: (B, heads, dim, H, W).
        locations: x and y in units of the map, (B, Q, heads, points, 2).
        weights: (B, Q, heads, points).

    Returns:
        Tensor: (B, Q, heads * dim).
    """
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    samples = F.grid_sample(value.flatten(0, 1), grid, padding_mode="zeros", align_corners=False)
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]
    return (samples * weights).sum(-1).unflatten(0, value.shape[:2]).flatten(1, 2).transpose(1, 2)


def _levels(value: Tensor, shapes: Tensor, starts: Tensor) -> list[tuple[slice, Tensor]]:
    """Return where each level lies in value (B, keys, heads, dim) and the level as (B, heads, dim, H, W)."""
    levels = [(slice(start, start + h * w), h) for (h, w), start in zip(shapes.tolist(), starts.tolist(), strict=True)]
    return [(part, _wide(value[:, part])[0].permute(0, 2, 3, 1).unflatten(-1, (h, -1))) for part, h in levels]


@_operator
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159), one level after the other; im2col_step has no effect.

    Args:
        value: (B, keys, heads, dim).
        value_spatial_shapes: Height and width of each level, (levels, 2).
        value_level_start_index: First key of each level, (levels,).
        sampling_locations: x and y in units of the level, (B, Q, heads, levels, points, 2).
        attention_weights: (B, Q, heads, levels, points).

    Returns:
        Tensor: (B, Q, heads * dim), in the dtype of value.
    """
    args = value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
    if takes_triton("ms_deform_attn", value, ms_deform_attn_unsupported, value, sampling_locations, attention_weights):
        from densezoo.ops.deformable.kernels import ms_deform_attn_triton

        return ms_deform_attn_triton(*args)
    locations, weights = _wide(sampling_locations, attention_weights)
    levels = _levels(value, value_spatial_shapes, value_level_start_index)
    output = sum(_sample_level(x, locations[:, :, :, i], weights[:, :, :, i]) for i, (_, x) in enumerate(levels))
    return output.to(value.dtype).contiguous()


@_operator
def ms_deform_attn_backward(
    value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor, sampling_locations: Tensor,
    attention_weights: Tensor, grad_output: Tensor, grad_value: Tensor, grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor, im2col_step: int,
) -> None:  # fmt: skip
    """Add the gradients of `ms_deform_attn_forward` to those given, recomputing one level at a time."""
    args = value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
    if takes_triton("ms_deform_attn", value, ms_deform_attn_unsupported, value, sampling_locations, attention_weights):
        from densezoo.ops.deformable.kernels import ms_deform_attn_triton_backward

        grads = ms_deform_attn_triton_backward(grad_output, *args)
        for total, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
            total += grad
        return
    locations, weights = _wide(sampling_locations, attention_weights)
    for i, (part, x) in enumerate(_levels(value, value_spatial_shapes, value_level_start_index)):
        grads = _recomputed_grads(_sample_level, (x, locations[:, :, :, i], weights[:, :, :, i]), grad_output)
        grad_value[:, part] += grads[0].flatten(3).permute(0, 3, 1, 2)
        grad_sampling_loc[:, :, :, i] += grads[1]
        grad_attn_weight[:, :, :, i] += grads[2]


@_operator
def masked_im2col_forward(
    im: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, col: Tensor, kernel_h: int, kernel_w: int, pad_h: int,
    pad_w: int,
) -> None:  # fmt: skip
    """Write the windows of im (1, C, H, W) at M places into col (C * kernel_h * kernel_w, M)."""
    padded = F.pad(im[0], (pad_w, kernel_w, pad_h, kernel_h))
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, rows, columns].flatten(0, 2))


@_operator
def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Write col (C, M) to M places of im (1, C, H, W)."""
    im[0][:, mask_h_idx, mask_w_idx] = col


def _reassemble(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    (batch, channels, height, width), k, scale = features.shape, kernel_size, scale_factor
    x = F.pad(features, [k // 2] * 4).reshape(batch, group_size, -1, height + k - 1, 1, width + k - 1, 1)
    masks = masks.reshape(batch, group_size, k * k, 1, height, scale, width, scale)
    taps = (x[:, :, :, i : i + height, :, j : j + width] * masks[:, :, i * k + j] for i in range(k) for j in range(k))
    return sum(taps).view(batch, channels, height * scale, width * scale)


@_operator
def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """CARAFE (arXiv 1905.02188): reassemble features (B, C, H, W) into output (B, C, H * scale, W * scale).

    Args:
        masks: The kernel of each output pixel, (B, groups * kernel_size**2, H * scale, W * scale).
    """
    output.copy_(_reassemble(*_wide(features, masks), kernel_size, group_size, scale_factor))


@_operator
def carafe_naive_backward(
    top_grad: Tensor, features: Tensor, masks: Tensor, bottom_grad: Tensor, mask_grad: Tensor, kernel_size: int,
    group_size: int, scale_factor: int,
) -> None:  # fmt: skip
    """Add the gradients of `carafe_naive_forward` to those given."""
    reassemble = functools.partial(
        _reassemble, kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor
    )
    grads = _recomputed_grads(reassemble, (features, masks), top_grad)
    bottom_grad += grads[0]
    mask_grad += grads[1]


@_operator
def carafe_forward(
    features: Tensor, masks: Tensor, rfeatures: Tensor, routput: Tensor, rmasks: Tensor, output: Tensor,
    kernel_size: int, group_size: int, scale_factor: int,
) -> None:  # fmt: skip
    """`carafe_naive_forward`, which also leaves the features in rfeatures for `carafe_backward`."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


@_operator
def carafe_backward(
    top_grad: Tensor, rfeatures: Tensor, masks: Tensor, rtop_grad: Tensor, rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor, rmask_grad: Tensor, bottom_grad: Tensor, mask_grad: Tensor, kernel_size: int,
    group_size: int, scale_factor: int,
) -> None:  # fmt: skip
    """Add the gradients of `carafe_forward` to those given."""
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def _psa_places(
    device: torch.device, h_feature: int, w_feature: int, h_mask: int, w_mask: int, half_h_mask: int, half_w_mask: int
) -> tuple[Tensor, Tensor]:
    """Return for pixels q and p, (HW, HW), the channel of p's mask that lies on q, and whether there is one."""
    rows, columns = (torch.arange(size, device=device) for size in (h_feature, w_feature))
    y = rows[:, None] - rows + half_h_mask  # (H of q, H of p)
    x = columns[:, None] - columns + half_w_mask
    inside = ((y >= 0) & (y < h_mask))[:, None, :, None] & ((x >= 0) & (x < w_mask))[None, :, None, :]
    channel = y[:, None, :, None] * w_mask + x[None, :, None, :]
    pixels = h_feature * w_feature
    return channel.where(inside, 0).view(pixels, pixels), inside.view(pixels, pixels)


@_operator
def psamask_forward(
    input: Tensor, output: Tensor, psa_type: int, num_: int, h_feature: int, w_feature: int, h_mask: int, w_mask: int,
    half_h_mask: int, half_w_mask: int,
) -> None:  # fmt: skip
    """Point-wise spatial attention (PSANet, ECCV 2018): lay each pixel's mask over the map around it.

    Args:
        input: The masks, (B, h_mask * w_mask, H, W).
        output: (B, H * W, H, W), zero beforehand.
        psa_type: 0 collects, output[:, q, p] is p's mask at q; 1 distributes, output[:, p, q] is.
    """
    channel, inside = _psa_places(input.device, h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask)
    laid = input.flatten(2).gather(1, channel.expand(num_, -1, -1)) * inside
    output.copy_((laid if psa_type == 0 else laid.transpose(1, 2)).reshape(output.shape))


@_operator
def psamask_backward(
    grad_output: Tensor, grad_input: Tensor, psa_type: int, num_: int, h_feature: int, w_feature: int, h_mask: int,
    w_mask: int, half_h_mask: int, half_w_mask: int,
) -> None:  # fmt: skip
    """Write the gradient of `psamask_forward` to grad_input."""
    channel, inside = _psa_places(grad_input.device, h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask)
    grad = grad_output.flatten(2)
    grad = (grad if psa_type == 0 else grad.transpose(1, 2)) * inside
    total = torch.zeros_like(grad_input).flatten(2).scatter_add_(1, channel.expand(num_, -1, -1), grad)
    grad_input.copy_(total.view_as(grad_input))


@_operator
def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Write the mean (C,) of input (B, C, N)."""
    mean.copy_(input.float().mean((0, 2)))


@_operator
def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Write the biased variance (C,) of input (B, C, N) about mean."""
    var.copy_((input.float() - mean[:, None]).square().mean((0, 2)))


@_operator
def sync_bn_forward_output(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, norm: Tensor, std: Tensor, output: Tensor, eps: float, momentum: float,
    group_size: int,
) -> None:  # fmt: skip
    """Normalise input (B, C, N) into norm, std and output, and update the running statistics, if any."""
    std.copy_((var + eps).sqrt())
    norm.copy_((input.float() - mean[:, None]) / std[:, None])
    output.copy_(norm * weight[:, None] + bias[:, None])
    if running_mean is not None:
        count = input.shape[0] * input.shape[2] * group_size
        running_mean += momentum * (mean - running_mean)
        running_var += momentum * (var * count / max(count - 1, 1) - running_var)


@_operator
def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Write the gradients (C,) of weight and bias from those of the output, (B, C, N)."""
    grad = grad_output.float()
    grad_weight.copy_((grad * norm).sum((0, 2)))
    grad_bias.copy_(grad.sum((0, 2)))


@_operator
def sync_bn_backward_data(
    grad_output: Tensor, weight: Tensor, grad_weight: Tensor, grad_bias: Tensor, norm: Tensor, std: Tensor,
    grad_input: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of the input (B, C, N) from that of the output."""
    shift = (norm * grad_weight[:, None] + grad_bias[:, None]) / (norm.shape[0] * norm.shape[2])
    grad_input.copy_((grad_output.float() - shift) * (weight / std)[:, None])


install()
