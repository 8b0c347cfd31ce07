"""The middle of an inverted bottleneck: a normalised map activated and convolved depthwise in one pass over it."""

import torch
from densezoo.ops.backend import takes_triton
from densezoo.ops.mbconv.reference import activate, activated_conv_reference
from densezoo.ops.shapes import check_tensors
from torch import Tensor, nn

__all__ = ["activated_conv", "activated_conv_mean", "batch_norm_affine"]

ACTS = ("gelu_tanh", "silu")


def activated_conv(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (1, 1),
    act: str = "gelu_tanh",
) -> Tensor:
    """Scale and shift the channels of a map, activate it, and convolve each channel with its own 3x3 kernel.

    PyTorch would make a pass over memory for the norm, which scale and shift stand for, another for the activation, one
    for padding and one for the convolution, and as many in the backward.

    Args:
        x: (B, H, W, C), float16, bfloat16, float32 or float64.
        scale: (C,), any floating dtype.
        shift: (C,), as `scale`.
        weight: (C, 1, 3, 3), any floating dtype.
        stride: 1 or 2.
        padding: Rows of zeros above the activated map and columns to its left, 0 or 1; 1 with stride 1. Below and to
            the right there are as many as it takes.
        act: `gelu_tanh`, the GELU by tanh (arXiv 1606.08415), or `silu`.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C), of `x`'s dtype. Sums run in float32 for 16-bit inputs. In bfloat16
        the kernels take the activation through the GPU's own tanh, which moves it by less than 6e-4 of its argument.

    Raises:
        ValueError: An argument's shape, dtype or value is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    _check(x, {"scale": scale, "shift": shift}, weight, stride, padding, act)
    if takes_triton("activated_conv", x, _unsupported, x):
        from densezoo.ops.mbconv.kernels import activated_conv_triton

        # torch.compile would store what has four axes as it likes convolutions to, rows innermost.
        tensors = (x.flatten(1, 2), scale, shift, weight)
        return _to_map(activated_conv_triton(*tensors, list(x.shape[1:3]), stride, list(padding), act), x, stride)
    tensors = (t.to(_accumulator(x)) for t in (x, scale, shift, weight))
    return activated_conv_reference(*tensors, stride, padding, act).to(x.dtype)


def activated_conv_mean(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (1, 1),
    act: str = "gelu_tanh",
) -> tuple[Tensor, Tensor]:
    """Add `bias` (C,) to the result of `activated_conv` and activate it again; return it with its mean over the map.

    For inference, where the norm after the convolution is part of its weight and bias: no gradients.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C), of `x`'s dtype, and (B, C), float32 (float64 of float64).

    Raises:
        ValueError: An argument's shape, dtype or value is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    _check(x, {"scale": scale, "shift": shift, "bias": bias}, weight, stride, padding, act)
    with torch.no_grad():
        if takes_triton("activated_conv_mean", x, _unsupported, x):
            from densezoo.ops.mbconv.kernels import activated_conv_inference

            tensors = (x.flatten(1, 2), scale, shift, weight, bias)
            out, mean = activated_conv_inference(*tensors, list(x.shape[1:3]), stride, list(padding), act)
            return _to_map(out, x, stride), mean
        dtype = _accumulator(x)
        tensors = (t.to(dtype) for t in (x, scale, shift, weight))
        out = activate(activated_conv_reference(*tensors, stride, padding, act) + bias.to(dtype), act)
        return out.to(x.dtype), out.mean((1, 2))


def batch_norm_affine(norm: nn.BatchNorm2d, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a BatchNorm (arXiv 1502.03167) multiplies each channel by and what it then adds.

    In training these go by the statistics of `tokens`, which the norm takes into its running averages.

    Args:
        norm: With weight and bias, running averages and a momentum.
        tokens: (B, N, C).

    Returns:
        (C,) and (C,), in float32 for 16-bit parameters; gradients go to the norm's parameters and to `tokens`.
    """
    if norm.training:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            # As a map, which PyTorch reads with its channels innermost. Compiled, what is normalised is never made.
            _, mean, rstd = torch.ops.aten._native_batch_norm_legit(
                tokens.detach().mT.unsqueeze(-1), norm.weight, norm.bias, norm.running_mean, norm.running_var, True,
                norm.momentum, norm.eps,
            )  # fmt: skip
        mean, rstd = _Statistics.apply(tokens, mean, rstd)
    else:
        mean, rstd = norm.running_mean, (norm.running_var + norm.eps).rsqrt()
    # Not by the scale: Triton 3.6 fails on what torch.compile makes of that next to the statistics' own reduction.
    return norm.weight * rstd, norm.bias - norm.weight * (mean * rstd)


class _Statistics(torch.autograd.Function):
    """Mean and inverse deviation of tokens (B, N, C), known already, with their gradients."""

    @staticmethod
    def forward(ctx, tokens: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens, mean, rstd)
        return mean.clone(), rstd.clone()

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_rstd: Tensor) -> tuple[Tensor, None, None]:
        tokens, mean, rstd = ctx.saved_tensors
        count = tokens.numel() // tokens.shape[-1]
        slope = -grad_rstd * rstd**3 / count
        return torch.addcmul(grad_mean / count - slope * mean, tokens, slope).to(tokens.dtype), None, None


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _to_map(tokens: Tensor, x: Tensor, stride: int) -> Tensor:
    return tokens.unflatten(1, [-(-side // stride) for side in x.shape[1:3]])


def _check(x: Tensor, vectors: dict[str, Tensor], weight: Tensor, stride: int, padding: tuple, act: str) -> None:
    check_tensors(x=x, **vectors, weight=weight)
    if x.dim() != 4 or 0 in x.shape[1:] or not x.is_floating_point():
        raise ValueError(
            f"x: got {x.dtype} of shape {tuple(x.shape)}, expected floating (B, H, W, C), H, W and C not 0"
        )
    channels = x.shape[3]
    for name, t in (*vectors.items(), ("weight", weight)):
        expected = (channels, 1, 3, 3) if t is weight else (channels,)
        if t.shape != expected or t.device != x.device or not t.is_floating_point():
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, {t.dtype} on {t.device}, expected {expected}, a floating dtype "
                f"on {x.device}"
            )
    if stride not in (1, 2):
        raise ValueError(f"stride: got {stride!r}, expected 1 or 2")
    sides = padding if isinstance(padding, (tuple, list)) else ()
    if len(sides) != 2 or any(side not in (0, 1) for side in sides) or (stride == 1 and 0 in sides):
        raise ValueError(f"padding: got {padding!r}, expected 0 or 1 per axis, and 1 with stride 1")
    if act not in ACTS:
        raise ValueError(f"act: got {act!r}, expected one of {', '.join(ACTS)}")


def _unsupported(x: Tensor) -> str | None:
    """Return why the kernels cannot take `x`, or None where they can."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {x.dtype} (kernels: float16, bfloat16, float32)"
    return None
