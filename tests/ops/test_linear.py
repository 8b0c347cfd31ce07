"""Focused linear attention: the reference against its definition, the kernels against the reference."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from densezoo.ops import focused_linear_attention, set_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

cuda = torch.cuda.is_available()

# batch, tokens, heads, dim, focusing_factor, positional
SETTINGS = [(2, 30, 3, 8, 3, True), (1, 49, 1, 16, 3, True), (2, 12, 2, 5, 2.5, True), (3, 20, 2, 8, 1, False)]


def inputs(setting, dtype=torch.float32, device="cpu"):
    """Return query, key and value as views of one tensor, the feature scale and the position encoding."""
    batch, tokens, heads, dim, _, positional = setting
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    qkv = normal(batch, tokens, 3, heads, dim).unbind(2)
    encoding = [normal(tokens, heads, dim)] if positional else []
    return [*qkv, F.softplus(normal(heads, dim)), *encoding]


def run(setting):
    def attend(query, key, value, feature_scale, encoding=None):
        options = dict(positional_encoding=encoding, focusing_factor=setting[4])
        return focused_linear_attention(query, key, value, feature_scale, **options)

    return attend


def phi(x, feature_scale, factor):
    """Return the features as the paper writes them."""
    x = (F.relu(x) + 1e-6) / feature_scale
    power = x**factor
    return power / power.flatten(2).norm(dim=-1)[..., None, None] * x.flatten(2).norm(dim=-1)[..., None, None]


def definition(setting, query, key, value, feature_scale, encoding=0.0):
    """Compute the attention from its (tokens, tokens) weights."""
    query, key = (phi(x, feature_scale, setting[4]) for x in (query, key + encoding))
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key) / key.shape[1]
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_reference_is_the_definition(setting):
    tensors = inputs(setting, torch.float64)
    torch.testing.assert_close(run(setting)(*tensors), definition(setting, *tensors))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gradients(setting):
    small = (1, 6, 2, 3, *setting[4:])
    leaves = [t.requires_grad_() for t in inputs(small, torch.float64)]
    assert torch.autograd.gradcheck(run(small), leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_computes_in_float32(dtype, autocast):
    # The cube of one, the product of two and the sum of all leave the range of float16.
    setting = (1, 3000, 2, 64, 3, True)
    tensors = inputs(setting)
    tensors[:3] = [(100 * t).to(dtype) for t in tensors[:3]]
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = run(setting)(*tensors)
    assert out.dtype == dtype and out.isfinite().all()
    expected = run(setting)(*(t.double() for t in tensors))
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [-5.0, 0.0, 6e4])
def test_extreme_inputs_stay_finite(dtype, value):
    # Without a positive feature only the epsilon is left, and its cube divided by a large scale is almost nothing.
    setting = (1, 10, 2, 32, 3, False)
    query, key, _, scale = inputs(setting)
    leaves = [torch.full_like(t, value).to(dtype).requires_grad_() for t in (query, key, query)]
    out = run(setting)(*leaves, torch.full_like(scale, 30.0))
    assert out.isfinite().all()
    out.float().mean().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_memory_is_linear_in_tokens():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    sizes = []
    for tokens in (300, 600):
        with Largest() as largest:
            run(SETTINGS[0])(*inputs((1, tokens, *SETTINGS[0][2:])))
        sizes.append(largest.numel)
    assert sizes[1] <= 2 * sizes[0]


def test_compiles_once_for_any_batch():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attend = run(SETTINGS[0])
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        tensors = inputs((batch, *SETTINGS[0][1:]))
        torch.testing.assert_close(compiled(*tensors), attend(*tensors))
    assert counter.frame_count <= 2


def test_exports_with_free_tokens():
    class Attend(torch.nn.Module):
        def forward(self, *tensors):
            return run(SETTINGS[0])(*tensors)

    free = torch.export.Dim("tokens", min=2, max=4096)
    shapes = ({1: free}, {1: free}, {1: free}, None, {0: free})
    program = torch.export.export(Attend(), tuple(inputs(SETTINGS[0])), dynamic_shapes=(shapes,)).module()
    for tokens in (5, 81):
        tensors = inputs((2, tokens, *SETTINGS[0][2:]))
        torch.testing.assert_close(program(*tensors), Attend()(*tensors))


def numerator(setting, query, key, value, feature_scale, encoding=0.0):
    """Compute the attention with a normaliser through which no gradient passes."""
    query, key = (phi(x, feature_scale, setting[4]) for x in (query, key + encoding))
    state = torch.einsum("bkhd,bkhe->bhde", key, value)
    total = torch.einsum("bqhd,bhd->bqh", query, key.sum(1)) + 1e-6 * key.shape[1]
    return torch.einsum("bqhd,bhde->bqhe", query, state) / total.detach()[..., None]


def gradients(setting, tensors, attend=None):
    """Return the output and the gradient of each of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = (attend or run(setting))(*leaves)
    # The same numbers in every dtype.
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16()
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))]


def error(got, expected, terms=None):
    """Return the relative RMS error; NaN counts as infinite.

    Where `expected` is less than a hundredth of the `terms` that cancel in it, no rounding leaves more than these hold:
    the error is relative to them.
    """
    size = expected.double().norm()
    if terms is not None and size < 0.01 * terms.norm():
        size = terms.norm()
    value = ((got.double() - expected.double()).norm() / size).item()
    return value if value == value else float("inf")


def compare(setting, tensors, allowed):
    """Compare the kernels, run twice, with the float64 reference."""
    set_backend("triton")
    got, again = gradients(setting, tensors), gradients(setting, tensors)
    set_backend("reference")
    tensors = [t.double() for t in tensors]
    expected, terms = gradients(setting, tensors), gradients(setting, tensors, partial(numerator, setting))
    errors = [error(*triple) for triple in zip(got, expected, terms, strict=True)]
    assert max(errors) < allowed, errors
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"


KERNEL_SETTINGS = [
    (2, 30, 3, 8, 3, True),
    (1, 49, 1, 16, 3, True),
    (1, 33, 2, 12, 2.5, True),
    (2, 17, 2, 40, 1, False),
    (2, 70, 4, 64, 3, True),
]


INTERPRETED = pytest.param("cpu", marks=pytest.mark.skipif(cuda, reason="the kernels run on the GPU"))


@pytest.mark.parametrize("run", [512, 16], ids=["whole", "split"])
@pytest.mark.parametrize(
    "setting, dtype, allowed",
    [*((setting, torch.float32, 5e-6) for setting in KERNEL_SETTINGS), (KERNEL_SETTINGS[0], torch.float16, 1e-3)],
    ids=str,
)
@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_kernels_interpreted(setting, dtype, allowed, run, monkeypatch, request, nan_filled_memory):
    from densezoo.ops.linear import kernels

    monkeypatch.setattr(kernels, "RUN", run)
    kernels._plan.cache_clear()
    request.addfinalizer(kernels._plan.cache_clear)
    tensors = inputs(setting)
    compare(setting, [*(t.to(dtype) for t in tensors[:3]), *tensors[3:]], allowed)


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("device", [INTERPRETED, pytest.param("cuda", marks=pytest.mark.gpu)])
def test_features_near_zero(device, dtype, allowed):
    # Heads without a positive query feature: only the epsilons are left, and gradients run along the features.
    setting = (1, 20, 2, 8, 3, True)
    tensors = inputs(setting, device=device)
    tensors[0] = 1e-3 * tensors[0] - 1e-3
    compare(setting, [*(t.to(dtype) for t in tensors[:3]), *tensors[3:]], allowed)


@pytest.mark.parametrize("device", [INTERPRETED, pytest.param("cuda", marks=pytest.mark.gpu)])
def test_float16_over_orders_of_magnitude(device):
    # Tokens of norms around 1e-3 and 1e4 side by side, and queries of features that keys hardly have.
    setting = (1, 80, 2, 16, 3, False)
    query, key, value, scale = inputs(setting, device=device)
    key = key.abs()
    key[..., :8] *= 1e-2
    query[:, ::3, :, :8] = query[:, ::3, :, :8].abs()
    query[:, ::3, :, 8:] = -1
    query[:, ::2] *= 1e-3
    query[:, 1::2] *= 2500
    key[:, ::2] *= 2500
    key[:, 1::2] *= 1e-3
    compare(setting, [*(t.to(torch.float16) for t in (query, key, value)), scale], 2e-3)


@pytest.mark.parametrize("device", [INTERPRETED, pytest.param("cuda", marks=pytest.mark.gpu)])
def test_windows_of_padding(device):
    setting = (3, 20, 2, 8, 3, True)
    tensors = inputs(setting, device=device)
    for t in tensors[:3]:
        t[-1] = 0
    compare(setting, tensors, 1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operator_contract(device):
    import densezoo.ops.linear.kernels  # noqa: F401  (registers the operator)

    setting = (2, 9, 2, 8, 3, True)
    for tensors in (inputs(setting, device=device), [*inputs(setting, device=device)[:4], None]):
        leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
        torch.library.opcheck(torch.ops.densezoo.focused_linear_attention, (*leaves, 3.0))
        saved = [t.detach() for t in torch.ops.densezoo.focused_linear_attention(*leaves, 3.0)]
        args = (torch.ones_like(saved[0]), *tensors, *saved)
        # opcheck leaves out what the compiler asserts: strides.
        with FakeTensorMode() as mode:
            fake = [t if t is None else mode.from_tensor(t) for t in args]
            expected = [t.stride() for t in torch.ops.densezoo.focused_linear_attention_backward(*fake, 3.0)]
        assert [t.stride() for t in torch.ops.densezoo.focused_linear_attention_backward(*args, 3.0)] == expected


GPU_SETTINGS = [
    (1, 3136, 1, 64, 3, True),
    (2, 3136, 3, 32, 3, True),
    (4, 784, 6, 32, 3, True),
    (2, 784, 2, 64, 3, True),
    (3, 196, 5, 64, 3, True),
    (16, 49, 8, 64, 3, True),
    (128, 49, 8, 64, 3, False),
    (256, 49, 2, 32, 3, True),
    (1, 15200, 2, 64, 3, True),
    (2, 777, 4, 24, 4, True),
    (1, 1000, 3, 128, 3, True),
    (5, 1, 3, 80, 3.5, True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("setting", KERNEL_SETTINGS + GPU_SETTINGS, ids=str)
def test_kernels(setting, dtype, allowed, nan_filled_memory):
    tensors = inputs(setting, device="cuda")
    compare(setting, [*(t.to(dtype) for t in tensors[:3]), *tensors[3:]], allowed)


@pytest.mark.gpu
def test_separate_strides():
    setting = (2, 700, 2, 32, 3, True)
    q, k, v, *rest = inputs(setting, device="cuda")
    set_backend("triton")
    expected = run(setting)(q, k, v, *rest)
    k_odd = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(setting)(q.contiguous(), k_odd, v, *rest), expected)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    setting = (45, 500_000, 1, 32, 3, False)
    qkv = torch.randn(*setting[:2], 3, *setting[2:4], device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    scale = torch.ones(1, 32, device="cuda")
    set_backend("triton")
    grad = torch.randn(*setting[:2], *setting[2:4], device="cuda", dtype=torch.bfloat16)
    results = []
    for count in (len(qkv), 1):
        leaves = [t.detach().requires_grad_() for t in qkv[-count:].unbind(2)]
        out = run(setting)(*leaves, scale)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad[-count:])])
    assert max(error(big[-1:], one) for big, one in zip(*results, strict=True)) < 1e-2


@pytest.mark.gpu
def test_graph_capture():
    setting = (4, 784, 2, 64, 3, True)
    tensors = inputs(setting, torch.bfloat16, "cuda")
    set_backend("triton")
    expected = gradients(setting, tensors)[1:]
    leaves = [t.requires_grad_() for t in tensors]
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = grad.to("cuda", torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = torch.autograd.grad(run(setting)(*leaves), leaves, grad)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.gpu
def test_compiles_whole_on_the_gpu():
    setting = (2, 60, 2, 32, 3, True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run(setting), fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        tensors = inputs((batch, *setting[1:]), device="cuda")
        assert error(compiled(*tensors), run(setting)(*tensors)) == 0
    assert counter.frame_count <= 2


def test_backend_is_chosen_by_name():
    set_backend("triton")
    with pytest.raises(RuntimeError, match="focused_linear_attention: cannot run on triton: dtype torch.float64"):
        run(SETTINGS[0])(*inputs(SETTINGS[0], torch.float64))
    with pytest.raises(RuntimeError, match="focused_linear_attention: cannot run on triton: head dim 5"):
        run(SETTINGS[2])(*inputs(SETTINGS[2]))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"query": torch.zeros(2, 8, 16)}, "query"),
        ({"query": torch.zeros(2, 8, 2, 8, dtype=torch.int64)}, "query"),
        ({"query": torch.zeros(2, 8, 0, 8)}, "query"),
        ({"key": torch.zeros(2, 9, 2, 8)}, "key"),
        ({"feature_scale": None}, "feature_scale"),
        ({"positional_encoding": 0.0}, "positional_encoding"),
        ({"value": torch.zeros(2, 8, 2, 8, dtype=torch.float64)}, "value"),
        ({"value": torch.zeros(2, 8, 2, 8, device="meta")}, "value"),
        ({"feature_scale": torch.ones(16)}, "feature_scale"),
        ({"feature_scale": torch.ones(2, 8, dtype=torch.int64)}, "feature_scale"),
        ({"positional_encoding": torch.zeros(1, 8, 2, 8)}, "positional_encoding"),
        ({"positional_encoding": torch.zeros(8, 2, 8, device="meta")}, "positional_encoding"),
        ({"focusing_factor": 0}, "focusing_factor"),
        ({"focusing_factor": float("nan")}, "focusing_factor"),
        ({"focusing_factor": float("inf")}, "focusing_factor"),
        ({"focusing_factor": "3"}, "focusing_factor"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    arguments = {name: torch.zeros(2, 8, 2, 8) for name in ("query", "key", "value")}
    arguments["feature_scale"] = torch.ones(2, 8)
    with pytest.raises(ValueError, match=f"^{named}: got"):
        focused_linear_attention(**(arguments | change))
