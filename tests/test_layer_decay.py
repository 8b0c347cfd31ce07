"""Layer-wise learning rates of every family, in a model of OpenMMLab."""

import pytest

pytest.importorskip("mmdet")

from test_openmmlab import TYPES, build
from torch import nn

from densezoo.layer_decay import layer_scales


@pytest.mark.parametrize("kind", TYPES)
def test_every_family(kind):
    """Every parameter has a rate, from the stem's up to that of the last block, one below what follows the backbone."""
    model = nn.ModuleDict(dict(backbone=build(kind), head=nn.Linear(1, 1)))
    scales = layer_scales(model, 0.5)
    names = [name for name, _ in model.backbone.named_parameters(prefix="backbone")]
    assert scales.keys() == set(names)
    assert scales[names[0]] == min(scales.values())
    assert max(scales.values()) == 0.5
    # as many as there are layers, without a gap
    assert sorted(set(scales.values())) == [0.5**i for i in range(len(set(scales.values())), 0, -1)]
    assert len(set(scales.values())) >= 4
