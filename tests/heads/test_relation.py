"""Relation-DETR's position relation against its definition."""

import math

import torch
from densezoo.heads import PositionRelation


def test_definition():
    relation = PositionRelation(num_heads=3, embed_dim=4, temperature=50.0, scale=10.0)
    boxes, others = torch.rand(2, 5, 4) + 0.1, torch.rand(2, 6, 4) + 0.1
    out = relation(boxes, others)
    assert out.shape == (2, 3, 5, 6)
    (cx, cy, w, h), (ox, oy, ow, oh) = boxes[1, 2].tolist(), others[1, 4].tolist()
    numbers = [
        math.log(abs(cx - ox) / (w + 1e-5) + 1),
        math.log(abs(cy - oy) / (h + 1e-5) + 1),
        math.log((w + 1e-5) / (ow + 1e-5)),
        math.log((h + 1e-5) / (oh + 1e-5)),
    ]
    code = []
    for number in numbers:
        for i in range(2):
            angle = 10 * number / 50 ** (2 * i / 4)
            code += [math.sin(angle), math.cos(angle)]
    conv = relation.pos_proj[0]
    expected = (conv.weight[:, :, 0, 0] @ torch.tensor(code) + conv.bias).relu()
    torch.testing.assert_close(out[1, :, 2, 4], expected, atol=1e-4, rtol=1e-4)


def test_boxes_get_no_gradient():
    boxes = (torch.rand(1, 5, 4) + 0.1).requires_grad_()
    out = PositionRelation()(boxes, boxes)
    out.sum().backward()
    assert boxes.grad is None


def test_degenerate_boxes():
    assert PositionRelation()(torch.zeros(1, 3, 4), torch.ones(1, 2, 4)).isfinite().all()
