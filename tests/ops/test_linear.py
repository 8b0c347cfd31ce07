"""Focused linear attention: the reference against its definition."""

import pytest
import torch
import torch.nn.functional as F
from densezoo.ops import focused_linear_attention
from torch._dynamo.testing import CompileCounterWithBackend

# batch, tokens, heads, dim, focusing_factor, positional
SETTINGS = [(2, 30, 3, 8, 3, True), (1, 49, 1, 16, 3, True), (2, 12, 2, 5, 2.5, True), (3, 20, 2, 8, 1, False)]


def inputs(setting, dtype=torch.float32):
    """Return query, key and value as views of one tensor, the feature scale and the position encoding."""
    batch, tokens, heads, dim, _, positional = setting
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    qkv = normal(batch, tokens, 3, heads, dim).unbind(2)
    encoding = [normal(tokens, heads, dim)] if positional else []
    return [*qkv, F.softplus(normal(heads, dim)), *encoding]


def run(setting):
    def attend(query, key, value, feature_scale, encoding=None):
        options = dict(positional_encoding=encoding, focusing_factor=setting[4])
        return focused_linear_attention(query, key, value, feature_scale, **options)

    return attend


def definition(setting, query, key, value, feature_scale, encoding=0.0):
    """Compute the attention from its (tokens, tokens) weights, with the kernel as the paper writes it."""

    def phi(x):
        x = (F.relu(x) + 1e-6) / feature_scale
        power = x ** setting[4]
        return power / power.flatten(2).norm(dim=-1)[..., None, None] * x.flatten(2).norm(dim=-1)[..., None, None]

    query, key = phi(query), phi(key + encoding)
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


@pytest.mark.parametrize(
    "change, named",
    [
        ({"query": torch.zeros(2, 8, 16)}, "query"),
        ({"query": torch.zeros(2, 8, 2, 8, dtype=torch.int64)}, "query"),
        ({"key": torch.zeros(2, 9, 2, 8)}, "key"),
        ({"value": torch.zeros(2, 8, 2, 8, dtype=torch.float64)}, "value"),
        ({"value": torch.zeros(2, 8, 2, 8, device="meta")}, "value"),
        ({"feature_scale": torch.ones(16)}, "feature_scale"),
        ({"feature_scale": torch.ones(2, 8, dtype=torch.int64)}, "feature_scale"),
        ({"positional_encoding": torch.zeros(1, 8, 2, 8)}, "positional_encoding"),
        ({"positional_encoding": torch.zeros(8, 2, 8, device="meta")}, "positional_encoding"),
        ({"focusing_factor": 0}, "focusing_factor"),
        ({"focusing_factor": float("nan")}, "focusing_factor"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    arguments = {name: torch.zeros(2, 8, 2, 8) for name in ("query", "key", "value")}
    arguments["feature_scale"] = torch.ones(2, 8)
    with pytest.raises(ValueError, match=f"^{named}: got"):
        focused_linear_attention(**(arguments | change))
