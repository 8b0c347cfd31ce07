"""Necks: from a backbone's maps to a detector's or segmentor's, `Neck(in_channels, ...)`, in plain PyTorch.

`in_channels` are the widths of the maps, finest first, such as a timm backbone's `feature_info.channels()`; a neck
takes the list of maps (B, C, H, W) that the backbone returns. In OpenMMLab they are `neck=dict(type="densezoo.<name>",
...)` (see `densezoo.openmmlab`). Deformable convolutions run in fp32 where there are none of the dtype.
"""

from densezoo.necks.fpn import FPN, PAFPN
from densezoo.necks.gather_distribute import GatherDistribute
from densezoo.necks.rcnet import RCNet
from densezoo.necks.rfp import RFP
from densezoo.necks.sac import SAC, use_sac
from densezoo.necks.sepc import SEPC
from densezoo.necks.simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ["FPN", "PAFPN", "RFP", "SAC", "SEPC", "GatherDistribute", "RCNet", "SimpleFeaturePyramid", "use_sac"]
