"""PoolFormer's mixing by pooling in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def map_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise maps (B, H, W, dim), each over all its positions and channels, and scale and shift the channels."""
    x = F.layer_norm(x, x.shape[1:], eps=eps) * weight
    return x if bias is None else x + bias


def _sum_of_neighbours(x: Tensor) -> Tensor:
    padded = F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1))
    return F.avg_pool2d(padded, 3, stride=1, divisor_override=1).permute(0, 2, 3, 1)


def pool_less_self(x: Tensor) -> Tensor:
    """Return the mean of the 3x3 neighbours inside a map (B, H, W, dim), less the position itself."""
    # Padded apart: PyTorch's own padding gives a wrong gradient on a GPU where channels are last (issue 188344).
    return _sum_of_neighbours(x) / _sum_of_neighbours(torch.ones_like(x[:1, :, :, :1])) - x


def pool_mix_reference(
    x: Tensor, norms: tuple[Tensor, Tensor | None, Tensor, Tensor | None], eps: float, layer_scale: Tensor | None,
    drop: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `densezoo.ops.pool_mix`; arguments checked."""
    weight, bias, next_weight, next_bias = norms
    y = pool_less_self(map_norm(x, weight, bias, eps))
    y = y if layer_scale is None else layer_scale * y
    x = x + (y if drop is None else y * drop)
    return x, map_norm(x, next_weight, next_bias, eps)
