"""Layer normalisation: its result and its one-pass backward against torch's, alone, compiled and under autocast."""

import pytest
import torch
import torch.nn.functional as F
from densezoo.ops import layer_norm, set_backend
from densezoo.ops.norm import LayerNorm, PreNorm
from torch._dynamo.testing import CompileCounterWithBackend

cuda = torch.cuda.is_available()
SHAPES = [(2, 3, 5, 96), (7, 8), (1, 1, 100), (3, 0, 16), (130, 33)]
GPU_SHAPES = [(2, 56, 56, 96), (1, 14, 14, 384), (5, 7, 7, 768), (300, 4096)]


def error(got, expected):
    """Return the relative RMS error; NaN counts as infinite."""
    if not expected.any():
        return got.abs().sum().item()
    value = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return value if value == value else float("inf")


def results(norm, shape, dtype, device="cpu"):
    """Return the norm's output, and the gradients of its inputs."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[-1:], shape[-1:], shape))
    x, weight, bias, grad = (t.to(device, dtype) for t in drawn)
    leaves = [(x + 3).requires_grad_(), weight.float().requires_grad_(), bias.float().requires_grad_()]
    if dtype == torch.float64:
        leaves[1:] = [t.detach().double().requires_grad_() for t in leaves[1:]]
    out = norm(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check_kernel(shape, dtype, allowed, device):
    expected = results(lambda x, w, b: F.layer_norm(x, w.shape, w, b), shape, torch.float64, device)
    set_backend("triton")
    for got, want in zip(results(layer_norm, shape, dtype, device), expected, strict=True):
        assert error(got, want) < allowed
        assert got.shape == want.shape


@pytest.mark.skipif(cuda, reason="the kernel runs on the GPU, in the tests below")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_interpreted(shape):
    check_kernel(shape, torch.float32, 2e-6, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES + GPU_SHAPES, ids=str)
def test_kernel(shape, dtype, allowed):
    check_kernel(shape, dtype, allowed, "cuda")


@pytest.mark.gpu
def test_more_than_2_31_elements():
    x = torch.randn(2**31 // 96 + 5000, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.rand(2, 96, device="cuda").unbind()
    set_backend("triton")
    layer_norm(x, weight, bias).backward(x.detach())
    got = x.grad[-4000:].clone()
    tail = x.detach()[-4000:].requires_grad_()
    F.layer_norm(tail.float(), (96,), weight, bias).backward(tail.detach().float())
    assert error(got, tail.grad) < 1e-2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, "x: got torch.int64"),
        ({"x": torch.ones(2, 0)}, r"x: got torch.float32 of shape \(2, 0\)"),
        ({"weight": torch.ones(2, 8)}, r"weight: got shape \(2, 8\), expected \(8,\)"),
        ({"bias": torch.ones(7)}, r"bias: got shape \(7,\)"),
        ({"bias": None}, "bias: got NoneType, expected a tensor"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, message):
    arguments = dict(x=torch.ones(2, 8), weight=torch.ones(8), bias=torch.ones(8)) | change
    with pytest.raises(ValueError, match=f"^{message}"):
        layer_norm(**arguments)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operator_contract(device):
    from densezoo.ops.norm import kernels  # noqa: F401  (defines the operator)

    x, grad = (torch.randn(3, 5, 24, device=device) for _ in range(2))
    rows = [torch.rand(3, 5, 1, device=device) for _ in range(2)]
    args = (grad, x, torch.rand(24, device=device), *rows)
    torch.library.opcheck(torch.ops.densezoo.layer_norm_backward.default, args)
    first, again = (torch.ops.densezoo.layer_norm_backward(*args) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_to_the_kernel(device):
    set_backend("triton")  # as `auto` does on a GPU
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer_norm, backend=counter, fullgraph=True)
    got, expected = (results(norm, (4, 6, 32), torch.float32, device) for norm in (compiled, layer_norm))
    torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("norm, dtype", [(LayerNorm, torch.float32), (PreNorm, torch.bfloat16)])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(device, backend, norm, dtype, is_compiled):
    """Under autocast a norm has the dtype of torch's, or of the projection after it; gradients have their leaves'."""
    set_backend(backend)
    norm = norm(32, device=device)
    x = torch.randn(4, 6, 32, device=device, requires_grad=True)
    grad = torch.randn_like(x)

    def run(module):
        with torch.autocast(device, torch.bfloat16):
            out = module(x)
        return [out, *torch.autograd.grad(out, [x, *norm.parameters()], grad.to(out.dtype))]

    out, *grads = run(torch.compile(norm, backend="aot_eager", fullgraph=True) if is_compiled else norm)
    expected, *expected_grads = run(lambda x: torch.nn.LayerNorm.forward(norm, x).to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == torch.float32
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("norm", [LayerNorm, PreNorm])
def test_shapes_are_known_without_data(norm):
    assert norm(32, device="meta")(torch.empty(4, 32, device="meta")).shape == (4, 32)


def test_takes_the_reference_where_the_kernel_cannot_run():
    x = torch.randn(2, 4, dtype=torch.float64)
    weight, bias = torch.rand(2, 4, dtype=torch.float64).unbind()
    assert torch.equal(layer_norm(x, weight, bias), F.layer_norm(x, (4,), weight, bias))
    set_backend("triton")
    with pytest.raises(RuntimeError, match="float64"):
        layer_norm(x, weight, bias)
