"""Multi-scale deformable attention: the reference against its definition, the kernels against the reference."""

import itertools
import math

import pytest
import torch
from densezoo.ops import ms_deform_attn, set_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

cuda = torch.cuda.is_available()

# batch, sizes of the levels, queries, heads, dim, points
SETTINGS = [
    (2, [(4, 5), (2, 3)], 5, 2, 8, 3),
    (1, [(3, 7)], 9, 1, 12, 1),
    (1, [(6, 4), (3, 2), (1, 1)], 4, 3, 5, 2),
]


def inputs(setting, dtype=torch.float32, device="cpu", location_dtype=None):
    """Return value, locations and weights, and the levels' sizes and starts; some points lie outside of the levels."""
    batch, sizes, queries, heads, dim, points = setting
    generator = torch.Generator().manual_seed(0)
    keys = [height * width for height, width in sizes]
    value = torch.randn(batch, sum(keys), 2, heads, dim, generator=generator, dtype=torch.float64)[:, :, 1]
    shape = batch, queries, heads, len(sizes), points
    locations = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 1.3 - 0.15
    # The locations' gradient jumps at the centres of positions: none so near that rounding crosses one.
    extent = torch.tensor(sizes).flip(1)[:, None]
    pixel = locations * extent - 0.5
    near = (pixel - pixel.round()).abs() < 1e-3
    locations = ((pixel.round() + 0.501) / extent).where(near, locations)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64).flatten(3).softmax(-1).view(shape)
    starts = torch.tensor([0, *itertools.accumulate(keys[:-1])], device=device)
    location_dtype = location_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    tensors = [value.to(device, dtype), locations.to(device, location_dtype), weights.to(device, dtype)]
    return tensors, (torch.tensor(sizes, device=device), starts)


def run_with(levels):
    return lambda value, locations, weights: ms_deform_attn(value, *levels, locations, weights)


def gradients(function, tensors):
    """Return the output of `function` and the gradient of each of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))]


def error(got, expected):
    """Return the relative RMS error; NaN counts as infinite."""
    value = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return value if value == value else float("inf")


def definition(value, sizes, starts, locations, weights):
    """Compute multi-scale deformable attention from its words, one point at a time."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = value.new_zeros(batch, queries, heads, value.shape[-1])
    for b, q, h, level, p in itertools.product(*map(range, (batch, queries, heads, levels, points))):
        height, width = sizes[level].tolist()
        x, y = (locations[b, q, h, level, p] * torch.tensor([width, height]) - 0.5).tolist()
        for row, column in itertools.product(*((math.floor(c), math.floor(c) + 1) for c in (y, x))):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[b, q, h, level, p]
                out[b, q, h] += share * value[b, starts[level] + row * width + column, h]
    return out.flatten(2)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_reference_is_the_definition(setting):
    tensors, levels = inputs(setting, torch.float64)
    torch.testing.assert_close(run_with(levels)(*tensors), definition(tensors[0], *levels, *tensors[1:]))


def test_reference_gradients():
    tensors, levels = inputs((1, [(3, 4), (2, 2)], 3, 2, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(run_with(levels), [t.requires_grad_() for t in tensors], fast_mode=True)


def test_level_starts_say_where_the_levels_lie():
    (value, *rest), (sizes, starts) = inputs(SETTINGS[0])
    swapped = torch.cat([value[:, 20:], value[:, :20]], 1)
    expected = run_with((sizes, starts))(value, *rest)
    torch.testing.assert_close(run_with((sizes, torch.tensor([6, 0])))(swapped, *rest), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_computes_in_float32(autocast):
    tensors, levels = inputs(SETTINGS[0], torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = run_with(levels)(*tensors)
    assert out.dtype == torch.bfloat16
    assert error(out, run_with(levels)(*(t.double() for t in tensors))) < 3e-3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_once_for_any_batch(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ms_deform_attn, fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        (value, *rest), levels = inputs((batch, *SETTINGS[0][1:]), device=device)
        torch.testing.assert_close(compiled(value, *levels, *rest), ms_deform_attn(value, *levels, *rest))
    assert counter.frame_count <= 2


class Attend(torch.nn.Module):
    def forward(self, *tensors):
        return ms_deform_attn(*tensors)


def test_exports_with_free_keys_and_queries():
    (value, *rest), levels = inputs(SETTINGS[0])
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        Attend(), (value, *levels, *rest), dynamic_shapes=(({1: free}, None, None, {1: free}, {1: free}),)
    ).module()
    for sizes, queries in [([(4, 5), (2, 3)], 5), ([(3, 9), (7, 2)], 8)]:
        (value, *rest), levels = inputs((2, sizes, queries, *SETTINGS[0][3:]))
        torch.testing.assert_close(program(value, *levels, *rest), ms_deform_attn(value, *levels, *rest))


def check_kernels(setting, allowed, dtype=torch.float32, device="cpu", location_dtype=None):
    tensors, levels = inputs(setting, dtype, device, location_dtype)
    set_backend("triton")
    got = gradients(run_with(levels), tensors)
    if device == "cuda":
        again = gradients(run_with(levels), tensors)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    set_backend("reference")
    expected = gradients(run_with(levels), [t.double() for t in tensors])
    assert max(map(error, got, expected)) < allowed


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_kernels_interpreted(setting, nan_filled_memory):
    check_kernels(setting, 1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_at_the_centres_of_positions(device):
    """Where the gradient of a location jumps it is the one towards larger coordinates; there is none a step outside."""
    (value, _, weights), levels = inputs((1, [(4, 8)], 6, 1, 8, 5), device=device)
    rows, columns = torch.arange(-1, 5, device=device), torch.tensor([-1, 0, 3, 7, 8], device=device)
    pixel = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
    locations = ((pixel + 0.5) / torch.tensor([8, 4], device=device)).view(1, 6, 1, 1, 5, 2)
    results = []
    for backend in ("triton", "reference"):
        set_backend(backend)
        results.append(gradients(run_with(levels), [value, locations, weights]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert results[0][2][:, 1:5, :, :, 1:4].all() and not results[0][2][:, 0].any()
    assert not results[0][2][:, :, :, :, [0, 4]].any()


GPU_SETTINGS = [
    *SETTINGS,
    (2, [(100, 152), (50, 76), (25, 38), (13, 19)], 3000, 8, 32, 4),
    (1, [(32, 40), (16, 20), (8, 10)], 1680, 8, 32, 4),
    (3, [(31, 17)], 333, 3, 24, 5),
    (1, [(20, 20), (10, 10)], 77, 4, 128, 8),
    (256, [(4, 4)], 16, 2, 64, 4),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("same", [True, False], ids=["one dtype", "float32 locations"])
@pytest.mark.parametrize("setting", GPU_SETTINGS, ids=str)
def test_kernels(setting, same, dtype, allowed, nan_filled_memory):
    check_kernels(setting, allowed, dtype, "cuda", dtype if same else torch.float32)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_any_size_and_without_one(device):
    """The sums of the values' gradient keep their precision at any scale, and say where there is no number."""
    (value, *rest), levels = inputs(SETTINGS[0], device=device)
    set_backend("triton")
    leaf = value.detach().requires_grad_()
    out = ms_deform_attn(leaf, *levels, *rest)
    expected = torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0]
    for factor in (1e-34, 1e-20, 1e20, 1e34):
        got = torch.autograd.grad(out, leaf, torch.full_like(out, factor), retain_graph=True)[0]
        assert error(got.double() / factor, expected) < 1e-6
    assert not torch.autograd.grad(out, leaf, torch.zeros_like(out), retain_graph=True)[0].any()
    for wrong in (float("inf"), float("nan")):
        grad = torch.ones_like(out)
        grad[0, 0, 0] = wrong
        assert torch.autograd.grad(out, leaf, grad, retain_graph=True)[0].isnan().all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_small_gradients_beside_large_ones(device):
    """Positions that a query of a large gradient does not sample keep the precision of theirs."""
    (value, _, weights), levels = inputs((1, [(6, 6)], 2, 1, 8, 3), device=device)
    # The first query samples in the upper half, the second in the lower one.
    x, y = torch.tensor([0.2, 0.5, 0.7], device=device), torch.tensor([[0.2], [0.8]], device=device).expand(2, 3)
    locations = torch.stack([x.expand(2, 3), y], -1).view(1, 2, 1, 1, 3, 2)
    grad = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1e6], [1e-6]])
    grads = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        set_backend(backend)
        leaf = value.to(dtype).requires_grad_()
        out = ms_deform_attn(leaf, *levels, locations, weights)
        grads.append(torch.autograd.grad(out, leaf, grad.to(out))[0])
    for half in (slice(0, 18), slice(18, 36)):
        assert error(grads[0][:, half], grads[1][:, half]) < 1e-6


def test_points_out_of_reach():
    (value, locations, weights), levels = inputs(SETTINGS[0])
    locations.view(-1)[:7] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e9, -1e9, 3e38, -3e38])
    set_backend("reference")
    expected = ms_deform_attn(value, *levels, locations, weights)
    assert expected.isfinite().all()
    if not cuda:
        set_backend("triton")
        torch.testing.assert_close(ms_deform_attn(value, *levels, locations, weights), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("queries, points", [(0, 2), (3, 0)])
def test_nothing_to_sample(queries, points, device):
    tensors, levels = inputs((2, [(4, 5), (2, 3)], queries, 2, 8, points), device=device)
    set_backend("triton")
    out, *grads = gradients(run_with(levels), tensors)
    assert out.shape == (2, queries, 16) and not out.any()
    assert not grads[0].any() and [g.shape for g in grads] == [t.shape for t in tensors]


@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_operator_contract_interpreted():
    check_operator_contract("cpu")


@pytest.mark.gpu
def test_operator_contract():
    check_operator_contract("cuda")


def check_operator_contract(device):
    import densezoo.ops.deformable.kernels  # noqa: F401  (registers the operator)

    (value, *rest), levels = inputs((1, [(3, 2)], 2, 1, 8, 2), device=device)
    tensors = [value, *levels, *rest]
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    torch.library.opcheck(torch.ops.densezoo.ms_deform_attn, tuple(leaves))
    out, nothing = (t.detach() for t in torch.ops.densezoo.ms_deform_attn(*leaves))
    args = (torch.ones_like(out), *tensors, out, nothing)
    # opcheck leaves out what the compiler asserts: strides.
    with FakeTensorMode() as mode:
        expected = [t.stride() for t in torch.ops.densezoo.ms_deform_attn_backward(*map(mode.from_tensor, args))]
    assert [t.stride() for t in torch.ops.densezoo.ms_deform_attn_backward(*args)] == expected


@pytest.mark.gpu
def test_cuda_graph(check_cuda_graph):
    tensors, levels = inputs((2, [(20, 30), (10, 15)], 100, 2, 32, 4), torch.bfloat16, "cuda")
    set_backend("triton")
    leaves = [t.detach().requires_grad_() for t in tensors]

    def step():
        out = run_with(levels)(*leaves)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    check_cuda_graph(step)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    value = torch.randn(5, 512 * 512, 2, 8, 128, device="cuda", dtype=torch.bfloat16)[:, :, 1]
    assert 2 * value.numel() > 2**31
    levels = torch.tensor([[512, 512]], device="cuda"), torch.tensor([0], device="cuda")
    locations = torch.rand(5, 100, 8, 1, 4, 2, device="cuda")
    weights = torch.rand(5, 100, 8, 1, 4, device="cuda")
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    out = run_with(levels)(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    last = [t.detach()[-1:].requires_grad_() for t in leaves]
    small = run_with(levels)(*last)
    small_grads = torch.autograd.grad(small, last, torch.ones_like(small))
    for big, one in zip((out, *grads), (small, *small_grads), strict=True):
        torch.testing.assert_close(big[-1:], one)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"value": torch.zeros(2, 26, 16)}, "value"),
        ({"value": torch.zeros(2, 26, 2, 8, dtype=torch.int64)}, "value"),
        ({"sampling_locations": torch.zeros(2, 5, 2, 6, 2)}, "sampling_locations"),
        ({"sampling_locations": torch.zeros(2, 5, 2, 2, 3, 3)}, "sampling_locations"),
        ({"sampling_locations": torch.zeros(2, 5, 3, 2, 3, 2)}, "sampling_locations"),
        ({"sampling_locations": torch.zeros(2, 5, 2, 0, 3, 2)}, "sampling_locations"),
        ({"attention_weights": torch.zeros(2, 5, 2, 6)}, "attention_weights"),
        ({"attention_weights": torch.zeros(2, 5, 2, 2, 3, dtype=torch.int32)}, "attention_weights"),
        ({"spatial_shapes": [(4, 5), (2, 3)]}, "spatial_shapes"),
        ({"spatial_shapes": torch.tensor([[4, 5]])}, "spatial_shapes"),
        ({"spatial_shapes": torch.tensor([[4.0, 5.0], [2.0, 3.0]])}, "spatial_shapes"),
        ({"level_start_index": torch.tensor([0])}, "level_start_index"),
        ({"level_start_index": torch.zeros(2, dtype=torch.int64, device="meta")}, "level_start_index"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, named):
    (value, locations, weights), (sizes, starts) = inputs(SETTINGS[0])
    arguments = dict(value=value, spatial_shapes=sizes, level_start_index=starts)
    arguments |= dict(sampling_locations=locations, attention_weights=weights) | change
    with pytest.raises(ValueError, match=f"^{named}: got"):
        ms_deform_attn(**arguments)


def test_what_the_kernels_leave_to_the_reference():
    set_backend("triton")
    tensors, levels = inputs(SETTINGS[0], torch.float64)
    with pytest.raises(RuntimeError, match="ms_deform_attn: cannot run on triton: value of torch.float64"):
        run_with(levels)(*tensors)
