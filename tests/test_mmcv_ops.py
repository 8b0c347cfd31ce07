"""mmcv's operators against definitions written out here, through mmcv's own Python layer."""

import copy
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

pytest.importorskip("mmdet")

from densezoo import mmcv_ops, openmmlab  # noqa: F401  # isort: skip  (before mmcv.ops)

if mmcv_ops.install().__file__ != mmcv_ops.__file__:
    pytest.skip("mmcv's own operators are compiled here", allow_module_level=True)

import mmcv.ops
import mmcv.ops.multi_scale_deform_attn as msda
import mmdet
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope

register_all_modules(init_default_scope=False)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def random_boxes(count, size=32.0, dtype=torch.float32):
    corners = torch.rand(count, 2, 2, dtype=dtype) * size
    return torch.cat([corners.amin(1), corners.amax(1) + 1], 1)


def overlap(a, b, offset=0, mode="iou"):
    """IoU of two boxes in Python floats."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return width * height / (areas[0] if mode == "iof" else sum(areas) - width * height)


# The module itself


def run_python(code, *args):
    result = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_broken_extension_falls_back_and_import_stays_light(tmp_path):
    (tmp_path / "_ext.py").write_text("raise ImportError('undefined symbol: _ZN3c104impl')")
    code = """
import sys, warnings
import densezoo
assert not {"mmcv", "mmengine", "mmdet", "mmseg", "densezoo.mmcv_ops"} & set(sys.modules)
import mmcv
mmcv.__path__.append(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import densezoo.mmcv_ops
assert not {"mmcv.ops", "mmdet", "mmseg"} & set(sys.modules)
message, = [str(w.message) for w in caught if "densezoo" in str(w.message)]
assert "undefined symbol" in message and "--no-build-isolation" in message
import mmcv.ops, torch
print(mmcv.ops.nms(torch.tensor([[0., 0, 9, 9], [0, 0, 8, 9], [20, 20, 30, 30]]), torch.tensor([.5, .9, .1]), .5)[1])
"""
    assert run_python(code, tmp_path).strip() == "tensor([1, 2])"


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """Take the replacement away and return where a compiled module would lie."""
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setattr(mmcv, "_ext", None)
    monkeypatch.setattr(mmcv, "__path__", [*mmcv.__path__, str(tmp_path)])
    return tmp_path / "_ext.py"


def test_missing_extension_is_replaced_silently(extension, recwarn):
    module = mmcv_ops.install()
    assert sys.modules["mmcv._ext"] is mmcv._ext is module is mmcv_ops.install()
    assert not recwarn.list


def test_working_extension_wins(extension):
    extension.write_text("def nms(): return 'compiled'")
    module = mmcv_ops.install()
    assert module.nms() == "compiled" and not hasattr(module, "softnms")
    assert mmcv_ops.install() is module


@pytest.mark.parametrize(
    "error", ["ImportError('undefined symbol')", "RuntimeError('wrong torch')", "OSError('libc10')"]
)
def test_any_failure_of_the_extension_is_reported(extension, error):
    extension.write_text(f"raise {error}")
    with pytest.warns(UserWarning, match=error.split("'")[1]):
        assert mmcv_ops.install().__file__ == mmcv_ops.__file__


def test_extension_that_lacks_its_own_dependency_is_broken(extension):
    extension.write_text("import no_such_module")
    with pytest.warns(UserWarning, match="no_such_module"):
        mmcv_ops.install()


def test_openmmlab_may_be_imported_first():
    """Modules that have put stubs for operators, and those whose import failed, work after the replacement is there."""
    code = """
import contextlib, inspect, sys
import numpy as np
from mmdet.structures.mask import BitmapMasks
stubs = sys.modules["mmdet.structures.mask.structures"], "roi_align"
with contextlib.suppress(ImportError):
    import mmdet.models
with contextlib.suppress(ImportError):
    import mmseg.models
assert "mmcv.ops" not in sys.modules and "mmdet.models.layers.bbox_nms" in sys.modules
before = getattr(*stubs)
import densezoo.mmcv_ops
assert densezoo.mmcv_ops.install().__file__ == densezoo.mmcv_ops.__file__
import mmcv.ops, mmdet.models, mmseg.models
from mmdet.models.layers import bbox_nms
from mmcv.cnn.bricks import transformer
assert before is not mmcv.ops.roi_align is getattr(*stubs)
assert bbox_nms.batched_nms is mmcv.ops.batched_nms
assert transformer.MultiScaleDeformableAttention is mmcv.ops.MultiScaleDeformableAttention
stubs = []
for name, module in list(sys.modules.items()):
    for key, value in vars(module).items() if name.startswith(("mmdet.", "mmseg.")) else ():
        if key[0] != "_" and key in vars(mmcv.ops) and (
            value is None or inspect.isroutine(value) | inspect.isclass(value) and "onedl-" in inspect.getsource(value)
        ):
            stubs.append((name, key))
assert not stubs, stubs
masks = BitmapMasks(np.ones((1, 8, 8), np.uint8), 8, 8)
print(masks.crop_and_resize(np.array([[0., 0, 4, 4]]), (2, 2), np.array([0])).masks.sum())
"""
    assert run_python(code).splitlines()[-1] == "4"


def test_absent_operator_raises_when_called():
    with pytest.raises(NotImplementedError, match="'nms_rotated'.*--no-build-isolation"):
        mmcv.ops.nms_rotated(torch.rand(3, 5), torch.rand(3), 0.5)
    with pytest.raises(NotImplementedError, match="'box_iou_rotated'"):
        mmcv.ops.box_iou_rotated(torch.rand(3, 5), torch.rand(3, 5))
    assert not hasattr(mmcv._ext, "_private") and not hasattr(mmcv._ext, "__path__")


def test_environment_reports():
    from mmcv.utils.env import collect_env as mmcv_env
    from mmcv.utils.ext_loader import check_ops_exist
    from mmdet.utils import collect_env as mmdet_env
    from mmengine.utils.dl_utils import mmcv_full_available

    assert "densezoo" in mmcv_env()["MMCV Compiler"]
    assert mmcv_env()["MMCV CUDA Compiler"] == mmcv.ops.get_compiling_cuda_version()
    assert "MMDetection" in mmdet_env()
    assert mmcv_full_available()
    # It calls pkgutil.find_loader, which Python 3.14 does not have.
    if sys.version_info < (3, 14):
        assert check_ops_exist()


# Boxes


def brute_nms(boxes, scores, threshold, offset):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(overlap(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nms(device, dtype, offset):
    boxes, scores = random_boxes(80).to(dtype), torch.rand(80).to(dtype)
    scores = torch.linspace(0.1, 0.9, 80)[torch.randperm(80)].to(dtype)
    dets, kept = mmcv.ops.nms(boxes.to(device), scores.to(device), 0.3, offset)
    expected = brute_nms(boxes.tolist(), scores.tolist(), 0.3, offset)
    assert kept.dtype == torch.long and kept.tolist() == expected and 5 < len(expected) < 70
    assert dets.dtype == dtype and torch.equal(dets.cpu(), torch.cat([boxes, scores[:, None]], 1)[expected])

    _, kept = mmcv.ops.nms(boxes.to(device), scores.to(device), 0.3, offset, score_threshold=0.5, max_num=4)
    above = (scores > 0.5).nonzero().flatten().tolist()
    again = brute_nms([boxes[i].tolist() for i in above], [scores[i].item() for i in above], 0.3, offset)
    assert kept.tolist() == [above[i] for i in again][:4]


def test_nms_compares_in_single_precision(device):
    # The IoU is the float nearest to 0.3, which is above 0.3.
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]], device=device)
    assert len(mmcv.ops.nms(boxes, torch.tensor([0.9, 0.8], device=device), 0.3)[1]) == 2
    assert len(mmcv.ops.nms(boxes, torch.tensor([0.9, 0.8], device=device), 0.29)[1]) == 1


def test_nms_of_numpy_arrays_and_of_nothing(device):
    dets, kept = mmcv.ops.nms(random_boxes(5).numpy(), np.random.rand(5).astype(np.float32), 0.5)
    assert isinstance(dets, np.ndarray) and dets.shape == (len(kept), 5)
    dets, kept = mmcv.ops.nms(torch.empty(0, 4, device=device), torch.empty(0, device=device), 0.5)
    assert dets.shape == (0, 5) and kept.shape == (0,) and kept.dtype == torch.long


@pytest.mark.parametrize("config", [dict(type="nms"), dict(type="nms", split_thr=10), dict(type="soft_nms")])
def test_batched_nms_separates_classes(device, config):
    boxes, scores, classes = random_boxes(60), torch.rand(60), torch.randint(3, (60,))
    dets, kept = mmcv.ops.batched_nms(
        boxes.to(device), scores.to(device), classes.to(device), dict(config, iou_threshold=0.3)
    )
    if config["type"] == "nms":
        expected = []
        for i in range(3):
            members = (classes == i).nonzero().flatten()
            picked = brute_nms(boxes[members].tolist(), scores[members].tolist(), 0.3, 0)
            expected += members[picked].tolist()
        assert sorted(kept.tolist()) == sorted(expected)
        assert torch.equal(dets[:, 4].cpu(), scores[kept.cpu()])
    assert torch.equal(dets[:, :4].cpu(), boxes[kept.cpu()])
    assert (dets[:-1, 4] >= dets[1:, 4]).all()


def brute_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    """Soft-NMS over the list of the boxes that remain, whose order decides ties as in mmcv."""
    scores, left, kept = list(scores), list(range(len(boxes))), []
    while left:
        # The best takes the first place, and the first its place.
        best = max(range(len(left)), key=lambda i: (scores[left[i]], -i))
        left[0], left[best] = left[best], left[0]
        top = left.pop(0)
        kept.append((top, scores[top]))
        i = 0
        while i < len(left):
            iou = overlap(boxes[top], boxes[left[i]], offset)
            decay = {
                "naive": 0.0 if iou >= threshold else 1.0,
                "linear": 1 - iou if iou >= threshold else 1.0,
                "gaussian": math.exp(-iou * iou / sigma),
            }[method]
            scores[left[i]] *= decay
            if scores[left[i]] < min_score:
                last = left.pop()
                if i < len(left):
                    left[i] = last
            else:
                i += 1
    return kept


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("offset", [0, 1])
def test_soft_nms(device, method, offset):
    boxes = random_boxes(60)
    scores = torch.randint(1, 8, (60,)) / 8  # with ties
    dets, kept = mmcv.ops.soft_nms(
        boxes.to(device), scores.to(device), 0.3, sigma=0.5, min_score=0.1, method=method, offset=offset
    )
    expected = brute_soft_nms(boxes.tolist(), scores.tolist(), 0.3, 0.5, 0.1, method, offset)
    assert kept.tolist() == [i for i, _ in expected] and 5 < len(expected) < 60
    assert torch.equal(dets[:, :4].cpu(), boxes[kept.cpu()])
    torch.testing.assert_close(dets[:, 4].cpu(), torch.tensor([score for _, score in expected]))


def test_soft_nms_leaves_its_arguments_and_takes_nothing():
    boxes, scores = random_boxes(20).requires_grad_(), torch.rand(20)
    before = boxes.clone(), scores.clone()
    dets, _ = mmcv.ops.soft_nms(boxes, scores, 0.1, min_score=0.5)
    assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])
    assert dets[0, 4] == scores.max() and (dets[1:, 4] >= 0.5).all()
    dets, kept = mmcv.ops.soft_nms(torch.empty(0, 4), torch.empty(0))
    assert dets.shape == (0, 5) and kept.shape == (0,)
    half = mmcv.ops.soft_nms(before[0].half(), scores.half(), 0.1, min_score=0.5)
    assert half[0].dtype == torch.float16 and torch.equal(half[0][0, :4], before[0].half()[scores.half().argmax()])


def test_nms_match(device):
    boxes, scores = random_boxes(40), torch.rand(40)
    groups = mmcv.ops.nms_match(torch.cat([boxes, scores[:, None]], 1).to(device), 0.3)
    left, expected = scores.argsort(descending=True).tolist(), []
    while left:
        group = [i for i in left if i == left[0] or overlap(boxes[left[0]].tolist(), boxes[i].tolist()) >= 0.3]
        expected.append(group)
        left = [i for i in left if i not in group]
    assert [group.tolist() for group in groups] == expected and 1 < len(expected) < 40
    assert all(group.dtype == torch.long for group in groups)
    assert mmcv.ops.nms_match(torch.empty(0, 5, device=device), 0.3) == []


def test_nms_match_groups_at_the_threshold():
    boxes = torch.tensor([[0.0, 0, 10, 1, 0.9], [0, 0, 7, 1, 0.8], [5, 5, 5, 5, 0.7]])
    assert [group.tolist() for group in mmcv.ops.nms_match(boxes, 0.7)] == [[0, 1], [2]]


@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bbox_overlaps(device, mode, offset, dtype):
    first, second = random_boxes(7).to(dtype), random_boxes(5).to(dtype)
    expected = torch.tensor([[overlap(a, b, offset, mode) for b in second.tolist()] for a in first.tolist()])
    tolerance = dict(rtol=1e-3, atol=1e-3) if dtype == torch.float16 else {}
    ious = mmcv.ops.bbox_overlaps(first.to(device), second.to(device), mode, offset=offset)
    torch.testing.assert_close(ious.cpu(), expected.to(dtype), **tolerance)
    ious = mmcv.ops.bbox_overlaps(first[:5].to(device), second.to(device), mode, aligned=True, offset=offset)
    torch.testing.assert_close(ious.cpu(), expected.diagonal().to(dtype), **tolerance)


def test_bbox_overlaps_of_nothing(device):
    boxes, nothing = random_boxes(3).to(device), torch.empty(0, 4, device=device)
    assert mmcv.ops.bbox_overlaps(boxes, nothing).shape == (3, 0)
    assert mmcv.ops.bbox_overlaps(nothing, nothing, aligned=True).shape == (0,)


# Regions of interest


def bilinear(image, y, x):
    """RoIAlign's sample of an (H, W) image."""
    height, width = image.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    y, x = y - top, x - left
    upper = image[top, left] * (1 - x) + image[top, right] * x
    return upper * (1 - y) + (image[bottom, left] * (1 - x) + image[bottom, right] * x) * y


def brute_roi_align(images, rois, size, scale, ratio, mode, aligned):
    output = images.new_zeros(len(rois), images.shape[1], *size)
    for n, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (side * scale - 0.5 * aligned for side in box)
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
        bin_h, bin_w = height / size[0], width / size[1]
        grid_h, grid_w = (ratio or math.ceil(side) for side in (bin_h, bin_w))
        for c, i, j in itertools.product(range(images.shape[1]), range(size[0]), range(size[1])):
            samples = [
                bilinear(
                    images[int(image), c], y1 + (i + (k + 0.5) / grid_h) * bin_h, x1 + (j + (m + 0.5) / grid_w) * bin_w
                )
                for k in range(grid_h)
                for m in range(grid_w)
            ]
            if samples:
                samples = torch.stack([torch.as_tensor(s, dtype=images.dtype) for s in samples])
                output[n, c, i, j] = samples.max() if mode == "max" else samples.mean()
    return output


# Whole, small, across the borders, outside, without area.
ROIS = torch.tensor(
    [[0, 1, 2, 13, 15], [1, 3.5, 3.5, 4.5, 6], [1, -9, -4.4, 9, 4], [0, 40, 40, 60, 60], [0, 6, 6, 6, 6]]
)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align(device, mode, ratio, aligned):
    images, rois = torch.randn(2, 2, 8, 7, dtype=torch.float64), ROIS.double()
    args = (2, 3), 0.5, ratio, mode, aligned
    expected = brute_roi_align(images, rois, *args)
    output = mmcv.ops.roi_align(images.to(device), rois.to(device), *args)
    torch.testing.assert_close(output.cpu(), expected)
    single = mmcv.ops.RoIAlign(*args)(images.float().to(device), rois.float().to(device))
    torch.testing.assert_close(single.cpu(), expected.float(), rtol=1e-4, atol=1e-4)
    half = mmcv.ops.roi_align(images.half().to(device), rois.half().to(device), *args)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.cpu(), expected.half(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_gradient(mode, aligned):
    images = torch.randn(2, 2, 8, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: mmcv.ops.roi_align(x, ROIS.double(), (2, 3), 0.5, 0, mode, aligned), images)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_argmax_and_dtypes_of_gradients(device, mode):
    images = torch.randn(2, 2, 8, 7, device=device, requires_grad=True)
    half = images.detach().half().requires_grad_()
    grad = torch.randn(5, 2, 2, 2, device=device)
    for x in (images, half):
        mmcv.ops.roi_align(x, ROIS.to(x), 2, 0.5, 2, mode).backward(grad.to(x.dtype))
    assert half.grad.dtype == torch.float16
    if mode == "avg":
        torch.testing.assert_close(half.grad.float(), images.grad, rtol=2e-2, atol=2e-2)
    else:
        outputs = [torch.empty(5, 2, 2, 2, device=device) for _ in range(3)]
        mmcv._ext.roi_align_forward(
            images, ROIS.to(images), *outputs, aligned_height=2, aligned_width=2, spatial_scale=0.5, sampling_ratio=2,
            pool_mode=0, aligned=True,
        )  # fmt: skip
        output, y, x = (out.cpu() for out in outputs)
        for n, c, i, j in itertools.product(range(3), range(2), range(2), range(2)):
            value = bilinear(images[int(ROIS[n, 0]), c].detach().cpu(), y[n, c, i, j].item(), x[n, c, i, j].item())
            assert output[n, c, i, j].item() == pytest.approx(float(value), abs=1e-5)


@pytest.mark.parametrize("layer", [mmcv.ops.RoIAlign(2), mmcv.ops.RoIAlign(2, pool_mode="max"), mmcv.ops.RoIPool(2)])
def test_no_rois(device, layer):
    images = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    output = layer(images, torch.empty(0, 5, device=device))
    assert output.shape == (0, 3, 2, 2)
    output.sum().backward()
    assert not images.grad.any()


def brute_roi_pool(images, rois, size, scale):
    output = images.new_zeros(len(rois), images.shape[1], *size)
    height, width = images.shape[2:]
    for n, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        for i, j in itertools.product(range(size[0]), range(size[1])):
            bin_h, bin_w = (y2 - y1) / size[0], (x2 - x1) / size[1]
            rows = slice(*(min(max(f(y1 + k * bin_h), 0), height) for f, k in ((math.floor, i), (math.ceil, i + 1))))
            columns = slice(*(min(max(f(x1 + k * bin_w), 0), width) for f, k in ((math.floor, j), (math.ceil, j + 1))))
            part = images[int(image), :, rows, columns].flatten(1)
            if part.numel():
                output[n, :, i, j] = part.amax(1)
    return output


def test_roi_pool(device):
    images = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    rois = torch.cat([ROIS, torch.tensor([[0, 10, 3, 2, 5.0]])]).double()  # the last has no area
    expected = brute_roi_pool(images, rois[:-1], (3, 2), 0.5)
    output = mmcv.ops.roi_pool(images.to(device), rois.to(device), (3, 2), 0.5).cpu()
    torch.testing.assert_close(output[:-1], expected)
    assert not output[-1].any()
    half = mmcv.ops.RoIPool((3, 2), 0.5)(images.half().to(device), rois.half().to(device))
    torch.testing.assert_close(half[:-1].cpu(), expected.half())
    assert gradcheck(lambda x: mmcv.ops.roi_pool(x, rois[:-1], (3, 2), 0.5), images.requires_grad_())


# Deformable operators


def zero_padded(image, y, x):
    """The bilinear sample of an (H, W) image that is zero outside."""
    top, left, total = math.floor(y), math.floor(x), 0.0
    for i, j in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
            total += image[i, j].item() * (1 - abs(y - i)) * (1 - abs(x - j))
    return total


def brute_deform_conv(images, offset, mask, weight, stride, padding, dilation, groups, deform_groups):
    (batch, channels), (k_h, k_w), (height, width) = images.shape[:2], weight.shape[2:], offset.shape[2:]
    offset = offset.view(batch, deform_groups, k_h, k_w, 2, height, width).tolist()
    mask = mask.view(batch, deform_groups, k_h, k_w, height, width)
    columns = images.new_zeros(batch, channels, k_h, k_w, height, width)
    for b, c, i, j, h, w in itertools.product(*map(range, columns.shape)):
        d = c // (channels // deform_groups)
        y = h * stride - padding + i * dilation + offset[b][d][i][j][0][h][w]
        x = w * stride - padding + j * dilation + offset[b][d][i][j][1][h][w]
        columns[b, c, i, j, h, w] = zero_padded(images[b, c], y, x) * mask[b, d, i, j, h, w]
    columns = columns.unflatten(1, (groups, -1))
    output = torch.einsum("bgcijhw,gocij->bgohw", columns, weight.unflatten(0, (groups, -1)))
    return output.flatten(1, 2)


# stride, padding, dilation, groups, deform_groups
GEOMETRIES = [(1, 1, 1, 1, 1), (2, 1, 1, 2, 1), (1, 2, 2, 1, 2), (2, 0, 1, 2, 2)]


def deform_inputs(geometry, batch=2, size=(6, 5), kernel=(3, 2), dtype=torch.float64):
    stride, padding, dilation, groups, deform_groups = geometry
    images = torch.randn(batch, 4, *size, dtype=dtype)
    height, width = (
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(images.shape[2:], kernel, strict=True)
    )
    taps = deform_groups * kernel[0] * kernel[1]
    offset = torch.randn(batch, 2 * taps, height, width, dtype=dtype) * 2
    mask = torch.rand(batch, taps, height, width, dtype=dtype)
    return images, offset, mask, torch.randn(6, 4 // groups, *kernel, dtype=dtype)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_deform_conv(device, geometry):
    images, offset, mask, weight = deform_inputs(geometry)
    expected = brute_deform_conv(images, offset, torch.ones_like(mask), weight, *geometry)
    inputs = [x.to(device) for x in (images, offset, weight)]
    for step in (1, 32):
        output = mmcv.ops.deform_conv2d(*inputs, *geometry, False, step)
        torch.testing.assert_close(output.cpu(), expected)
    half = mmcv.ops.deform_conv2d(*(x.half() for x in inputs), *geometry)
    torch.testing.assert_close(half.cpu().double(), expected, rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_modulated_deform_conv(device, geometry, with_bias):
    images, offset, mask, weight = deform_inputs(geometry)
    bias = torch.randn(6, dtype=torch.float64) if with_bias else None
    expected = brute_deform_conv(images, offset, mask, weight, *geometry)
    expected = expected + bias[:, None, None] if with_bias else expected
    inputs = [x if x is None else x.to(device) for x in (images, offset, mask, weight, bias)]
    torch.testing.assert_close(mmcv.ops.modulated_deform_conv2d(*inputs, *geometry).cpu(), expected)
    half = [x if x is None else x.half().requires_grad_() for x in inputs]
    output = mmcv.ops.modulated_deform_conv2d(*half, *geometry)
    torch.testing.assert_close(output.cpu().double(), expected, rtol=3e-2, atol=5e-2)
    output.sum().backward()
    assert all(x is None or (x.grad.dtype == torch.float16 and x.grad.isfinite().all()) for x in half)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_deform_conv_gradients(geometry):
    images, offset, mask, weight = (x.requires_grad_() for x in deform_inputs(geometry, 1, (3, 4), (2, 2)))
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *x: mmcv.ops.deform_conv2d(*x, *geometry), (images, offset, weight))
    assert gradcheck(lambda *x: mmcv.ops.modulated_deform_conv2d(*x, *geometry), (images, offset, mask, weight, bias))
    assert gradcheck(lambda *x: mmcv.ops.modulated_deform_conv2d(*x, None, *geometry), (images, offset, mask, weight))


def test_modulated_deform_conv_reads_larger_offsets_from_their_start(device):
    geometry = ((1, 1), (1, 1), (1, 1), 1, 1)
    images = torch.randn(2, 4, 3, 4, dtype=torch.float64, device=device)
    offset = torch.randn(2, 18, 6, 8, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.rand(2, 9, 6, 8, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64, device=device)
    first = [x.flatten(1)[:, : x.shape[1] * 12].unflatten(1, (-1, 3, 4)) for x in (offset, mask)]
    expected = mmcv.ops.modulated_deform_conv2d(images, *first, weight, None, *geometry)
    output = mmcv.ops.modulated_deform_conv2d(images, offset, mask, weight, None, *geometry)
    torch.testing.assert_close(output, expected)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (offset, mask)) for x in (output, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_deform_conv_layers(device):
    x = torch.randn(2, 4, 8, 8, device=device)
    for layer in (mmcv.ops.DeformConv2dPack, mmcv.ops.ModulatedDeformConv2dPack):
        layer = layer(4, 6, 3, padding=1, deform_groups=2).to(device)
        # The offsets begin at 0 and the masks at 1/2.
        scale = 0.5 if hasattr(layer, "bias") else 1
        torch.testing.assert_close(layer(x), scale * F.conv2d(x, layer.weight, padding=1), rtol=1e-4, atol=1e-4)
        layer(x).sum().backward()
        assert layer.weight.grad.any() and layer.conv_offset.weight.grad.any()
    mmcv.ops.SAConv2d(4, 4, 3, padding=1, use_deform=True).to(device)(x).sum().backward()


def test_deform_conv_layer_under_autocast(device):
    layer = mmcv.ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1).to(device)
    with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
        output = layer(torch.randn(2, 4, 8, 8, device=device))
        assert output.dtype == torch.get_autocast_dtype(device)
    output.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.isfinite().all()


SHAPES = torch.tensor([[4, 5], [2, 3]])
STARTS = torch.tensor([0, 20])


def attention_inputs(dtype=torch.float64, batch=2, queries=3, heads=2, dim=4, points=2):
    value = torch.randn(batch, 26, heads, dim, dtype=dtype)
    locations = torch.rand(batch, queries, heads, 2, points, 2, dtype=dtype) * 1.4 - 0.2  # some outside
    weights = torch.rand(batch, queries, heads, 2, points, dtype=dtype)
    return value, locations, weights


def attend(value, locations, weights, step=64):
    shapes, starts = SHAPES.to(value.device), STARTS.to(value.device)
    return msda.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, step)


def test_ms_deform_attn(device):
    value, locations, weights = attention_inputs()
    expected = torch.zeros(2, 3, 2, 4, dtype=torch.float64)
    for b, q, h, d, level, p in itertools.product(*map(range, (2, 3, 2, 4, 2, 2))):
        (height, width), start = SHAPES[level].tolist(), STARTS[level]
        image = value[b, start : start + height * width, h, d].view(height, width)
        x, y = locations[b, q, h, level, p].tolist()
        expected[b, q, h, d] += zero_padded(image, y * height - 0.5, x * width - 0.5) * weights[b, q, h, level, p]
    inputs = [x.to(device) for x in (value, locations, weights)]
    torch.testing.assert_close(attend(*inputs).cpu(), expected.flatten(2))
    half = [x.half().requires_grad_() for x in inputs]
    output = attend(*half)
    assert output.dtype == torch.float16 and output.is_contiguous()
    torch.testing.assert_close(output.cpu().double(), expected.flatten(2), rtol=2e-2, atol=2e-2)
    output.sum().backward()
    assert all(x.grad.dtype == torch.float16 and x.grad.isfinite().all() for x in half)


def test_ms_deform_attn_gradients():
    assert gradcheck(attend, [x.requires_grad_() for x in attention_inputs(batch=1)])
    assert attend(*attention_inputs(queries=0)).shape == (2, 0, 8)


def test_ms_deform_attn_takes_the_kernels(device, monkeypatch):
    from densezoo.ops.deformable import kernels

    calls = []
    for name in ("ms_deform_attn_triton", "ms_deform_attn_triton_backward"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, f=original, n=name: calls.append(n) or f(*args))
    results, tensors = [], attention_inputs()
    # On a CPU the kernels are asked for, and interpreted.
    for backend in ("auto" if device == "cuda" else "triton", "reference"):
        monkeypatch.setattr("densezoo.ops.backend._backend", backend)
        inputs = [x.float().to(device).requires_grad_() for x in tensors]
        output = attend(*inputs)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    assert calls == ["ms_deform_attn_triton", "ms_deform_attn_triton_backward"]
    torch.testing.assert_close(*results)


def test_ms_deform_attn_uses_the_level_starts():
    value, locations, weights = attention_inputs()
    swapped = torch.cat([value[:, 20:], value[:, :20]], 1)  # the second level first
    output = mmcv._ext.ms_deform_attn_forward(
        value=swapped, value_spatial_shapes=SHAPES, value_level_start_index=torch.tensor([6, 0]),
        sampling_locations=locations, attention_weights=weights, im2col_step=64,
    )  # fmt: skip
    torch.testing.assert_close(output, attend(value, locations, weights))


def test_multi_scale_deformable_attention_layer(device, monkeypatch):
    """The operator agrees with mmcv's own PyTorch form, which the layer takes on a CPU."""
    layer = mmcv.ops.MultiScaleDeformableAttention(8, num_heads=2, num_levels=2, num_points=2, dropout=0.0).to(device)
    query, value = torch.randn(5, 2, 8, device=device), torch.randn(26, 2, 8, device=device)
    points = torch.rand(2, 5, 2, 2, device=device)
    kwargs = dict(
        value=value, reference_points=points, spatial_shapes=SHAPES.to(device), level_start_index=STARTS.to(device)
    )
    output = layer(query, **kwargs)
    grads = torch.autograd.grad(output.square().sum(), list(layer.parameters()))

    if device == "cpu":
        monkeypatch.setattr(msda, "multi_scale_deformable_attn_pytorch", lambda v, _, *args: attend(v, *args))
    else:
        monkeypatch.setattr(msda, "IS_CUDA_AVAILABLE", False)
    again = layer(query, **kwargs)
    torch.testing.assert_close(again, output)
    again = torch.autograd.grad(again.square().sum(), list(layer.parameters()))
    torch.testing.assert_close(again, grads, rtol=1e-4, atol=1e-4)


# Losses


@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(device, weighted):
    logits, labels = torch.randn(7, 4, dtype=torch.float64) * 3, torch.tensor([0, 1, 2, 3, 4, -1, 2])
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    loss = torch.zeros_like(logits)
    for n, c in itertools.product(range(7), range(4)):
        p = 1 / (1 + math.exp(-logits[n, c]))
        loss[n, c] = -0.25 * (1 - p) ** 2 * math.log(p) if labels[n] == c else -0.75 * p**2 * math.log(1 - p)
        if weighted and labels[n] in range(4):
            loss[n, c] *= weight[labels[n]]
    inputs = logits.to(device), labels.to(device), 2.0, 0.25, weight if weight is None else weight.to(device)
    torch.testing.assert_close(mmcv.ops.sigmoid_focal_loss(*inputs, "none").cpu(), loss)
    torch.testing.assert_close(mmcv.ops.sigmoid_focal_loss(*inputs, "mean").cpu(), loss.sum() / 7)
    assert gradcheck(
        lambda x: mmcv.ops.sigmoid_focal_loss(x, labels, 1.5, 0.3, weight, "none"), logits.requires_grad_()
    )


def test_sigmoid_focal_loss_agrees_with_torchvision_in_fp16_and_at_the_ends(device):
    from torchvision.ops import sigmoid_focal_loss

    logits = torch.tensor([[-12.0, 12], [3, -3], [0, 9]], device=device, dtype=torch.float16, requires_grad=True)
    labels = torch.tensor([0, 1, 2], device=device)
    expected = sigmoid_focal_loss(logits.float(), F.one_hot(labels, 3)[:, :2].float())
    loss = mmcv.ops.SigmoidFocalLoss(2.0, 0.25, reduction="none")(logits, labels)
    assert loss.dtype == torch.float16
    torch.testing.assert_close(loss.float(), expected, rtol=1e-2, atol=1e-3)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logits)[0], expected_grad, rtol=1e-2, atol=1e-3)
    extreme = torch.tensor([[-200.0, 200]], device=device, requires_grad=True)
    # mmcv bounds the logarithms by that of the smallest normal float.
    loss = mmcv.ops.sigmoid_focal_loss(extreme, torch.tensor([0], device=device), 2.0, 0.25, None, "none")
    torch.testing.assert_close(loss.cpu(), -math.log(torch.finfo(torch.float).tiny) * torch.tensor([[0.25, 0.75]]))
    loss.sum().backward()
    assert extreme.grad.isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_focal_loss(device, weighted):
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 3, 3, -1, 4])
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    p = logits.softmax(1)
    loss = [
        -0.25 * (1 - p[n, c]) ** 2 * p[n, c].log() * (weight[c] if weighted else 1) for n, c in enumerate([0, 1, 3, 3])
    ]
    expected = torch.stack(loss + [torch.zeros(()).double()] * 2)
    inputs = logits.to(device), labels.to(device), 2.0, 0.25, weight if weight is None else weight.to(device)
    torch.testing.assert_close(mmcv.ops.softmax_focal_loss(*inputs, "none").cpu(), expected)
    torch.testing.assert_close(mmcv.ops.softmax_focal_loss(*inputs, "mean").cpu(), expected.mean())
    for gamma in (2.0, 0.5, 0.0):
        assert gradcheck(
            lambda x, gamma=gamma: mmcv.ops.softmax_focal_loss(x, labels, gamma, 0.3, weight, "sum"),
            logits.requires_grad_(),
        )


def test_softmax_focal_loss_is_finite_for_a_sure_prediction_and_in_fp16(device):
    logits = torch.tensor([[60.0, 0], [0, 60]], device=device).half().requires_grad_()
    for gamma in (0.0, 0.5, 2.0):
        loss = mmcv.ops.SoftmaxFocalLoss(gamma, 0.25)(logits, torch.tensor([0, 0], device=device))
        loss.backward()
        assert loss.dtype == torch.float16 and loss.isfinite() and logits.grad.isfinite().all()


def test_focal_losses_of_nothing_and_of_wrong_labels(device):
    for loss in (mmcv.ops.sigmoid_focal_loss, mmcv.ops.softmax_focal_loss):
        with pytest.raises(ValueError, match="label 5, expected at most num_classes = 4"):
            loss(torch.randn(2, 4, device=device), torch.tensor([0, 5], device=device))
    empty, labels = (
        torch.empty(0, 4, device=device, requires_grad=True),
        torch.empty(0, dtype=torch.long, device=device),
    )
    loss = mmcv.ops.sigmoid_focal_loss(empty, labels, 2.0, 0.25, None, "sum")
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 4)


# The rest


def test_masked_conv(device):
    layer = mmcv.ops.MaskedConv2d(3, 5, (3, 5), padding=(1, 2)).to(device)
    x, mask = torch.randn(1, 3, 9, 8, device=device), torch.rand(1, 9, 8, device=device) > 0.6
    with torch.no_grad():
        expected = F.conv2d(x, layer.weight, layer.bias, padding=(1, 2)) * mask
        torch.testing.assert_close(mmcv.ops.masked_conv2d(x, mask, layer.weight, layer.bias, (1, 2)), expected)
        assert not mmcv.ops.masked_conv2d(x, mask & False, layer.weight, layer.bias, (1, 2)).any()
    # Windows that leave the map are zero there.
    places, columns = torch.ones(9, 8, device=device).nonzero().T.contiguous(), torch.empty(3 * 15, 72, device=device)
    mmcv._ext.masked_im2col_forward(x, *places, columns, kernel_h=3, kernel_w=5, pad_h=0, pad_w=1)
    assert torch.equal(columns, F.unfold(F.pad(x, (1, 3, 0, 2)), (3, 5))[0])


def test_carafe(device):
    features = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    masks = torch.rand(2, 2 * 9, 6, 8, dtype=torch.float64)
    expected = torch.zeros(2, 4, 6, 8, dtype=torch.float64)
    for c, h, w, i, j in itertools.product(range(4), range(6), range(8), range(3), range(3)):
        y, x = h // 2 + i - 1, w // 2 + j - 1
        if y in range(3) and x in range(4):
            expected[:, c, h, w] += features[:, c, y, x] * masks[:, c // 2 * 9 + i * 3 + j, h, w]
    inputs = features.to(device), masks.to(device)
    torch.testing.assert_close(mmcv.ops.carafe(*inputs, 3, 2, 2).cpu(), expected)
    torch.testing.assert_close(mmcv.ops.carafe_naive(*inputs, 3, 2, 2).cpu(), expected)
    assert gradcheck(lambda *x: mmcv.ops.carafe(*x, 3, 2, 2), (features.requires_grad_(), masks.requires_grad_()))
    layer = mmcv.ops.CARAFEPack(4, 2, compressed_channels=4).to(device)
    assert layer(torch.randn(2, 4, 5, 6, device=device)).shape == (2, 4, 10, 12)


@pytest.mark.parametrize("kind", ["collect", "distribute"])
def test_psa_mask(device, kind):
    height, width, mask = 4, 3, (5, 3)
    x = torch.randn(2, 15, height, width, dtype=torch.float64)
    expected = torch.zeros(2, 12, height, width, dtype=torch.float64)
    for h, w, i, j in itertools.product(*map(range, (height, width, *mask))):
        y, z = h + i - 2, w + j - 1
        if y in range(height) and z in range(width):
            if kind == "collect":
                expected[:, y * width + z, h, w] = x[:, i * 3 + j, h, w]
            else:
                expected[:, h * width + w, y, z] = x[:, i * 3 + j, h, w]
    layer = mmcv.ops.PSAMask(kind, mask)
    assert torch.equal(layer(x.to(device)).cpu(), expected)
    assert gradcheck(layer, x.requires_grad_())


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sync_bn(device, process_group):
    theirs, ours = torch.nn.BatchNorm2d(3).to(device), mmcv.ops.SyncBatchNorm(3).to(device)
    torch.nn.init.uniform_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 5, 6, device=device) * 2 + 1
    grad, results = torch.randn_like(x), []
    for layer in (ours, theirs):
        y = x.clone().requires_grad_()
        output = layer(y)
        output.backward(grad)
        results.append((output, y.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


# Detectors, small and untrained, from mmdet's own configs

CONFIGS = {
    "faster": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mask": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "cascade": "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "retinanet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "atss": "atss/atss_r50_fpn_1x_coco.py",
    "fcos": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "deformable_detr": "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "mask2former": "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
    "soft_nms": "faster_rcnn/faster-rcnn_r50_fpn_soft-nms_1x_coco.py",
    "nms_match": "pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py",
    "masked_conv": "guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco.py",
    "carafe": "carafe/mask-rcnn_r50_fpn-carafe_1x_coco.py",
    "deform_conv": "vfnet/vfnet_r50_fpn_1x_coco.py",
}
SMALL = dict(
    num_classes=3, num_things_classes=3, num_queries=10, num_layers=1, stacked_convs=1, num_convs=1, num_points=64,
    in_channels=32, feat_channels=32, out_channels=32, conv_out_channels=32, fc_out_channels=32, embed_dims=32,
    feedforward_channels=32, num_feats=16, num_groups=4, max_per_img=10, max_per_image=10, score_thr=0.0,
)  # fmt: skip
BACKBONE = dict(type="ResNet", depth=18, base_channels=8, stem_channels=8, zero_init_residual=False)
DROPPED = ("batch_augments", "pretrained")
WIDTHS = [8, 16, 32, 64]


def shrink(value, key=None):
    """Return a model's config with few channels, layers, queries and classes."""
    if isinstance(value, dict):
        if key == "backbone":
            value = dict(BACKBONE, out_indices=value["out_indices"])
        if value.get("type") in ("DeformableDETRHead", "DINOHead"):
            value = dict(value, embed_dims=32)
        return {name: shrink(entry, name) for name, entry in value.items() if name not in DROPPED}
    if key == "in_channels" and isinstance(value, list):
        return WIDTHS[-len(value) :]
    if key == "class_weight" and isinstance(value, list):
        return [1.0, 1.0, 1.0, 0.1]
    if isinstance(value, (list, tuple)):
        return type(value)(shrink(entry) for entry in value)
    return min(SMALL[key], value) if key in SMALL and value is not None else value


RUNS = [*((name, False) for name in CONFIGS), *((name, True) for name in [*CONFIGS][:9])]


@pytest.mark.parametrize("name, amp", RUNS, ids=lambda value: {True: "amp", False: "single"}.get(value, value))
def test_detector_trains_and_predicts(device, name, amp):
    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs" / CONFIGS[name])
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(ConfigDict(shrink(config.model.to_dict()))).to(device)
    model.init_weights()
    with_mask = name in ("mask", "cascade", "mask2former", "carafe")
    inputs = demo_mm_inputs(2, [(3, 160, 160), (3, 128, 150)], [3, 1], 3, with_mask=with_mask)

    model.train()
    batch = model.data_preprocessor(copy.deepcopy(inputs), True)
    autocast = torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16, enabled=amp)
    with autocast:
        loss, parts = model.parse_losses(model(**batch, mode="loss"))
    loss.backward()
    assert all(part.isfinite() for part in parts.values()) and loss > 0
    grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)
    assert grads["backbone.layer2.0.conv1.weight"].any()

    model.eval()
    with torch.no_grad(), autocast:
        batch = {key: value[:1] for key, value in inputs.items()}
        (result,) = model(**model.data_preprocessor(batch, False), mode="predict")
    instances = result.pred_instances
    assert len(instances) and instances.bboxes.isfinite().all() and (instances.labels < 3).all()
    assert not with_mask or instances.masks.shape[0] == len(instances)


@pytest.mark.parametrize("head", [dict(type="PSAHead", mask_size=(5, 5)), dict(type="CCHead")], ids=["psa", "cc"])
def test_segmentor_trains_and_predicts(device, head):
    import mmseg.models
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    head = dict(head, in_channels=64, in_index=3, channels=16, num_classes=3)
    config = dict(type="EncoderDecoder", backbone=BACKBONE, decode_head=head, test_cfg=dict(mode="whole"))
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = mmseg.models.build_segmentor(ConfigDict(config)).to(device)
    inputs = torch.randn(2, 3, 96, 64, device=device)
    shape = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), (96, 64))
    labels = torch.randint(3, (2, 1, 96, 64), device=device)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=shape) for label in labels]
    loss, _ = model.parse_losses(model(inputs, samples, mode="loss"))
    loss.backward()
    assert loss.isfinite() and model.backbone.conv1.weight.grad.any()
    with torch.no_grad():
        results = model.eval()(inputs, samples, mode="predict")
    assert [result.pred_sem_seg.data.shape for result in results] == [(1, 96, 64)] * 2
