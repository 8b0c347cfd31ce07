"""The zoo's backbones: one file a family. Importing this package registers all of them with timm."""

from densezoo.backbones import nat

__all__ = ["nat"]
