"""What the operators share in reading their arguments and in reshaping."""

import torch
from torch import Tensor


def check_tensors(**arguments: object) -> None:
    """Raise ValueError for an argument that is no tensor; the message names it."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: got {type(value).__name__}, expected a tensor")


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
