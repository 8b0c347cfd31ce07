"""What operators, necks and heads share in reading their arguments and in reshaping."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from densezoo.ops.backend import is_exporting
from torch import Tensor


def check_tensors(**arguments: object) -> None:
    """Raise ValueError for an argument that is no tensor; the message names it."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: got {type(value).__name__}, expected a tensor")


def positive(name: str, value: int) -> int:
    """Return `value`, or raise ValueError, starting with `name`, where it is no positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a positive integer")
    return value


def check_widths(in_channels: Sequence[int], least: int = 1) -> list[int]:
    """Return the widths of the levels; ValueError where they are not `least` positive integers or more."""
    if isinstance(in_channels, str | int) or not isinstance(in_channels, Sequence) or len(in_channels) < least:
        raise ValueError(
            f"in_channels: got {in_channels!r}, expected the widths of {least} levels or more, finest first, such as "
            "a timm backbone's feature_info.channels()"
        )
    return [positive("in_channels", width) for width in in_channels]


def check_features(features: Sequence[Tensor], in_channels: Sequence[int], name: str = "features") -> None:
    """Raise ValueError, starting with `name`, where the maps are not those that a neck or head was built for."""
    if isinstance(features, Tensor):
        raise ValueError(f"{name}: got one tensor, expected a sequence of maps (B, C, H, W), finest first")
    widths = [x.shape[1] for x in features]
    if widths != list(in_channels):
        raise ValueError(
            f"{name}: got {len(widths)} maps of {widths} channels, expected {len(in_channels)}, finest first, of "
            f"{list(in_channels)} as in in_channels"
        )
    # Asked of a graph to export it would limit the sizes that the graph serves.
    if is_exporting():
        return
    for finer, coarser in pairwise(features):
        if coarser.shape[2] > finer.shape[2] or coarser.shape[3] > finer.shape[3]:
            sizes = [tuple(x.shape[2:]) for x in features]
            raise ValueError(f"{name}: got maps of sizes {sizes}, expected the finest first, then none larger")


def per_axis(name: str, value, kind: type = int) -> tuple:
    """Return an argument as (rows, columns): a pair as it is, a single value for both.

    Raises:
        ValueError: `value` is neither, of type `kind`; the message starts with `name`.
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    # A bool is an int to Python, but no size; a free size of an exported graph is one, but no int.
    kinds = (int, torch.SymInt) if kind is int else kind
    if len(pair) != 2 or any(not isinstance(v, kinds) or (kind is int and isinstance(v, bool)) for v in pair):
        raise ValueError(f"{name}: got {value!r}, expected {kind.__name__} or (rows, columns) of them")
    return pair


def fold(x: Tensor, *shape: int) -> Tensor:
    """Reshape through one dimension: torch.export cannot prove that symbolic sizes merge, only that they split."""
    return x.contiguous().flatten().view(shape)
