"""What every head can do: odd sizes, gradients, autocast, torch.compile and torch.export."""

import copy

import pytest
import torch
from densezoo.heads import BVR, DyHead, MEUDecoder, P2ATDecoder, PositionRelation, RoIBVR
from torch.utils._pytree import tree_leaves, tree_map


def pyramid(channels: list[int], size: tuple[int, int]) -> list[torch.Tensor]:
    """Return levels (2, C, H, W), each half of the one before it, rounded up."""
    maps = []
    for width in channels:
        maps.append(torch.randn(2, width, *size))
        size = tuple((n + 1) // 2 for n in size)
    return maps


def boxes(count: int) -> torch.Tensor:
    return torch.rand(2, count, 4) * 0.8 + 0.1


def proposals(size: tuple[int, int]) -> list[torch.Tensor]:
    rois = []
    for count in size:
        corner, side = torch.rand(count, 2) * 60, torch.rand(count, 2) * 60 + 4
        rois.append(torch.cat([corner, corner + side], 1))
    return rois


# A small one of each, and inputs of a size, which for proposals is how many the two images have.
HEADS = {
    "dyhead": (lambda: DyHead(16, 32, num_blocks=1), lambda size: (pyramid([16] * 3, size),)),
    "bvr": (
        lambda: BVR(24, in_channels=16, channels=32, strides=(8, 16), num_heads=4, num_keys=10),
        lambda size: (pyramid([16] * 2, size), pyramid([32] * 2, size), pyramid([32] * 2, size)),
    ),
    "roi_bvr": (
        lambda: RoIBVR(16, 32, num_heads=4, num_keys=5),
        lambda size: (torch.randn(sum(size), 16, 7, 7), torch.randn(sum(size), 32), proposals(size)),
    ),
    "meu": (lambda: MEUDecoder([8, 16, 24], 16), lambda size: (pyramid([8, 16, 24], size),)),
    "p2at": (
        lambda: P2ATDecoder([8, 16, 24, 32], 16, num_heads=2, key_dim=4, num_blocks=1, pos_embed_size=3),
        lambda size: (pyramid([8, 16, 24, 32], size),),
    ),
    "relation": (lambda: PositionRelation(4, 8), lambda size: (boxes(size[0]), boxes(size[1]))),
}
each = pytest.mark.parametrize("name", HEADS)


def build(name: str) -> torch.nn.Module:
    """Return a head in which every parameter counts: some start near 0."""
    head = HEADS[name][0]()
    for parameter in head.parameters():
        if parameter.ndim == 1 or parameter.numel() == len(parameter):
            torch.nn.init.normal_(parameter, mean=0.2, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        if len(parameter) == 1:  # a single number that ReLU might take away
            parameter.data.abs_()
    return head


def inputs(name: str, size: tuple[int, int]) -> tuple:
    return HEADS[name][1](size)


def total(outputs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    leaves = [leaf.float() for leaf in tree_leaves(outputs)]
    return sum((leaf * torch.randn(leaf.shape, generator=generator)).sum() for leaf in leaves)


@each
@pytest.mark.parametrize("size", [(16, 24), (13, 9), (9, 30)], ids=str)
def test_forward_and_backward(name, size):
    head = build(name)
    for train in (True, False):
        head.train(train).zero_grad()
        args = tree_map(lambda t: t.requires_grad_(), inputs(name, size))
        outputs = head(*args)
        total(outputs).backward()
        assert all(leaf.isfinite().all() for leaf in tree_leaves(outputs))
        for key, parameter in head.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            # A batch norm in training takes away what a bias before it adds.
            assert train or parameter.grad.any(), key
        if name != "relation":
            first = tree_leaves(args)[0].grad
            assert first.isfinite().all() and first.any()


@each
def test_images_are_independent(name):
    head, args = build(name).eval(), inputs(name, (12, 10))
    counts = [12, 10] if name == "roi_bvr" else [1, 1]
    whole = head(*args)
    for i in range(2):

        def part(t, i=i):
            return t if len(t) not in (2, 22) else t.split(counts)[i]

        own = (part(args[0]), part(args[1]), args[2][i : i + 1]) if name == "roi_bvr" else tree_map(part, args)
        for expected, got in zip(tree_leaves(whole), tree_leaves(head(*own)), strict=True):
            torch.testing.assert_close(got, part(expected), atol=1e-4, rtol=1e-4)


@each
def test_memory_layout_is_free(name):
    head, args = build(name).eval(), inputs(name, (12, 10))
    other = tree_map(lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t, args)
    for expected, got in zip(tree_leaves(head(*args)), tree_leaves(head(*other)), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@each
def test_autocast(name):
    head, args = build(name), inputs(name, (12, 10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = head(*args)
    total(outputs).backward()
    assert all(leaf.isfinite().all() for leaf in tree_leaves(outputs))
    assert all(p.grad.isfinite().all() for p in head.parameters())
    if name not in ("bvr", "roi_bvr"):  # rounding chooses other points
        head.eval()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = head(*args)
        for expected, got in zip(tree_leaves(head(*args)), tree_leaves(narrow), strict=True):
            error = (got.float() - expected).norm() / expected.norm()
            assert error < 0.05


@each
def test_compile(name):
    head, args = build(name).eval(), inputs(name, (12, 10))
    compiled = torch.compile(copy.deepcopy(head), fullgraph=True, backend="aot_eager")
    expected, got = head(*args), compiled(*args)
    for a, b in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)
    for outputs in (expected, got):
        total(outputs).backward()
    for (key, a), b in zip(head.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-3, rtol=1e-3, msg=key)


@each
def test_export_with_free_sizes(name):
    head, auto = build(name).eval(), torch.export.Dim.AUTO
    if name == "roi_bvr":  # one graph a number of proposals
        args = inputs(name, (12, 10))
        program = torch.export.export(head, args).module()
        sizes = [(12, 10)]
    else:
        args = inputs(name, (16, 24))
        free = {1: auto} if name == "relation" else {2: auto, 3: auto}
        program = torch.export.export(head, args, dynamic_shapes=tree_map(lambda t: free, args)).module()
        sizes = [(16, 24), (20, 12), (26, 38)]
    for size in sizes:
        args = inputs(name, size)
        for expected, got in zip(tree_leaves(head(*args)), tree_leaves(program(*args)), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@each
def test_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    head, args = build(name).eval(), inputs(name, (12, 10))
    other, moved = copy.deepcopy(head).cuda(), tree_map(torch.Tensor.cuda, args)
    expected, got = head(*args), other(*moved)
    for a, b in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        torch.testing.assert_close(b.cpu(), a, atol=1e-3, rtol=1e-3)
    total(expected).backward()
    total(tree_map(torch.Tensor.cpu, got)).backward()
    for (key, a), b in zip(head.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad, atol=1e-2, rtol=1e-2, msg=key)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            outputs = other(*moved)
        total(tree_map(torch.Tensor.cpu, outputs)).backward()
        assert all(leaf.isfinite().all() for leaf in tree_leaves(outputs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DyHead(0), "in_channels: got 0, expected a positive integer"),
        (lambda: DyHead([16, 16]), r"in_channels: got \[16, 16\], expected a positive integer"),
        (lambda: DyHead(4, 16)([torch.zeros(1, 8, 5, 8)]), r"maps: got 1 maps of \[8\] channels, expected 1, .* \[4\]"),
        (lambda: DyHead(4, 16)([]), r"maps: got 0 maps of \[\] channels, expected 1, finest first, of \[4\]"),
        (lambda: DyHead(4, 16)(torch.zeros(1, 4, 5, 8)), "maps: got one tensor, expected a sequence of maps"),
        (lambda: DyHead(16, 40), "out_channels: got 40, expected a positive multiple of 16"),
        (lambda: DyHead(16, 32, num_blocks=0), "num_blocks: got 0, expected a positive integer"),
        (
            lambda: DyHead(4, 16)([torch.zeros(1, 4, 5, 8), torch.zeros(1, 4, 2, 4)]),
            r"maps: level 1 is \(2, 4\), expected \(3, 4\), half of level 0 rounded up",
        ),
        (lambda: BVR(0), "num_classes: got 0, expected a positive integer"),
        (lambda: BVR(3, in_channels=0), "in_channels: got 0, expected a positive integer"),
        (lambda: BVR(3, strides=()), r"strides: got \(\), expected the strides of one level or more, finest first"),
        (lambda: BVR(3, strides=8), "strides: got 8, expected the strides of one level or more, finest first"),
        (
            lambda: BVR(3, 4, 32, strides=(8,))(*([torch.zeros(1, width, 4, 4)] for width in (4, 32, 16))),
            r"reg_maps: got 1 maps of \[16\] channels, expected 1, finest first, of \[32\]",
        ),
        (lambda: RoIBVR(0), "in_channels: got 0, expected a positive integer"),
        (lambda: RoIBVR(16, 32, cell=0), "cell: got 0, expected a positive number of pixels"),
        (lambda: BVR(3, num_keys=0), "num_keys: got 0, expected a positive integer"),
        (lambda: BVR(3, channels=48), "channels: got 48, expected a positive multiple of 32"),
        (lambda: BVR(3, channels=64, num_heads=5), "num_heads: got 5 for 64 channels, expected a divisor"),
        (
            lambda: BVR(3, 4, 32, strides=(8, 16))([], [], []),
            r"maps, cls_maps, reg_maps: got \(0, 0, 0\) levels, expected 2 each",
        ),
        (lambda: RoIBVR(16, 32, num_keys=0), "num_keys: got 0, expected a positive integer"),
        (lambda: RoIBVR(18, 32), "channels: got 18, expected a positive multiple of 4"),
        (lambda: MEUDecoder([8]), r"in_channels: got \[8\], expected the widths of 2 levels or more"),
        (lambda: MEUDecoder([8, 16], 0), "channels: got 0, expected a positive integer"),
        (lambda: MEUDecoder([8, 8])([torch.zeros(1, 8, 2, 2)]), r"maps: got 1 maps of \[8\] channels, expected 2, "),
        (lambda: MEUDecoder([8, 8])(pyramid([8, 8], (4, 4))[::-1]), r"maps: got maps of sizes .*, expected the finest"),
        (lambda: P2ATDecoder([8, 8, 8]), r"in_channels: got \[8, 8, 8\], expected the widths of four levels"),
        (lambda: P2ATDecoder([8, 0, 8, 8]), "in_channels: got 0, expected a positive integer"),
        (lambda: P2ATDecoder([8] * 4, num_heads=0), "num_heads: got 0, expected a positive integer"),
        (lambda: P2ATDecoder([8] * 4, 8)([torch.zeros(1, 8, 2, 2)]), r"maps: got 1 maps of \[8\] .*, expected 4, "),
        (lambda: PositionRelation(0), "num_heads: got 0, expected a positive integer"),
        (lambda: PositionRelation(8, 15), "embed_dim: got 15, expected a positive even number"),
        (
            lambda: PositionRelation()(torch.zeros(1, 3, 4), torch.zeros(1, 3, 5)),
            r"others: got shape \(1, 3, 5\), expected \(B, N, 4\)",
        ),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
