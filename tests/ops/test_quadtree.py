"""QuadTree attention: the reference against its definition."""

import pytest
import torch
from densezoo.ops import quadtree_attention
from torch._dynamo.testing import CompileCounterWithBackend

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


@pytest.mark.parametrize(
    "change, named",
    [
        ({"query": torch.zeros(2, 8, 16)}, "query"),
        ({"query": torch.zeros(2, 5, 8, 2, 8, dtype=torch.int64)}, "query"),
        ({"key": torch.zeros(2, 5, 9, 2, 8)}, "key"),
        ({"key": torch.zeros(2, 5, 8, 16)}, "key"),
        ({"value": torch.zeros(2, 5, 8, 2, 8)}, "value"),
        ({"value": []}, "value"),
        ({"value": [None]}, "value"),
        ({"value": [torch.zeros(2, 5, 8, 2, 8), torch.zeros(2, 2, 4, 2, 8)]}, r"value\[1\]"),
        ({"value": [torch.zeros(2, 5, 8, 2, 8, dtype=torch.float64)]}, r"value\[0\]"),
        ({"value": [torch.zeros(2, 5, 8, 2, 8, device="meta")]}, r"value\[0\]"),
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
