"""The middle of an inverted bottleneck: the reference against torch's modules, the kernels against it in float64."""

import pytest
import torch
import torch.nn.functional as F
from densezoo.ops import set_backend
from densezoo.ops.mbconv import activated_conv, activated_conv_mean
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

cuda = torch.cuda.is_available()


def inputs(*shape, dtype=torch.float64, device="cpu"):
    """Return a map that is a view of a wider one, scale, shift, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*shape[:3], 2 * shape[3]), shape[3:], shape[3:], (shape[3], 1, 3, 3), shape[3:])
    x, *others = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    return [t.to(device, dtype) for t in (x[..., shape[3] :], *others)]


def error(got, expected):
    """Return the relative RMS error; NaN counts as infinite."""
    value = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return value if value == value else float("inf")


def results(tensors, **options):
    """Return the output, each gradient, and the output and mean for inference."""
    leaves = [t.detach().requires_grad_() for t in tensors[:4]]
    out = activated_conv(*leaves, **options)
    # NaN follows in memory, so that what a kernel reads beyond the gradient shows.
    grad = torch.full((2 * out.numel(),), torch.nan, dtype=out.dtype, device=out.device)[: out.numel()].view(out.shape)
    grad.copy_(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad), *activated_conv_mean(*tensors, **options)]


@pytest.mark.parametrize("act, module", [("gelu_tanh", nn.GELU(approximate="tanh")), ("silu", nn.SiLU())])
def test_reference_is_the_modules(act, module):
    for height, width in ((6, 9), (1, 2)):
        x, scale, shift, weight, bias = inputs(2, height, width, 5)
        norm = nn.BatchNorm2d(5, eps=0).double().eval()
        norm.load_state_dict(norm.state_dict() | dict(weight=scale, bias=shift))
        y = module(norm(x.permute(0, 3, 1, 2)))
        expected = F.conv2d(y, weight, padding=1, groups=5)
        torch.testing.assert_close(activated_conv(x, scale, shift, weight, act=act).permute(0, 3, 1, 2), expected)
        expected = F.conv2d(y, weight, stride=2, padding=1, groups=5)
        out = activated_conv(x, scale, shift, weight, stride=2, act=act).permute(0, 3, 1, 2)
        torch.testing.assert_close(out, expected)
        expected = F.conv2d(F.pad(y, (0, 1 + width % 2, 0, 1 + height % 2)), weight, stride=2, groups=5)
        out = activated_conv(x, scale, shift, weight, stride=2, act=act, padding=(0, 0)).permute(0, 3, 1, 2)
        torch.testing.assert_close(out, expected)
        expected = module(activated_conv(x, scale, shift, weight, act=act) + bias)
        out, mean = activated_conv_mean(x, scale, shift, weight, bias, act=act)
        torch.testing.assert_close((out, mean), (expected, expected.mean((1, 2))))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(3, 4, 8)}, r"x: got torch.float32 of shape \(3, 4, 8\)"),
        ({"x": torch.ones(1, 3, 0, 8)}, r"x: got torch.float32 of shape \(1, 3, 0, 8\)"),
        ({"scale": None}, "scale: got NoneType, expected a tensor"),
        ({"scale": torch.ones(7)}, r"scale: got shape \(7,\)"),
        ({"scale": torch.ones(8, dtype=torch.int64)}, r"scale: got shape \(8,\), torch.int64 on cpu"),
        ({"shift": torch.ones(7)}, r"shift: got shape \(7,\)"),
        ({"weight": torch.ones(8, 1, 5, 5)}, r"weight: got shape \(8, 1, 5, 5\)"),
        ({"stride": 3}, "stride: got 3"),
        ({"padding": (0, 1)}, r"padding: got \(0, 1\)"),
        ({"padding": 1}, "padding: got 1"),
        ({"act": "relu"}, "act: got 'relu', expected one of gelu_tanh, silu"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = dict(x=torch.ones(1, 3, 4, 8), scale=torch.ones(8), shift=torch.ones(8), weight=torch.ones(8, 1, 3, 3))
    with pytest.raises(ValueError, match=message):
        activated_conv(**arguments | change)


# Whole and cut strips, pieces of rows, odd and even sides, both ways of padding.
CASES = [
    ((1, 7, 9, 20), dict(stride=2, padding=(0, 0))),
    ((2, 9, 8, 12), {}),
    ((1, 15, 7, 8), {"act": "silu"}),
    ((2, 16, 14, 8), {"stride": 2, "padding": (0, 0)}),
    ((2, 6, 18, 8), {"stride": 2, "act": "silu"}),
    ((1, 7, 9, 20), {"stride": 2}),
    ((1, 5, 16, 4), {"stride": 2, "padding": (1, 0)}),
    ((1, 1, 1, 3), {"stride": 2}),
    ((3, 1, 2, 3), {}),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_empty_batch(device):
    if device == "cpu" and cuda:
        pytest.skip("the kernels run on the GPU")
    set_backend("triton")
    got = results(inputs(0, 5, 6, 4, dtype=torch.float32, device=device), stride=2)
    assert got[0].shape == (0, 3, 3, 4)
    assert not any(t.any() for t in got)


@pytest.mark.parametrize("shape, options", CASES, ids=str)
@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_kernels_interpreted(shape, options):
    tensors = inputs(*shape, dtype=torch.float32)
    set_backend("triton")
    got = results(tensors, **options)
    set_backend("reference")
    expected = results([t.double() for t in tensors], **options)
    assert max(map(error, got, expected)) < 1e-6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operator_contract(device):
    import densezoo.ops.mbconv.kernels  # noqa: F401  (registers the operators)

    if device == "cpu" and cuda:
        pytest.skip("the kernels run on the GPU")
    x, *others, bias = inputs(1, 3, 5, 8, dtype=torch.float32, device=device)
    leaves = [t.detach().requires_grad_() for t in (x.flatten(1, 2), *others)]
    options = ([3, 5], 2, [1, 1], "gelu_tanh")
    torch.library.opcheck(torch.ops.densezoo.activated_conv, (*leaves, *options))
    tensors = [t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.densezoo.activated_conv_inference, (*tensors, bias, *options))
    out = torch.ops.densezoo.activated_conv(*tensors, *options)
    args = (torch.ones_like(out), *tensors, out)
    # opcheck leaves out what the compiler asserts: strides.
    with FakeTensorMode() as mode:
        fake = torch.ops.densezoo.activated_conv_backward(*map(mode.from_tensor, args), *options)
    got = torch.ops.densezoo.activated_conv_backward(*args, *options)
    assert [t.stride() for t in got] == [t.stride() for t in fake]


GPU_CASES = [
    ((16, 112, 112, 64), {"stride": 2, "padding": (0, 0)}),
    ((16, 56, 56, 256), {}),
    ((8, 14, 14, 1024), {"stride": 2, "padding": (0, 0)}),
    ((64, 7, 7, 512), {}),
    ((2, 75, 101, 96), {"stride": 2}),
    ((2, 64, 96, 40), {"stride": 2, "act": "silu"}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape, options", CASES + GPU_CASES, ids=str)
def test_kernels(shape, options, dtype, allowed, nan_filled_memory):
    tensors = inputs(*shape, dtype=dtype, device="cuda")
    set_backend("triton")
    got, again = (results(tensors, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    set_backend("reference")
    expected = results([t.double() for t in tensors], **options)
    assert max(map(error, got, expected)) < allowed


@pytest.mark.gpu
def test_beyond_32_bits():
    x = torch.randn(700, 56, 56, 1024, device="cuda", dtype=torch.bfloat16)
    _, scale, shift, weight, _ = inputs(1, 1, 1, 1024, dtype=torch.float32, device="cuda")
    assert x.numel() > 2**31
    set_backend("triton")
    out = activated_conv(x, scale, shift, weight)
    set_backend("reference")
    assert error(out[-1:], activated_conv(x[-1:].double(), scale, shift, weight)) < 1e-2


@pytest.mark.gpu
def test_cuda_graph():
    x, *others = inputs(2, 7, 9, 32, dtype=torch.float32, device="cuda")
    activated_conv_mean(x, *others)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = activated_conv_mean(x, *others)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(out, activated_conv_mean(x, *others))
