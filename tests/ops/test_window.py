"""Window attention: the reference against its definition and Swin's cyclic shift, the kernels against the reference."""

import random

import pytest
import torch
from densezoo.ops import set_backend, window_attention
from timm.models.swin_transformer import SwinTransformerBlock
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

cuda = torch.cuda.is_available()

# batch, height, width, heads, dim, window_size, shift, grid
SETTINGS = [
    (2, 14, 21, 2, 8, 7, 0, False),
    (2, 14, 21, 1, 8, 7, 0, True),
    (1, 14, 21, 2, 8, 7, 3, False),
    (1, 15, 9, 3, 4, 7, 0, False),
    (1, 15, 9, 1, 4, 7, 0, True),
    (1, 13, 12, 1, 4, (7, 5), (2, 4), False),
    (2, 3, 20, 2, 4, 7, 0, True),
    (1, 3, 5, 1, 4, 7, 3, False),
    (1, 10, 8, 2, 4, (10, 2), 0, False),
    (1, 8, 10, 2, 4, (2, 10), 0, False),
    (1, 1, 1, 1, 4, 7, 0, True),
    (1, 16, 1, 1, 4, (4, 1), (1, 0), False),
]
ids = ["-".join(str(v).replace(" ", "") for v in s) for s in SETTINGS]

# Windows of one tile: Swin's, of fewer positions, and stripes; then windows of several.
KERNEL_SETTINGS = [
    (2, 14, 8, 2, 8, 7, 0, False),
    (2, 10, 14, 1, 12, 7, 3, False),
    (1, 15, 9, 1, 8, 7, 0, True),
    (1, 3, 5, 2, 20, 7, 3, False),
    (1, 9, 5, 1, 8, (9, 2), 0, False),
    (1, 9, 8, 1, 8, 3, (1, 2), False),
    (1, 1, 1, 1, 8, 7, 0, True),
    (1, 9, 12, 1, 8, (9, 8), 0, False),
    (1, 13, 9, 2, 8, (6, 11), (4, 7), False),
    (1, 20, 9, 1, 8, (10, 9), 0, True),
]


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def inputs(setting, dtype=torch.float64, seed=0):
    """Return a qkv map and a bias table."""
    batch, height, width, heads, dim, window_size, *_ = setting
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, height, width, 3 * heads * dim, generator=generator, dtype=torch.float64)
    bias = torch.randn(heads, *(2 * w - 1 for w in pair(window_size)), generator=generator, dtype=torch.float64)
    return qkv.to(dtype), bias.to(dtype)


def options(setting):
    return dict(zip(("num_heads", "window_size", "shift", "grid"), (setting[3], *setting[5:]), strict=True))


def run(setting):
    return lambda qkv, bias=None: window_attention(qkv, bias, **options(setting))


def dense(qkv, bias, num_heads, window_size, shift, grid):
    """Compute window attention from its definition: among all pairs, those of one window attend to each other."""
    batch, height, width, _ = qkv.shape
    places = []
    for size, window, offset in zip((height, width), pair(window_size), pair(shift), strict=True):
        index, lattices = torch.arange(size), -(-size // window)
        number, place = (
            (index % lattices, index // lattices) if grid else ((index - offset) // window, (index - offset) % window)
        )
        places.append((number[:, None] == number, place - place[:, None] + window - 1))
    (row_same, row_entry), (col_same, col_entry) = places
    same = row_same[:, None, :, None] & col_same[None, :, None, :]
    mask = torch.zeros(num_heads, *same.shape, dtype=qkv.dtype)
    if bias is not None:
        # Where the windows differ the entry is out of the table and does not matter.
        row_entry, col_entry = row_entry.clamp(0, bias.shape[1] - 1), col_entry.clamp(0, bias.shape[2] - 1)
        mask = bias[:, row_entry[:, None, :, None], col_entry[None, :, None, :]]
    mask = mask.masked_fill(~same, float("-inf")).flatten(3, 4).flatten(1, 2)
    q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = (q @ k.mT * q.shape[-1] ** -0.5 + mask).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2).unflatten(1, (height, width))


def gradients(function, tensors, seed=1):
    """Return the output of `function` and the gradient of each of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))]


def error(got, expected):
    """Return the relative RMS error; NaN counts as infinite, and what should be zero by its size."""
    value = ((got.double() - expected.double()).norm() / (expected.double().norm() or 1)).item()
    return value if value == value else float("inf")


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("setting", SETTINGS, ids=ids)
def test_reference_is_the_definition(setting, biased):
    qkv, bias = inputs(setting)
    bias = bias if biased else None
    torch.testing.assert_close(run(setting)(qkv, bias), dense(qkv, bias, **options(setting)))


@pytest.mark.parametrize("setting", [SETTINGS[i] for i in (4, 5)], ids=[ids[i] for i in (4, 5)])
def test_reference_gradients(setting):
    leaves = [t.requires_grad_() for t in inputs((*setting[:3], 1, 2, *setting[5:]))]
    assert torch.autograd.gradcheck(run(setting), leaves, fast_mode=True)


@pytest.mark.parametrize("shift", [0, 3])
def test_swin_blocks_are_these(shift):
    torch.manual_seed(0)
    block = SwinTransformerBlock(16, (14, 21), num_heads=2, window_size=7, shift_size=shift).eval()
    attn, x = block.attn, torch.randn(2, 14, 21, 16)
    torch.nn.init.normal_(attn.relative_position_bias_table)
    # Swin counts offsets from key to query; rows are offsets, columns are heads.
    bias = attn.relative_position_bias_table.unflatten(0, (13, 13)).flip(0, 1).permute(2, 0, 1)
    got = attn.proj(window_attention(attn.qkv(x), bias, num_heads=2, window_size=7, shift=shift))
    torch.testing.assert_close(got, block._attn(x), atol=1e-5, rtol=1e-5)


def test_scale_and_strides():
    setting = SETTINGS[3]
    qkv, bias = inputs(setting)
    wide = torch.cat([qkv, qkv], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., : qkv.shape[-1]]
    assert not wide.is_contiguous()
    torch.testing.assert_close(run(setting)(wide, bias), run(setting)(qkv, bias))
    scaled = torch.cat([qkv[..., :12] * 3, qkv[..., 12:]], -1)
    got = window_attention(qkv, bias, scale=3 * 4**-0.5, **options(setting))
    torch.testing.assert_close(got, run(setting)(scaled, bias))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[4]], ids=[ids[0], ids[4]])
def test_16_bit_inputs_are_summed_in_float32(setting, dtype, autocast):
    qkv, bias = (t.to(dtype) for t in inputs(setting))
    with torch.autocast("cpu", dtype, enabled=autocast):
        got = run(setting)(qkv, bias)
    # Rounded once, at the end.
    assert got.dtype == dtype
    expected = run(setting)(qkv.float(), bias.float())
    torch.testing.assert_close(got, expected.to(dtype), atol=0, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("setting", KERNEL_SETTINGS, ids=str)
@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_kernels_interpreted(setting, biased, nan_filled_memory):
    tensors = inputs(setting, torch.float32)[: 2 if biased else 1]
    set_backend("triton")
    got = gradients(run(setting), tensors)
    set_backend("reference")
    expected = gradients(run(setting), [t.double() for t in tensors])
    assert max(map(error, got, expected)) < 1e-6


@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_strides_and_scale_interpreted():
    check_strides_and_scale("cpu")


@pytest.mark.gpu
def test_strides_and_scale():
    check_strides_and_scale("cuda")


def check_strides_and_scale(device):
    for setting in ((1, 3, 4, 2, 8, 3, 1, False), (1, 9, 8, 1, 8, (9, 8), 0, False)):
        check_strides_and_scale_of(setting, device)


def check_strides_and_scale_of(setting, device):
    qkv, bias = (t.to(device) for t in inputs(setting, torch.float32))
    wide = torch.cat([qkv, qkv], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., : qkv.shape[-1]]
    apart = torch.stack([qkv, qkv], -1)[..., 1]
    flipped = bias.mT.contiguous().mT
    for scale in (0.3, 0.0, -0.5):
        set_backend("reference")

        # The gradient too is a part of a map's channels.
        def attend(qkv, bias, scale=scale):
            return torch.cat([window_attention(qkv, bias, scale=scale, **options(setting)), qkv], -1)

        expected = gradients(attend, [qkv.double(), bias.double()])
        set_backend("triton")
        for tensors in ([wide, flipped], [apart, bias]):
            assert max(map(error, gradients(attend, tensors), expected)) < 1e-5


@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_operator_contract_interpreted():
    check_operator_contract("cpu")


@pytest.mark.gpu
def test_operator_contract():
    check_operator_contract("cuda")


def check_operator_contract(device):
    import densezoo.ops.window.kernels  # noqa: F401  (registers the operator)

    for setting in ((1, 4, 5, 1, 8, 3, 0, False), (1, 9, 8, 1, 8, (9, 8), 0, False)):
        qkv, bias = (t.to(device) for t in inputs(setting, torch.float32))
        sides, qkv = list(qkv.shape[1:3]), qkv.flatten(1, 2)
        # As Swin passes it: turned around.
        for table in (bias.mT.contiguous().mT, None):
            leaves = [t if t is None else t.detach().requires_grad_() for t in (qkv, table)]
            options = (sides, 1, list(pair(setting[5])), [0, 1], False, 0.3)
            torch.library.opcheck(torch.ops.densezoo.window_attention, (*leaves, *options))
            out, lse = (t.detach() for t in torch.ops.densezoo.window_attention(*leaves, *options))
            args = (torch.ones_like(out), qkv, table, out, lse)
            # opcheck leaves out what the compiler asserts: strides.
            with FakeTensorMode() as mode:
                fake = [t if t is None else mode.from_tensor(t) for t in args]
                expected = [t.stride() for t in torch.ops.densezoo.window_attention_backward(*fake, *options)]
            got = torch.ops.densezoo.window_attention_backward(*args, *options)
            assert [t.stride() for t in got] == expected


def random_setting(generator: random.Random):
    window = tuple(generator.choice([1, 2, 4, 5, 7, 8, 12, 17]) for _ in range(2))
    grid = generator.random() < 0.3
    shift = (0, 0) if grid else tuple(generator.randint(0, w - 1) for w in window)
    heads, dim = generator.randint(1, 5), generator.choice([8, 20, 32, 48, 64, 96, 128])
    return (generator.randint(1, 4), *(generator.randint(1, 40) for _ in range(2)), heads, dim, window, shift, grid)


GPU_SETTINGS = [
    (128, 56, 56, 3, 32, 7, 3, False),
    (256, 14, 14, 6, 32, 7, 0, False),
    (2, 203, 308, 3, 32, 7, 3, False),
    (4, 64, 64, 3, 32, 8, 4, False),
    (2, 50, 76, 2, 32, (50, 2), 0, False),
    (3, 25, 38, 4, 32, (25, 38), 0, False),
    (2, 48, 50, 4, 32, 12, 0, True),
    (1, 40, 33, 1, 32, 32, 0, False),
    *(random_setting(random.Random(seed)) for seed in range(30)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("setting", KERNEL_SETTINGS + GPU_SETTINGS, ids=str)
def test_kernels(setting, dtype, allowed, biased, nan_filled_memory):
    qkv, bias = (t.cuda() for t in inputs(setting, dtype))
    tensors = [qkv, bias.float()] if biased else [qkv]
    set_backend("triton")
    got = gradients(run(setting), tensors)
    again = gradients(run(setting), tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    set_backend("reference")
    expected = gradients(run(setting), [t.double() for t in tensors])
    assert max(map(error, got, expected)) < allowed


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shift", [0, 1])
def test_windows_of_padding(shift, device):
    """Of a map padded before its projection: all tokens of such windows are the projection's bias."""
    if device == "cpu" and cuda:
        pytest.skip("the kernels run on the GPU")
    setting = (1, 9, 10, 2, 8, 3, shift, False)
    qkv, bias = (t.to(device) for t in inputs(setting, torch.float32))
    qkv[:, 4:] = qkv[:, :, 3:] = torch.linspace(-1, 1, qkv.shape[-1], device=device)
    set_backend("triton")
    got = gradients(run(setting), [qkv, bias])
    set_backend("reference")
    expected = gradients(run(setting), [qkv.double(), bias.double()])
    assert max(map(error, got, expected)) < 1e-5


@pytest.mark.gpu
def test_more_than_2_31_elements():
    qkv = torch.randn(23, 1024, 1024, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert qkv.numel() > 2**31
    bias = torch.randn(1, 13, 13, device="cuda")
    out = window_attention(qkv, bias, num_heads=1, window_size=7, shift=3)
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    last = qkv.detach()[-1:].requires_grad_()
    small = window_attention(last, bias, num_heads=1, window_size=7, shift=3)
    torch.testing.assert_close(out[-1:], small)
    torch.testing.assert_close(grad[-1:], torch.autograd.grad(small, last, torch.ones_like(small))[0])


@pytest.mark.gpu
def test_cuda_graph():
    setting = (2, 20, 17, 2, 32, 7, 3, False)
    tensors = [t.cuda() for t in inputs(setting, torch.bfloat16)]
    expected = gradients(run(setting), tensors)
    leaves = [t.requires_grad_() for t in tensors]
    grad = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = grad.to("cuda", torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(setting)(*leaves)
        got = [out, *torch.autograd.grad(out, leaves, grad)]
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_once_for_any_batch(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def attend(qkv, bias):
        shifted = window_attention(qkv, bias, num_heads=2, window_size=7, shift=3)
        return shifted + window_attention(qkv, bias, num_heads=2, window_size=7, grid=True)

    for batch in (2, 3, 7, 5):
        tensors = [t.to(device) for t in inputs((batch, 15, 14, 2, 8, 7), torch.float32)]
        expected = sum(
            window_attention(*tensors, num_heads=2, window_size=7, **o) for o in (dict(shift=3), dict(grid=1))
        )
        torch.testing.assert_close(attend(*tensors), expected)
    # One graph for the first batch size, one with the batch size free.
    assert counter.frame_count <= 2


@pytest.mark.parametrize("option", [{}, {"shift": 3}, {"grid": True}], ids=str)
def test_exports_with_free_height_and_width(option):
    class Attend(torch.nn.Module):
        def forward(self, qkv, bias):
            return window_attention(qkv, bias, num_heads=2, window_size=7, **option)

    sides = {1: torch.export.Dim("height", min=2, max=512), 2: torch.export.Dim("width", min=2, max=512)}
    example = inputs((1, 20, 27, 2, 8, 7), torch.float32)
    program = torch.export.export(Attend(), example, dynamic_shapes=(sides, None)).module()
    for height, width in ((14, 33), (41, 5)):
        tensors = inputs((1, height, width, 2, 8, 7), torch.float32)
        torch.testing.assert_close(program(*tensors), Attend()(*tensors))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"qkv": None}, "qkv"),
        ({"qkv": torch.zeros(8, 8, 24)}, "qkv"),
        ({"qkv": torch.zeros(1, 8, 8, 0)}, "qkv"),
        ({"qkv": torch.zeros(1, 8, 8, 32)}, "qkv"),
        ({"qkv": torch.zeros(1, 8, 8, 24, dtype=torch.int64)}, "qkv"),
        ({"num_heads": 3}, "qkv"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 2.0}, "num_heads"),
        ({"window_size": 0}, "window_size"),
        ({"window_size": (4, 4, 4)}, "window_size"),
        ({"window_size": 4.0}, "window_size"),
        ({"shift": 4}, "shift"),
        ({"shift": (0, -1)}, "shift"),
        ({"shift": 2, "grid": True}, "shift"),
        ({"rel_pos_bias": [0.0]}, "rel_pos_bias"),
        ({"rel_pos_bias": torch.zeros(2, 7, 8)}, "rel_pos_bias"),
        ({"rel_pos_bias": torch.zeros(2, 7, 7, device="meta")}, "rel_pos_bias"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, named):
    arguments = {"qkv": torch.zeros(1, 8, 8, 24), "num_heads": 2, "window_size": 4}
    with pytest.raises(ValueError, match=f"^{named}: got"):
        window_attention(**(arguments | change))


def test_unsupported_inputs_say_why():
    set_backend("triton")
    for setting, dtype, why in (
        ((1, 8, 8, 1, 8, 4), torch.float64, "dtype torch.float64"),
        ((1, 8, 8, 1, 4, 4), torch.float32, "head dim 4"),
        ((1, 4, 4, 1, 8, (33, 32)), torch.float32, r"window_size \(33, 32\) with a bias"),
    ):
        qkv, bias = inputs(setting, dtype)
        with pytest.raises(RuntimeError, match=f"window_attention: cannot run on triton: {why}"):
            window_attention(qkv, bias, num_heads=1, window_size=setting[5])
