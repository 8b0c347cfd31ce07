"""Attention modules that plug into other networks: `Module(channels, **its own)`, (B, C, H, W) to (B, C, H, W).

Any size works, H and W need not be those of training. `device` and `dtype` are as in torch's own modules. They go into
mmdet's and mmseg's ResNets as `plugins` of type `densezoo.<name>` (see `densezoo.openmmlab`), and into timm's as
`block_args=dict(attn_layer=...)`. Parameters are named as in the published code.
"""

from densezoo.ops.plugins.bam import BAM
from densezoo.ops.plugins.cbam import CBAM
from densezoo.ops.plugins.eca import ECA
from densezoo.ops.plugins.fca import FCA
from densezoo.ops.plugins.se import SE
from densezoo.ops.plugins.triplet import Triplet

__all__ = ["BAM", "CBAM", "ECA", "FCA", "SE", "Triplet"]
