"""QuadTree, attention from coarse to fine in PVTv2 (arXiv 2201.02767).

Code and weights were published at github.com/Tangshitao/QuadTreeAttention (MIT by its README). Parameter names are
those of the published checkpoints, so official files load as they are. Type A of the attention was published as code
alone (`quadtreeA_b0` there).

The published models take maps whose sides are even at every level but the coarsest, which has no fewer positions than
are kept. Here maps of any size work: nothing outside of the map is attended to, and where a side is odd its last
positions stand twice in the means and convolutions that lead to the next level.

The published detectors and segmentors keep 32 keys where the classifiers keep 8, and have ReLU in the value branches
where these have GELU, although they start from their weights. So do the models with `out_norms` here. They are trained
with a `drop_path_rate` of 0.1, which here the configs set.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from densezoo.backbones.pvt import PVT
from densezoo.backbones.staged import check_per_stage, pretrained_filter
from densezoo.ops import quadtree_attention
from densezoo.ops.depthwise import depthwise_conv
from densezoo.ops.precision import autocast_dtype
from densezoo.ops.quadtree import halve, to_quads
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class ImageNorm(nn.GroupNorm):
    """Normalise tokens (B, N, dim) over all that there is of an image: a GroupNorm of one group."""

    def __init__(self, dim: int):
        super().__init__(1, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the shape of `x`."""
        # As rows: a GroupNorm of maps is compiled to passes over one channel after the other, far apart in memory.
        row = x.flatten(1)
        x = F.layer_norm(row, row.shape[1:], eps=self.eps).unflatten(1, (-1, x.shape[2]))
        return x * self.weight + self.bias


class ValueBranch(nn.Sequential):
    """From a level's values to those of the next, of half the sides: tokens (B, H * W, dim) both."""

    def __init__(self, dim: int, act: type[nn.Module]):
        super().__init__(
            ImageNorm(dim), act(), nn.Conv2d(dim, dim, 2, stride=2), ImageNorm(dim), act(), nn.Conv2d(dim, dim, 1)
        )

    def forward(self, input: Tensor, size: Sequence[int]) -> Tensor:
        """Return the tokens of a map of sides ceil(H / 2) and ceil(W / 2); `size` is (H, W)."""
        norm, act, quad_conv, next_norm, next_act, proj = self
        x = act(norm(input))
        # With the product's cast here, torch.compile makes one pass of all this and of cutting quads.
        x = x.to(autocast_dtype(x) or x.dtype)
        quads = to_quads(x.unflatten(1, size)).flatten(3).flatten(1, 2)
        x = F.linear(quads, quad_conv.weight.permute(0, 2, 3, 1).flatten(1), quad_conv.bias)
        return F.linear(next_act(next_norm(x)), proj.weight.flatten(1), proj.bias)


class LevelMix(nn.Module):
    """What type B adds to the levels: learned weights, and an encoding of positions by convolving the values."""

    def __init__(self, dim: int, levels: int):
        super().__init__()
        # Index 0 is the coarsest level, here and there.
        self.weight = nn.Parameter(torch.randn(levels))
        self.get_vs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(levels))

    def forward(self, value: Sequence[Tensor], sizes: Sequence) -> tuple[list[Tensor], list[Tensor]]:
        """Take the values of each level, the finest first, to maps (B, H, W, dim) of weighted ones and of encodings.

        They are tokens (B, H * W, dim); `sizes` has (H, W) of each.
        """
        weights, convs = self.weight.softmax(0).flip(0), list(reversed(self.get_vs))
        kernels = torch.stack([conv.weight for conv in convs]) * weights.view(-1, 1, 1, 1, 1)
        biases = torch.stack([conv.bias for conv in convs]) * weights.view(-1, 1)
        weighted, encoding = [], []
        for x, size, weight, *filters in zip(value, sizes, weights, kernels, biases, strict=True):
            weighted.append((weight * x).unflatten(1, size))
            encoding.append(depthwise_conv(x.unflatten(1, size), *filters))
        return weighted, encoding


class QuadTreeAttention(nn.Module):
    """QuadTree attention over a map (B, H, W, dim).

    Args:
        dim: Channels.
        num_heads: Attention heads.
        levels: Levels of the pyramid, that of the map included.
        topk: Keys that a query keeps for the next level.
        attn_type: "A" or "B", as in `densezoo.ops.quadtree_attention`.
        value_act: Activation in the branches that lead from a level's values to the next in type B, "gelu" or "relu".
    """

    def __init__(self, dim: int, num_heads: int, levels: int, topk: int, attn_type: str, value_act: str):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of dim {dim}")
        self.num_heads = num_heads
        self.levels = levels
        self.topk = topk
        self.attn_type = attn_type
        self.q_proj = nn.Conv2d(dim, dim, 1)
        self.k_proj = nn.Conv2d(dim, dim, 1)
        self.v_proj = nn.Conv2d(dim, dim, 1)
        # What the three give goes through it, for hooks to see.
        self.qkv = nn.Identity()
        if attn_type == "B":
            act = ACTIVATIONS[value_act]
            self.py_att = LevelMix(dim, levels)
            self.value_branchs = nn.ModuleList(ValueBranch(dim, act) for _ in range(levels - 1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        # All but the attention goes over tokens: torch.compile would store maps of four axes that are taken more than
        # once as it likes convolutions to, rows innermost.
        convs, sizes = (self.q_proj, self.k_proj, self.v_proj), [x.shape[1:3]]
        weight, bias = (torch.cat([getattr(conv, name) for conv in convs]) for name in ("weight", "bias"))
        q, k, v = self.qkv(F.linear(x.flatten(1, 2), weight.flatten(1), bias)).chunk(3, -1)
        q, k = (part.unflatten(1, sizes[0]) for part in (q, k))
        if self.attn_type == "A":
            values, encoding = [v.unflatten(1, sizes[0])], None
            for _ in range(self.levels - 1):
                values.append(halve(values[-1]))
        else:
            tokens = [v]
            for branch in self.value_branchs:
                tokens.append(branch(tokens[-1], sizes[-1]))
                sizes.append([(side + 1) // 2 for side in sizes[-1]])
            values, encoding = self.py_att(tokens, sizes)
            encoding = self.to_heads(*encoding)
        q, k, *values = self.to_heads(q, k, *values)
        out = quadtree_attention(q, k, values, topk=self.topk, attn_type=self.attn_type, encoding=encoding)
        return self.proj(out.flatten(3).flatten(1, 2)).unflatten(1, sizes[0])

    def to_heads(self, *maps: Tensor) -> list[Tensor]:
        """Return maps (B, H, W, dim) as (B, H, W, heads, head_dim)."""
        return [x.unflatten(-1, (self.num_heads, -1)) for x in maps]


class QuadTree(PVT):
    """QuadTree attention in every stage of PVTv2.

    Images of any size from 32x32: sides are rounded up at each stage. Every stage ends with a norm, so that `out_norms`
    adds none: where given, the model has no classifier, and the attention is that of the published dense models.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dims: Width of each stage.
        depths: Blocks per stage.
        num_heads: Attention heads per stage.
        mlp_ratios: Hidden width of the MLPs over the stage's width.
        levels: Levels of the attention's pyramid per stage.
        topk: Keys that a query keeps at each level; by default 8, and 32 with `out_norms`.
        attn_type: Type of the attention, "A" or "B".
        value_act: Activation in the value branches of type B, "gelu" or "relu"; by default "gelu", and "relu" with
            `out_norms`.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output; where given, the model has the dense layout.

    Raises:
        ValueError: An argument does not fit the others; the message names it.
    """

    overlapping = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        levels: Sequence[int] = (4, 3, 2, 1),
        topk: int | None = None,
        attn_type: str = "B",
        value_act: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        check_per_stage(depths, levels=levels)
        if any(not isinstance(n, int) or n < 1 for n in levels):
            raise ValueError(f"levels: got {levels!r}, expected positive ints")
        if attn_type not in ("A", "B"):
            raise ValueError(f"attn_type: got {attn_type!r}, expected 'A' or 'B'")
        if topk is None:
            topk = 32 if out_norms else 8
        if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
            raise ValueError(f"topk: got {topk!r}, expected a positive int")
        if value_act is None:
            value_act = "relu" if out_norms else "gelu"
        if value_act not in ACTIVATIONS:
            raise ValueError(f"value_act: got {value_act!r}, expected one of {', '.join(ACTIVATIONS)}")
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            img_size=224,  # nothing is made for it
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            out_norms=out_norms,
            attention=lambda i, dim, heads, _: QuadTreeAttention(dim, heads, levels[i], topk, attn_type, value_act),
        )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a published state dict, classification or dense, with the keys of `model`, which are its own."""
    return state_dict


_B0 = dict(embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2))

VARIANTS: dict[str, dict] = {
    "quadtree_b0": _B0,
    "quadtree_b1": dict(depths=(2, 2, 2, 2)),
    "quadtree_b2": dict(depths=(3, 4, 6, 3)),
    "quadtree_b3": dict(depths=(3, 4, 18, 3)),
    "quadtree_b4": dict(depths=(3, 8, 27, 3)),
    "quadtree_a_b0": dict(_B0, attn_type="A"),
}


def _cfg(file: str | None) -> dict:
    return dict(
        url=f"https://github.com/Tangshitao/QuadTreeAttention/releases/download/{file}" if file else "",
        license="mit",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed1.proj",
        classifier="head",
    )


default_cfgs = generate_default_cfgs(
    {
        "quadtree_b0.in1k": _cfg("QuadTreeAttention_cls/b0.pth"),
        # The published table links b2's file; this is the one that the published detectors start from.
        "quadtree_b1.in1k": _cfg("QuadTreeAttention/b1.pth"),
        "quadtree_b2.in1k": _cfg("QuadTreeAttention_cls/b2.pth"),
        "quadtree_b3.in1k": _cfg("QuadTreeAttention_cls/b3.pth"),
        "quadtree_b4.in1k": _cfg("QuadTreeAttention_cls/b4.pth"),
        # Its weights were never published.
        "quadtree_a_b0.in1k": _cfg(None),
    }
)


def _create(variant: str, pretrained: bool, **kwargs) -> QuadTree:
    kwargs = VARIANTS[variant] | kwargs
    return build_model_with_cfg(
        QuadTree,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter(checkpoint_filter_fn),
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["depths"]))), feature_cls="getter"),
        **kwargs,
    )


@register_model
def quadtree_b0(pretrained: bool = False, **kwargs) -> QuadTree:
    """QuadTree-B-b0, ImageNet-1k."""
    return _create("quadtree_b0", pretrained, **kwargs)


@register_model
def quadtree_b1(pretrained: bool = False, **kwargs) -> QuadTree:
    """QuadTree-B-b1, ImageNet-1k."""
    return _create("quadtree_b1", pretrained, **kwargs)


@register_model
def quadtree_b2(pretrained: bool = False, **kwargs) -> QuadTree:
    """QuadTree-B-b2, ImageNet-1k."""
    return _create("quadtree_b2", pretrained, **kwargs)


@register_model
def quadtree_b3(pretrained: bool = False, **kwargs) -> QuadTree:
    """QuadTree-B-b3, ImageNet-1k."""
    return _create("quadtree_b3", pretrained, **kwargs)


@register_model
def quadtree_b4(pretrained: bool = False, **kwargs) -> QuadTree:
    """QuadTree-B-b4, ImageNet-1k."""
    return _create("quadtree_b4", pretrained, **kwargs)


@register_model
def quadtree_a_b0(pretrained: bool = False, **kwargs) -> QuadTree:
    """QuadTree-A-b0, of which no weights were published."""
    return _create("quadtree_a_b0", pretrained, **kwargs)
