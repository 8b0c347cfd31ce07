"""PoolFormer's token mixer between the two norms of a block."""

import torch
from densezoo.ops.backend import takes_triton
from densezoo.ops.pooling.reference import pool_mix_reference
from densezoo.ops.shapes import check_tensors
from torch import Tensor

__all__ = ["add_branch", "pool_mix"]


def pool_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    next_weight: Tensor,
    next_bias: Tensor | None,
    eps: float = 1e-5,
    *,
    layer_scale: Tensor | None = None,
    drop: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add to a map what pooling makes of its norm, and norm the sum for the MLP (PoolFormer, arXiv 2111.11418).

    Both norms take a map as one group, and pooling is the mean of a position's 3x3 neighbours inside the map less the
    position itself: mixed = x + drop * layer_scale * (pool(norm(x)) - norm(x)). The norm's mean and `bias` cancel.

    Args:
        x: (B, H, W, dim), float16, bfloat16, float32 or float64.
        weight: (dim,), of the norm before pooling.
        bias: (dim,) or None, of the norm before pooling; its gradient is 0.
        next_weight: (dim,), of the norm after.
        next_bias: (dim,) or None, of the norm after.
        eps: Added to the variances.
        layer_scale: (dim,), multiplies the branch; None for 1.
        drop: (B, 1, 1, 1), multiplies the branch of each image, without a gradient: stochastic depth. None for 1.

    Returns:
        The sum and its norm, of `x`'s shape. Under autocast the sum is in float32, and so is the norm, but that of the
        kernels has the dtype that a projection would cast it to. Else both have `x`'s dtype, or a wider one of the
        parameters.

    Raises:
        ValueError: An argument's shape or dtype is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    check_tensors(x=x, weight=weight, next_weight=next_weight)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, H, W, dim), H, W and dim not 0")
    if not x.is_floating_point():
        raise ValueError(f"x: got {x.dtype}, expected a floating dtype")
    vectors = dict(weight=weight, bias=bias, next_weight=next_weight, next_bias=next_bias, layer_scale=layer_scale)
    for name, t in vectors.items():
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {tuple(x.shape[-1:])} as `x` has channels")
    if drop is not None and drop.shape != (x.shape[0], 1, 1, 1):
        raise ValueError(f"drop: got shape {tuple(drop.shape)}, expected {(x.shape[0], 1, 1, 1)}")
    if takes_triton("pool_mix", x, _unsupported, x):
        from densezoo.ops.pooling.kernels import pool_mix_triton

        return pool_mix_triton(x, weight, bias, next_weight, next_bias, eps, layer_scale, drop)
    return pool_mix_reference(x, (weight, bias, next_weight, next_bias), eps, layer_scale, drop)


def add_branch(x: Tensor, branch: Tensor, bias: Tensor, drop: Tensor | None = None) -> Tensor:
    """Add a branch to a map: x + drop * (branch + bias).

    The forward is left to torch.compile, which fuses it with what is around it. Of the backward, a sum over positions
    beside a change of dtype, it makes a slow pass: the kernel makes a fast one.

    Args:
        x: (B, H, W, dim).
        branch: Of `x`'s shape, of any dtype.
        bias: (dim,).
        drop: (B, 1, 1, 1), without a gradient: stochastic depth. None for 1.

    Returns:
        Of `x`'s shape, in the widest of the dtypes.
    """
    if takes_triton("add_branch", x, _unsupported, x):
        from densezoo.ops.pooling.kernels import add_branch_triton

        return add_branch_triton(x, branch, bias, drop)
    branch = branch + bias
    return x + (branch if drop is None else branch * drop)


def _unsupported(x: Tensor) -> str | None:
    """Return why the kernels cannot take `x`, or None where they can."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {x.dtype} (kernels: float16, bfloat16, float32)"
    return None
