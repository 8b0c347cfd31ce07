"""The precision that operators compute in: of references float32 for 16-bit inputs, under autocast too."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return 16-bit tensors as float32, others as they are."""
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Return a context in which autocast leaves products on the device of `tensor` in their inputs' dtype."""
    device = tensor.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts `x` before a product; None where it does not."""
    device = x.device.type
    # Of tensors without data autocast knows nothing, and float64 it leaves alone.
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
