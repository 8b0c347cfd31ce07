"""Attention modules that plug into other networks: `Module(channels, **its own)`, (B, C, H, W) to (B, C, H, W).

Any size works, H and W need not be those of training. `device` and `dtype` are as in torch's own modules. They go into
mmdet's and mmseg's ResNets as `plugins` of type `densezoo.<name>` (see `densezoo.openmmlab`), and into timm's as
`block_args=dict(attn_layer=...)`. Parameters are named as in the published code, where weights were published.
"""

from densezoo.ops.plugins.bam import BAM
from densezoo.ops.plugins.cbam import CBAM
from densezoo.ops.plugins.das import DAS
from densezoo.ops.plugins.eca import ECA
from densezoo.ops.plugins.ela import ELA
from densezoo.ops.plugins.fca import FCA
from densezoo.ops.plugins.gather_excite import GatherExcite
from densezoo.ops.plugins.pkcam import PKCAM
from densezoo.ops.plugins.se import SE
from densezoo.ops.plugins.triplet import Triplet
from densezoo.ops.plugins.ulsam import ULSAM

__all__ = ["BAM", "CBAM", "DAS", "ECA", "ELA", "FCA", "GatherExcite", "PKCAM", "SE", "Triplet", "ULSAM"]
