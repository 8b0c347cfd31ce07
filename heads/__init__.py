"""Heads that mmdet and mmseg do not have, as plain PyTorch modules.

`densezoo.openmmlab` registers what detectors and segmentors make of them.
"""

from densezoo.heads.bvr import BVR, RoIBVR
from densezoo.heads.dyhead import DyHead
from densezoo.heads.fpenet import MEU, MEUDecoder
from densezoo.heads.p2at import P2ATDecoder
from densezoo.heads.relation import PositionRelation

__all__ = ["BVR", "MEU", "DyHead", "MEUDecoder", "P2ATDecoder", "PositionRelation", "RoIBVR"]
