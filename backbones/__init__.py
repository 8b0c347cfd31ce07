"""The zoo's backbones: one file a family. Importing this package registers every variant with timm."""

from types import ModuleType

from densezoo.backbones import (
    agent,
    attention_mobilenet,
    attention_resnet,
    davit,
    dinat_s,
    flatten,
    focalnet,
    maxvit,
    nat,
    nat_isotropic,
    poolformer,
    quadtree,
)

__all__ = ["FAMILIES", "VARIANTS"]

FAMILIES: tuple[ModuleType, ...] = (
    nat,
    dinat_s,
    nat_isotropic,
    davit,
    maxvit,
    quadtree,
    agent,
    flatten,
    focalnet,
    poolformer,
    attention_resnet,
    attention_mobilenet,
)
"""The modules of the families; each has `VARIANTS`, `default_cfgs` and `checkpoint_filter_fn`."""

VARIANTS: dict[str, ModuleType] = {name: family for family in FAMILIES for name in family.VARIANTS}
"""The module of every variant, by timm name."""
