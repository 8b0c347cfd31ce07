"""Cases for tools/benchmark.py of what stands around attention: convolutions, MLPs, norms, pooling with norms."""

from collections.abc import Iterator
from functools import partial

import torch
from _benchmark_cases import Case, reference_ways, worst_error
from densezoo.ops import activated_conv, depthwise_conv, layer_norm, mlp, pool_mix
from densezoo.ops.depthwise.reference import depthwise_conv_reference
from densezoo.ops.mbconv.reference import activated_conv_reference
from densezoo.ops.pooling import add_branch
from densezoo.ops.pooling.reference import pool_mix_reference

# Shapes, sizes and options: DaViT-T's encodings, PVTv2's MLPs and FLatten's values at 224, DaViT-T's first at 800x1216.
DEPTHWISE = [
    *(((128, side, side, dim), 3, (True, False)) for side, dim in ((56, 96), (28, 192), (14, 384), (7, 768))),
    *(((128, side, side, dim), 3, (False, True)) for side, dim in ((56, 512), (28, 1024), (14, 1280), (7, 2048))),
    *(((128, side, side, dim), 5, (False, False)) for side, dim in ((56, 64), (28, 128))),
    ((2, 200, 304, 96), 3, (True, False)),
]


def depthwise_conv_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Depthwise convolutions with what stands around them: a residual or GELU."""
    for shape, size, (residual, gelu) in DEPTHWISE:
        dim = shape[-1]
        inputs = [torch.randn(s, device=device, dtype=dtype) for s in (shape, (dim, 1, size, size), (dim,))]

        def run(x, weight, bias, residual=residual, gelu=gelu):
            return depthwise_conv(x, weight, bias, residual=residual, gelu=gelu)

        def reference(x, weight, bias, residual=residual, gelu=gelu):
            return depthwise_conv_reference(x, weight, bias, (None, None), residual, gelu)

        ways = {"densezoo": run, **reference_ways(reference)}
        check = partial(worst_error, run, [inputs[0][:1], *inputs[1:]])
        extra = " + x" if residual else " and GELU" if gelu else ""
        name = f"depthwise_conv {size}x{size}{extra} {shape[0]}, {shape[1]}x{shape[2]}x{dim}"
        yield Case(name, inputs, ways, check)


def mlp_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """MLPs as compiled graphs train them: the first stages of NAT-T and DaViT-T, at 224 and at 800x1216."""
    shapes = [(128, 56, 56, 64, 192), (128, 28, 28, 128, 384), (128, 14, 14, 256, 768)]
    shapes += [(128, 56, 56, 96, 384), (128, 28, 28, 192, 768)]
    shapes += [(2, 200, 304, 64, 192), (2, 100, 152, 128, 384), (2, 50, 76, 256, 768)]
    shapes += [(2, 200, 304, 96, 384), (2, 100, 152, 192, 768)]
    for *size, dim, hidden in shapes:
        shapes_of_inputs = ((*size, dim), (hidden, dim), (hidden,), (dim, hidden), (dim,))
        x, weight1, bias1, weight2, bias2 = (torch.randn(s, device=device, dtype=dtype) for s in shapes_of_inputs)
        inputs = (x, weight1 / dim**0.5, bias1, weight2 / hidden**0.5, bias2)

        def reference(x, weight1, bias1, weight2, bias2):
            linear, gelu = torch.nn.functional.linear, torch.nn.functional.gelu
            return linear(gelu(linear(x, weight1, bias1)), weight2, bias2)

        ways = {"densezoo": torch.compile(mlp, dynamic=False), **reference_ways(reference)}
        check = partial(worst_error, mlp, [x[:1], *inputs[1:]])
        yield Case(f"mlp {size[0]}, {size[1]}x{size[2]}x{dim} to {hidden}", inputs, ways, check)


def activated_conv_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The middle of MaxViT-T's inverted bottlenecks at 224, and of the first at 800x1216."""
    shapes = [((128, 7 * 2**i, 7 * 2**i, 2 ** (12 - i)), 2) for i in (4, 3, 2, 1)]
    shapes += [((128, 7 * 2**i, 7 * 2**i, 2 ** (11 - i)), 1) for i in (3, 2, 1, 0)]
    for shape, stride in [*shapes, ((2, 400, 608, 256), 2)]:
        dim, padding = shape[-1], (2 - stride, 2 - stride)
        sizes = (shape, (dim,), (dim,), (dim, 1, 3, 3))
        inputs = [torch.randn(s, device=device, dtype=dtype) for s in sizes]

        def run(x, scale, shift, weight, stride=stride, padding=padding):
            return activated_conv(x, scale, shift, weight, stride=stride, padding=padding)

        def reference(x, scale, shift, weight, stride=stride, padding=padding):
            return activated_conv_reference(x, scale, shift, weight, stride, padding, "gelu_tanh")

        ways = {"densezoo": run, **reference_ways(reference)}
        check = partial(worst_error, run, [inputs[0][:1], *inputs[1:]])
        name = f"activated_conv stride {stride} {shape[0]}, {shape[1]}x{shape[2]}x{dim}"
        yield Case(name, inputs, ways, check)


def layer_norm_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Layer norm: DaViT-T's stages at 224, and the first at 800x1216; the kernel is the backward of compiled graphs."""
    shapes = [(128, 56, 56, 96), (128, 28, 28, 192), (128, 14, 14, 384), (128, 7, 7, 768), (2, 200, 304, 96)]
    for batch, height, width, dim in shapes:
        x = torch.randn(batch, height, width, dim, device=device, dtype=dtype)
        inputs = (x, torch.rand(dim, device=device) + 0.5, torch.randn(dim, device=device))

        def reference(x, weight, bias):
            return torch.nn.functional.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype))

        ways = {"densezoo": torch.compile(layer_norm, dynamic=False), **reference_ways(reference)}
        check = partial(worst_error, layer_norm, [x[:1], *inputs[1:]])
        yield Case(f"layer_norm {batch}, {height}x{width}x{dim}", inputs, ways, check)


def pool_mix_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """A PoolFormer block but its MLP: the stages of PoolFormer-S12 at 224, and the first at 800x1216."""
    shapes = [(128, 56, 56, 64), (128, 28, 28, 128), (128, 14, 14, 320), (128, 7, 7, 512), (2, 200, 304, 64)]
    for batch, height, width, dim in shapes:
        x = torch.randn(batch, height, width, dim, device=device, dtype=dtype)
        inputs = (x, *(torch.rand(5, dim, device=device, dtype=dtype) + 0.5).unbind())

        def run(x, layer_scale, weight, next_weight, next_bias, bias):
            mixed, normed = pool_mix(x, weight, None, next_weight, next_bias, layer_scale=layer_scale)
            return add_branch(mixed, normed, bias)

        def reference(x, layer_scale, weight, next_weight, next_bias, bias):
            mixed, normed = pool_mix_reference(x, (weight, None, next_weight, next_bias), 1e-5, layer_scale, None)
            return mixed + (normed + bias)

        ways = {"densezoo": torch.compile(run, dynamic=False), **reference_ways(reference)}
        check = partial(worst_error, run, [x[:1], *inputs[1:]])
        yield Case(f"pool_mix {batch}, {height}x{width}x{dim}", inputs, ways, check)
