"""Agent attention: the reference against its definition, the kernels against the reference."""

import pytest
import torch
from densezoo.ops import agent_attention, set_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

cuda = torch.cuda.is_available()

# batch, tokens, agents, heads, dim, biased
SETTINGS = [(2, 30, 9, 3, 8, True), (1, 50, 49, 1, 16, True), (2, 7, 16, 2, 5, True), (3, 12, 4, 2, 8, False)]
BIASES = ("aggregation_bias", "broadcast_bias")


def inputs(setting, dtype=torch.float32, device="cpu"):
    """Return query, key and value as views of one tensor, agents, and the biases."""
    batch, tokens, agents, heads, dim, biased = setting
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    qkv = normal(batch, tokens, 3, heads, dim).unbind(2)
    biases = [normal(heads, agents, tokens), normal(heads, tokens, agents)] if biased else []
    return [*qkv, normal(batch, agents, heads, dim), *biases]


def run(query, key, value, agent, *biases, **kwargs):
    return agent_attention(query, key, value, agent, **dict(zip(BIASES, biases, strict=False)), **kwargs)


def definition(query, key, value, agent, *biases):
    """Compute agent attention from the paper's formula, one image and head at a time."""
    out = torch.empty_like(query)
    gather, spread = biases or (torch.zeros(query.shape[2]), torch.zeros(query.shape[2]))
    scale = query.shape[-1] ** -0.5
    for image in range(query.shape[0]):
        for head in range(query.shape[2]):
            q, k, v, a = (t[image, :, head] for t in (query, key, value, agent))
            weights = (scale * a @ k.T + gather[head]).exp()
            agent_value = weights / weights.sum(1, keepdim=True) @ v
            weights = (scale * q @ a.T + spread[head]).exp()
            out[image, :, head] = weights / weights.sum(1, keepdim=True) @ agent_value
    return out


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_reference_is_the_definition(setting):
    tensors = inputs(setting, torch.float64)
    torch.testing.assert_close(run(*tensors), definition(*tensors))


def test_scale():
    query, key, value, agent, *biases = inputs(SETTINGS[0], torch.float64)
    # Both scores are linear in the agents.
    expected = run(query, key, value, 2 * agent, *biases, scale=0.25)
    torch.testing.assert_close(run(query, key, value, agent, *biases, scale=0.5), expected)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gradients(setting):
    leaves = [t.requires_grad_() for t in inputs((1, 6, 4, 2, 3, setting[-1]), torch.float64)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_computes_in_float32(dtype, autocast):
    # Scores beyond the range of float16, whose differences matter.
    tensors = inputs((1, 40, 9, 2, 64, True))
    tensors[:4] = [(40 * t).to(dtype) for t in tensors[:4]]
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = run(*tensors)
    assert out.dtype == dtype and out.isfinite().all()
    expected = run(*(t.double() for t in tensors))
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


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
            run(*inputs((1, tokens, 9, 1, 8, True)))
        sizes.append(largest.numel)
    assert sizes[1] <= 2 * sizes[0]


def test_compiles_once_for_any_batch():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        tensors = inputs((batch, *SETTINGS[0][1:]))
        torch.testing.assert_close(compiled(*tensors), run(*tensors))
    assert counter.frame_count <= 2


def test_exports_with_free_tokens():
    class Attend(torch.nn.Module):
        def forward(self, *tensors):
            return run(*tensors)

    free = torch.export.Dim("tokens", min=2, max=4096)
    shapes = ({1: free}, {1: free}, {1: free}, None, {2: free}, {1: free})
    program = torch.export.export(Attend(), tuple(inputs(SETTINGS[0])), dynamic_shapes=(shapes,)).module()
    for tokens in (5, 81):
        tensors = inputs((2, tokens, *SETTINGS[0][2:]))
        torch.testing.assert_close(program(*tensors), run(*tensors))


def numerator(query, key, value, agent, *biases):
    """Compute agent attention with normalisers through which no gradient passes."""
    query, key, value, agent = (t.transpose(1, 2) for t in (query, key, value, agent))
    gather, spread = biases or (0.0, 0.0)

    def attend(query, key, value, bias):
        weights = (query.shape[-1] ** -0.5 * query @ key.mT + bias).exp()
        return weights / weights.detach().sum(-1, keepdim=True) @ value

    return attend(query, agent, attend(agent, key, value, gather), spread).transpose(1, 2)


def gradients(tensors, attend=run):
    """Return the output and the gradient of each of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = attend(*leaves)
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


def compare(tensors, allowed):
    """Compare the kernels, run twice, with the float64 reference."""
    set_backend("triton")
    got, again = gradients(tensors), gradients(tensors)
    set_backend("reference")
    tensors = [t.double() for t in tensors]
    expected, terms = gradients(tensors), gradients(tensors, numerator)
    errors = [error(*triple) for triple in zip(got, expected, terms, strict=True)]
    assert max(errors) < allowed, errors
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"


KERNEL_SETTINGS = [(3, 30, 9, 2, 8, True), (1, 70, 49, 1, 16, True), (2, 75, 16, 2, 12, True), (2, 40, 4, 1, 40, False)]


# Runs of fewer tokens split a head between programs; fewer programs take several images each.
@pytest.mark.parametrize("launch", [{}, {"RUN": 16}, {"PROGRAMS": 1}], ids=["whole", "split", "grouped"])
@pytest.mark.parametrize("setting", KERNEL_SETTINGS, ids=str)
@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_kernels_interpreted(setting, launch, monkeypatch, request, nan_filled_memory):
    from densezoo.ops.agent import kernels

    for name, value in launch.items():
        monkeypatch.setattr(kernels, name, value)
    kernels._plan.cache_clear()
    request.addfinalizer(kernels._plan.cache_clear)
    compare(inputs(setting), 1e-6)


HELD_SETTINGS = [(5, 30, 9, 2, 8, True), (1, 64, 49, 1, 16, True), (3, 130, 16, 1, 12, True)]


@pytest.mark.parametrize("setting", HELD_SETTINGS, ids=str)
@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_kernels_that_hold_biases_interpreted(setting, monkeypatch, request, nan_filled_memory):
    from densezoo.ops.agent import kernels

    for key in (("held", 64), ("held", 128)):
        monkeypatch.setitem(kernels.LAUNCH, key, kernels.LAUNCH[key]._replace(programs=4))
    kernels._plan.cache_clear()
    request.addfinalizer(kernels._plan.cache_clear)
    compare(inputs(setting, torch.float16), 2e-3)


@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_one_bias_interpreted():
    tensors = inputs((2, 40, 9, 2, 8, True))
    for name, bias in zip(BIASES, tensors[4:], strict=True):
        set_backend("triton")
        leaf = bias.clone().requires_grad_()
        out = agent_attention(*tensors[:4], **{name: leaf})
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        set_backend("reference")
        leaf = bias.double().requires_grad_()
        expected = agent_attention(*(t.double() for t in tensors[:4]), **{name: leaf})
        assert error(out, expected) < 1e-6
        assert error(grad, *torch.autograd.grad(expected.square().sum(), leaf)) < 1e-6


INTERPRETED = pytest.param("cpu", marks=pytest.mark.skipif(cuda, reason="the kernels run on the GPU"))


@pytest.mark.parametrize("device", [INTERPRETED, pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sums_beyond_float16(device):
    # The gradients of the agents' values leave its range, those of the inputs do not.
    tensors = inputs((1, 300, 9, 1, 16, True), torch.float16, device)
    grads = []
    for backend, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        set_backend(backend)
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = run(*leaves)
        grads.append(torch.autograd.grad(out, leaves, torch.full_like(out, 2e3)))
    assert max(error(*pair) for pair in zip(*grads, strict=True)) < 2e-3


@pytest.mark.parametrize("device", [INTERPRETED, pytest.param("cuda", marks=pytest.mark.gpu)])
def test_windows_of_padding(device):
    setting = (3, 20, 9, 2, 8, True)
    tensors = inputs(setting, device=device)
    for t in tensors[:4]:
        t[-1] = 0
    compare(tensors, 1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operator_contract(device):
    import densezoo.ops.agent.kernels  # noqa: F401  (registers the operator)

    setting = (2, 9, 4, 2, 8, True)
    for tensors in (inputs(setting, device=device), [*inputs(setting, device=device)[:4], None, None]):
        leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
        torch.library.opcheck(torch.ops.densezoo.agent_attention, (*leaves, 0.3))
        saved = [t.detach() for t in torch.ops.densezoo.agent_attention(*leaves, 0.3)]
        args = (torch.ones_like(saved[0]), *tensors, *saved)
        # opcheck leaves out what the compiler asserts: strides.
        with FakeTensorMode() as mode:
            fake = [t if t is None else mode.from_tensor(t) for t in args]
            expected = [t.stride() for t in torch.ops.densezoo.agent_attention_backward(*fake, 0.3)]
        assert [t.stride() for t in torch.ops.densezoo.agent_attention_backward(*args, 0.3)] == expected


GPU_SETTINGS = [
    (1, 3136, 9, 1, 64, True),
    (2, 3136, 9, 3, 32, True),
    (16, 784, 16, 2, 64, True),
    (100, 784, 16, 6, 32, True),
    (3, 196, 49, 5, 64, True),
    (40, 196, 49, 12, 32, True),
    (128, 49, 49, 8, 64, True),
    (256, 50, 64, 3, 24, False),
    (1, 15200, 12, 2, 64, True),
    (1, 1000, 25, 3, 128, True),
    (5, 1, 1, 3, 80, True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("setting", KERNEL_SETTINGS + GPU_SETTINGS, ids=str)
def test_kernels(setting, dtype, allowed, nan_filled_memory):
    tensors = inputs(setting, device="cuda")
    compare([*(t.to(dtype) for t in tensors[:4]), *tensors[4:]], allowed)


@pytest.mark.gpu
def test_separate_strides():
    q, k, v, agent, gather, spread = inputs((2, 700, 16, 2, 32, True), device="cuda")
    set_backend("triton")
    expected = run(q, k, v, agent, gather, spread)
    k_odd = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(q.contiguous(), k_odd, v, agent, gather, spread.mT.contiguous().mT), expected)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    qkv = torch.randn(45, 500_000, 3, 1, 32, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    agent = torch.randn(45, 9, 1, 32, device="cuda", dtype=torch.bfloat16)
    set_backend("triton")
    grad = torch.randn(45, 500_000, 1, 32, device="cuda", dtype=torch.bfloat16)
    results = []
    for count in (45, 1):
        leaves = [t.detach().requires_grad_() for t in (*qkv[-count:].unbind(2), agent[-count:])]
        out = run(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad[-count:])])
    assert max(error(big[-1:], one) for big, one in zip(*results, strict=True)) < 1e-2


@pytest.mark.gpu
def test_graph_capture():
    tensors = inputs((4, 784, 16, 2, 64, True), torch.bfloat16, "cuda")
    set_backend("triton")
    expected = gradients(tensors)[1:]
    leaves = [t.requires_grad_() for t in tensors]
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = grad.to("cuda", torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = torch.autograd.grad(run(*leaves), leaves, grad)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.gpu
def test_compiles_whole_on_the_gpu():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        tensors = inputs((batch, 60, 9, 2, 32, True), device="cuda")
        assert error(compiled(*tensors), run(*tensors)) == 0
    assert counter.frame_count <= 2


def test_backend_is_chosen_by_name():
    set_backend("triton")
    with pytest.raises(RuntimeError, match="agent_attention: cannot run on triton: dtype torch.float64"):
        run(*inputs(SETTINGS[0], torch.float64))
    with pytest.raises(RuntimeError, match="agent_attention: cannot run on triton: 65 agents"):
        run(*inputs((1, 7, 65, 1, 8, True)))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"query": torch.zeros(2, 8, 16)}, "query"),
        ({"query": torch.zeros(2, 8, 2, 8, dtype=torch.int64)}, "query"),
        ({"query": torch.zeros(2, 8, 2, 0)}, "query"),
        ({"key": torch.zeros(2, 9, 2, 8)}, "key"),
        ({"agent": None}, "agent"),
        ({"broadcast_bias": 0.0}, "broadcast_bias"),
        ({"value": torch.zeros(2, 8, 2, 8, dtype=torch.float64)}, "value"),
        ({"value": torch.zeros(2, 8, 2, 8, device="meta")}, "value"),
        ({"agent": torch.zeros(2, 4, 1, 8)}, "agent"),
        ({"agent": torch.zeros(2, 4, 2)}, "agent"),
        ({"aggregation_bias": torch.zeros(2, 8, 4)}, "aggregation_bias"),
        ({"aggregation_bias": torch.zeros(2, 4, 8, device="meta")}, "aggregation_bias"),
        ({"broadcast_bias": torch.zeros(1, 2, 8, 4)}, "broadcast_bias"),
        ({"broadcast_bias": torch.zeros(2, 8, 4, dtype=torch.int32)}, "broadcast_bias"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    arguments = {name: torch.zeros(2, 8, 2, 8) for name in ("query", "key", "value")}
    arguments["agent"] = torch.zeros(2, 4, 2, 8)
    with pytest.raises(ValueError, match=f"^{named}: got"):
        agent_attention(**(arguments | change))
