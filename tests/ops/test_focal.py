"""Focal modulation: the reference against its definition and the published module, the kernels against it."""

from pathlib import Path

import parity
import pytest
import torch
import torch.nn.functional as F
from densezoo.ops import focal_modulation, set_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

cuda = torch.cuda.is_available()

# batch, height, width, dim, kernel sizes
SETTINGS = [
    (2, 5, 7, 3, (3, 5)),
    (1, 6, 4, 2, (3,)),
    (1, 2, 3, 4, (5, 7, 9)),
    (2, 1, 1, 2, (1, 3)),
    (1, 8, 8, 2, (9, 3)),
]


def inputs(setting, dtype=torch.float64, device="cpu"):
    """Return context and gates as views of one projection, and the kernels."""
    batch, height, width, dim, sizes = setting
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    projected = normal(batch, height, width, 2 * dim + len(sizes) + 1)
    _, context, gates = projected.split([dim, dim, len(sizes) + 1], dim=-1)
    return [context, gates, *(normal(dim, 1, size, size) / size for size in sizes)]


def run(context, gates, *weights, **kwargs):
    return focal_modulation(context, gates, weights, **kwargs)


def error(got, expected):
    """Return the relative RMS error; NaN counts as infinite."""
    value = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return value if value == value else float("inf")


def gradients(tensors, seed=1, **kwargs):
    """Return focal modulation's output and the gradient of each of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = run(*leaves, **kwargs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))]


def definition(context, gates, *weights):
    """Compute the sum from the paper's formulas, one position and channel at a time."""
    batch, height, width, dim = context.shape
    out = torch.zeros_like(context)
    for level, weight in enumerate(weights):
        reach, gathered = weight.shape[-1] // 2, torch.zeros_like(context)
        for y in range(height):
            for x in range(width):
                for j in range(max(0, y - reach), min(height, y + reach + 1)):
                    for i in range(max(0, x - reach), min(width, x + reach + 1)):
                        gathered[:, y, x] += weight[:, 0, j - y + reach, i - x + reach] * context[:, j, i]
        context = gathered * 0.5 * (1 + torch.erf(gathered / 2**0.5))
        out += gates[..., level, None] * context
    return out + gates[..., -1:] * F.gelu(context.sum((1, 2), keepdim=True) / (height * width))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_reference_is_the_definition(setting):
    tensors = inputs(setting)
    expected = definition(*tensors)
    torch.testing.assert_close(run(*tensors), expected)
    levels = len(setting[-1])
    torch.testing.assert_close(run(*tensors, normalize_modulator=True), expected / (levels + 1))


@torch.no_grad()
def test_published_module():
    golden = parity.load(Path(parity.__file__).parent / "goldens" / "focal_modulation.json")
    state, dim = parity.state_dict_from(golden), 64
    x = parity.fixed_input("x", tuple(golden["inputs"]["x"])).permute(0, 2, 3, 1)
    projected = F.linear(x, state["f.weight"], state["f.bias"])
    query, context, gates = projected.split([dim, dim, 3], dim=-1)
    context = focal_modulation(context, gates, [state[f"focal_layers.{level}.0.weight"] for level in (0, 1)])
    modulator = F.linear(context, state["h.weight"].flatten(1), state["h.bias"])
    y = F.linear(query * modulator, state["proj.weight"], state["proj.bias"])
    assert parity.compare(golden["outputs"]["y"], y.permute(0, 3, 1, 2)) < 2e-6


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gradients(setting):
    leaves = [t.clone().requires_grad_() for t in inputs((1, 4, 3, 2, *setting[4:]))]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_computes_in_float32(dtype, autocast):
    # Sums over windows and gated sums leave the range of float16; only their end comes back into it.
    context, gates, *weights = inputs((1, 30, 40, 8, (3, 5)), torch.float32)
    context, gates = (100 * context.abs()).to(dtype), (gates / 64).to(dtype)
    weights = [weight.abs() * 8 for weight in weights]
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = run(context, gates, *weights)
    assert out.dtype == dtype and out.isfinite().all()
    expected = run(context.double(), gates.double(), *weights)
    first = F.conv2d(context.double().permute(0, 3, 1, 2), weights[0].double(), padding=1, groups=8)
    second = F.conv2d(first, weights[1].double(), padding=2, groups=8)
    assert second.max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1)


@pytest.mark.parametrize("aligned", [False, True], ids=["views", "dense"])
@pytest.mark.parametrize("setting", [(2, 5, 1, 3, (3, 5)), (1, 2, 3, 34, (1, 3)), (1, 2, 1, 3, (7,))], ids=str)
@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_kernels_interpreted(setting, aligned, monkeypatch, nan_filled_memory):
    from densezoo.ops.focal import kernels

    # Several images a program, or short pieces.
    monkeypatch.setattr(kernels, "PROGRAMS", 1 if aligned else 4096)
    monkeypatch.setattr(kernels, "ROWS", 2)
    monkeypatch.setattr(kernels, "_walk", lambda table, size: kernels._Walk(2))
    kernels._problem.cache_clear()
    tensors = inputs(setting, torch.float32)
    tensors = [t.contiguous() for t in tensors] if aligned else tensors
    set_backend("triton")
    got = gradients(tensors, normalize_modulator=aligned)
    kernels._problem.cache_clear()
    set_backend("reference")
    expected = gradients([t.double() for t in tensors], normalize_modulator=aligned)
    assert max(map(error, got, expected)) < 1e-6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operator_contract(device, monkeypatch):
    from densezoo.ops.focal import kernels

    if device == "cpu" and cuda:
        pytest.skip("the kernels run on the GPU")
    # The interpreter takes the numbers of a strip one by one.
    monkeypatch.setattr(kernels, "_walk", lambda table, size: kernels._Walk(1))
    kernels._problem.cache_clear()
    context, gates, weight = inputs((2, 2, 1, 4, (3,)), torch.float32, device)
    tensors = [context, gates, weight.flatten(1).t().contiguous()]
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.densezoo.focal_modulation, (*leaves, [3], True))
    saved = [t.detach() for t in torch.ops.densezoo.focal_modulation(*leaves, [3], True)]
    args = (torch.ones_like(saved[0]), *tensors, *saved)
    # opcheck leaves out what the compiler asserts: strides.
    with FakeTensorMode() as mode:
        fake = torch.ops.densezoo.focal_modulation_backward(*(mode.from_tensor(t) for t in args), [3], True)
    got = torch.ops.densezoo.focal_modulation_backward(*args, [3], True)
    kernels._problem.cache_clear()
    assert [t.stride() for t in got] == [t.stride() for t in fake]


GPU_SETTINGS = [
    (4, 56, 56, 96, (3, 5, 7)),
    (128, 7, 7, 768, (3, 5)),
    (256, 14, 14, 32, (3, 5)),
    (2, 200, 304, 96, (3, 5)),
    (3, 23, 41, 52, (9, 11)),
    (2, 30, 19, 72, (3, 5, 7, 9)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("aligned", [False, True], ids=["views", "dense"])
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("setting", SETTINGS + GPU_SETTINGS, ids=str)
def test_kernels(setting, dtype, allowed, aligned, nan_filled_memory):
    tensors = inputs(setting, dtype, "cuda")
    tensors[2:] = [t.float() for t in tensors[2:]]
    tensors = [t.contiguous() for t in tensors] if aligned else tensors
    set_backend("triton")
    got, again = (gradients(tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    set_backend("reference")
    expected = gradients([t.double() for t in tensors])
    assert max(map(error, got, expected)) < allowed


@pytest.mark.gpu
def test_more_than_2_31_elements():
    projected = torch.randn(33, 1024, 1024, 2 * 32 + 3, device="cuda", dtype=torch.bfloat16)
    _, context, gates = projected.split([32, 32, 3], dim=-1)
    assert projected.numel() > 2**31
    weights = [t.cuda().float() for t in inputs((1, 1, 1, 32, (3, 5)))[2:]]
    results = []
    for count in (len(context), 1):
        leaves = [t[-count:].detach().requires_grad_() for t in (context, gates)]
        out = run(*leaves, *weights)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    # Indices of 64 bits make other code: where a sum nearly cancels, its rounding shows.
    for big, one in zip(*results, strict=True):
        torch.testing.assert_close(big[-1:], one, rtol=1.6e-2, atol=4e-3)


@pytest.mark.gpu
def test_cuda_graphs_capture():
    set_backend("triton")
    leaves = [t.detach().requires_grad_() for t in inputs((4, 14, 14, 64, (3, 5)), torch.float16, "cuda")]
    grad = torch.randn(leaves[0].shape, device="cuda", dtype=torch.float16)

    def step():
        out = run(*leaves)
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
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        tensors = inputs((batch, *SETTINGS[0][1:]), torch.float32, device)
        torch.testing.assert_close(compiled(*tensors), run(*tensors))
    assert counter.frame_count <= 2


def test_exports_with_free_height_and_width():
    class Modulate(torch.nn.Module):
        def forward(self, *tensors):
            return run(*tensors)

    height, width = torch.export.Dim("height", min=2, max=512), torch.export.Dim("width", min=2, max=512)
    shapes = ({1: height, 2: width}, {1: height, 2: width}, None, None)
    tensors = tuple(t.contiguous() for t in inputs(SETTINGS[0]))
    program = torch.export.export(Modulate(), tensors, dynamic_shapes=(shapes,)).module()
    for size in [(9, 4), (3, 31)]:
        tensors = [t.contiguous() for t in inputs((2, *size, *SETTINGS[0][3:]))]
        torch.testing.assert_close(program(*tensors), run(*tensors))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"context": torch.zeros(2, 5, 8)}, "context"),
        ({"context": torch.zeros(2, 0, 6, 8)}, "context"),
        ({"context": torch.zeros(2, 5, 6, 0)}, "context"),
        ({"gates": None}, "gates"),
        ({"weights": [torch.zeros(8, 1, 3, 3), None]}, r"weights\[1\]"),
        ({"context": torch.zeros(2, 5, 6, 8, dtype=torch.int64)}, "context"),
        ({"gates": torch.zeros(2, 5, 6, 2)}, "gates"),
        ({"gates": torch.zeros(2, 5, 7, 3)}, "gates"),
        ({"gates": torch.zeros(2, 5, 6)}, "gates"),
        ({"gates": torch.zeros(2, 5, 6, 3, dtype=torch.float64)}, "gates"),
        ({"gates": torch.zeros(2, 5, 6, 3, device="meta")}, "gates"),
        ({"weights": []}, "weights"),
        ({"weights": torch.zeros(2, 8, 1, 3, 3)}, "weights"),
        ({"weights": [torch.zeros(8, 1, 3, 3), torch.zeros(8, 1, 4, 4)]}, r"weights\[1\]"),
        ({"weights": [torch.zeros(8, 1, 3, 5), torch.zeros(8, 1, 3, 3)]}, r"weights\[0\]"),
        ({"weights": [torch.zeros(8, 3, 3), torch.zeros(8, 1, 3, 3)]}, r"weights\[0\]"),
        ({"weights": [torch.zeros(8, 1, 3, 3), torch.zeros(4, 1, 3, 3)]}, r"weights\[1\]"),
        ({"weights": [torch.zeros(8, 1, 3, 3, dtype=torch.int64), torch.zeros(8, 1, 3, 3)]}, r"weights\[0\]"),
        ({"weights": [torch.zeros(8, 1, 3, 3, device="meta"), torch.zeros(8, 1, 3, 3)]}, r"weights\[0\]"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    arguments = dict(
        context=torch.zeros(2, 5, 6, 8), gates=torch.zeros(2, 5, 6, 3), weights=[torch.zeros(8, 1, 3, 3)] * 2
    )
    with pytest.raises(ValueError, match=f"^{named}: got"):
        focal_modulation(**(arguments | change))
