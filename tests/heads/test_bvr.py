"""RelationNet++: the published attention's outputs, and the key points it attends to and learns."""

import math
from pathlib import Path

import parity
import pytest
import torch
from densezoo.heads.bvr import (
    BVR,
    KINDS,
    Bridge,
    KeyPointAttention,
    RelativePosition,
    RoIBVR,
    cell_centers,
    gaussian_focal_loss,
    gaussian_sigma,
    point_targets,
)

GOLDENS = Path(parity.__file__).parent / "goldens"


def test_parity():
    golden = parity.load(GOLDENS / "bvr_attention.json")
    bridge = Bridge(64, num_heads=4, num_kinds=2, base_size=40)
    # published files hold the table as well
    table = torch.zeros(golden["keys"]["relative_positional_encoding.base_embedding"])
    bridge.load_state_dict(parity.state_dict_from(golden) | {"relative_positional_encoding.base_embedding": table})
    x = {name: parity.fixed_input(name, shape) for name, shape in golden["inputs"].items()}
    keys = [(x[f"k{i}"], x[f"pos{i}"] * 40 + torch.tensor([96.0, 64.0])) for i in range(2)]
    cells = cell_centers([(16, 24)], [8], torch.device("cpu"))
    with torch.no_grad():
        out = bridge(x["q"].flatten(1, 2), cells[None], keys)
    assert parity.compare(golden["outputs"]["y"], out.unflatten(1, (16, 24))) < 2e-6


@pytest.mark.parametrize("key_channels", [16, 24], ids=["joined weights", "three weights"])
def test_attention_is_torchs(key_channels):
    arguments = dict(kdim=key_channels, vdim=key_channels)
    kinds = (KeyPointAttention, torch.nn.MultiheadAttention)
    ours, theirs = (kind(16, 4, batch_first=True, **arguments) for kind in kinds)
    torch.nn.init.normal_(ours.in_proj_bias)
    theirs.load_state_dict(ours.state_dict())
    queries, features = torch.randn(2, 9, 16, requires_grad=True), torch.randn(2, 5, key_channels)
    bias = torch.randn(2, 4, 9, 5, requires_grad=True)
    results = []
    for out in (ours(queries, features, bias), theirs(queries, features, features, attn_mask=bias.flatten(0, 1))[0]):
        parameters = (ours if not results else theirs).parameters()
        results.append([out, *torch.autograd.grad(out.sin().sum(), [queries, bias, *parameters])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("base_size", [40, 400])
def test_table_of_relative_positions_is_nearly_exact_at_its_cells(base_size):
    exact = RelativePosition(16, 4, None)
    torch.nn.init.normal_(exact.embedding_transform[0].conv.weight)
    torch.nn.init.constant_(exact.embedding_transform[0].conv.bias, 9.0)
    table = RelativePosition(16, 4, base_size)
    table.load_state_dict(exact.state_dict())
    half = base_size // 2
    cells = torch.randint(-half, half + 1, (2, 3, 5, 2))
    # the table has one cell more than the sides it is read by
    read = cells * base_size / (base_size + 1)
    torch.testing.assert_close(table(read), exact(cells), atol=1e-4, rtol=1e-4)


def test_parameters_have_the_published_names():
    names = set(small_bvr().state_dict())
    for kind in KINDS:
        convs = [f"layers.{kind}.0", f"layers.{kind}.1", f"cls_heads.{kind}.0", f"offset_heads.{kind}.0"]
        own = {f"keypoint_{conv}.{part}" for conv in convs for part in ("conv.weight", "gn.weight", "gn.bias")}
        own |= {f"keypoint_{part}_heads.{kind}.1.{p}" for part in ("cls", "offset") for p in ("weight", "bias")}
        own = {f"keypoint_head.{name}" for name in own}
        assert own <= names
        names -= own
    assert {name.partition(".")[0] for name in names} == {"cls_transformer", "reg_transformer"}


def small_bvr(**options) -> BVR:
    return BVR(3, in_channels=8, channels=32, strides=(8, 16), num_heads=4, **options)


def test_chooses_the_best_local_maxima_of_all_levels():
    bvr = small_bvr(points_per_level=2, num_keys=3)
    sizes = [(6, 8), (3, 4)]
    logits = [torch.full((1, 3, *size), -9.0) for size in sizes]
    offsets = [torch.zeros(1, 2, *size) for size in sizes]
    logits[0][0, 1, 2, 3] = 4.0
    logits[0][0, 1, 2, 4] = 3.9  # beside a larger one
    logits[0][0, 2, 5, 7] = 1.0
    logits[1][0, 0, 1, 2] = 2.0
    logits[1][0, 0, 0, 0] = 0.5
    offsets[1][0, :, 1, 2] = torch.tensor([0.25, -0.5])
    cells = cell_centers(sizes, bvr.strides, torch.device("cpu"))
    index, position = bvr.choose(list(zip(logits, offsets, strict=True)), cells)
    assert index.tolist() == [[2 * 8 + 3, 48 + 1 * 4 + 2, 5 * 8 + 7]]
    expected = [[3 * 8 + 4, 2 * 8 + 4], [2 * 16 + 8 + 4, 16 + 8 - 8], [7 * 8 + 4, 5 * 8 + 4]]
    assert position.tolist() == [[[float(v) for v in row] for row in expected]]


def test_keys_are_the_features_of_chosen_cells():
    bvr = small_bvr(num_keys=4).eval()
    maps, cls_maps, reg_maps = ([torch.randn(2, c, *s) for s in ((6, 8), (3, 4))] for c in (8, 32, 32))
    new_cls, new_reg, points = bvr(maps, cls_maps, reg_maps)
    cells = cell_centers([(6, 8), (3, 4)], bvr.strides, torch.device("cpu"))
    for maps, new, transformer, kinds in (
        (cls_maps, new_cls, bvr.cls_transformer, ["center"]),
        (reg_maps, new_reg, bvr.reg_transformer, ["top_left_corner", "bottom_right_corner"]),
    ):
        tokens = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)
        keys = []
        for kind in kinds:
            index, position = bvr.choose(points[kind], cells)
            keys.append((torch.stack([tokens[b, index[b]] for b in range(2)]), position))
        expected = transformer(tokens, cells[None], keys).transpose(1, 2)
        torch.testing.assert_close(torch.cat([m.flatten(2) for m in new], 2), expected)


@pytest.mark.parametrize(("width", "height"), [(40.0, 30.0), (100.0, 8.0), (3.0, 3.0)])
def test_sigma_keeps_the_overlap(width, height):
    radius = (6 * gaussian_sigma(torch.tensor([[5.0, 7.0, 5 + width, 7 + height]])).item() - 1) / 2
    area = width * height
    inner = (width - 2 * radius) * (height - 2 * radius) / area
    outer = area / ((width + 2 * radius) * (height + 2 * radius))
    shared = (width - radius) * (height - radius)
    overlaps = sorted([inner, outer, shared / (2 * area - shared)])
    assert overlaps[0] == pytest.approx(0.7, abs=1e-4)


def test_targets():
    sizes, strides = [(6, 8), (3, 4)], (8, 16)
    cells = cell_centers(sizes, strides, torch.device("cpu")).split([48, 12])
    boxes = torch.tensor([[10.0, 6.0, 50.0, 40.0], [30.0, 20.0, 60.0, 44.0]])
    scores, offsets, positive = point_targets(boxes, torch.tensor([2, 0]), "top_left_corner", cells, strides, 3)
    # nearest cells of (10, 6) and (30, 20): (12, 4), (28, 20) at stride 8; (8, 8), (24, 24) at stride 16
    assert positive.nonzero()[:, 0].tolist() == [0 * 8 + 1, 2 * 8 + 3, 48 + 0, 48 + 1 * 4 + 1]
    torch.testing.assert_close(
        offsets.T, torch.tensor([[-2 / 8, 2 / 8], [2 / 8, 0.0], [2 / 16, -2 / 16], [6 / 16, -4 / 16]])
    )
    assert scores[2, 1] == 1 and scores[0, 19] == 1 and scores[1].max() == 0
    sigma = gaussian_sigma(boxes)
    assert scores[2, 2].item() == pytest.approx(math.exp(-64 / (2 * sigma[0] ** 2)), rel=1e-5)

    scores, offsets, positive = point_targets(boxes[:0], torch.zeros(0, dtype=torch.long), "center", cells, strides, 3)
    assert not scores.any() and offsets.shape == (2, 0) and not positive.any()


def test_focal_loss():
    logits, targets = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.6, 0.0])
    p = logits.sigmoid()
    expected = -((1 - p[0]) ** 2) * p[0].log() - 0.4**4 * p[1] ** 2 * (1 - p[1]).log() - p[2] ** 2 * (1 - p[2]).log()
    torch.testing.assert_close(gaussian_focal_loss(logits, targets), expected)


def test_learns_to_find_points():
    bvr = small_bvr()
    maps = [torch.randn(1, 8, 6, 8), torch.randn(1, 8, 3, 4)]
    boxes, labels = [torch.tensor([[10.0, 6.0, 50.0, 40.0]])], [torch.tensor([2])]
    optimizer = torch.optim.Adam(bvr.keypoint_head.parameters(), lr=3e-3)
    for _ in range(60):
        score, offset, count = bvr.loss(bvr.keypoint_head(maps), boxes, labels)
        optimizer.zero_grad()
        (score + offset).div(count).backward()
        optimizer.step()
    assert count == 6
    points, cells = bvr.keypoint_head(maps), cell_centers([(6, 8), (3, 4)], bvr.strides, torch.device("cpu"))
    for kind, expected in zip(KINDS, ([10.0, 6.0], [50.0, 40.0], [30.0, 23.0]), strict=True):
        position = bvr.choose(points[kind], cells)[1][0, 0]
        torch.testing.assert_close(position, torch.tensor(expected), atol=2.0, rtol=0)


def test_images_without_objects():
    bvr = small_bvr()
    points = bvr.keypoint_head([torch.randn(2, 8, 6, 8), torch.randn(2, 8, 3, 4)])
    score, offset, count = bvr.loss(points, [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2)
    assert score > 0 and offset == 0 and count == 0

    roi = RoIBVR(16, 32, num_heads=4)
    points = roi(torch.randn(3, 16, 7, 7), torch.randn(3, 32), [torch.zeros(0, 4), torch.tensor([[0.0, 0, 9, 9]] * 3)])[
        2
    ]
    score, offset, count = roi.loss(points, torch.zeros(0, 4), torch.zeros(0, 4))
    assert score > 0 and offset == 0 and count == 0


def test_proposals_learn_their_points():
    roi = RoIBVR(16, 32, num_heads=4)
    maps = torch.randn(3, 16, 7, 7)
    rois = torch.tensor([[10.0, 20.0, 80.0, 90.0], [0.0, 0.0, 28.0, 28.0], [5.0, 5.0, 50.0, 60.0]])
    boxes = torch.tensor([[12.0, 16.0, 70.0, 95.0]])
    optimizer = torch.optim.Adam(roi.parameters(), lr=2e-3)
    for _ in range(80):
        points = roi(maps, torch.zeros(3, 32), [rois])[2]
        score, offset, count = roi.loss(points, rois[:1], boxes)
        optimizer.zero_grad()
        (score + offset).div(count).backward()
        optimizer.step()
    logits, offsets = points
    assert logits[0].max() > logits[1:].max()
    for i, expected in enumerate(([12.0, 16.0], [70.0, 95.0], [41.0, 55.5])):
        index = logits[0, i].argmax()
        cell = torch.stack([index % 14, index // 14]) + 0.5 + offsets[0, 2 * i : 2 * i + 2].flatten(1)[:, index]
        torch.testing.assert_close(rois[0, :2] + cell * 70 / 14, torch.tensor(expected), atol=4.0, rtol=0)
