"""Which positions of a map a position attends to, told by the operators themselves.

The output of attention is linear in its values, so the gradient of the output at a position with respect to the values
is that position's row of the attention matrix. The values are cut out of the projection that makes them by a hook.
"""

from collections.abc import Callable

import torch
from densezoo.backbones.davit import ChannelAttention
from torch import Tensor, nn

# Projection -> where the values are among its C output channels, (from, to) in parts of the C of `proj`.
VALUES = {"qkv": (2, 3), "kv": (1, 2), "f": (1, 2)}


class _Stop(Exception):
    """The forward pass has come as far as wanted."""


def value_projection(module: nn.Module) -> str | None:
    """Return the name of the projection that makes the values of a module, None if it attends to no positions."""
    # Channels attend to each other there.
    if isinstance(module, ChannelAttention) or not isinstance(getattr(module, "proj", None), nn.Linear):
        return None
    return next((name for name in VALUES if isinstance(getattr(module, name, None), nn.Linear | nn.Identity)), None)


def as_map(x: Tensor, height: int, width: int) -> Tensor:
    """Return a map (B, H, W, C), or tokens of one, for an image of this size; a class token is left out."""
    if x.ndim == 4:
        return x
    strides = (s for s in range(1, height + 1) if height % s == width % s == 0)
    stride = next(s for s in strides if height * width // s**2 <= x.shape[1])
    rows, columns = height // stride, width // stride
    return x[:, x.shape[1] - rows * columns :].unflatten(1, (rows, columns))


def run(model: nn.Module, image: Tensor, hooks: dict[nn.Module, Callable], values: dict[nn.Module, Callable]) -> None:
    """Run a model with hooks before modules, and after those that make values."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    handles += [module.register_forward_hook(hook) for module, hook in values.items()]
    try:
        model(image)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def find_layers(model: nn.Module, image: Tensor) -> dict[str, tuple[int, int]]:
    """Return the name of every module that attends to positions, in order, and the size (H, W) of its map."""
    found: dict[str, tuple[int, int]] = {}

    def note(name: str) -> Callable:
        return lambda module, args: found.update({name: tuple(as_map(args[0], *image.shape[2:]).shape[1:3])})

    run(model, image, {m.proj: note(name) for name, m in model.named_modules() if value_projection(m)}, {})
    return found


@torch.enable_grad()
def attention_weights(model: nn.Module, image: Tensor, name: str, point: tuple[float, float]) -> Tensor:
    """Return how much the position at `point` takes from each position, (H, W), not negative, mean over channels.

    Args:
        model: In evaluation mode.
        image: (1, C, height, width).
        name: Module of `find_layers`.
        point: Row and column in the image, from 0 to 1.
    """
    module = model.get_submodule(name)
    projection = value_projection(module)
    kept: dict[str, Tensor] = {}

    def cut(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        start, end = (part * module.proj.in_features for part in VALUES[projection])
        before, value, after = output.detach().tensor_split((start, end), -1)
        kept["value"] = value.clone().requires_grad_()
        return torch.cat((before, kept["value"], after), -1)

    def stop(layer: nn.Module, args: tuple) -> None:
        kept["output"] = args[0]
        raise _Stop

    run(model, image, {module.proj: stop}, {getattr(module, projection): cut})
    size = image.shape[2:]
    output = as_map(kept["output"], *size)
    rows, columns = output.shape[1:3]
    at = output[0, min(int(point[0] * rows), rows - 1), min(int(point[1] * columns), columns - 1)]
    (weights,) = torch.autograd.grad(at.sum(), kept["value"])
    weights = as_map(weights, *size)
    # What attention pads a map with is at its bottom and right.
    return weights[0, :rows, :columns].abs().mean(-1)
