"""Focal modulation in plain PyTorch: the CPU path, the export path and what kernels are tested against."""

from collections.abc import Sequence

import torch.nn.functional as F
from densezoo.ops.backend import is_exporting
from densezoo.ops.precision import widen, without_autocast
from torch import Tensor


def focal_modulation_reference(
    context: Tensor, gates: Tensor, weights: Sequence[Tensor], normalize_modulator: bool
) -> Tensor:
    """Compute `densezoo.ops.focal_modulation`; 16-bit inputs are computed in float32."""
    dtype = context.dtype
    # (B, channels, H, W)
    context, gates = (t.permute(0, 3, 1, 2) for t in widen(context, gates))
    if is_exporting():
        # Export asks of other orders in memory whether a view will do, and the answer would bound the sizes.
        context, gates = context.contiguous(), gates.contiguous()
    *level_gates, mean_gate = gates.split(1, dim=1)
    total = 0
    with without_autocast(context):
        for weight, gate in zip(weights, level_gates, strict=True):
            weight = weight.to(context.dtype)
            context = F.gelu(F.conv2d(context, weight, padding=weight.shape[-1] // 2, groups=len(weight)))
            total = total + gate * context
        total = total + mean_gate * F.gelu(context.mean((2, 3), keepdim=True))
    if normalize_modulator:
        total = total / gates.shape[1]
    return total.permute(0, 2, 3, 1).to(dtype)
