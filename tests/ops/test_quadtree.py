"""QuadTree attention: the reference against its definition, the kernels against the reference."""

import pytest
import torch
from densezoo.ops import quadtree_attention, set_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

cuda = torch.cuda.is_available()

# batch, height, width, heads, dim, levels, topk
SETTINGS = [
    (2, 8, 12, 2, 4, 3, 3),
    (1, 16, 8, 1, 8, 4, 2),
    (1, 5, 6, 2, 5, 1, 4),
    (1, 13, 9, 1, 5, 3, 4),  # odd sides at each level
    (1, 5, 11, 1, 4, 4, 8),  # fewer positions than are kept
    (1, 1, 1, 1, 4, 3, 2),
]
TYPES = ["A", "B"]


def inputs(setting, dtype=torch.float32):
    """Return query, key and the values of every level, the first three as views of one tensor."""
    batch, height, width, heads, dim, levels, _ = setting
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = list(normal(batch, 3, heads * dim, height, width).permute(1, 0, 3, 4, 2).unflatten(-1, (heads, dim)))
    for _ in range(levels - 1):
        height, width = (height + 1) // 2, (width + 1) // 2
        tensors.append(normal(batch, height, width, heads, dim))
    return tensors


def run(query, key, *value, **kwargs):
    return quadtree_attention(query, key, value, **kwargs)


def children(position, size):
    """Return the positions of the next finer level, of the given size, that a position stands for."""
    row, column = position
    quad = [(2 * row + i, 2 * column + j) for i in (0, 1) for j in (0, 1)]
    return [(row, column) for row, column in quad if row < size[0] and column < size[1]]


def coarsen(x):
    """Return the means of the children of each position of (H, W, dim)."""
    height, width = (x.shape[0] + 1) // 2, (x.shape[1] + 1) // 2
    means = [
        [torch.stack([x[p] for p in children((i, j), x.shape)]).mean(0) for j in range(width)] for i in range(height)
    ]
    return torch.stack([torch.stack(row) for row in means])


def attend(q, k, v, topk, attn_type, scale):
    """Attend in one image and head: q and k of (H, W, dim), v a list of such, the finest first."""
    q, k = [q], [k]
    for _ in v[1:]:
        q.append(coarsen(q[-1]))
        k.append(coarsen(k[-1]))
    # What each position of the level before kept, as (position, weight), and its output.
    kept, outputs = {}, {}
    for level in reversed(range(len(v))):
        height, width = q[level].shape[:2]
        before, kept, sums, outputs = kept, {}, outputs, {}
        for query in [(i, j) for i in range(height) for j in range(width)]:
            if level == len(v) - 1:
                # All keys, as one group of weight 1.
                groups = [([(i, j) for i in range(height) for j in range(width)], 1)]
            else:
                parent = (query[0] // 2, query[1] // 2)
                groups = [(children(key, (height, width)), weight) for key, weight in before[parent]]
                if attn_type == "B":
                    groups = [(sum((keys for keys, _ in groups), []), 1)]
            weights = []
            for keys, total in groups:
                exp = [(scale * q[level][query] @ k[level][key]).exp() for key in keys]
                weights += [(key, total * e / sum(exp)) for key, e in zip(keys, exp, strict=True)]
            weights.sort(key=lambda item: -item[1])
            kept[query] = weights[:topk]
            only_coarsest = level == len(v) - 1
            if attn_type == "A" and (level > 0 or only_coarsest):
                weights = weights[topk:]
            outputs[query] = sum((w * v[level][key] for key, w in weights), torch.zeros_like(v[level][0, 0]))
            if not only_coarsest:
                outputs[query] = outputs[query] + sums[parent]
    return outputs


def definition(query, key, *value, topk, attn_type):
    """Compute QuadTree attention from its words, one query at a time."""
    out, scale = torch.empty_like(query), query.shape[-1] ** -0.5
    for image in range(query.shape[0]):
        for head in range(query.shape[3]):
            q, k, *v = (t[image, :, :, head] for t in (query, key, *value))
            for position, x in attend(q, k, v, topk, attn_type, scale).items():
                out[(image, *position, head)] = x
    return out


@pytest.mark.parametrize("attn_type", TYPES)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_reference_is_the_definition(setting, attn_type):
    outputs, gradients = [], []
    for function in (run, definition):
        leaves = [t.requires_grad_() for t in inputs(setting, torch.float64)]
        out = function(*leaves, topk=setting[-1], attn_type=attn_type)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients.append(torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True))
        outputs.append(out)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("attn_type", TYPES)
def test_encodings_are_added_to_all_descendants(attn_type):
    query, key, *value = inputs(SETTINGS[3], torch.float64)
    encoding = [torch.randn_like(v) for v in value]
    plain, encoded = (quadtree_attention(query, key, value, attn_type=attn_type, encoding=e) for e in (None, encoding))
    row, column = torch.arange(13)[:, None], torch.arange(9)
    expected = sum(x[:, row >> level, column >> level] for level, x in enumerate(encoding))
    torch.testing.assert_close(encoded - plain, expected)


@pytest.mark.parametrize("attn_type", TYPES)
def test_gradcheck(attn_type):
    leaves = [t.requires_grad_() for t in inputs((1, 6, 5, 2, 3, 3, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: run(*t, topk=2, attn_type=attn_type), leaves, fast_mode=True)


def test_type_b_of_one_level_is_attention():
    query, key, value = inputs(SETTINGS[2])
    tokens = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*tokens).transpose(1, 2).unflatten(1, (5, 6))
    torch.testing.assert_close(run(query, key, value), expected)


@pytest.mark.parametrize("attn_type", TYPES)
def test_scale(attn_type):
    query, *rest = inputs(SETTINGS[0], torch.float64)
    expected = run(2 * query, *rest, attn_type=attn_type, scale=0.25)
    torch.testing.assert_close(run(query, *rest, attn_type=attn_type, scale=0.5), expected)


@pytest.mark.parametrize("attn_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_computes_in_float32(dtype, autocast, attn_type):
    # Scores beyond the range of float16, whose differences matter.
    tensors = [(40 * t).to(dtype) for t in inputs((1, 12, 10, 2, 64, 3, 4))]
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = run(*tensors, topk=4, attn_type=attn_type)
    assert out.dtype == dtype and out.isfinite().all()
    expected = run(*(t.double() for t in tensors), topk=4, attn_type=attn_type)
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-1)


@pytest.mark.parametrize("attn_type", TYPES)
def test_memory_is_linear_in_positions(attn_type):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    sizes = []
    for width in (64, 128):
        with Largest() as largest:
            run(*inputs((1, 64, width, 1, 8, 4, 8)), attn_type=attn_type)
        sizes.append(largest.numel)
    assert sizes[1] <= 2 * sizes[0]


@pytest.mark.parametrize("attn_type", TYPES)
def test_compiles_once_for_any_batch(attn_type):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        tensors = inputs((batch, *SETTINGS[3][1:]))
        torch.testing.assert_close(compiled(*tensors, attn_type=attn_type), run(*tensors, attn_type=attn_type))
    assert counter.frame_count <= 2


class Attend(torch.nn.Module):
    """Two levels."""

    def __init__(self, attn_type):
        super().__init__()
        self.attn_type = attn_type

    def forward(self, query, key, value):
        coarse = torch.nn.functional.interpolate(
            value.flatten(3).permute(0, 3, 1, 2), size=tuple((size + 1) // 2 for size in value.shape[1:3])
        )
        coarse = coarse.permute(0, 2, 3, 1).unflatten(-1, value.shape[3:])
        return run(query, key, value, coarse, topk=4, attn_type=self.attn_type)


@pytest.mark.parametrize("attn_type", TYPES)
def test_exports_with_free_sides(attn_type):
    module, free = Attend(attn_type), torch.export.Dim.DYNAMIC
    program = torch.export.export(
        module, tuple(inputs((2, 12, 16, 2, 8, 1, 4))), dynamic_shapes=({1: free, 2: free},) * 3
    ).module()
    for height, width in [(12, 16), (13, 7), (3, 5), (16, 4)]:
        tensors = inputs((2, height, width, 2, 8, 1, 4))
        torch.testing.assert_close(program(*tensors), module(*tensors))


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


def kernel_inputs(setting, dtype=torch.float32, device="cpu", dense=True):
    """Return the inputs of a setting with dense channels, as the backbone's are, the first three views of one tensor.

    With `dense` false, key and values have other strides than the query, the last one's channels not dense.
    """
    batch, height, width, heads, dim, levels, _ = setting
    query, key, *value = inputs(setting, torch.float32)
    qkv = torch.stack([query, key, value[0]], 3).to(device, dtype)
    query, key, value[0] = qkv.unbind(3)
    value[1:] = [v.to(device, dtype) for v in value[1:]]
    if not dense:
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
        value[-1] = value[-1].transpose(3, 4).contiguous().transpose(3, 4)
    return [query, key, *value]


def check_kernels(setting, allowed, dtype=torch.float32, device="cpu", dense=True):
    """Compare output and gradients with the reference's in float64.

    A key that two implementations rank differently differs in its score by rounding alone, but not in its children: the
    inputs are those of one seed, whose scores lie further apart.
    """
    levels = setting[5]

    def attend(query, key, *maps):
        return quadtree_attention(query, key, maps[:levels], topk=setting[-1], encoding=maps[levels:])

    tensors = kernel_inputs(setting, dtype, device, dense)
    # Encodings: the values in another order.
    tensors += [v.flip(1) if dense else v.flip(1).transpose(1, 2).contiguous().transpose(1, 2) for v in tensors[2:]]
    set_backend("triton")
    got = gradients(attend, tensors)
    if device == "cuda":
        assert all(torch.equal(a, b) for a, b in zip(got, gradients(attend, tensors), strict=True)), "two runs differ"
    set_backend("reference")
    expected = gradients(attend, [t.double() for t in tensors])
    # Where a map has one position, query and key have no gradient.
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if b.norm() > 1e-12]
    assert all(a.isfinite().all() for a in got)
    assert max(error(a, b) for a, b in pairs) < allowed


@pytest.mark.parametrize(
    "setting, dense",
    [
        ((2, 3, 4, 2, 8, 2, 2), True),
        ((1, 5, 7, 1, 12, 3, 4), False),  # odd sides, fewer positions than are kept at the coarsest level
        ((1, 5, 6, 2, 8, 1, 4), True),
        ((1, 7, 2, 1, 8, 4, 3), True),
        ((1, 1, 1, 1, 8, 3, 2), True),
        ((1, 6, 7, 1, 8, 2, 9), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.float16, 2e-3)], ids=str)
@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_kernels_interpreted(setting, dense, dtype, allowed, nan_filled_memory):
    check_kernels(setting, allowed, dtype, dense=dense)


GPU_SETTINGS = [
    *((s[0], s[1], s[2], s[3], 8, s[5], s[6]) for s in SETTINGS),
    (3, 56, 56, 1, 64, 4, 8),
    (4, 28, 28, 5, 32, 3, 8),
    (2, 14, 14, 5, 64, 2, 8),
    (16, 7, 7, 8, 64, 1, 8),
    (1, 200, 304, 1, 64, 4, 32),
    (1, 50, 76, 5, 32, 2, 32),
    (1, 25, 38, 8, 64, 1, 32),
    (2, 57, 83, 2, 40, 3, 12),
    (1, 37, 21, 3, 128, 3, 16),
    (1, 45, 30, 2, 24, 2, 50),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "strided"])
@pytest.mark.parametrize("setting", GPU_SETTINGS, ids=str)
def test_kernels(setting, dense, dtype, allowed, nan_filled_memory):
    check_kernels(setting, allowed, dtype, "cuda", dense)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 7, 128, 256])
def test_images_do_not_depend_on_the_batch(batch):
    tensors = kernel_inputs((batch, 28, 28, 2, 32, 3, 8), torch.bfloat16, "cuda")
    set_backend("triton")
    got = gradients(run, tensors)
    leaves = [t[-1:].detach().requires_grad_() for t in tensors]
    out = run(*leaves)
    grad = torch.randn(got[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[-1:]
    last = [out, *torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))]
    assert all(torch.equal(a[-1:], b) for a, b in zip(got, last, strict=True))


@pytest.mark.gpu
def test_keys_that_all_choose():
    """One key stands out: the list of those that chose it is as long as the map."""
    query, key, *value = kernel_inputs((1, 64, 64, 1, 32, 3, 8), torch.float32, "cuda")
    query, key = query.abs(), key.clone()
    key[:, 20:24, 36:40] = 1
    set_backend("triton")
    got = gradients(run, [query, key, *value])
    set_backend("reference")
    expected = gradients(run, [t.double() for t in (query, key, *value)])
    assert max(map(error, got, expected)) < 1e-5


@pytest.mark.gpu
def test_more_than_2_31_elements():
    qkv = torch.randn(33, 1024, 1024, 3, 1, 32, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    # Parts of the map, whose coarsest level would have too many positions.
    leaves = [t[:, :512, :512].detach().requires_grad_() for t in qkv.unbind(3)]
    leaves += [torch.randn(33, n, n, 1, 32, device="cuda").bfloat16().requires_grad_() for n in (256, 128, 64)]
    set_backend("triton")
    out = run(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    last = [t.detach()[-1:].requires_grad_() for t in leaves]
    small = run(*last)
    small_grads = torch.autograd.grad(small, last, torch.ones_like(small))
    for big, one in zip((out, *grads), (small, *small_grads), strict=True):
        torch.testing.assert_close(big[-1:], one)


@pytest.mark.gpu
def test_memory_is_a_seventh_of_the_reference():
    tensors = [t.requires_grad_() for t in kernel_inputs((2, 200, 304, 1, 64, 4, 32), torch.bfloat16, "cuda")]
    peaks = []
    for backend in ("triton", "reference"):
        set_backend(backend)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = run(*tensors)
        torch.autograd.grad(out, tensors, torch.ones_like(out))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del out
    assert peaks[0] * 7 <= peaks[1], peaks


@pytest.mark.gpu
def test_cuda_graph(check_cuda_graph):
    tensors = kernel_inputs((2, 28, 28, 2, 32, 3, 8), torch.bfloat16, "cuda")
    set_backend("triton")
    leaves = [t.detach().requires_grad_() for t in tensors]
    grad = torch.randn_like(leaves[0])

    def step():
        out = run(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    check_cuda_graph(step)


@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_operator_contract_interpreted():
    check_operator_contract("cpu")


@pytest.mark.gpu
def test_operator_contract():
    check_operator_contract("cuda")


def check_operator_contract(device):
    import densezoo.ops.quadtree.kernels  # noqa: F401  (registers the operator)

    query, key, *value = kernel_inputs((1, 2, 3, 1, 8, 2, 2), device=device)
    tensors = [query, key, *value, None, None, torch.randn_like(value[1]), None, None]
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.densezoo.quadtree_attention, (*leaves, 2, 0.3))
    out, *saved = (t.detach() for t in torch.ops.densezoo.quadtree_attention(*leaves, 2, 0.3))
    args = (torch.ones_like(out), *tensors, out, *saved)
    # opcheck leaves out what the compiler asserts: strides.
    with FakeTensorMode() as mode:
        fake = [t if t is None else mode.from_tensor(t) for t in args]
        expected = [t.stride() for t in torch.ops.densezoo.quadtree_attention_backward(*fake, 2, 0.3)]
    assert [t.stride() for t in torch.ops.densezoo.quadtree_attention_backward(*args, 2, 0.3)] == expected


@pytest.mark.gpu
def test_kernels_compile_once_for_any_batch():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    set_backend("triton")
    for batch in (2, 3, 7, 5):
        tensors = kernel_inputs((batch, 13, 9, 2, 32, 3, 4), device="cuda")
        torch.testing.assert_close(compiled(*tensors), run(*tensors))
    assert counter.frame_count <= 2


def test_what_the_kernels_leave_to_the_reference():
    set_backend("triton")
    for setting, options, reason in [
        ((1, 4, 4, 1, 8, 2, 2), {"attn_type": "A"}, "attn_type 'A'"),
        ((1, 4, 4, 1, 4, 2, 2), {}, "head dim 4"),
        ((1, 4, 4, 1, 8, 5, 2), {}, "5 levels"),
        ((1, 4, 4, 1, 8, 2, 2), {"topk": 65}, "topk 65"),
        ((1, 130, 130, 1, 8, 2, 2), {}, "a coarsest level of 65x65"),
    ]:
        with pytest.raises(RuntimeError, match=f"quadtree_attention: cannot run on triton: {reason}"):
            run(*inputs(setting), **options)
    with pytest.raises(RuntimeError, match="dtype torch.float64"):
        run(*inputs((1, 4, 4, 1, 8, 2, 2), torch.float64))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"query": torch.zeros(2, 8, 16)}, "query"),
        ({"query": torch.zeros(2, 5, 8, 2, 8, dtype=torch.int64)}, "query"),
        ({"query": torch.zeros(2, 5, 8, 2, 0)}, "query"),
        ({"key": None}, "key"),
        ({"key": torch.zeros(2, 5, 9, 2, 8)}, "key"),
        ({"key": torch.zeros(2, 5, 8, 16)}, "key"),
        ({"value": torch.zeros(2, 5, 8, 2, 8)}, "value"),
        ({"value": []}, "value"),
        ({"value": [None]}, "value"),
        ({"value": [torch.zeros(2, 5, 8, 2, 8), torch.zeros(2, 2, 4, 2, 8)]}, r"value\[1\]"),
        ({"value": [torch.zeros(2, 5, 8, 2, 8, dtype=torch.float64)]}, r"value\[0\]"),
        ({"value": [torch.zeros(2, 5, 8, 2, 8, device="meta")]}, r"value\[0\]"),
        ({"encoding": [torch.zeros(2, 5, 8, 2, 8)]}, "encoding"),
        ({"encoding": [torch.zeros(2, 5, 8, 2, 8), torch.zeros(2, 2, 4, 2, 8)]}, r"encoding\[1\]"),
        ({"topk": 0}, "topk"),
        ({"topk": 2.0}, "topk"),
        ({"topk": True}, "topk"),
        ({"attn_type": "b"}, "attn_type"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    arguments = dict(query=torch.zeros(2, 5, 8, 2, 8), key=torch.zeros(2, 5, 8, 2, 8))
    arguments["value"] = [torch.zeros(2, 5, 8, 2, 8), torch.zeros(2, 3, 4, 2, 8)]
    with pytest.raises(ValueError, match=f"^{named}: got"):
        quadtree_attention(**(arguments | change))
