"""The MLP: its kernels against Linear, GELU and Linear, alone, compiled and under autocast, and when it takes them."""

import importlib
from functools import partial

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from densezoo.ops import mlp, set_backend
from densezoo.ops.mlp import Mlp
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

cuda = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GELUS = ["none", "tanh"]
# Shape of x, hidden width, output width: whole tiles, edges of rows and of all widths, several steps of the hidden.
NARROW = [((2, 9, 7, 64), 192, 64), ((300, 33), 70, 20), ((1, 96), 384, 96), ((0, 16), 32, 16), ((140, 128), 300, 64)]
TRAINED = [((40, 200), 100, 192), ((2, 7, 11, 256), 300, 256)]
WIDE = [((3, 5, 160), 300, 160), ((20, 64), 130, 192), ((0, 256), 16, 256)]
GPU_CASES = [
    ((128, 28, 28, 128), 384, 128), ((5, 56, 56, 96), 384, 96), ((3, 14, 14, 320), 1280, 320), ((1, 512), 2048, 512),
    ((256, 7, 7, 768), 3072, 768), ((50, 1000), 333, 10),
]  # fmt: skip


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


def check_kernels(case, approximate, dtype, allowed, device):
    tensors = inputs(case, dtype, device)
    set_backend("triton")
    with torch.no_grad():
        got, again = (mlp(*tensors, approximate=approximate) for _ in range(2))
    assert torch.equal(got, again), "two runs differ"
    expected = plain(*(t.double() for t in tensors), approximate)
    assert got.shape == expected.shape and got.dtype == dtype
    assert error(got, expected) < allowed


@pytest.mark.skipif(cuda, reason="the kernel runs on the GPU, in the tests below")
@pytest.mark.parametrize("approximate", GELUS)
@pytest.mark.parametrize("case", NARROW, ids=str)
def test_kernel_interpreted(case, approximate):
    check_kernels(case, approximate, torch.float16, 1e-3, "cpu")


@pytest.mark.parametrize("approximate", GELUS)
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_wide_in_bfloat16(case, approximate):
    check_kernels(case, approximate, torch.bfloat16, 1e-2, "cuda" if cuda else "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("approximate", GELUS)
@pytest.mark.parametrize("case", NARROW + WIDE + GPU_CASES, ids=str)
def test_kernels(case, approximate, dtype, allowed, nan_filled_memory):
    check_kernels(case, approximate, dtype, allowed, "cuda")


def gradients(function, tensors, seed=1):
    """Return the output of a function of tensors, and their gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))


def check_training(case, dtype, allowed, device):
    tensors = inputs(case, dtype, device)
    set_backend("triton")
    got, again = (gradients(mlp, tensors) for _ in range(2))
    expected = gradients(plain, [t.double() for t in tensors])
    for result, same, want in zip(got, again, expected, strict=True):
        assert torch.equal(result, same), "two runs differ"
        assert result.shape == want.shape and result.dtype == dtype
        assert error(result, want) < allowed


@pytest.fixture(params=["saved", "made again", "in parts"])
def way(request, monkeypatch):
    """Train with each way to have the hidden map in the backward."""
    module, kernels = (importlib.import_module(f"densezoo.ops.mlp{part}") for part in ("", ".kernels"))
    monkeypatch.setattr(module, "MADE_AGAIN", 128 if request.param == "made again" else 0)
    if request.param == "in parts":
        parts = {k: s._replace(span=64) if k[0] == "backward" else s for k, s in kernels.LAUNCH.items()}
        monkeypatch.setattr(kernels, "LAUNCH", parts)
    kernels._constants.cache_clear()
    yield request.param
    kernels._constants.cache_clear()


@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the test below")
@pytest.mark.parametrize("case", [*NARROW, *TRAINED], ids=str)
def test_training_interpreted(case, way):
    check_training(case, torch.float16, 2e-3, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    "case", [*NARROW, *TRAINED, *GPU_CASES[:2], ((3, 100, 152, 192), 768, 192), ((2, 50, 76, 256), 768, 256)], ids=str
)
def test_training(case, dtype, allowed, way, nan_filled_memory):
    check_training(case, dtype, allowed, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 192])
def test_training_with_more_than_2_31_elements(dim):
    tensors = inputs(((1, dim), 2 * dim, dim), torch.bfloat16, "cuda")
    x = torch.randn(2**31 // dim + 5000, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    set_backend("triton")
    out = mlp(x, *tensors[1:])
    (got,) = torch.autograd.grad(out, x, x.detach())
    tail = x.detach()[-4000:].double().requires_grad_()
    expected = plain(tail, *(t.double() for t in tensors[1:]))
    assert error(out[-4000:], expected) < 1e-2
    assert error(got[-4000:], *torch.autograd.grad(expected, tail, tail.detach())) < 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_training_falls_back(device, monkeypatch):
    """On GPUs with too little shared memory, at any of the launches."""
    from densezoo.ops.mlp import kernels

    class Lacking:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                raise kernels.OutOfResources(300_000, 200_000, "shared memory")

            return launch

    monkeypatch.setattr(kernels, "_whole", Lacking())
    monkeypatch.setattr(kernels, "_backward", Lacking())
    tensors = inputs(((50, 24), 40, 16), torch.float16, device)
    set_backend("triton")
    with pytest.raises(RuntimeError, match="mlp: cannot run on triton"):
        mlp(*tensors)
    # What a graph that was compiled before calls.
    set_backend("auto")
    expected = gradients(plain, [t.double() for t in tensors])
    x, weight1, bias1, weight2, bias2 = tensors
    out, hidden = kernels.mlp_training(*tensors)
    assert error(out, expected[0]) < 2e-3
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    for saved in (hidden, None):
        grad_x, grad_hidden, act, sums = kernels.mlp_backward(grad, x, weight1, bias1, weight2, saved)
        for got, want in zip(
            (grad_x, grad_hidden.t() @ x, sums[:40], grad.t() @ act, sums[40:]), expected[1:], strict=True
        ):
            assert error(got, want) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("value", [-30.0, 30.0, 1e4])
def test_far_from_zero(value):
    x = torch.full((4, 64), value, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.eye(64, device="cuda", dtype=torch.bfloat16), torch.zeros(64, device="cuda").bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(mlp(x, weight, bias, weight, bias), x.clamp(min=0), atol=2e-2, rtol=1e-2)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    tensors = inputs(((1, 64), 128, 64), torch.bfloat16, "cuda")
    x = torch.randn(2**31 // 64 + 5000, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        got = mlp(x, *tensors[1:])[-4000:]
    assert error(got, plain(*(t.double() for t in (x[-4000:], *tensors[1:])))) < 1e-2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", ["permuted", "sliced", "weights"])
@pytest.mark.parametrize("dim, dtype", [(24, torch.float16), (160, torch.bfloat16)])
def test_strides(view, dim, dtype, device):
    tensors = inputs(((2, 6, 5, dim), 40, 16), dtype, device)
    expected = plain(*(t.double() for t in tensors))
    set_backend("triton")
    if view == "permuted":
        tensors[0] = tensors[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif view == "sliced":
        tensors[0] = F.pad(tensors[0], (0, 8))[..., :dim]
    else:
        tensors[1], tensors[3] = (t.t().contiguous().t() for t in (tensors[1], tensors[3]))
    with torch.no_grad():
        assert error(mlp(*tensors), expected) < (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_operator_contract(device):
    from densezoo.ops.mlp import kernels  # noqa: F401  (defines the operators)

    tensors = inputs(((30, 24), 40, 16), torch.float16, device)
    torch.library.opcheck(torch.ops.densezoo.mlp_narrow.default, (*tensors, "none"))
    torch.library.opcheck(torch.ops.densezoo.mlp_hidden.default, tuple(t.bfloat16() for t in tensors[:3]))
    torch.library.opcheck(torch.ops.densezoo.mlp_training.default, tuple(tensors))
    x, weight1, bias1, weight2, _ = tensors
    for hidden in (torch.ones_like(x @ weight1.t()), None):
        args = (torch.ones_like(x[:, :16]), x, weight1, bias1, weight2, hidden)
        torch.library.opcheck(torch.ops.densezoo.mlp_backward.default, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim, dtype", [(32, torch.float16), (144, torch.bfloat16)])
def test_compiled_inference(device, dim, dtype):
    """Under autocast, without a break and once for all batches, to the operators that eager code calls."""
    torch.manual_seed(0)
    theirs, ours = timm.layers.Mlp(dim, 96).to(device), Mlp(dim, 96).to(device)
    ours.load_state_dict(theirs.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=True)
    set_backend("triton")
    for batch in (2, 3, 9):
        x = torch.randn(batch, 5, 7, dim, device=device)
        with torch.no_grad(), torch.autocast(device, dtype):
            expected, eager, got = theirs(x), ours(x), compiled(x)
        assert got.dtype == eager.dtype == expected.dtype == dtype
        assert torch.equal(got, eager)
        assert error(got, expected) < (2e-3 if dtype == torch.float16 else 1e-2)
    assert counter.frame_count == 1
    names = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum("densezoo.mlp_" in name for name in names) == 1


@pytest.mark.parametrize("dim", [32, 80])
@pytest.mark.parametrize(
    "device, dtype, allowed",
    [
        ("cpu", torch.float16, 2e-3),
        pytest.param("cuda", torch.float16, 2e-3, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 1e-2, marks=pytest.mark.gpu),
    ],
)
def test_compiled_training(dim, device, dtype, allowed):
    """Under autocast, without a break and once for all batches; the gradients are those of torch's layers."""
    torch.manual_seed(0)
    theirs, ours = timm.layers.Mlp(dim, 96).to(device), Mlp(dim, 96).to(device)
    ours.load_state_dict(theirs.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=True)
    set_backend("triton")

    def run(module, layers, x, grad):
        with torch.autocast(device, dtype):
            out = module(x)
        return out, *torch.autograd.grad(out, [x, *layers.parameters()], grad.to(out.dtype))

    for batch in (2, 3, 9):
        x, grad = (torch.randn(batch, 5, 7, dim, device=device) for _ in range(2))
        x.requires_grad_()
        out, *expected = run(theirs, theirs, x, grad)
        eager, got = run(ours, ours, x, grad), run(compiled, ours, x, grad)
        assert got[0].dtype == out.dtype
        assert all(map(torch.equal, got, eager))
        for result, want in zip(got, (out, *expected), strict=True):
            assert result.dtype == want.dtype
            assert error(result, want) < 2 * allowed
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case, dtype, approximate",
    [
        (((9, 24), 40, 24), torch.float32, "none"),
        (((9, 24), 40, 24), torch.float16, "tanh"),
        (((9, 300), 40, 24), torch.float16, "none"),
    ],
    ids=str,
)
def test_other_training_is_torchs(case, dtype, approximate, device):
    tensors = inputs(case, dtype, device)
    set_backend("triton")
    ways = (partial(function, approximate=approximate) for function in (mlp, plain))
    assert all(map(torch.equal, *(gradients(function, tensors) for function in ways)))


@pytest.mark.gpu
def test_eager_training_is_torchs():
    tensors = inputs(((9, 24), 40, 24), torch.bfloat16, "cuda")
    assert all(map(torch.equal, gradients(mlp, tensors), gradients(plain, tensors)))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [((8, 14, 14, 64), 192, 64), ((8, 14, 14, 256), 768, 256)], ids=str)
@torch.no_grad()
def test_cuda_graphs_capture(case):
    tensors = inputs(case, torch.bfloat16, "cuda")
    expected = mlp(*tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        mlp(*tensors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = mlp(*tensors)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("approximate", GELUS)
def test_elsewhere_it_is_timms(approximate):
    torch.manual_seed(0)
    act = partial(nn.GELU, approximate)
    theirs, ours = timm.layers.Mlp(24, 50, act_layer=act), Mlp(24, 50, act_layer=act)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 24)
    assert torch.equal(ours(x), theirs(x))
    with torch.no_grad():
        assert torch.equal(mlp(x, *theirs.state_dict().values(), approximate=approximate), theirs(x))
        assert Mlp(24, 50).to("meta")(torch.empty(2, 24, device="meta")).shape == (2, 24)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
def test_what_was_put_in_its_layers_runs():
    """Layers that were replaced or have hooks, and other activations, are called."""
    set_backend("triton")
    x = torch.randn(5, 24, dtype=torch.float16, device="cuda" if cuda else "cpu")
    ours, relu = Mlp(24, 50).to(x), Mlp(24, 50, act_layer=nn.ReLU).to(x)
    relu.load_state_dict(ours.state_dict())
    weights = [*ours.state_dict().values()]
    assert torch.equal(relu(x), F.linear(F.relu(F.linear(x, *weights[:2])), *weights[2:]))
    seen = []
    handle = ours.fc1.register_forward_hook(lambda module, args, out: seen.append(out))
    expected = ours(x)
    assert torch.equal(seen[0], F.linear(x, *weights[:2]))
    handle.remove()
    assert error(ours(x), expected) < 2e-3
    assert len(seen) == 1
    replaced = Mlp(24, 50)
    replaced.fc2 = Doubled(50, 24)
    replaced.to(x).load_state_dict(ours.state_dict())
    assert torch.equal(replaced(x), 2 * expected)


@pytest.mark.parametrize("name, index, shape", [("weight1", 1, (8, 5)), ("bias1", 2, (3,)), ("weight2", 3, (4, 9))])
def test_wrong_shapes_are_named(name, index, shape):
    tensors = inputs(((2, 4), 8, 4))
    tensors[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"^{name}: got shape"):
        mlp(*tensors)


@pytest.mark.parametrize(
    "index, tensor, message",
    [
        (0, torch.ones(2, 4, dtype=torch.int64), "x: got torch.int64"),
        (0, torch.tensor(1.0), r"x: got torch.float32 of shape \(\)"),
        (1, torch.ones(8), r"weight1: got shape \(8,\)"),
        (2, None, "bias1: got NoneType, expected a tensor"),
        (3, torch.ones(4, 8), "weight2: got torch.float32, expected x's: torch.float64"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(index, tensor, message):
    tensors = inputs(((2, 4), 8, 4))
    tensors[index] = tensor
    with pytest.raises(ValueError, match=f"^{message}"):
        mlp(*tensors)


def test_wrong_gelu():
    with pytest.raises(ValueError, match="approximate: got 'sigmoid'"):
        mlp(*inputs(((2, 4), 8, 4)), approximate="sigmoid")
