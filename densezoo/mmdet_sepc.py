"""mmdet's dense heads on the maps of `densezoo.SEPC`; `densezoo.openmmlab` imports this when a config names one."""

from mmdet.models.dense_heads import FreeAnchorRetinaHead, RetinaHead
from torch import Tensor

from densezoo.openmmlab import MODELS


class _SEPCHead:
    """What makes a head of RetinaNet's kind, the second base, take a pair of maps a level, and no towers.

    The anchors' grid is that of the maps, which are two pixels smaller in each axis than the pyramid's.
    """

    def __init_subclass__(cls):
        MODELS.register_module(module=cls, force=True)

    def __init__(self, *args, stacked_convs: int = 0, **kwargs):
        if stacked_convs:
            raise ValueError(f"stacked_convs: got {stacked_convs}, expected 0: SEPC takes the place of the towers")
        super().__init__(*args, stacked_convs=0, **kwargs)

    def forward_single(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if isinstance(x, Tensor):
            raise ValueError("x: got one map a level, expected SEPC's pairs: put densezoo.SEPC last in the neck")
        classes, boxes = x
        return self.retina_cls(classes), self.retina_reg(boxes)


class SEPCRetinaHead(_SEPCHead, RetinaHead):
    """RetinaNet's head after SEPC (arXiv 2005.03101); arguments as for mmdet's."""


class SEPCFreeAnchorRetinaHead(_SEPCHead, FreeAnchorRetinaHead):
    """FreeAnchor's head after SEPC (arXiv 2005.03101); arguments as for mmdet's."""
