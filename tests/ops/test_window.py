"""Window attention: the reference against its definition and against Swin's cyclic shift."""

import pytest
import torch
from densezoo.ops import window_attention
from timm.models.swin_transformer import SwinTransformerBlock
from torch._dynamo.testing import CompileCounterWithBackend

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


def test_compiles_once_for_any_batch():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def attend(qkv, bias):
        shifted = window_attention(qkv, bias, num_heads=2, window_size=7, shift=3)
        return shifted + window_attention(qkv, bias, num_heads=2, window_size=7, grid=True)

    for batch in (2, 3, 7, 5):
        tensors = inputs((batch, 15, 14, 2, 8, 7), torch.float32)
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
        ({"qkv": torch.zeros(8, 8, 24)}, "qkv"),
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
        ({"rel_pos_bias": torch.zeros(2, 7, 8)}, "rel_pos_bias"),
        ({"rel_pos_bias": torch.zeros(2, 7, 7, device="meta")}, "rel_pos_bias"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, named):
    arguments = {"qkv": torch.zeros(1, 8, 8, 24), "num_heads": 2, "window_size": 4}
    with pytest.raises(ValueError, match=f"^{named}: got"):
        window_attention(**(arguments | change))
