"""The MLP: its kernels against Linear, GELU and Linear, alone, compiled and under autocast, and when it takes them."""

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from densezoo.ops import get_backend, mlp, set_backend
from densezoo.ops.mlp import Mlp
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

cuda = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GELUS = ["none", "tanh"]
# Shape of x, hidden width, output width: whole tiles, edges of rows, depth and columns, several steps of each.
CASES = [((2, 9, 7, 64), 192, 64), ((300, 33), 70, 20), ((1, 96), 384, 96), ((0, 16), 32, 16), ((140, 256), 300, 64)]
GPU_CASES = [
    ((128, 28, 28, 128), 384, 128), ((5, 56, 56, 96), 384, 96), ((3, 14, 14, 320), 1280, 320), ((1, 512), 2048, 512),
    ((256, 7, 7, 768), 3072, 768), ((50, 1000), 333, 10),
]  # fmt: skip


@pytest.fixture(autouse=True)
def restore_backend():
    before = get_backend()
    yield
    set_backend(before)


@pytest.fixture
def nan_filled_memory():
    """Fill uninitialised memory with NaN, so that an element which a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def error(got, expected):
    """Return the relative RMS error; NaN counts as infinite."""
    if not expected.any():
        return got.abs().sum().item()
    value = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return value if value == value else float("inf")


def inputs(case, dtype=torch.float64, device="cpu"):
    """Return x, weights and biases as a network has them."""
    (*_, dim), hidden, out = case
    generator = torch.Generator().manual_seed(0)
    shapes = (case[0], (hidden, dim), (hidden,), (out, hidden), (out,))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn[1], drawn[3] = drawn[1] / dim**0.5, drawn[3] / hidden**0.5
    return [t.to(device, dtype) for t in drawn]


def plain(x, weight1, bias1, weight2, bias2, approximate="none"):
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate=approximate), weight2, bias2)


def results(function, tensors, **options):
    """Return the output without gradients, that with them, and the gradient of each of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.no_grad():
        first = function(*leaves, **options)
    out = function(*leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [first, out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))]


def check_kernels(case, approximate, dtype, allowed, device):
    tensors = inputs(case, dtype, device)
    set_backend("triton")
    got, again = (results(mlp, tensors, approximate=approximate) for _ in range(2))
    assert all(map(torch.equal, got, again)), "two runs differ"
    expected = results(plain, [t.double() for t in tensors], approximate=approximate)
    for one, want in zip(got, expected, strict=True):
        assert one.shape == want.shape and one.dtype == dtype
        assert error(one, want) < allowed


@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("approximate", GELUS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_interpreted(case, approximate, dtype, allowed):
    check_kernels(case, approximate, dtype, allowed, "cpu")


@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
@pytest.mark.parametrize("rows, cols, depth, programs", [(16, 32, 16, 0), (32, 32, 16, 2), (32, 32, 128, 2)])
def test_launch_settings(rows, cols, depth, programs, monkeypatch):
    """Tiles of any size, each with a program or several to one, give the same."""
    from densezoo.ops.mlp import kernels

    launch = {
        key: s._replace(rows=rows, cols=cols, depth=depth, programs=programs) for key, s in kernels.LAUNCH.items()
    }
    monkeypatch.setattr(kernels, "LAUNCH", launch)
    kernels._plan.cache_clear()
    try:
        check_kernels(((70, 24), 40, 24), "none", torch.float32, 1e-6, "cpu")
    finally:
        kernels._plan.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("approximate", GELUS)
@pytest.mark.parametrize("case", CASES + GPU_CASES, ids=str)
def test_kernels(case, approximate, dtype, allowed, nan_filled_memory):
    check_kernels(case, approximate, dtype, allowed, "cuda")


@pytest.mark.gpu
def test_more_than_2_31_elements():
    tensors = inputs(((1, 64), 256, 64), torch.bfloat16, "cuda")
    x = torch.randn(2**31 // 256 + 5000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = mlp(x, *tensors[1:])
    (grad,) = torch.autograd.grad(out, x, x.detach())
    tail = x.detach()[-4000:].double().requires_grad_()
    expected = plain(tail, *(t.double() for t in tensors[1:]))
    (expected_grad,) = torch.autograd.grad(expected, tail, tail.detach())
    assert error(out[-4000:], expected) < 1e-2 and error(grad[-4000:], expected_grad) < 1e-2
    with torch.no_grad():
        assert error(mlp(x, *tensors[1:])[-4000:], expected) < 1e-2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", ["permuted", "sliced", "weights"])
def test_strides(view, device):
    tensors = inputs(((2, 6, 5, 24), 40, 16), torch.float32, device)
    expected = results(plain, [t.double() for t in tensors])
    set_backend("triton")
    if view == "permuted":
        tensors[0] = tensors[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif view == "sliced":
        tensors[0] = F.pad(tensors[0], (0, 8))[..., :24]
    else:
        tensors[1], tensors[3] = (t.t().contiguous().t() for t in (tensors[1], tensors[3]))
    for got, want in zip(results(mlp, tensors), expected, strict=True):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_operator_contract(device):
    from densezoo.ops.mlp import kernels  # noqa: F401  (defines the operators)

    x, weight1, bias1, weight2, _ = inputs(((30, 24), 40, 24), torch.float32, device)
    ops = torch.ops.densezoo
    torch.library.opcheck(ops.mlp_hidden.default, (x, weight1, bias1, "none"))
    torch.library.opcheck(ops.mlp_activated.default, (x, weight1, bias1, "tanh"))
    torch.library.opcheck(
        ops.mlp_hidden_backward.default, (x, weight2, ops.mlp_hidden(x, weight1, bias1, "none")[0], "none")
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [None, torch.float16], ids=str)
def test_compiles_without_a_break(device, autocast):
    """Compiled as eager, forward and backward, once for all batches, and autocast is the layers' own."""
    torch.manual_seed(0)
    theirs, ours = timm.layers.Mlp(32, 96).to(device), Mlp(32, 96).to(device)
    ours.load_state_dict(theirs.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=True)
    set_backend("triton")

    def run(module, batch):
        x = torch.randn(batch, 5, 7, 32, generator=torch.Generator().manual_seed(batch)).to(device).requires_grad_()
        with torch.autocast(device, autocast, enabled=autocast is not None):
            out = module(x)
        return [out, *torch.autograd.grad(out, [x, *module.parameters()], torch.ones_like(out))]

    for batch in (2, 3, 9):
        expected = run(theirs, batch)
        for module in (ours, compiled):
            for got, want in zip(run(module, batch), expected, strict=True):
                assert got.dtype == want.dtype
                assert error(got, want) < (1e-5 if autocast is None else 2e-3)
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_cuda_graphs_capture():
    tensors = [t.requires_grad_() for t in inputs(((8, 14, 14, 64), 192, 64), torch.bfloat16, "cuda")]
    expected = results(mlp, tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(mlp, tensors)
        out = mlp(*tensors)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grad = grad.to("cuda", out.dtype)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = mlp(*tensors)
            grads = torch.autograd.grad(out, tensors, grad)
    graph.replay()
    assert all(map(torch.equal, (out, *grads), expected[1:]))


@pytest.mark.parametrize("approximate", GELUS)
def test_elsewhere_it_is_timms(approximate):
    torch.manual_seed(0)
    act = lambda: nn.GELU(approximate)  # noqa: E731
    theirs, ours = timm.layers.Mlp(24, 50, act_layer=act), Mlp(24, 50, act_layer=act)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 24)
    assert torch.equal(ours(x), theirs(x))
    functional = mlp(x, *theirs.state_dict().values(), approximate=approximate)
    assert torch.equal(functional, theirs(x))
    assert Mlp(24, 50).to("meta")(torch.empty(2, 24, device="meta")).shape == (2, 24)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_was_put_in_its_layers_runs():
    """Layers that were replaced or have hooks, and other activations, are called."""
    set_backend("triton")
    x = torch.randn(5, 24)
    plain_one, other = Mlp(24, 50), Mlp(24, 50, act_layer=nn.ReLU)
    weights = [*plain_one.state_dict().values()]
    other.load_state_dict(plain_one.state_dict())
    torch.testing.assert_close(other(x), F.linear(F.relu(F.linear(x, *weights[:2])), *weights[2:]))
    seen = []
    handle = plain_one.fc1.register_forward_hook(lambda module, args, out: seen.append(out))
    expected = plain_one(x)
    torch.testing.assert_close(seen[0], F.linear(x, *weights[:2]))
    handle.remove()
    torch.testing.assert_close(plain_one(x), expected)
    assert len(seen) == 1
    replaced = Mlp(24, 50)
    replaced.fc2 = Doubled(50, 24)
    replaced.load_state_dict(plain_one.state_dict())
    torch.testing.assert_close(replaced(x), 2 * expected)


@pytest.mark.parametrize("name, index, shape", [("weight1", 1, (8, 5)), ("bias1", 2, (3,)), ("weight2", 3, (4, 9))])
def test_wrong_shapes_are_named(name, index, shape):
    tensors = inputs(((2, 4), 8, 4))
    tensors[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"^{name}: got shape"):
        mlp(*tensors)


def test_wrong_gelu():
    with pytest.raises(ValueError, match="approximate: got 'sigmoid'"):
        mlp(*inputs(((2, 4), 8, 4)), approximate="sigmoid")


def test_takes_the_reference_where_the_kernels_cannot_run():
    tensors = inputs(((2, 4), 8, 4))
    assert torch.equal(mlp(*tensors), plain(*tensors))
    set_backend("triton")
    with pytest.raises(RuntimeError, match="float64"):
        mlp(*tensors)
