"""Vision backbones for dense prediction. Importing this package registers every backbone with timm."""

from densezoo import backbones, ops
from densezoo.version import __version__

__all__ = ["__version__", "backbones", "ops"]
