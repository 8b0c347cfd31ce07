"""The attention modules: the published outputs, their definitions, and their places in other networks."""

import copy
import functools
import io
from pathlib import Path

import parity
import pytest
import timm
import torch
import torch.nn.functional as F
from densezoo.ops import plugins
from densezoo.ops.plugins import BAM, CBAM, DAS, ECA, ELA, FCA, PKCAM, SE, ULSAM, GatherExcite, Triplet
from densezoo.ops.plugins.parts import map_conv, max_mean
from timm.models import byobnet
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.ops import deform_conv2d

GOLDENS = Path(parity.__file__).parent / "goldens"
MODULES = [getattr(plugins, name) for name in plugins.__all__]
# What leaves a bottleneck more than one or two channels in small networks.
NARROW = {kind: dict(reduction=4) if kind in (BAM, CBAM, FCA, SE) else {} for kind in MODULES}
each = pytest.mark.parametrize("kind", MODULES, ids=plugins.__all__)


def build(kind: type, channels: int = 32, **options) -> torch.nn.Module:
    """Return a module in which every parameter counts: some start at 0."""
    module = kind(channels, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("bam", BAM(64)),
        ("cbam", CBAM(64)),
        ("eca", ECA(64)),
        ("fca", FCA(64, dct_size=56)),
        ("fca_28", FCA(64, dct_size=28)),
        ("se", SE(64)),
        ("triplet_attention", Triplet(64)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parity(name, module):
    golden = parity.load(GOLDENS / f"{name}.json")
    module.load_state_dict(parity.state_dict_from(golden))
    with torch.no_grad():
        out = module.eval()(parity.fixed_input("x", golden["inputs"]["x"]))
    assert parity.compare(golden["outputs"]["y"], out) < 2e-6


@each
@pytest.mark.parametrize("size", [(12, 16), (7, 5), (1, 9), (13, 1), (1, 1)], ids=str)
def test_forward_and_backward(kind, size):
    module = build(kind, **NARROW[kind])
    for train in (True, False):
        module.train(train).zero_grad()
        x = torch.randn(3, 32, *size, requires_grad=True)
        out = module(x)
        assert out.shape == x.shape and out.dtype == x.dtype
        (out * torch.randn(out.shape)).sum().backward()
        assert x.grad.isfinite().all() and x.grad.any()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            # A batch norm in training takes away what a bias before it adds. ULSAM's softmax over one position is 1,
            # and DAS's norm over one leaves nothing.
            idle = train or (kind in (ULSAM, DAS) and size == (1, 1))
            assert idle or parameter.grad.any(), name


@each
def test_gradients(kind):
    module = build(kind, channels=16, **NARROW[kind])
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module.eval().double(), x, fast_mode=True)


@each
def test_images_are_independent_and_memory_layout_is_free(kind):
    module, x = build(kind).eval(), torch.randn(3, 32, 9, 6)
    out = module(x)
    torch.testing.assert_close(module(x[1:2]), out[1:2])
    torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), out)
    torch.testing.assert_close(module(x.transpose(2, 3).contiguous().transpose(2, 3)), out)


@each
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_autocast(kind, train):
    module, x = build(kind).train(train), torch.randn(2, 32, 9, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, narrow = module(x), module(x.bfloat16())
    out.float().sum().backward()
    assert out.isfinite().all() and narrow.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    torch.testing.assert_close(narrow.float(), out.float(), atol=0.1, rtol=0.1)


@each
def test_whole_module_in_bfloat16(kind):
    module, x = build(kind).eval(), torch.randn(2, 32, 9, 11)
    out = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x), atol=0.1, rtol=0.1)


@each
def test_compile(kind):
    module, x = build(kind), torch.randn(2, 32, 9, 11)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    for net in (module, compiled):
        net(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), module(x))
    for (name, a), b in zip(module.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-4, msg=name)


@each
def test_export_with_free_height_and_width(kind):
    module, free = build(kind).eval(), torch.export.Dim.DYNAMIC
    program = torch.export.export(module, (torch.randn(2, 32, 14, 21),), dynamic_shapes=({2: free, 3: free},)).module()
    # A strided convolution in an exported graph serves no map that it takes to a single row or column.
    for size in ((14, 21), (9, 10), (30, 11)) if kind is GatherExcite else ((14, 21), (7, 7), (5, 30)):
        x = torch.randn(2, 32, *size)
        torch.testing.assert_close(program(x), module(x))


@each
def test_state_dict_and_factory_arguments(kind):
    module = build(kind).eval()
    again = kind(32, device="cpu", dtype=torch.float64).eval()
    assert all(t.dtype == torch.float64 for t in again.state_dict().values() if t.is_floating_point())
    again.load_state_dict(module.state_dict())
    x = torch.randn(2, 32, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(again(x), module.double()(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SE(24), r"reduction: got 16 for 24 channels, expected one of \[1, 2, 3, 4, 6, 8, 12, 24\]"),
        (lambda: CBAM(8), "reduction: got 16 for 8 channels, expected one of"),
        (lambda: BAM(32, reduction=0), "reduction: got 0, expected a positive integer"),
        (lambda: SE(0), "channels: got 0, expected a positive integer"),
        (lambda: SE(32.0), "channels: got 32.0, expected a positive integer"),
        (lambda: ECA(-1), "channels: got -1, expected a positive integer"),
        (lambda: Triplet(None), "channels: got None, expected a positive integer"),
        (lambda: BAM(32, dilation=0), "dilation: got 0, expected a positive integer"),
        (lambda: CBAM(32, kernel_size=6), "kernel_size: got 6, expected an odd number"),
        (lambda: ECA(32, kernel_size=4), "kernel_size: got 4, expected an odd number"),
        (lambda: Triplet(32, kernel_size=0), "kernel_size: got 0, expected a positive integer"),
        (lambda: FCA(40), "channels: got 40, expected a multiple of 16, as in 'top16'"),
        (lambda: FCA(32, dct_size=6), "dct_size: got 6, expected 7 at least"),
        (lambda: FCA(32, dct_size=(7, 8, 9)), r"dct_size: got \(7, 8, 9\), expected int or \(rows, columns\)"),
        (lambda: FCA(32, frequencies="top3"), "frequencies: got 'top3', expected one of top1, top2, top4, top8, top16"),
        (lambda: FCA(32, reduction=5), "reduction: got 5 for 32 channels, expected one of"),
        (lambda: GatherExcite(32, extent=6), "extent: got 6, expected a power of two from 2, or None"),
        (lambda: GatherExcite(32, variant="phi"), "variant: got 'phi', expected one of theta-, theta, theta\\+"),
        (lambda: GatherExcite(32, extent=None), "size: got None, expected the map's where a convolution"),
        (lambda: GatherExcite(32, size=7), "size: got 7, expected the map's where .*, else None"),
        (lambda: GatherExcite(24, variant="theta+"), "reduction: got 16 for 24 channels, expected one of"),
        (lambda: ELA(24), "norm_groups: got 16 for 24 channels, expected a divisor of the channels"),
        (lambda: ELA(32, groups=5), "groups: got 5 for 32 channels, expected a divisor of the channels"),
        (lambda: ELA(32, kernel_size=4), "kernel_size: got 4, expected an odd number"),
        (lambda: PKCAM(32, previous=-1), "previous: got -1, expected the number of earlier maps"),
        (lambda: PKCAM(32, kernel_size=2), "kernel_size: got 2, expected an odd number"),
        (lambda: DAS(32, ratio=0), "ratio: got 0, expected a number above 0 and up to 1"),
        (lambda: DAS(32, kernel_size=2), "kernel_size: got 2, expected an odd number"),
        (lambda: ULSAM(32, groups=5), "groups: got 5 for 32 channels, expected a divisor of the channels"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("channels", "size"), [(1, 1), (8, 3), (64, 3), (128, 5), (256, 5), (1024, 5), (2048, 7)])
def test_eca_kernel_size(channels, size):
    assert ECA(channels).conv.kernel_size == (size,)


@pytest.mark.parametrize("dct_size", [7, 14, (14, 7), (20, 9)], ids=str)
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (5, 23), (31, 8)], ids=str)
def test_fca_is_the_pooled_dct(dct_size, size):
    module, x = build(FCA, dct_size=dct_size, frequencies="low8").double(), torch.randn(2, 32, *size).double()
    height, width = (dct_size, dct_size) if isinstance(dct_size, int) else dct_size
    pooled, numbers = F.adaptive_avg_pool2d(x, (height, width)), []
    for c in range(32):
        u, v = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (2, 1), (1, 2))[c // 4]
        h, w = torch.arange(height).double(), torch.arange(width).double()
        rows = torch.cos(torch.pi * u * (height // 7) * (h + 0.5) / height) * (2 if u else 1) ** 0.5
        columns = torch.cos(torch.pi * v * (width // 7) * (w + 0.5) / width) * (2 if v else 1) ** 0.5
        numbers.append((pooled[:, c] * torch.outer(rows, columns)).sum((1, 2)) / (height * width) ** 0.5)
    expected = x * module.fc(torch.stack(numbers, 1))[..., None, None]
    torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-6)


def test_fca_takes_published_files_of_its_own_frequencies():
    module = FCA(32, dct_size=14)
    basis = (module.rows[:, :, None] * module.columns[:, None]).repeat_interleave(2, 0)
    published = torch.nn.Sequential(copy.deepcopy(module)).state_dict() | {"0.dct_layer.weight": basis}
    assert torch.nn.Sequential(module).load_state_dict(published).unexpected_keys == []
    for other in (FCA(32, dct_size=14, frequencies="bot16"), FCA(32, dct_size=28)):
        with pytest.raises(RuntimeError, match="0.dct_layer.weight: .* another dct_size or other frequencies"):
            torch.nn.Sequential(other).load_state_dict(published)


def test_triplet_rotates_the_map():
    module, x = build(Triplet).eval(), torch.randn(2, 32, 6, 9)
    expected = 0
    for gate, axis in ((module.cw, 2), (module.hc, 3), (module.hw, 1)):
        rotated = x.transpose(1, axis)
        scale = gate(torch.stack([rotated.amax(1), rotated.mean(1)], 1)).sigmoid()
        expected = expected + (rotated * scale).transpose(1, axis) / 3
    torch.testing.assert_close(module(x), expected)


def test_cbam_starts_with_a_flat_spatial_gate():
    module, x = CBAM(32), torch.randn(2, 32, 6, 9)
    channel = (module.ChannelGate(x.mean((2, 3))) + module.ChannelGate(x.amax((2, 3)))).sigmoid()
    torch.testing.assert_close(module(x), x * channel[..., None, None] / 2)


# Of one tile and of several, rows and columns that do not fill one; the last is stored transposed.
MAPS = [
    ((2, 2, 5, 7), 7),
    ((1, 2, 70, 40), 7),
    ((3, 2, 1, 1), 3),
    ((2, 2, 9, 33), 5),
    ((1, 2, 3, 60), 7),
    ((1, 2, 20, 6), 15),
    ((1, 2, 3, 3), 9),
    ((2, 2, 7, 18), 7),
]
GPU_MAPS = [
    ((128, 2, 256, 56), 7),
    ((128, 2, 14, 1024), 7),
    ((2, 2, 200, 304), 7),
    ((256, 2, 7, 7), 3),
    ((2, 2, 64, 40), 27),
]


def map_conv_results(shape, size, dtype, device, through_kernels):
    """Return the convolution of two maps to one and its gradients, by the kernels or in float64."""
    from densezoo.ops.plugins.kernels import map_conv_triton

    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype)
        for s in (shape, (1, 2, size, size), (shape[0], 1, *shape[2:]))
    )
    if shape == MAPS[-1][0]:
        x = x.mT.contiguous().mT
    if not through_kernels:
        x, weight, grad = x.double(), weight.double(), grad.double()
    x.requires_grad_(), weight.requires_grad_()
    out = map_conv_triton(x, weight) if through_kernels else F.conv2d(x, weight, padding=size // 2)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), grad)]


def worst_error(got, expected):
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("shape", "size"), MAPS, ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, in the tests below")
def test_map_conv_interpreted(shape, size):
    got, expected = (map_conv_results(shape, size, torch.float32, "cpu", way) for way in (True, False))
    assert worst_error(got, expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("shape", "size"), MAPS + GPU_MAPS, ids=str)
def test_map_conv(shape, size, dtype, allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    got, again = (map_conv_results(shape, size, dtype, "cuda", True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    assert worst_error(got, map_conv_results(shape, size, dtype, "cuda", False)) < allowed


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_map_conv_is_an_operator(device):
    import densezoo.ops.plugins.kernels  # noqa: F401  (registers the operator)

    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")
    x, weight = (torch.randn(s, device=device, requires_grad=True) for s in ((2, 2, 6, 9), (1, 2, 3, 3)))
    torch.library.opcheck(torch.ops.densezoo.map_conv, (x, weight))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_map_conv_with_a_norm_fused_into_it(monkeypatch):
    gate, x = map_conv(3).eval(), torch.randn(2, 2, 6, 9)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    expected = gate(x)
    monkeypatch.setattr("densezoo.ops.backend._backend", "triton")
    torch.testing.assert_close(torch.nn.utils.fusion.fuse_conv_bn_eval(gate.conv, gate.bn)(x), expected)


# Heights and widths of several maps of a batch: of one piece and of several, by rows and as their transposes.
GATES = [
    (3, [(5, 7)], 7),
    (2, [(6, 5), (40, 5), (40, 6)], 7),
    (2, [(6, 5), (6, 40), (5, 40)], 3),
    (4, [(1, 20), (30, 1)], 3),
]
GPU_GATES = [
    (128, [(14, 14), (1024, 14), (1024, 14)], 7),
    (128, [(14, 14), (14, 1024), (14, 1024)], 7),
    (64, [(56, 56), (256, 56), (256, 56)], 7),
    (2, [(200, 304), (256, 304), (256, 200)], 3),
    (256, [(7, 7)], 5),
]


def map_gates_results(batch, sizes, size, training, dtype, device, through_kernels):
    """Return gates with their statistics and gradients, by the kernels or in float64; the second map lies turned."""
    from densezoo.ops.plugins.kernels import map_gates_triton

    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    maps, grads = ([randn(batch, n, *hw) for hw in sizes] for n in (2, 1))
    if training:
        maps = [x + 1 for x in maps]
    maps[1:2] = [x.mT.contiguous().mT for x in maps[1:2]]
    weights = [randn(1, 2, size, size) / size for _ in sizes]
    scales, shifts, means, variances = ([randn(1) for _ in sizes] for _ in range(4))
    variances = [v.square() + 1 for v in variances]
    groups = [maps, weights, scales, shifts, means, variances]
    if not through_kernels:
        groups, grads = ([[t.double() for t in ts] for ts in groups], [g.double() for g in grads])
    maps, weights, scales, shifts, means, variances = groups
    leaves = [t.requires_grad_() for ts in groups[:4] for t in ts]
    if through_kernels:
        known = ([], []) if training else (means, variances)
        gates, stats = map_gates_triton(maps, weights, scales, shifts, *known, 1 / 3, 1e-5)
    else:
        gates, stats = [], []
        for x, weight, *norm in zip(*groups, strict=True):
            y = F.conv2d(x, weight, padding=size // 2)
            # The kernels normalise the numbers that they keep.
            y = y + (y.to(dtype).double() - y).detach()
            mean, variance = (y.mean(), y.var(correction=0)) if training else norm[2:]
            normal = (y - mean) / (variance + 1e-5).sqrt()
            gates.append((normal * norm[0] + norm[1]).sigmoid() / 3)
            count = y.numel() if training else 2
            found = mean, variance * count / (count - 1), (variance + 1e-5).rsqrt()
            stats.append(torch.stack([t.flatten()[0] for t in found]))
        stats = torch.stack(stats, 1)
    results = torch.autograd.grad(gates, leaves, grads)
    # Of norms' parameters together: a sum over all positions may be so near 0 that it is nothing but rounding.
    *results, norms = *results[: 2 * len(sizes)], torch.cat(results[2 * len(sizes) :])
    return [*(g.detach() for g in gates), stats, *results, norms]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("batch", "sizes", "size"), GATES, ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, in the tests below")
def test_map_gates_interpreted(batch, sizes, size, training, nan_filled_memory, monkeypatch):
    from densezoo.ops.plugins import kernels

    # Several blocks of an image, and several steps over what programs have written.
    monkeypatch.setattr(kernels, "BLOCK", 32)
    monkeypatch.setattr(kernels, "PARTS", 4)
    monkeypatch.setattr(kernels, "ROWS", 16)
    args = batch, sizes, size, training, torch.float32
    got, expected = (map_gates_results(*args, "cpu", way) for way in (True, False))
    assert worst_error(got, expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("batch", "sizes", "size"), GATES[:3] + GPU_GATES, ids=str)
def test_map_gates(batch, sizes, size, training, dtype, allowed, nan_filled_memory, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    args = batch, sizes, size, training, dtype, "cuda"
    got, again = (map_gates_results(*args, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    assert worst_error(got, map_gates_results(*args, False)) < allowed


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_map_gates_are_operators(device):
    import densezoo.ops.plugins.kernels  # noqa: F401  (registers the operators)

    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")
    ops, opcheck = torch.ops.densezoo, torch.library.opcheck
    maps = [torch.randn(2, 2, *size, device=device) for size in ((5, 6), (20, 6))]
    weights = [torch.randn(1, 2, 3, 3, device=device) for _ in maps]
    ones = [torch.ones(1, device=device) for _ in maps]
    for training in (True, False):
        known = [] if training else ones
        *outs, stats = ops.map_gates(maps, weights, ones, ones, known, known, 0.5, 1e-5)
        opcheck(ops.map_gates, (maps, weights, ones, ones, known, known, 0.5, 1e-5))
        args = outs[:2], maps, weights, ones, ones, outs[2:], stats, training, 0.5
        opcheck(ops.map_gates_backward, args)


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
def test_map_norm(turned):
    norms, x = (map_conv(3).bn.cuda(), torch.nn.BatchNorm2d(1, momentum=0.01).cuda()), torch.randn(3, 1, 5, 7)
    x = (x.mT.contiguous().mT if turned else x).cuda()
    results, grad = [], torch.randn_like(x)
    for norm in norms:
        leaf = x.detach().requires_grad_()
        out = norm(leaf)
        grads = torch.autograd.grad(out, (leaf, *norm.parameters()), grad)
        results.append([out, *grads, *norm.buffers(), norm.eval()(x)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# Of one tile and of several along each axis, and sizes that fill none.
GATED = [(2, 5, 7, 9), (1, 70, 6, 8), (2, 3, 70, 67), (3, 8, 5, 1), (1, 1, 1, 6), (1, 66, 3, 4), (1, 21, 12, 10)]
GPU_GATED = [
    (128, 256, 56, 56),
    (128, 1024, 14, 14),
    (2, 512, 7, 7),
    (2, 256, 200, 304),
    (256, 64, 7, 7),
    (8, 99, 13, 9),
    (16, 70, 28, 28),
]
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


def axis_gates(*pools):
    return tuple((pool * torch.tensor([0.3, 2.0]).to(pool)[:, None, None]).sum(1, True).sigmoid() / 3 for pool in pools)


def gated_results(shape, layout, dtype, device, through_kernels):
    """Return a map scaled by three gates and its gradient, by the kernels or in float64; many maxima are not alone."""
    from densezoo.ops.plugins.axes import gate_axes_triton

    generator = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, device=device).to(memory_format=layout) for _ in range(2))
    x = ((x * 2).round() / 2).to(device, dtype)
    grad = grad.to(device, dtype)
    if through_kernels:
        out = gate_axes_triton(x.requires_grad_(), axis_gates)
        assert out.stride() == x.stride()
    else:
        x, grad = x.double().requires_grad_(), grad.double()
        hw, cw, ch = axis_gates(*(max_mean(x, dim) for dim in (1, 2, 3)))
        out = x * (hw + cw.transpose(1, 2) + ch[:, 0, ..., None])
    return [out.detach(), *torch.autograd.grad(out, x, grad)]


@layouts
@pytest.mark.parametrize("small", [0, 256], ids=["large", "small"])
@pytest.mark.parametrize("shape", GATED, ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, in the tests below")
def test_gate_axes_interpreted(shape, small, layout, nan_filled_memory, monkeypatch):
    from densezoo.ops.plugins import axes

    # Tiles of several steps, and of several parts along each axis.
    tile = 64 if max(shape) < 16 else 4096
    apply, reduce = axes._Launch(tile, 4, 1, 4), axes._ReduceLaunch(tile, 32)
    monkeypatch.setattr(axes, "LAUNCH", {"pool": reduce, "scale": apply, "sums": reduce, "backward": apply})
    launches = {kind: axes._PlanesLaunch(256, kind in ("pool", "sums") and 32, 4, 4) for kind in axes.LAUNCH}
    monkeypatch.setattr(axes, "SMALL_LAUNCH", launches)
    monkeypatch.setattr(axes, "SMALL", small)
    monkeypatch.setattr(axes, "POSITIONS", tile // 2)
    got, expected = (gated_results(shape, layout, torch.float32, "cpu", way) for way in (True, False))
    assert worst_error(got, expected) < 1e-6


@pytest.mark.gpu
@layouts
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", GATED + GPU_GATED, ids=str)
def test_gate_axes(shape, dtype, allowed, layout, nan_filled_memory):
    got, again = (gated_results(shape, layout, dtype, "cuda", True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    assert worst_error(got, gated_results(shape, layout, dtype, "cuda", False)) < allowed


@pytest.mark.gpu
def test_gate_axes_of_more_than_2_31_elements():
    x = torch.randn(33, 1024, 256, 256, device="cuda", dtype=torch.bfloat16)
    from densezoo.ops.plugins.axes import gate_axes_triton

    results = []
    for leaf in (x, x[-1:].clone()):
        out = gate_axes_triton(leaf.requires_grad_(), axis_gates)
        results.append([t[-1:] for t in (out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(out)))])
    assert worst_error(results[0], [t.double() for t in results[1]]) < 1e-2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gate_axes_are_operators(device):
    import densezoo.ops.plugins.axes  # noqa: F401  (registers the operators)

    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")
    ops, (x, grad) = torch.ops.densezoo, torch.randn(2, 2, 3, 5, 6, device=device)
    pools = ops.pool_axes(x)
    gates, counts = list(axis_gates(*pools)), ops.gate_axes_sums(grad, x, pools)
    torch.library.opcheck(ops.pool_axes, (x,))
    torch.library.opcheck(ops.gate_axes, (x, gates))
    torch.library.opcheck(ops.gate_axes_sums, (grad, x, pools))
    torch.library.opcheck(ops.gate_axes_backward, (grad, x, gates, pools, counts, pools))


def channel_gate(pools):
    """Gates of few bits, which are the same in every dtype and often equal, with gradients to maxima and means."""
    top, mean = pools.unbind(1)
    return (top / 8 + 2 * (mean - mean.detach())).clamp(0.25, 0.5)


def position_gate(pools):
    return axis_gates(pools)[0] * 3


def twice_gated_results(shape, layout, dtype, device, through_kernels):
    """Return a map scaled by both gates and its gradient, by the kernels or in float64; many maxima are not alone."""
    from densezoo.ops.plugins.cbam_kernels import gate_twice_triton

    generator = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, device=device).to(memory_format=layout) for _ in range(2))
    x, grad = ((x * 2).round() / 2).to(dtype), grad.to(dtype)
    if through_kernels:
        out = gate_twice_triton(x.requires_grad_(), channel_gate, position_gate)
        assert out.is_contiguous(memory_format=layout)
    else:
        x, grad = x.double().requires_grad_(), grad.double()
        y = x * channel_gate(torch.stack([x.amax((2, 3)), x.mean((2, 3))], 1))[..., None, None]
        out = y * position_gate(max_mean(y, 1))
    return [out.detach(), *torch.autograd.grad(out, x, grad)]


@layouts
@pytest.mark.parametrize("tiles", ["planes", "small", "large"])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 70, 6, 8), (2, 3, 20, 23), (3, 8, 5, 1), (1, 1, 1, 6)], ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, in the tests below")
def test_gate_twice_interpreted(shape, tiles, layout, nan_filled_memory, monkeypatch):
    from densezoo.ops.plugins import cbam_kernels

    if tiles == "planes":
        launch = cbam_kernels._SmallLaunch(256, 4, 4)
        monkeypatch.setattr(cbam_kernels, "SMALL_LAUNCH", dict.fromkeys(cbam_kernels.SMALL_LAUNCH, launch))
    else:
        monkeypatch.setattr(cbam_kernels, "SMALL", 0)
    if tiles == "small":
        # Tiles of several steps, and of several parts along each axis.
        launch = cbam_kernels._Launch(64 if max(shape) < 16 else 512, 16, 4, 1, 8)
        monkeypatch.setattr(cbam_kernels, "LAUNCH", dict.fromkeys(cbam_kernels.LAUNCH, launch))
    got, expected = (twice_gated_results(shape, layout, torch.float32, "cpu", way) for way in (True, False))
    assert worst_error(got, expected) < 1e-6


@pytest.mark.gpu
@layouts
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", GATED + GPU_GATED, ids=str)
def test_gate_twice(shape, dtype, allowed, layout, nan_filled_memory):
    got, again = (twice_gated_results(shape, layout, dtype, "cuda", True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    assert worst_error(got, twice_gated_results(shape, layout, dtype, "cuda", False)) < allowed


@pytest.mark.gpu
def test_gate_twice_of_more_than_2_31_elements():
    from densezoo.ops.plugins.cbam_kernels import gate_twice_triton

    x, results = torch.randn(33, 1024, 256, 256, device="cuda", dtype=torch.bfloat16), []
    for leaf in (x, x[-1:].clone()):
        out = gate_twice_triton(leaf.requires_grad_(), channel_gate, position_gate)
        results.append([t[-1:] for t in (out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(out)))])
    assert worst_error(results[0], [t.double() for t in results[1]]) < 1e-2


@pytest.mark.parametrize("first", [True, False], ids=["channels first", "channels last"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gate_twice_are_operators(device, first):
    import densezoo.ops.plugins.cbam_kernels  # noqa: F401  (registers the operators)

    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")
    ops, (x, grad) = torch.ops.densezoo, torch.randn(2, 2, 5, 6, device=device)
    channel, position = (torch.rand(2, size, device=device) for size in ((5, 6) if first else (6, 5)))
    pool, maps = ops.pool_channels(x, first), ops.pool_positions(x, channel, first)
    sums = ops.gate_twice_sums(grad, x, channel, position, pool, maps, first)
    opcheck = torch.library.opcheck
    opcheck(ops.pool_channels, (x, first))
    opcheck(ops.pool_positions, (x, channel, first))
    opcheck(ops.gate_twice, (x, channel, position, first))
    opcheck(ops.gate_twice_sums, (grad, x, channel, position, pool, maps, first))
    opcheck(ops.gate_through_maps, (x, channel, maps, sums[1], maps, first))
    opcheck(ops.gate_twice_backward, (grad, x, channel, position, pool, maps, *sums, pool, maps, first))


@layouts
@pytest.mark.parametrize("kind", [CBAM, Triplet])
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the modules take the kernels by themselves")
def test_modules_take_the_kernels(kind, layout, monkeypatch):
    module, x = build(kind, 16, kernel_size=3), torch.randn(3, 16, 4, 6).to(memory_format=layout)
    for narrow in (False, True):
        results = []
        for backend in ("reference", "triton"):
            monkeypatch.setattr("densezoo.ops.backend._backend", backend)
            net, leaf = copy.deepcopy(module), x.detach().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                out = net(leaf)
            grads = torch.autograd.grad(out.square().sum(), (leaf, *net.parameters()))
            results.append([out, *grads, *(b.float() for b in net.buffers()), net.eval()(leaf)])
        # Rounding may move a norm's few gradients far.
        for a, b in list(zip(*results, strict=True))[: 2 if narrow else None]:
            torch.testing.assert_close(a, b, atol=(0.1 if narrow else 1e-5) * b.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@layouts
@pytest.mark.parametrize("operator", ["map_conv", "map_gates", "gate_axes", "gate_twice"])
def test_kernels_compile_once_for_any_batch(device, operator, layout):
    from densezoo.ops.plugins.axes import gate_axes_triton
    from densezoo.ops.plugins.cbam_kernels import gate_twice_triton
    from densezoo.ops.plugins.kernels import map_conv_triton, map_gates_triton

    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(x, weight):
        if operator == "map_conv":
            return map_conv_triton(x, weight)
        if operator == "map_gates":
            scale, shift, *_ = weight.flatten().split(1)
            return map_gates_triton([x], [weight], [scale], [shift], [], [], 0.5, 1e-5)[0][0]
        if operator == "gate_axes":
            return gate_axes_triton(x * weight.sum(), axis_gates)
        return gate_twice_triton(x * weight.sum(), channel_gate, position_gate)

    compiled, weight = torch.compile(run, fullgraph=True, backend=counter), torch.ones(1, 2, 3, 3, device=device)
    for batch in (2, 3, 5):
        results, x = [], torch.randn(batch, 2, 4, 5, device=device).to(memory_format=layout)
        for function in (run, compiled):
            leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    # One graph for the first batch size, one with the batch size free.
    assert counter.frame_count <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [CBAM, Triplet])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gpu_matches_cpu(kind, layout, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    module, x = build(kind, 64), torch.randn(4, 64, 30, 41).to(memory_format=layout)
    results = []
    for device in ("cpu", "cuda"):
        net = copy.deepcopy(module).to(device)
        for run in (net, torch.compile(net, fullgraph=True)) if device == "cuda" else (net,):
            leaf = x.to(device).detach().requires_grad_()
            out = run(leaf)
            grads = torch.autograd.grad(out.square().sum(), (leaf, *net.parameters()))
            results.append([out, *grads, *(b.clone().float() for b in net.buffers())])
            net.load_state_dict(module.state_dict())
    expected, *others = results
    for got in others:
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, atol=1e-4 * b.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("variant", ["theta-", "theta", "theta+"])
@pytest.mark.parametrize("extent", [2, 4, None])
def test_gather_excite(variant, extent):
    x = torch.randn(2, 32, 13, 9)
    size = (13, 9) if extent is None and variant != "theta-" else None
    module = build(GatherExcite, extent=extent, variant=variant, size=size).eval()
    if variant == "theta-" and extent:
        gathered = F.avg_pool2d(x, 2 * extent - 1, extent, padding=extent - 1, count_include_pad=False)
    elif variant == "theta-":
        gathered = x.mean((2, 3), keepdim=True)
    else:
        gathered, convs = x, [m for m in module.gather if isinstance(m, torch.nn.Conv2d)]
        assert len(convs) == (1 if extent is None else extent // 2)
        for i, conv in enumerate(convs):
            stride, padding = (2, 1) if extent else (1, 0)
            gathered = F.conv2d(gathered.relu() if i else x, conv.weight, None, stride, padding, groups=32)
            norm = module.gather[3 * i + 1]
            gathered = gathered * norm.weight[:, None, None] * (1 + norm.eps) ** -0.5 + norm.bias[:, None, None]
    if variant == "theta+":
        gathered = module.mlp[2](module.mlp[0](gathered).relu())
    stride = extent or 13
    assert gathered.shape[2:] == (-(-13 // stride), -(-9 // stride))
    rows, columns = (torch.arange(n) * m // n for n, m in zip((13, 9), gathered.shape[2:], strict=True))
    torch.testing.assert_close(module(x), x * gathered[:, :, rows][..., columns].sigmoid())


def test_gather_excite_of_the_whole_of_another_map():
    module, x = build(GatherExcite, extent=None, size=(4, 3)).eval(), torch.randn(2, 32, 11, 6)
    gathered = module.gather(F.adaptive_avg_pool2d(x, (4, 3)))
    torch.testing.assert_close(module(x), x * gathered.sigmoid())


@pytest.mark.parametrize("options", [dict(kernel_size=5, norm_groups=32), dict(groups=4), {}], ids=str)
def test_ela_scales_rows_and_columns(options):
    module, x = build(ELA, **options), torch.randn(2, 32, 6, 9)
    rows = torch.stack([module.norm(module.conv(image.mean(2)[None]))[0] for image in x]).sigmoid()
    columns = torch.stack([module.norm(module.conv(image.mean(1)[None]))[0] for image in x]).sigmoid()
    torch.testing.assert_close(module(x), torch.einsum("bchw,bch,bcw->bchw", x, rows, columns))


def test_pkcam():
    x, alone = torch.randn(2, 64, 6, 9), build(PKCAM, 64)
    eca = ECA(64)
    eca.conv.load_state_dict(alone.local_conv.state_dict())
    torch.testing.assert_close(alone(x), x + eca(x))

    module, previous = build(PKCAM, 64, kernel_size=5, previous=2), (torch.randn(2, 16), torch.randn(2, 64))
    own = x.mean((2, 3))
    weights = module.mix_maps.weight.flatten()
    mixed = weights[0] * previous[0].repeat(1, 4) + weights[1] * previous[1] + weights[2] * own
    scales = [
        F.conv1d(F.pad(means, (2, 2))[:, None], conv.weight)[:, 0].sigmoid()
        for means, conv in ((own, module.local_conv), (mixed.relu(), module.global_conv))
    ]
    weights = module.mix_scales.weight.flatten()
    scale = (weights[0] * scales[0] + weights[1] * scales[1]).sigmoid()
    torch.testing.assert_close(module(x, previous), x * (1 + scale[..., None, None]))
    for wrong in ((), previous[:1], (torch.randn(2, 24), previous[1])):
        with pytest.raises(ValueError, match=r"previous: got .*, expected 2 tensors \(B, C'\) with C' a divisor of 64"):
            module(x, wrong)


def test_das():
    module, x = build(DAS, 20), torch.randn(2, 20, 6, 9)
    y = F.conv2d(F.conv2d(x, module.depthwise.weight, groups=20, padding=1), module.pointwise.weight)
    assert y.shape[1] == 4
    y = F.gelu(F.instance_norm(y))
    offset, mask = module.offset(y).split((18, 9), 1)
    y = deform_conv2d(y, offset, module.deform.weight, module.deform.bias, padding=1, mask=mask.sigmoid())
    gate = F.layer_norm(y.permute(0, 2, 3, 1), (20,), module.norm.weight, module.norm.bias).sigmoid()
    torch.testing.assert_close(module(x), x * gate.permute(0, 3, 1, 2))


def test_das_starts_with_a_plain_convolution():
    module, x = DAS(20), torch.randn(2, 20, 6, 9)
    y = F.gelu(F.instance_norm(module.pointwise(module.depthwise(x))))
    y = F.conv2d(y / 2, module.deform.weight, module.deform.bias, padding=1)
    torch.testing.assert_close(module(x), x * module.norm(y.permute(0, 2, 3, 1)).sigmoid().permute(0, 3, 1, 2))


def test_ulsam_has_one_softmax_a_subspace():
    module, x = build(ULSAM, groups=2).eval(), torch.randn(2, 32, 6, 9)
    parts = []
    for i, part in enumerate(x.split(16, 1)):
        own = slice(16 * i, 16 * i + 16)
        norm = (1 + module.bn_dws.eps) ** -0.5
        weight, bias = module.conv_dws.weight[own].flatten(), module.conv_dws.bias[own]
        y = part * weight[:, None, None] + bias[:, None, None]
        y = (y * norm * module.bn_dws.weight[own, None, None] + module.bn_dws.bias[own, None, None]).relu()
        y = F.max_pool2d(y, 3, 1, 1)
        y = torch.einsum("bchw,c->bhw", y, module.conv_point.weight[i].flatten()) + module.conv_point.bias[i]
        y = (y * norm * module.bn_point.weight[i] + module.bn_point.bias[i]).relu()
        attention = y.flatten(1).softmax(1).view(2, 1, 6, 9)
        parts.append(part + part * attention)
    torch.testing.assert_close(module(x), torch.cat(parts, 1))


@each
def test_timm_resnet(kind):
    model = timm.create_model("resnet18", num_classes=3, channels=(16, 16, 32, 32), block_args=dict(attn_layer=kind))
    assert sum(isinstance(m, kind) for m in model.modules()) == 8
    # The residual branches start at 0.
    for m in model.modules():
        if isinstance(m, kind | torch.nn.BatchNorm2d):
            for p in m.parameters():
                torch.nn.init.normal_(p, mean=0.5, std=0.2)
    model(torch.randn(2, 3, 64, 96)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(any(p.grad.any() for p in m.parameters()) for m in model.modules() if isinstance(m, kind))


def test_timm_resnet_with_options():
    model = timm.create_model("resnet18", block_args=dict(attn_layer=functools.partial(SE, reduction=4)))
    assert model.layer2[0].se.fc[0].out_features == 32
    features = timm.create_model("resnet18", features_only=True, block_args=dict(attn_layer=Triplet))
    assert [f.shape[1] for f in features(torch.randn(1, 3, 64, 64))] == [64, 64, 128, 256, 512]


@each
def test_timm_byobnet(kind):
    block = byobnet.ByoBlockCfg(type="bottle", d=1, c=64, s=2, gs=0, br=0.5)
    model = byobnet.ByobNet(byobnet.ByoModelCfg(blocks=(block, block), stem_chs=16, attn_layer=kind), num_classes=3)
    assert sum(isinstance(m, kind) for m in model.modules()) == 2
    model(torch.randn(2, 3, 64, 96)).sum().backward()


@each
@pytest.mark.parametrize("library", ["mmdet", "mmseg"])
def test_mmcv_plugin_layer(kind, library):
    pytest.importorskip(library)
    from mmengine.registry import MODELS, init_default_scope

    import densezoo.openmmlab  # noqa: F401

    init_default_scope(library)
    plugin = dict(cfg=dict(type=f"densezoo.{kind.__name__}", **NARROW[kind]), position="after_conv3")
    plugins = [plugin | dict(stages=(False, True, True, True))]
    model = MODELS.build(dict(type="ResNet", depth=50, base_channels=8, plugins=plugins))
    model.init_weights()
    name = "gather_excite" if kind is GatherExcite else kind.__name__.lower()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kind)}
    assert list(layers) == [f"layer{i}.{j}.{name}" for i, depth in ((2, 4), (3, 6), (4, 3)) for j in range(depth)]
    if kind is CBAM:
        assert all(not m.SpatialGate.spatial.bn.weight.any() for m in layers.values())
    outs = model(torch.randn(2, 3, 64, 96))
    assert [tuple(out.shape[1:]) for out in outs] == [(32, 16, 24), (64, 8, 12), (128, 4, 6), (256, 2, 3)]
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad is not None for m in layers.values() for p in m.parameters())
    torch.save(model, io.BytesIO())
