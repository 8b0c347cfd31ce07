"""Vision backbones for dense prediction. Importing this package registers every backbone with timm."""

from densezoo import backbones, ops
from densezoo.version import __version__

__all__ = ["__version__", "backbones", "load", "ops", "push_to_hub"]


def __getattr__(name: str):
    # Loaded when first used: importing the package stays light.
    if name == "load":
        from densezoo.publishing import load

        return load
    if name == "push_to_hub":
        from densezoo.hub import push_to_hub

        return push_to_hub
    raise AttributeError(f"module 'densezoo' has no attribute {name!r}")
