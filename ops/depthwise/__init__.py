"""Depthwise convolutions over channels-last maps, with what stands around them: bias, residual and GELU."""

import torch
from densezoo.ops.backend import takes_triton
from densezoo.ops.depthwise.reference import depthwise_conv_reference
from densezoo.ops.precision import autocast_dtype
from densezoo.ops.shapes import check_tensors
from torch import Tensor, nn

__all__ = ["DepthwiseConv", "depthwise_conv"]

SIZES = (3, 5, 7)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: tuple[int | None, int | None] = (None, None),
    residual: bool = False,
    gelu: bool = False,
) -> Tensor:
    """Convolve each channel of a map with its own kernel, at stride 1, zero-padded to the map's size.

    Under autocast `x` is cast to autocast's dtype, as a convolution's input is, but with `residual` it keeps its own:
    the kernel then reads and writes a float32 map once, where PyTorch makes passes to cast it, to add the bias and to
    add the map.

    Args:
        x: (B, H, W, C), float16, bfloat16, float32 or float64, any strides.
        weight: (C, 1, size, size), with an odd size, of `x`'s dtype unless autocast is on.
        bias: (C,), as `weight`.
        window_size: Rows and columns of the windows that the map is cut into; a convolution sees zeros beyond its own.
            None for the whole side. The last window is narrower where they do not divide the map.
        residual: Whether to add `x`.
        gelu: Whether to apply the exact GELU (arXiv 1606.08415) at last.

    Returns:
        (B, H, W, C), of `x`'s dtype or autocast's. The kernels compute in float32, with `weight` and `bias` as they
        are, and take the GELU of bfloat16 through the GPU's own tanh, which moves it by less than 6e-4 of its argument.

    Raises:
        ValueError: An argument's shape, dtype or device is wrong; the message names it.
        RuntimeError: The backend is set to `triton` and the kernels cannot run on these inputs.
    """
    dtype = autocast_dtype(x)
    _check(x, weight, bias, window_size, dtype is not None)
    if takes_triton("depthwise_conv", x, _unsupported, x, weight):
        from densezoo.ops.depthwise.kernels import depthwise_conv_triton

        if dtype and not residual:
            x = x.to(dtype)
        return depthwise_conv_triton(x, weight, bias, window_size, residual, gelu)
    return depthwise_conv_reference(x, weight, bias, window_size, residual, gelu)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, window_size: tuple, is_autocast: bool) -> None:
    check_tensors(x=x, weight=weight)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, H, W, C), H, W and C not 0")
    if not x.is_floating_point():
        raise ValueError(f"x: got {x.dtype}, expected a floating dtype")
    if weight.dim() != 4 or weight.shape[:2] != (x.shape[3], 1) or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected (C, 1, size, size) with C = {x.shape[3]} channels of x"
        )
    if weight.shape[3] % 2 == 0:
        raise ValueError(f"weight: got size {weight.shape[3]}, expected an odd one")
    if bias is not None:
        check_tensors(bias=bias)
        if bias.shape != x.shape[3:]:
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({x.shape[3]},)")
    sides = window_size if isinstance(window_size, (tuple, list)) else ()
    # A free size of an exported graph is no int.
    are_sizes = (side is None or (isinstance(side, (int, torch.SymInt)) and side >= 1) for side in sides)
    if len(sides) != 2 or not all(are_sizes):
        raise ValueError(f"window_size: got {window_size!r}, expected (rows, columns) from 1, or None for a whole side")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.device != x.device or not (is_autocast or t.dtype == x.dtype)):
            raise ValueError(
                f"{name}: got {t.dtype} on {t.device}, expected x's: {x.dtype} on {x.device} (or any dtype in autocast)"
            )


def _unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Return why the kernels cannot take these inputs, or None where they can."""
    for t in (x, weight):
        if t.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"dtype {t.dtype} (kernels: float16, bfloat16, float32)"
    if weight.shape[-1] not in SIZES:
        return f"size {weight.shape[-1]} (kernels: {', '.join(map(str, SIZES))})"
    return None


class DepthwiseConv(nn.Conv2d):
    """nn.Conv2d's parameters of a depthwise convolution, applied to a map (B, H, W, dim) by `depthwise_conv`.

    Args:
        dim: Channels.
        kernel_size: Odd; the map is padded to keep its size.
        bias: Whether there is one.
        window_size: As that of `depthwise_conv`.
        residual: Whether to add the map.
        gelu: Whether to apply GELU at last.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        bias: bool = True,
        *,
        window_size: tuple[int | None, int | None] = (None, None),
        residual: bool = False,
        gelu: bool = False,
    ):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias)
        self.options = {"window_size": window_size, "residual": residual, "gelu": gelu}

    def forward(self, input: Tensor) -> Tensor:
        """Return a map of the shape of `input`."""
        return depthwise_conv(input, self.weight, self.bias, **self.options)
