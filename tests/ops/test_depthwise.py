"""Depthwise convolution: the reference against torch's own, the kernels against it in float64."""

import pytest
import torch
import torch.nn.functional as F
from densezoo.ops import depthwise_conv, set_backend
from densezoo.ops.depthwise import DepthwiseConv
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

cuda = torch.cuda.is_available()


def inputs(*shape, size=3, dtype=torch.float64, device="cpu", seed=0):
    """Return a map that is a view of a wider one, a weight and a bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape[:3], 2 * shape[3], generator=generator, dtype=torch.float64)[..., shape[3] :]
    weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((shape[3], 1, size, size), shape[3:])
    )
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def error(got, expected):
    """Return the relative RMS error; NaN counts as infinite."""
    value = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return value if value == value else float("inf")


def gradients(tensors, **kwargs):
    """Return the output and the gradient of each of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = depthwise_conv(*leaves, **kwargs)
    # NaN follows in memory, so that what a kernel reads beyond the gradient shows.
    grad = torch.full((2 * out.numel(),), torch.nan, dtype=out.dtype, device=out.device)[: out.numel()].view(out.shape)
    grad.copy_(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("window_size", [(None, None), (3, None), (None, 4), (2, 3), (9, 9)], ids=str)
def test_reference_is_a_convolution_of_each_window(size, window_size):
    x, weight, bias = inputs(2, 7, 9, 4, size=size)
    rows, cols = (side or 9 for side in window_size)
    expected = torch.empty_like(x)
    for top in range(0, 7, rows):
        for left in range(0, 9, cols):
            part = x[:, top : top + rows, left : left + cols].permute(0, 3, 1, 2)
            part = F.conv2d(part, weight, bias, padding=size // 2, groups=4).permute(0, 2, 3, 1)
            expected[:, top : top + rows, left : left + cols] = part
    torch.testing.assert_close(depthwise_conv(x, weight, bias, window_size=window_size), expected)
    out = depthwise_conv(x, weight, bias, window_size=window_size, residual=True, gelu=True)
    torch.testing.assert_close(out, F.gelu(x + expected))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(3, 4, 8)}, r"x: got shape \(3, 4, 8\)"),
        ({"x": torch.ones(1, 3, 4, 8, dtype=torch.int32)}, "x: got torch.int32"),
        ({"x": torch.ones(1, 0, 4, 8)}, r"x: got shape \(1, 0, 4, 8\)"),
        ({"weight": None}, "weight: got NoneType, expected a tensor"),
        ({"weight": torch.ones(8, 8, 3, 3)}, r"weight: got shape \(8, 8, 3, 3\)"),
        ({"weight": torch.ones(8, 1, 4, 4)}, "weight: got size 4, expected an odd one"),
        ({"weight": torch.ones(8, 1, 3, 3, dtype=torch.float64)}, "weight: got torch.float64"),
        ({"bias": torch.ones(7)}, r"bias: got shape \(7,\), expected \(8,\)"),
        ({"window_size": (0, None)}, r"window_size: got \(0, None\)"),
        ({"window_size": (2.5, 2)}, r"window_size: got \(2.5, 2\)"),
        ({"window_size": 3}, "window_size: got 3"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"x": torch.ones(1, 3, 4, 8), "weight": torch.ones(8, 1, 3, 3), "bias": torch.ones(8)}
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**arguments | change)


def test_module_is_a_conv2d_over_maps():
    module, conv = DepthwiseConv(6, 5, gelu=True), nn.Conv2d(6, 6, 5, padding=2, groups=6)
    conv.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(module(x), F.gelu(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)), atol=0, rtol=0)
    assert DepthwiseConv(6, bias=False)(x).shape == x.shape


def test_autocast_keeps_a_residual():
    module, x = DepthwiseConv(4, residual=True), torch.randn(1, 3, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.float32
        assert depthwise_conv(x, module.weight, module.bias).dtype == torch.bfloat16
    torch.testing.assert_close(module(x), x + depthwise_conv(x, module.weight, module.bias))


# Shape, size, options: whole and cut strips, pieces of rows, windows that do and do not divide the map.
CASES = [
    ((2, 9, 8, 12), 3, {"residual": True}),
    ((1, 15, 7, 8), 3, {"gelu": True}),
    ((2, 7, 5, 20), 3, {"window_size": (3, 2)}),
    ((1, 8, 9, 4), 5, {"window_size": (None, 4)}),
    ((1, 8, 9, 4), 7, {"window_size": (None, 4)}),
    ((1, 2, 1, 3), 5, {}),
    ((1, 5, 6, 4), 7, {"residual": True, "gelu": True}),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_empty_batch(device):
    if device == "cpu" and cuda:
        pytest.skip("the kernels run on the GPU")
    set_backend("triton")
    got = gradients(inputs(0, 5, 6, 4, dtype=torch.float32, device=device), gelu=True)
    assert got[0].shape == (0, 5, 6, 4)
    assert not got[2].any() and not got[3].any()


@pytest.mark.parametrize("shape, size, options", CASES, ids=str)
@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_kernels_interpreted(shape, size, options):
    tensors = inputs(*shape, size=size, dtype=torch.float32)
    set_backend("triton")
    got = gradients(tensors, **options)
    set_backend("reference")
    expected = gradients([t.double() for t in tensors], **options)
    assert max(map(error, got, expected)) < 1e-6


@pytest.mark.parametrize("options", [{}, {"gelu": True}], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradient_that_is_a_part_of_the_channels(device, options):
    if device == "cpu" and cuda:
        pytest.skip("the kernels run on the GPU")
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        set_backend(backend)
        tensors = [t.to(dtype).requires_grad_() for t in inputs(2, 5, 7, 12, device=device)]
        whole = torch.cat([tensors[0], depthwise_conv(*tensors, **options)], -1)
        grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        results.append(torch.autograd.grad(whole, tensors, grad))
    assert max(map(error, *results)) < 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operator_contract(device):
    import densezoo.ops.depthwise.kernels  # noqa: F401  (registers the operator)

    if device == "cpu" and cuda:
        pytest.skip("the kernels run on the GPU")
    for bias, window, options in ((True, [0, 0], (True, False, False)), (False, [2, 0], (False, True, True))):
        tensors = inputs(1, 3, 5, 8, dtype=torch.float32, device=device)
        tensors, options = (tensors[0].flatten(1, 2), *tensors[1:]), ([3, 5], window, *options)
        leaves = [t.detach().requires_grad_() for t in tensors]
        leaves, tensors = ((*ts[:2], ts[2] if bias else None) for ts in (leaves, tensors))
        torch.library.opcheck(torch.ops.densezoo.depthwise_conv, (*leaves, *options))
        out, before = (t.detach() for t in torch.ops.densezoo.depthwise_conv(*leaves, *options))
        args = (torch.ones_like(out), *tensors, out, before)
        # opcheck leaves out what the compiler asserts: strides.
        with FakeTensorMode() as mode:
            fakes = (t if t is None else mode.from_tensor(t) for t in args)
            fake = torch.ops.densezoo.depthwise_conv_backward(*fakes, *options)
        got = torch.ops.densezoo.depthwise_conv_backward(*args, *options)
        assert [t.stride() for t in got] == [t.stride() for t in fake]


GPU_CASES = [
    ((128, 14, 14, 384), 3, {"residual": True}),
    ((256, 7, 7, 512), 3, {"gelu": True}),
    ((2, 200, 304, 96), 3, {"gelu": True}),
    ((3, 56, 56, 64), 5, {}),
    ((2, 14, 14, 128), 3, {"window_size": (None, 7)}),
    ((1, 37, 41, 40), 7, {"window_size": (8, 8)}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape, size, options", CASES + GPU_CASES, ids=str)
def test_kernels(shape, size, options, dtype, allowed, nan_filled_memory):
    tensors = inputs(*shape, size=size, dtype=dtype, device="cuda")
    set_backend("triton")
    got, again = (gradients(tensors, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    set_backend("reference")
    expected = gradients([t.double() for t in tensors], **options)
    assert max(map(error, got, expected)) < allowed


@pytest.mark.gpu
def test_beyond_32_bits():
    x = torch.randn(700, 56, 56, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1024, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    set_backend("triton")
    out = depthwise_conv(x, weight)
    set_backend("reference")
    assert error(out[-1:], depthwise_conv(x[-1:].double(), weight.double())) < 1e-2


@pytest.mark.gpu
def test_compile_knows_one_graph_for_all_batches():
    counter = CompileCounterWithBackend("inductor")
    module = DepthwiseConv(64, residual=True, gelu=True).cuda()
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 9, 11, 64, device="cuda", requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            out, expected = compiled(x), module(x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected)))
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_cuda_graph():
    module, x = DepthwiseConv(32).cuda(), torch.randn(2, 7, 9, 32, device="cuda")
    with torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(out, module(x))
