"""The zoo's backbones: one file a family. Importing this package registers every variant with timm."""

from types import ModuleType

from densezoo.backbones import davit, dinat_s, focalnet, maxvit, nat, nat_isotropic, poolformer

__all__ = ["FAMILIES", "VARIANTS"]

FAMILIES: tuple[ModuleType, ...] = (nat, dinat_s, nat_isotropic, davit, maxvit, focalnet, poolformer)
"""The modules of the families that pass the whole of tests/backbones (agent and flatten do not yet).

Each has `VARIANTS`, `default_cfgs` and `checkpoint_filter_fn`.
"""

VARIANTS: dict[str, ModuleType] = {name: family for family in FAMILIES for name in family.VARIANTS}
"""The module of every variant, by timm name."""
