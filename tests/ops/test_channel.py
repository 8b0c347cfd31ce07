"""Channel attention: the reference against its definition and two published forms, the kernels against it."""

import math

import pytest
import torch
from densezoo.ops import channel_attention, channel_attention_qkv, set_backend
from timm.models.davit import ChannelAttention, ChannelAttentionV2
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

cuda = torch.cuda.is_available()


def inputs(*shape, dtype=torch.float64, device="cpu", seed=0):
    """Return query, key and value as views of one qkv tensor."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(*shape[:-2], 3, *shape[-2:], generator=generator, dtype=torch.float64)
    return qkv.to(device, dtype).unbind(-3)


def error(got, expected):
    """Return the relative RMS error; NaN counts as infinite."""
    value = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return value if value == value else float("inf")


def gradients(tensors, seed=1, **kwargs):
    """Return channel attention's output and the gradient of each of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = channel_attention(*leaves, **kwargs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))]


def packed_gradients(tensors, roles, seed=1, **kwargs):
    """Return the same of the tensors packed in one, unpacked."""
    parts = [tensors[roles.index(i)] for i in range(3)]
    leaf = torch.stack(parts, -3).requires_grad_()
    out = channel_attention_qkv(leaf, roles=roles, **kwargs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (grad_qkv,) = torch.autograd.grad(out, leaf, grad.to(out.device, out.dtype))
    assert grad_qkv.is_contiguous()
    return [out.detach(), *(grad_qkv.select(-3, role) for role in roles)]


@pytest.mark.parametrize("shape", [(2, 5, 7, 3, 8), (1, 1, 1, 1, 4), (2, 9, 2, 6), (1, 2, 3, 4, 2, 5)], ids=str)
def test_reference_is_the_definition(shape):
    query, key, value = inputs(*shape)
    expected = torch.empty(shape, dtype=torch.float64)
    for b in range(shape[0]):
        for h in range(shape[-2]):
            q, k, v = (t[b, ..., h, :] for t in (query, key, value))
            weights = sum(0.3 * torch.outer(a, c) for a, c in zip(q.flatten(0, -2), k.flatten(0, -2), strict=True))
            expected[b, ..., h, :] = v @ weights.softmax(-1).T
    torch.testing.assert_close(channel_attention(query, key, value, scale=0.3), expected)


def test_reference_gradients():
    leaves = [t.clone().requires_grad_() for t in inputs(2, 3, 4, 2, 3)]
    assert torch.autograd.gradcheck(channel_attention, leaves, fast_mode=True)


@pytest.mark.parametrize("published", [ChannelAttention, ChannelAttentionV2])
def test_published_forms(published):
    torch.manual_seed(0)
    module, x = published(16, num_heads=2), torch.randn(2, 35, 16)
    q, k, v = module.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
    out = channel_attention(q, k, v, scale=35**-0.5) if published is ChannelAttentionV2 else channel_attention(k, v, q)
    torch.testing.assert_close(module.proj(out.flatten(2)), module(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_inputs_are_summed_in_float32(dtype, autocast):
    # Sums over this many positions overflow float16, and bfloat16 does not count that far.
    query, key, value = (t * 4 for t in inputs(1, 160, 160, 1, 8, dtype=dtype))
    query = key * 0.9 + query * 0.1
    with torch.autocast("cpu", dtype, enabled=autocast):
        got = channel_attention(query, key, value, scale=160**-2.3)
    assert got.dtype == dtype
    expected = channel_attention(query.float(), key.float(), value.float(), scale=160**-2.3)
    assert (query.float() * key.float()).sum((0, 1, 2)).abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(got, expected.to(dtype), atol=0, rtol=torch.finfo(dtype).eps)


# Few positions, weights computed again; many, weights kept; few heads, positions split.
SHAPES = [(2, 5, 7, 3, 8), (3, 7, 7, 5, 20), (1, 20, 19, 2, 12), (1, 25, 41, 3, 16), (1, 1, 1, 1, 8), (2, 90, 2, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels", [16, 64], ids=["one head", "several heads"])
@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_kernels_interpreted(shape, channels, monkeypatch, nan_filled_memory):
    from densezoo.ops.channel import kernels

    launch = {name: settings._replace(channels=channels) for name, settings in kernels.LAUNCH.items()}
    monkeypatch.setattr(kernels, "LAUNCH", launch)
    kernels._problem.cache_clear()
    tensors = inputs(*shape, dtype=torch.float32)
    set_backend("triton")
    got = gradients(tensors, scale=0.1)
    packed = packed_gradients(tensors, (1, 2, 0), scale=0.1)
    kernels._problem.cache_clear()
    set_backend("reference")
    expected = gradients([t.double() for t in tensors], scale=0.1)
    assert max(map(error, got, expected)) < 1e-6
    assert max(map(error, packed, expected)) < 1e-6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operator_contract(device):
    import densezoo.ops.channel.kernels  # noqa: F401  (registers the operator)

    if device == "cpu" and cuda:
        pytest.skip("the kernels run on the GPU")
    for shape in [(2, 5, 6, 2, 8), (1, 9, 8, 1, 8)]:
        tensors = inputs(*shape, dtype=torch.float32, device=device)
        leaves = [t.detach().requires_grad_() for t in tensors]
        torch.library.opcheck(torch.ops.densezoo.channel_attention, (*leaves, 0.3))
        out, weights = (t.detach() for t in torch.ops.densezoo.channel_attention(*leaves, 0.3))
        args = (torch.ones_like(out), *tensors, out, weights)
        # opcheck leaves out what the compiler asserts: strides.
        with FakeTensorMode() as mode:
            fake = torch.ops.densezoo.channel_attention_backward(*(mode.from_tensor(t) for t in args), 0.3)
        got = torch.ops.densezoo.channel_attention_backward(*args, 0.3)
        assert [t.stride() for t in got] == [t.stride() for t in fake]

        packed = torch.stack(tensors, -3).requires_grad_()
        torch.library.opcheck(torch.ops.densezoo.channel_attention_qkv, (packed, [0, 1, 2], 0.3))
        grad = torch.ops.densezoo.channel_attention_qkv_backward(args[0], packed, out, weights, [0, 1, 2], 0.3)
        assert torch.equal(grad, torch.stack(got, -3))


GPU_SHAPES = [(128, 14, 14, 12, 32), (256, 7, 7, 24, 32), (2, 200, 304, 3, 32), (1, 37, 41, 2, 128), (3, 24, 24, 4, 80)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES[:4] + SHAPES[5:] + GPU_SHAPES, ids=str)
def test_kernels(shape, dtype, allowed, nan_filled_memory):
    tensors = inputs(*shape, dtype=dtype, device="cuda")
    scale = math.prod(shape[1:-2]) ** -0.5
    set_backend("triton")
    got, again = (gradients(tensors, scale=scale) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    packed = packed_gradients(tensors, (2, 0, 1), scale=scale)
    assert all(torch.equal(a, b) for a, b in zip(packed, got, strict=True)), "the packed form differs"
    set_backend("reference")
    expected = gradients([t.double() for t in tensors], scale=scale)
    assert max(map(error, got, expected)) < allowed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_sum_in_float32(dtype):
    query, key, value = (t * 4 for t in inputs(1, 160, 160, 1, 8, dtype=dtype, device="cuda"))
    # The gradients of the weights leave the range of float16 too.
    tensors = [key * 0.9 + query * 0.1, key, value + 4]
    results = []
    for backend, widened in (("triton", tensors), ("reference", [t.double() for t in tensors])):
        set_backend(backend)
        leaves = [t.detach().requires_grad_() for t in widened]
        out = channel_attention(*leaves, scale=160**-2.3)
        results.append([out, *torch.autograd.grad(out, leaves, leaves[2].detach() / 4 + 1)])
    assert max(map(error, *results)) < (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    qkv = torch.randn(12, 1024, 1024, 3, 2, 32, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    leaves = [t.requires_grad_() for t in qkv.unbind(3)]
    out = channel_attention(*leaves, scale=1e-3)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    last = [t.detach()[-1:].requires_grad_() for t in leaves]
    small = channel_attention(*last, scale=1e-3)
    small_grads = torch.autograd.grad(small, last, torch.ones_like(small))
    for big, one in zip((out, *grads), (small, *small_grads), strict=True):
        assert error(big[-1:], one) < 1e-2


@pytest.mark.gpu
def test_separate_strides():
    q, k, v = inputs(2, 20, 20, 2, 32, dtype=torch.float32, device="cuda")
    set_backend("triton")
    expected = channel_attention(q, k, v)
    cropped = torch.nn.functional.pad(v, (0, 0, 0, 0, 0, 5))[:, :, :20]
    for other in (v.contiguous(), v.transpose(1, 2).contiguous().transpose(1, 2), cropped):
        assert error(channel_attention(q, k, other), expected) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 14, 14, 3, 32), (1, 40, 50, 2, 32)], ids=str)
def test_cuda_graphs_capture(shape):
    set_backend("triton")
    tensors = inputs(*shape, dtype=torch.float16, device="cuda")
    leaves = [t.detach().requires_grad_() for t in tensors]
    grad = torch.randn(shape, device="cuda", dtype=torch.float16)

    def step():
        out = channel_attention(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_once_for_any_batch(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(channel_attention, fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        tensors = inputs(batch, 6, 5, 2, 8, dtype=torch.float32, device=device)
        torch.testing.assert_close(attend(*tensors), channel_attention(*tensors))
    # One graph for the first batch size, one with the batch size free.
    assert counter.frame_count <= 2


def test_exports_with_free_height_and_width():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return channel_attention(q, k, v, scale=(q.shape[1] * q.shape[2]) ** -0.5)

    sides = {1: torch.export.Dim("height", min=2, max=512), 2: torch.export.Dim("width", min=2, max=512)}
    example = tuple(inputs(1, 20, 26, 2, 8))
    program = torch.export.export(Attend(), example, dynamic_shapes=(sides, sides, sides)).module()
    for height, width in ((14, 33), (41, 2)):
        tensors = inputs(1, height, width, 2, 8)
        torch.testing.assert_close(program(*tensors), Attend()(*tensors))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"query": torch.zeros(8, 2, 4)}, "query"),
        ({"query": torch.zeros(1, 8, 2, 4, dtype=torch.int64)}, "query"),
        ({"query": torch.zeros(1, 8, 2, 0)}, "query"),
        ({"key": torch.zeros(1, 8, 2, 5)}, "key"),
        ({"value": None}, "value"),
        ({"value": torch.zeros(1, 8, 2, 4, dtype=torch.float64)}, "value"),
        ({"value": torch.zeros(1, 8, 2, 4, device="meta")}, "value"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, named):
    arguments = {name: torch.zeros(1, 8, 2, 4) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=f"^{named}: got"):
        channel_attention(**(arguments | change))


def test_packed_names_wrong_arguments():
    qkv = torch.zeros(1, 8, 3, 2, 4)
    for change, named in (
        ({"qkv": qkv[:, :, :2]}, "qkv"),
        ({"qkv": qkv[:, 0]}, "qkv"),
        ({"qkv": qkv.long()}, "qkv"),
        ({"roles": (0, 1, 1)}, "roles"),
        ({"roles": (0, 1)}, "roles"),
        ({"roles": ("query", 1, 2)}, "roles"),
        ({"roles": None}, "roles"),
        ({"qkv": None}, "qkv"),
        ({"qkv": qkv[..., :0]}, "qkv"),
    ):
        with pytest.raises(ValueError, match=f"^{named}: got"):
            channel_attention_qkv(**({"qkv": qkv} | change))
