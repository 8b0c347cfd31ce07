"""Layer-wise learning rates: each layer's is that of the next times a rate, for every family in every model."""

from collections.abc import Callable

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models import group_parameters
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with `paramwise_cfg.layer_decay_rate`: the rate of a layer over that of the next.

    What is not in the backbone keeps its learning rate, like the layer after the backbone's last.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module: bool = False) -> None:
        """Add a group for each parameter of the model, with its layer's learning rate."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:
            return
        scales = layer_scales(module, self.paramwise_cfg.get("layer_decay_rate", 1.0))
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for group in params:
            (parameter,) = group["params"]
            scale = scales.get(names[id(parameter)], 1.0)
            group["lr"] = group.get("lr", self.base_lr) * scale


def layer_scales(model: nn.Module, rate: float) -> dict[str, float]:
    """Return the factor of each parameter of a model's backbone.

    Raises:
        ValueError: The model has no backbone whose layers are known.
    """
    for attribute in ("backbone", "model"):
        backbone = getattr(model, attribute, None)
        matcher: Callable | None = getattr(backbone, "group_matcher", None)
        if matcher:
            layers = group_parameters(backbone, matcher(coarse=False), reverse=True)
            # timm has the classifier in the last layer; one that is wrapped has none, or keeps its learning rate there.
            top = max(layers.values()) + (not _has_classifier(backbone))
            return {f"{attribute}.{name}": rate ** (top - layer) for name, layer in layers.items()}
    kind = type(getattr(model, "backbone", model)).__name__
    raise ValueError(f"layer_decay_rate: {kind} does not tell the layers of its parameters, as the zoo's and timm's do")


def _has_classifier(backbone: nn.Module) -> bool:
    return bool(getattr(backbone, "num_classes", 0))
