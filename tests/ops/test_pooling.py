"""PoolFormer's mixing and the norms around it: the kernels against the float64 reference, compiled, under autocast."""

import pytest
import torch
from densezoo.ops import pool_mix, set_backend
from densezoo.ops.pooling import add_branch
from torch._dynamo.testing import CompileCounterWithBackend

cuda = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# One position, one row, one column; channels in several blocks, and rows in several strips.
SHAPES = [(1, 1, 1, 8), (2, 1, 5, 8), (1, 6, 1, 12), (2, 5, 6, 16), (1, 31, 9, 80), (0, 3, 3, 8)]
GPU_SHAPES = [(3, 56, 56, 64), (2, 28, 29, 128), (5, 14, 14, 320), (256, 7, 7, 512), (1, 200, 304, 96), (2, 15, 9, 20)]
EPS = 1e-6


def error(got, expected):
    """Return the relative RMS error; NaN counts as infinite."""
    # The first bias cancels: its gradient is 0 but for rounding.
    if not (expected.abs() > 1e-12).any():
        return got.abs().sum().item()
    value = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return value if value == value else float("inf")


def draw(shape, dtype, device="cpu", is_bare=False):
    """Return x, the norms' parameters and the layer scale, and what stochastic depth leaves; `is_bare` of few."""
    generator = torch.Generator().manual_seed(0)
    dim = shape[-1:]
    x, *vectors = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, dim, dim, dim, dim, dim))
    drop = torch.arange(shape[0]).reshape(-1, 1, 1, 1) % 2 * 1.25
    vectors = [(v + 0.5).to(device, torch.promote_types(dtype, torch.float32)).requires_grad_() for v in vectors]
    x = (2 * x + 3).to(device, dtype).requires_grad_()
    if is_bare:
        vectors[1] = vectors[3] = vectors[4] = None
    return [x, *vectors], None if is_bare else drop.to(device, vectors[0].dtype)


def results(function, leaves, drop=None):
    """Return the sum, its norm, and the gradients of all inputs there are."""
    *leaves, layer_scale = leaves
    outs = function(*leaves, EPS, layer_scale=layer_scale, drop=drop)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in outs]
    leaves = [t for t in (*leaves, layer_scale) if t is not None]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, grads)]


def wide(leaves):
    return [None if t is None else t.detach().double().requires_grad_() for t in leaves]


def check_kernels(shape, dtype, allowed, device, is_bare=False):
    leaves, drop = draw(shape, dtype, device, is_bare)
    set_backend("reference")
    expected = results(pool_mix, wide(leaves), None if drop is None else drop.double())
    set_backend("triton")
    for got, want in zip(results(pool_mix, leaves, drop), expected, strict=True):
        assert error(got, want) < allowed
        assert got.shape == want.shape


@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
@pytest.mark.parametrize("is_bare", [False, True], ids=["full", "bare"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_interpreted(shape, is_bare):
    check_kernels(shape, torch.float32, 3e-6, "cpu", is_bare)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES + GPU_SHAPES, ids=str)
def test_kernels(shape, dtype, allowed):
    check_kernels(shape, dtype, allowed, "cuda")


def draw_branch(device, dtype=torch.float32):
    x, branch = (torch.randn(3, 4, 5, 16, device=device) for _ in range(2))
    leaves = [x.requires_grad_(), branch.to(dtype).requires_grad_(), torch.randn(16, device=device, requires_grad=True)]
    return leaves, torch.tensor([0.0, 2.0, 1.0], device=device).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_drop", [False, True])
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_add_branch(device, has_drop, dtype, allowed):
    leaves, drop = draw_branch(device, dtype)
    drop = drop if has_drop else None
    found = []
    for backend, tensors in (("triton", leaves), ("reference", wide(leaves))):
        set_backend(backend)
        out = add_branch(*tensors, drop)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        found.append([out.detach(), *torch.autograd.grad(out, tensors, grad)])
    for got, want in zip(*found, strict=True):
        assert error(got, want) < allowed
    assert found[0][2].dtype == dtype and found[0][0].dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_operator_contract(device):
    from densezoo.ops.pooling import kernels  # noqa: F401  (defines the operators)

    leaves, drop = draw((2, 5, 6, 16), torch.float32, device)
    x, weight, _, next_weight, next_bias, _ = (t.detach() for t in leaves)
    ops = torch.ops.densezoo
    args = (x.flatten(1, 2), weight, drop, next_weight, next_bias, EPS, 6, torch.float32, torch.bfloat16)
    torch.library.opcheck(ops.pool_mix.default, args)
    out, norm, statistics = ops.pool_mix(*args)
    grads = torch.randn_like(out), torch.randn_like(norm)
    args = (*grads, args[0], out, weight, drop, next_weight, statistics, 6)
    torch.library.opcheck(ops.pool_mix_backward.default, args)
    first, again = (ops.pool_mix_backward(*args) for _ in range(2))
    assert all(map(torch.equal, first, again))
    torch.library.opcheck(ops.add_branch_backward.default, (grads[0], drop, torch.bfloat16))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles(device, backend):
    set_backend(backend)  # as `auto` does on a GPU

    def run(*args, **kwargs):
        out, norm = pool_mix(*args, **kwargs)
        return add_branch(out, norm, args[1]), norm

    counter = CompileCounterWithBackend("aot_eager")
    leaves, drop = draw((2, 5, 6, 16), torch.float32, device)
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    torch.testing.assert_close(results(compiled, leaves, drop), results(run, leaves, drop))
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(device, is_compiled):
    """The sum stays in float32, the norm has the dtype of the projection after it, gradients their leaves'."""
    leaves, drop = draw((2, 5, 6, 16), torch.float32, device)
    leaves[0] = leaves[0].detach().bfloat16().requires_grad_()

    def run(*args, **kwargs):
        with torch.autocast(device, torch.bfloat16):
            return pool_mix(*args, **kwargs)

    set_backend("triton")
    got = results(torch.compile(run, backend="aot_eager", fullgraph=True) if is_compiled else run, leaves, drop)
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.bfloat16, *5 * [torch.float32]]
    set_backend("reference")
    for result, want in zip(got, results(pool_mix, wide(leaves), drop.double()), strict=True):
        assert error(result, want) < 1e-2


@pytest.mark.gpu
def test_more_than_2_31_elements():
    x = torch.randn(8, 3000, 1500, 64, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.rand(2, 64, device="cuda").unbind()
    set_backend("triton")
    out, norm = pool_mix(x, weight, bias, weight, bias)
    expected = pool_mix(x[-1:].contiguous(), weight, bias, weight, bias)
    assert torch.equal(out[-1:], expected[0]) and torch.equal(norm[-1:], expected[1])


@pytest.mark.gpu
def test_repeats_in_every_bit_in_a_graph():
    leaves, drop = draw((4, 14, 14, 320), torch.float32, "cuda")
    set_backend("triton")
    expected = pool_mix(*leaves[:-1], EPS, layer_scale=leaves[-1], drop=drop)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        got = pool_mix(*leaves[:-1], EPS, layer_scale=leaves[-1], drop=drop)
    graph.replay()
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    "message, change",
    [
        ("x: got shape", dict(x=torch.ones(2, 5, 6))),
        ("x: got shape", dict(x=torch.ones(2, 3, 0, 6))),
        ("x: got torch.int64", dict(x=torch.ones(2, 3, 4, 6, dtype=torch.int64))),
        ("weight: got NoneType", dict(weight=None)),
        ("next_bias: got shape", dict(next_bias=torch.ones(5))),
        ("drop: got shape", dict(drop=torch.ones(2))),
    ],
)
def test_errors_name_the_argument(message, change):
    ones = torch.ones(6)
    arguments = dict(x=torch.ones(2, 3, 4, 6), weight=ones, bias=ones, next_weight=ones, next_bias=ones) | change
    with pytest.raises(ValueError, match=f"^{message}"):
        pool_mix(**arguments)


def test_takes_the_reference_where_the_kernels_cannot_run():
    leaves, drop = draw((2, 3, 4, 8), torch.float64)
    pool_mix(*leaves[:-1], layer_scale=leaves[-1], drop=drop)
    set_backend("triton")
    with pytest.raises(RuntimeError, match="float64"):
        pool_mix(*leaves[:-1], layer_scale=leaves[-1], drop=drop)


def test_saves_no_maps_of_four_axes():
    """A compiler that lays out convolutions channels last would transpose those that it keeps for the backward."""
    leaves, _ = draw((2, 5, 6, 16), torch.float32)
    saved = []
    set_backend("triton")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        out, norm = pool_mix(*leaves[:-1], layer_scale=leaves[-1])
        add_branch(out, norm, leaves[1])
    assert (2, 30, 16) in saved and all(len(shape) < 4 for shape in saved)
