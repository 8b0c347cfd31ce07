"""Neighbourhood attention: the reference against its definition, the kernels against the reference."""

import itertools
import random

import pytest
import torch
from densezoo.ops import na2d, na2d_qkv, set_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

cuda = torch.cuda.is_available()

# batch, height, width, heads, dim, kernel_size, stride, dilation, is_causal
SETTINGS = [
    (2, 9, 11, 2, 8, 7, 1, 1, False),
    (1, 7, 16, 1, 12, (7, 5), 1, (1, 3), False),
    (1, 13, 10, 3, 8, (4, 6), 1, 1, False),
    (1, 17, 15, 1, 16, 3, 2, (5, 4), False),
    (1, 12, 9, 2, 8, (5, 4), (3, 4), 2, False),
    (1, 11, 12, 1, 8, 5, 1, 2, (True, False)),
    (1, 12, 9, 2, 20, (1, 8), (1, 3), 1, True),
    (1, 27, 15, 1, 8, 13, (2, 1), (2, 1), False),
]
ids = ["-".join(str(v).replace(" ", "") for v in s) for s in SETTINGS]


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def inputs(setting, dtype=torch.float32, device="cpu", seed=0):
    """Return query, key and value as views of one qkv tensor, and a bias table."""
    batch, height, width, heads, dim, kernel_size, *_ = setting
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, height, width, 3, heads, dim, generator=generator, dtype=torch.float64)
    rpb = torch.randn(heads, *(2 * k - 1 for k in pair(kernel_size)), generator=generator, dtype=torch.float64)
    return [t.to(device, dtype) for t in (*qkv.unbind(3), rpb)]


def options(setting):
    return dict(zip(("kernel_size", "stride", "dilation", "is_causal"), setting[5:], strict=True))


def axis_pairs(size, kernel_size, stride, dilation, is_causal):
    """Return the (query, key) positions of one axis that attend, with their distance in ranks, from the definition."""
    for group in range(dilation):
        members = range(group, size, dilation)
        for rank, query in enumerate(members):
            if is_causal:
                leader = min(rank // stride * stride + stride - 1, len(members) - 1)
                keys = [r for r in range(len(members)) if leader - kernel_size < r <= rank]
            else:
                leader = min(rank // stride * stride + stride // 2, len(members) - 1)
                # The nearest members; of two at one distance, the left one.
                keys = sorted(range(len(members)), key=lambda r: (abs(r - leader), r))[:kernel_size]
            yield from ((query, members[r], r - rank) for r in keys)


def dense(query, key, value, rpb, kernel_size, stride, dilation, is_causal):
    """Compute neighbourhood attention from its definition, with a dense (H*W, H*W) bias."""
    height, width, heads = query.shape[1:4]
    per_axis = [pair(v) for v in (kernel_size, stride, dilation, is_causal)]
    rows, cols = (list(axis_pairs(s, *(v[a] for v in per_axis))) for a, s in enumerate((height, width)))
    bias = torch.full((heads, height, width, height, width), float("-inf"), dtype=query.dtype)
    for (i, k, a), (j, m, b) in itertools.product(rows, cols):
        bias[:, i, j, k, m] = 0 if rpb is None else rpb[:, a + per_axis[0][0] - 1, b + per_axis[0][1] - 1]
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    attn = (q @ k.mT * query.shape[-1] ** -0.5 + bias.flatten(3, 4).flatten(1, 2)).softmax(-1)
    return (attn @ v).transpose(1, 2).unflatten(1, (height, width))


def gradients(function, tensors, seed=1):
    """Return the output of `function` and the gradient of each of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))]


def error(got, expected):
    """Return the relative RMS error; NaN counts as infinite."""
    value = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return value if value == value else float("inf")


def run_qkv(setting, biased=True):
    return lambda qkv, *rpb: na2d_qkv(qkv, rpb=rpb[0] if biased else None, **options(setting))


def stacked(results):
    """Return an output and gradients of query, key, value and more, as `run_qkv` has them."""
    out, *qkv, rpb = results if len(results) == 5 else (*results, None)
    return [out, torch.stack(qkv, 3), *([] if rpb is None else [rpb])]


def run(setting, biased=True):
    if biased:
        return lambda q, k, v, rpb: na2d(q, k, v, rpb=rpb, **options(setting))
    return lambda q, k, v: na2d(q, k, v, **options(setting))


def random_setting(generator: random.Random):
    kernel_size, stride, dilation, size = [], [], [], []
    for _ in range(2):
        kernel_size.append(generator.randint(1, 13))
        stride.append(generator.choice([1, 1, generator.randint(1, kernel_size[-1])]))
        dilation.append(generator.choice([1, 1, 2, 3, 5]))
        size.append(kernel_size[-1] * dilation[-1] + generator.randint(0, 12))
    causal = tuple(generator.random() < 0.2 for _ in range(2))
    heads, dim = generator.randint(1, 3), generator.choice([8, 20, 32, 40, 64, 128])
    return (generator.randint(1, 3), *size, heads, dim, tuple(kernel_size), tuple(stride), tuple(dilation), causal)


RANDOM = [random_setting(random.Random(seed)) for seed in range(40)]


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("setting", SETTINGS, ids=ids)
def test_reference_is_the_definition(setting, biased):
    *qkv, rpb = inputs(setting, torch.float64)
    expected = dense(*qkv, rpb if biased else None, **options(setting))
    torch.testing.assert_close(na2d(*qkv, rpb=rpb if biased else None, **options(setting)), expected)


@pytest.mark.parametrize("setting", RANDOM[:12], ids=range(12))
def test_reference_is_the_definition_at_random(setting):
    *qkv, rpb = inputs(setting, torch.float64)
    torch.testing.assert_close(na2d(*qkv, rpb=rpb, **options(setting)), dense(*qkv, rpb, **options(setting)))


@pytest.mark.parametrize("setting", [SETTINGS[i] for i in (2, 4, 5)], ids=[ids[i] for i in (2, 4, 5)])
def test_reference_gradients(setting):
    batch, height, width, _, _, *rest = setting
    leaves = [t.requires_grad_() for t in inputs((batch, height, width, 1, 2, *rest), torch.float64)]
    assert torch.autograd.gradcheck(run(setting), leaves, fast_mode=True)


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
    for side in (28, 56):
        with Largest() as largest:
            na2d(*inputs((1, side, side, 1, 8, 7))[:3], 7)
        sizes.append(largest.numel)
    assert sizes[1] <= 4.01 * sizes[0]


@pytest.mark.parametrize(
    "setting, biased", [*((s, True) for s in SETTINGS), (SETTINGS[1], False), (SETTINGS[-1], False)], ids=str
)
@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_kernels_interpreted(setting, biased, nan_filled_memory):
    tensors = inputs(setting)[: 4 if biased else 3]
    set_backend("triton")
    got = gradients(run(setting, biased), tensors)
    set_backend("reference")
    expected = gradients(run(setting, biased), [t.double() for t in tensors])
    assert max(map(error, got, expected)) < 1e-6


@pytest.mark.parametrize(
    "setting, biased",
    [*((SETTINGS[i], True) for i in (0, 1, 3, 6)), ((1, 14, 14, 2, 8, 7, 1, 1, False), True), (SETTINGS[2], False)],
    ids=str,
)
@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_packed_kernels_interpreted(setting, biased, nan_filled_memory):
    *qkv, rpb = inputs(setting)
    tensors = [torch.stack(qkv, 3), *([rpb] if biased else [])]
    set_backend("triton")
    got = gradients(run_qkv(setting, biased), tensors)
    set_backend("reference")
    expected = gradients(run(setting, biased), [t.double() for t in ([*qkv, rpb] if biased else qkv)])
    assert max(map(error, got, stacked(expected))) < 1e-6


TALL = [
    (2, 35, 3, 2, 8, 3, 1, 1, False),
    (1, 38, 9, 1, 8, (7, 3), 1, 1, False),
    (2, 26, 20, 1, 8, (4, 2), 1, 1, False),
    (1, 47, 6, 1, 8, 3, 1, (7, 1), False),
    (1, 40, 5, 1, 8, (5, 3), (2, 1), (3, 1), (True, False)),
    (1, 30, 4, 1, 8, 3, 1, 1, True),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("setting", TALL, ids=str)
def test_runs_of_tiles(setting, device, monkeypatch):
    if device == "cpu" and cuda:
        pytest.skip("the kernels run on the GPU")
    from densezoo.ops.neighborhood import kernels

    # As if few programs filled the GPU.
    for key, launch in kernels.LAUNCH.items():
        monkeypatch.setitem(kernels.LAUNCH, key, launch._replace(programs=1))
    runs_of, runs = kernels._runs, []
    monkeypatch.setattr(kernels, "_runs", lambda *args: runs.append(args[-1]) or runs_of(*args))
    kernels._problem.cache_clear()
    tensors = inputs(setting, device=device)
    set_backend("triton")
    got = gradients(run(setting), tensors)
    kernels._problem.cache_clear()
    # What a causal tile sees depends on its place.
    assert (max(runs) > 1) == (setting is not TALL[-1])
    set_backend("reference")
    assert max(map(error, got, gradients(run(setting), [t.double() for t in tensors]))) < 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_images(device):
    if device == "cpu" and cuda:
        pytest.skip("the kernels run on the GPU")
    set_backend("triton")
    tensors = inputs((0, 8, 8, 1, 8, 3, 1, 1, False), device=device)
    *grads, grad_rpb = gradients(run((0, 8, 8, 1, 8, 3, 1, 1, False)), tensors)
    assert all(g.shape == (0, 8, 8, 1, 8) for g in grads) and not grad_rpb.any()


@pytest.mark.skipif(cuda, reason="the kernels run on the GPU, in the tests below")
def test_operator_contract_interpreted():
    check_operator_contract("cpu")


@pytest.mark.gpu
def test_operator_contract():
    check_operator_contract("cuda")


def check_operator_contract(device):
    *qkv, rpb = inputs((2, 5, 6, 1, 8, 3), device=device)
    for tensors in ([*qkv, rpb], [*qkv, None]):
        leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
        import densezoo.ops.neighborhood.kernels  # noqa: F401  (registers the operator)

        options = ([3, 3], [1, 1], [1, 2], [False, False], 0.3)
        torch.library.opcheck(torch.ops.densezoo.na2d, (*leaves, *options))
        out, lse = (t.detach() for t in torch.ops.densezoo.na2d(*leaves, *options))
        args = (torch.ones_like(out), *tensors, out, lse)
        # opcheck leaves out what the compiler asserts: strides.
        with FakeTensorMode() as mode:
            fake = [t if t is None else mode.from_tensor(t) for t in args]
            expected = [t.stride() for t in torch.ops.densezoo.na2d_backward(*fake, *options)]
        assert [t.stride() for t in torch.ops.densezoo.na2d_backward(*args, *options)] == expected

        packed = [torch.stack(qkv, 3).requires_grad_(), leaves[-1]]
        torch.library.opcheck(torch.ops.densezoo.na2d_qkv, (*packed, *options))
        grad_qkv, _ = torch.ops.densezoo.na2d_qkv_backward(torch.ones_like(out), *packed, out, lse, *options)
        grads = torch.ops.densezoo.na2d_backward(*args, *options)
        assert grad_qkv.is_contiguous() and torch.equal(grad_qkv, torch.stack(grads[:3], 3))


GPU_SETTINGS = [
    (128, 56, 56, 2, 32, 7, 1, 1, False),
    (256, 14, 14, 4, 32, 7, 1, 1, False),
    (16, 14, 14, 8, 32, 7, 1, 2, False),
    (2, 84, 69, 3, 32, (7, 11), 1, 1, False),
    (1, 200, 304, 2, 32, 7, 1, 28, False),
    (2, 31, 45, 2, 128, 13, 1, 1, False),
    (3, 40, 37, 5, 24, 5, 1, (3, 1), False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("setting", SETTINGS + GPU_SETTINGS + RANDOM, ids=str)
def test_kernels(setting, dtype, allowed, nan_filled_memory):
    tensors = inputs(setting, dtype, "cuda")
    tensors[3] = tensors[3].float()
    set_backend("triton")
    got = gradients(run(setting), tensors)
    again = gradients(run(setting), tensors)
    set_backend("reference")
    expected = gradients(run(setting), [t.double() for t in tensors])
    assert max(map(error, got, expected)) < allowed
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    set_backend("triton")
    packed = gradients(run_qkv(setting), [torch.stack(tensors[:3], 3), tensors[3]])
    assert all(torch.equal(a, b) for a, b in zip(packed, stacked(got), strict=True)), "the packed form differs"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("setting", SETTINGS + GPU_SETTINGS[2:], ids=str)
def test_kernels_without_a_bias(setting, dtype, allowed, nan_filled_memory):
    tensors = inputs(setting, dtype, "cuda")[:3]
    set_backend("triton")
    got = gradients(run(setting, biased=False), tensors)
    packed = gradients(run_qkv(setting, biased=False), [torch.stack(tensors, 3)])
    assert all(torch.equal(a, b) for a, b in zip(packed, stacked(got), strict=True)), "the packed form differs"
    set_backend("reference")
    expected = gradients(run(setting, biased=False), [t.double() for t in tensors])
    assert max(map(error, got, expected)) < allowed


@pytest.mark.gpu
@pytest.mark.parametrize("setting", [(2, 20, 17, 2, 32, 7, 1, 1, False), (2, 20, 17, 2, 32, 13, 1, 1, False)], ids=str)
def test_cuda_graph(setting, check_cuda_graph):
    tensors = inputs(setting, torch.bfloat16, "cuda")
    set_backend("triton")
    leaves = [t.detach().requires_grad_() for t in tensors]
    grad = torch.randn_like(leaves[0])

    def step():
        out = run(setting)(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    check_cuda_graph(step)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    qkv = torch.randn(33, 1024, 1024, 3, 1, 32, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31 and qkv[:, :, :, 0].numel() > 2**30
    rpb = torch.randn(1, 5, 5, device="cuda")
    leaves = [t.requires_grad_() for t in qkv.unbind(3)]
    out = na2d(*leaves, 3, rpb=rpb)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    last = [t.detach()[-1:].requires_grad_() for t in leaves]
    small = na2d(*last, 3, rpb=rpb)
    small_grads = torch.autograd.grad(small, last, torch.ones_like(small))
    for big, one in zip((out, *grads), (small, *small_grads), strict=True):
        torch.testing.assert_close(big[-1:], one)


@pytest.mark.gpu
def test_separate_strides():
    *qkv, rpb = inputs((2, 20, 20, 2, 32, 7), device="cuda")
    q, k, v = qkv[0].contiguous(), qkv[1], qkv[2].transpose(1, 2).contiguous().transpose(1, 2)
    set_backend("triton")
    assert error(na2d(q, k, v, 7, rpb=rpb), na2d(*qkv, 7, rpb=rpb)) == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_once_for_any_batch(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def attend(q, k, v, rpb):
        return na2d(q, k, v, 5, dilation=2, rpb=rpb)

    for batch in (2, 3, 7, 5):
        *qkv, rpb = inputs((batch, 12, 14, 2, 8, 5), device=device)
        torch.testing.assert_close(attend(*qkv, rpb), na2d(*qkv, 5, dilation=2, rpb=rpb))
    # One graph for the first batch size, one with the batch size free.
    assert counter.frame_count <= 2


@torch.no_grad()
def test_packed_is_the_same_and_names_wrong_arguments():
    *qkv, rpb = inputs(SETTINGS[1], torch.float64)
    packed = torch.stack(qkv, 3)
    assert torch.equal(run_qkv(SETTINGS[1])(packed, rpb), run(SETTINGS[1])(*qkv, rpb))
    for wrong, named in (
        ((packed[:, :, :, :2], 7), "qkv: got shape"),
        ((packed[:, :, :, 0], 7), "qkv: got shape"),
        ((packed[..., :0], 7), "qkv: got shape"),
        ((qkv, 7), "qkv: got list"),
        ((packed.long(), 7), "qkv: got torch.int64"),
        ((packed, 9), "kernel_size [*] dilation: got"),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            na2d_qkv(*wrong)


def test_exports_with_free_height_and_width():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v, rpb):
            return na2d(q, k, v, 7, dilation=2, rpb=rpb)

    sides = {1: torch.export.Dim("height", min=14, max=512), 2: torch.export.Dim("width", min=14, max=512)}
    example = tuple(inputs((1, 20, 26, 2, 8, 7)))
    program = torch.export.export(Attend(), example, dynamic_shapes=(sides, sides, sides, None)).module()
    for height, width in ((14, 33), (41, 20)):
        tensors = inputs((1, height, width, 2, 8, 7))
        torch.testing.assert_close(program(*tensors), Attend()(*tensors))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"kernel_size": 14}, "kernel_size"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size"),
        ({"kernel_size": 3.0}, "kernel_size"),
        ({"kernel_size": 9}, "kernel_size * dilation"),
        ({"dilation": 3}, "kernel_size * dilation"),
        ({"dilation": 0}, "dilation"),
        ({"stride": 4}, "stride"),
        ({"stride": True}, "stride"),
        ({"is_causal": 1}, "is_causal"),
        ({"key": torch.zeros(1, 8, 8, 2, 4)}, "key"),
        ({"value": torch.zeros(1, 8, 8, 2, 8, dtype=torch.float64)}, "value"),
        ({"value": None}, "value"),
        ({"query": torch.zeros(1, 8, 8, 2, 0)}, "query"),
        ({"query": torch.zeros(8, 8, 2, 8)}, "query"),
        ({"query": torch.zeros(1, 8, 8, 2, 8, dtype=torch.int64)}, "query"),
        ({"rpb": [0.0]}, "rpb"),
        ({"rpb": torch.zeros(2, 5, 3)}, "rpb"),
        ({"rpb": torch.zeros(2, 5, 5, device="meta")}, "rpb"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, named):
    arguments = {name: torch.zeros(1, 8, 8, 2, 8) for name in ("query", "key", "value")} | {"kernel_size": 3}
    with pytest.raises(ValueError, match=f"^{named.replace('*', '[*]')}: got"):
        na2d(**(arguments | change))


def test_backend_is_chosen_by_name():
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of auto, triton, reference"):
        set_backend("cuda")
    set_backend("triton")
    with pytest.raises(RuntimeError, match="na2d: cannot run on triton: dtype torch.float64"):
        na2d(*inputs((1, 8, 8, 1, 8, 3), torch.float64)[:3], 3)
    with pytest.raises(RuntimeError, match="na2d: cannot run on triton: head dim 4"):
        na2d(*inputs((1, 8, 8, 1, 4, 3))[:3], 3)
    set_backend("auto")
    na2d(*inputs((1, 8, 8, 1, 4, 3))[:3], 3)
