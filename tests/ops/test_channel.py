"""Channel attention: the reference against its definition and against the two published forms."""

import pytest
import torch
from densezoo.ops import channel_attention
from timm.models.davit import ChannelAttention, ChannelAttentionV2
from torch._dynamo.testing import CompileCounterWithBackend


def inputs(*shape, dtype=torch.float64, seed=0):
    """Return query, key and value as views of one qkv tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape[:-2], 3, *shape[-2:], generator=generator, dtype=torch.float64).to(dtype).unbind(-3)


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
        got = channel_attention(query, key, value, scale=160**-1.9)
    assert got.dtype == dtype
    expected = channel_attention(query.float(), key.float(), value.float(), scale=160**-1.9)
    assert (query.float() * key.float()).sum((0, 1, 2)).abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(got, expected.to(dtype), atol=0, rtol=torch.finfo(dtype).eps)


def test_compiles_once_for_any_batch():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(channel_attention, fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        tensors = inputs(batch, 6, 5, 2, 8)
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
        ({"key": torch.zeros(1, 8, 2, 5)}, "key"),
        ({"value": torch.zeros(1, 8, 2, 4, dtype=torch.float64)}, "value"),
        ({"value": torch.zeros(1, 8, 2, 4, device="meta")}, "value"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, named):
    arguments = {name: torch.zeros(1, 8, 2, 4) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=f"^{named}: got"):
        channel_attention(**(arguments | change))
