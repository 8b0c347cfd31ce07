"""What holds of every heavy operator: its graphs, compiled or exported, take any batch, and float32 takes tf32."""

import pytest
import torch
from densezoo.ops import (
    agent_attention,
    channel_attention,
    channel_attention_qkv,
    focal_modulation,
    focused_linear_attention,
    ms_deform_attn,
    na2d,
    na2d_qkv,
    quadtree_attention,
    set_backend,
    window_attention,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

cuda = torch.cuda.is_available()

# Shapes by operator, where None stands for the batch; vectors are scales and positive.
CASES = {
    "window_attention": (
        lambda qkv, bias: window_attention(qkv, bias, num_heads=2, window_size=4, shift=1),
        [(None, 5, 6, 48), (2, 7, 7)],
    ),
    "na2d": (lambda q, k, v, rpb: na2d(q, k, v, 3, rpb=rpb), [*3 * [(None, 5, 6, 2, 8)], (2, 5, 5)]),
    "na2d_qkv": (lambda qkv, rpb: na2d_qkv(qkv, 3, rpb=rpb), [(None, 5, 6, 3, 2, 8), (2, 5, 5)]),
    "channel_attention": (channel_attention, 3 * [(None, 5, 6, 2, 8)]),
    "channel_attention_qkv": (lambda qkv: channel_attention_qkv(qkv, roles=(1, 2, 0)), [(None, 5, 6, 3, 2, 8)]),
    "focused_linear_attention": (
        lambda q, k, v, scale, encoding: focused_linear_attention(q, k, v, scale, positional_encoding=encoding),
        [*3 * [(None, 20, 2, 8)], (2, 8), (20, 2, 8)],
    ),
    "agent_attention": (
        lambda q, k, v, agent, gather, spread: agent_attention(
            q, k, v, agent, aggregation_bias=gather, broadcast_bias=spread
        ),
        [*3 * [(None, 30, 2, 8)], (None, 9, 2, 8), (2, 9, 30), (2, 30, 9)],
    ),
    "quadtree_attention": (
        lambda q, k, *value: quadtree_attention(q, k, value, topk=2),
        [*3 * [(None, 3, 4, 1, 8)], (None, 2, 2, 1, 8)],
    ),
    "focal_modulation": (
        lambda context, gates, *weights: focal_modulation(context, gates, weights),
        [(None, 3, 4, 8), (None, 3, 4, 2), (8, 1, 3, 3)],
    ),
    "ms_deform_attn": (
        lambda value, locations, weights: ms_deform_attn(
            value, *LEVELS[value.device.type], locations.sigmoid(), weights
        ),
        [(None, 26, 1, 8), (None, 4, 1, 2, 2, 2), (None, 4, 1, 2, 2)],
    ),
}
LEVELS = {
    device: (torch.tensor([(4, 5), (2, 3)], device=device), torch.tensor([0, 20], device=device))
    for device in (("cpu", "cuda") if cuda else ("cpu",))
}


def inputs(shapes, batch, device):
    generator = torch.Generator().manual_seed(batch)
    drawn = (torch.randn([batch if n is None else n for n in s], generator=generator) for s in shapes)
    return [(t if t.dim() > 2 else t.abs() + 0.5).to(device) for t in drawn]


def gradients(function, tensors):
    """Return the output of `function` and the gradient of each of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))]


def error(got, expected):
    """Return the relative RMS error; NaN counts as infinite."""
    value = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return value if value == value else float("inf")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_trains_any_batch(name, device):
    if device == "cpu" and cuda:
        pytest.skip("the kernels run on the GPU")
    function, shapes = CASES[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    set_backend("triton")
    for batch in (2, 3, 4):
        tensors = inputs(shapes, batch, device)
        got = gradients(compiled, tensors)
    assert max(map(error, got, gradients(function, tensors))) < 1e-6
    # One graph for the first batch size, one with the batch size free.
    assert counter.frame_count <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_float32_with_tf32(name, monkeypatch):
    function, shapes = CASES[name]
    tensors = inputs(shapes, 3, "cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    set_backend("triton")
    got = gradients(function, tensors)
    set_backend("reference")
    expected = gradients(function, [t.double() for t in tensors])
    # tf32 keeps 10 digits, one less than it takes to round.
    assert max(map(error, got, expected)) < 1e-2


@pytest.mark.parametrize("name", CASES)
def test_one_exported_graph_takes_any_batch(name):
    """Whatever limits the kernels have: a named range is stricter than Dim.DYNAMIC."""
    function, shapes = CASES[name]
    module = nn.Module()
    module.forward = lambda *tensors: function(*tensors)
    free = [{0: torch.export.Dim("batch", min=1)} if s[0] is None else None for s in shapes]
    program = torch.export.export(module, tuple(inputs(shapes, 2, "cpu")), dynamic_shapes=(tuple(free),))
    for batch in (1, 5):
        tensors = inputs(shapes, batch, "cpu")
        torch.testing.assert_close(program.module()(*tensors), function(*tensors))


@pytest.mark.parametrize("name", ["quadtree_attention", "focal_modulation", "ms_deform_attn"])
def test_more_images_than_a_grid_has_programs(name):
    function, shapes = CASES[name]
    tensors = inputs(shapes, 1, "cuda" if cuda else "cpu")
    tensors = [t.expand(65536, *s[1:]) if s[0] is None else t for t, s in zip(tensors, shapes, strict=True)]
    set_backend("triton")
    with pytest.raises(RuntimeError, match=f"{name}: .*65536 images \\(kernels: up to 65535\\)"):
        function(*tensors)
