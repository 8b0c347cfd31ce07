"""Agent attention: the reference against its definition."""

import pytest
import torch
from densezoo.ops import agent_attention
from torch._dynamo.testing import CompileCounterWithBackend

# batch, tokens, agents, heads, dim, biased
SETTINGS = [(2, 30, 9, 3, 8, True), (1, 50, 49, 1, 16, True), (2, 7, 16, 2, 5, True), (3, 12, 4, 2, 8, False)]
BIASES = ("aggregation_bias", "broadcast_bias")


def inputs(setting, dtype=torch.float32):
    """Return query, key and value as views of one tensor, agents, and the biases."""
    batch, tokens, agents, heads, dim, biased = setting
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

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


@pytest.mark.parametrize(
    "change, named",
    [
        ({"query": torch.zeros(2, 8, 16)}, "query"),
        ({"query": torch.zeros(2, 8, 2, 8, dtype=torch.int64)}, "query"),
        ({"key": torch.zeros(2, 9, 2, 8)}, "key"),
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
