"""PVT (arXiv 2102.12122) and PVTv2 (arXiv 2106.13797) as skeletons, for families that bring their own attention."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from densezoo.backbones.nat import spread_drop_path
from densezoo.backbones.staged import (
    Blocks,
    StagedBackbone,
    check_out_norms,
    check_per_stage,
    convolve,
    init_weights,
    resize_tokens,
    square_side,
)
from densezoo.ops.depthwise import DepthwiseConv
from densezoo.ops.mlp import Mlp
from densezoo.ops.norm import LayerNorm, PreNorm
from timm.layers import DropPath
from torch import Tensor, nn

NORM_EPS = 1e-6
"""Of the norms in and after blocks; those of patch embeddings have torch's 1e-5."""


class PatchEmbed(nn.Module):
    """Take a map (B, H, W, in_chans) to a normed map (B, H', W', dim) by a strided convolution.

    Rows and columns that the last patch does not reach are left out, as in the published dense models.
    """

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int):
        super().__init__()
        padding = kernel_size // 2 if kernel_size > stride else 0
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.norm(convolve(self.proj, x))


class ConvMlp(nn.Module):
    """The MLP of PVTv2 over a map (B, H, W, dim), with a depthwise convolution of the hidden map."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Sequential(OrderedDict(dwconv=DepthwiseConv(hidden, gelu=True)))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        return self.fc2(self.dwconv(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP of PVT and DeiT, with stochastic depth."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = PreNorm(dim, eps=NORM_EPS)
        self.attn = attn
        self.norm2 = PreNorm(dim, eps=NORM_EPS)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, *args) -> Tensor:
        """Take a map (B, H, W, dim), or what else `attn` takes with `args`, to one of its shape."""
        # As tokens: torch.compile would store maps of four axes as it likes convolutions to, rows innermost.
        sides = x.shape[1:-1]
        x = x.flatten(1, -2)
        x = x + self.drop_path(self.attn(self.norm1(x).unflatten(1, sides), *args).flatten(1, -2))
        x = x + self.drop_path(self.mlp(self.norm2(x).unflatten(1, sides)).flatten(1, -2))
        return x.unflatten(1, sides)


class PVT(StagedBackbone):
    """Stages of patch embedding and blocks, at strides 4, 8, 16 and 32, around a family's attention.

    PVT cuts patches side by side and adds a position embedding, which is resized bilinearly where the map is not of
    `img_size`; it has no final norm. PVTv2 has patches that overlap, a convolution in its MLPs, no
    position embedding, and a norm `norm{s}` at the end of each stage, so that `out_norms` adds none.

    Args:
        attention: Called with a stage's index, width, heads and map side at `img_size`, once for each block.
    """

    # Whether it is PVTv2.
    overlapping = False
    # The published recipes decay the position embeddings.
    position_tables = ()

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        img_size: int,
        drop_rate: float,
        drop_path_rate: float,
        out_norms: Sequence[int],
        attention: Callable[[int, int, int, int], nn.Module],
    ):
        super().__init__()
        check_per_stage(depths, embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios)
        self.feature_info = []
        for i, (dim, heads, rates) in enumerate(
            zip(embed_dims, num_heads, spread_drop_path(drop_path_rate, depths), strict=True)
        ):
            stride, reduction = (2, 4 * 2**i) if i else (4, 4)
            side = square_side(img_size) // reduction
            kernel_size = 2 * stride - 1 if self.overlapping else stride
            embed = PatchEmbed(embed_dims[i - 1] if i else in_chans, dim, kernel_size, stride)
            mlp = ConvMlp if self.overlapping else Mlp
            blocks = (Block(dim, attention(i, dim, heads, side), mlp(dim, int(dim * mlp_ratios[i])), r) for r in rates)
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"block{i + 1}", Blocks(*blocks))
            if self.overlapping:
                setattr(self, f"norm{i + 1}", LayerNorm(dim, eps=NORM_EPS))
            else:
                position = nn.Parameter(torch.empty(1, side * side, dim))
                setattr(self, f"pos_embed{i + 1}", nn.init.trunc_normal_(position, std=0.02))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"block{i + 1}"))
        self.apply(init_weights)
        if self.overlapping:
            self.apply(_init_conv)
            # The norms of the outputs are there already, and under the names that `build_head` would give its own.
            check_out_norms(out_norms, len(depths))
            num_classes, out_norms = 0 if out_norms else num_classes, ()
        self.build_head(num_classes, global_pool, drop_rate, out_norms)
        self.norm = nn.Identity()

    def patch_embed(self, x: Tensor) -> Tensor:
        """Return images (B, in_chans, H, W) as a map: there is no stem, every stage starts with a patch embedding."""
        return x.permute(0, 2, 3, 1)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run stage `i` on the output of the one before it."""
        embed, blocks = (self.get_submodule(f"{part}{i + 1}") for part in ("patch_embed", "block"))
        x = embed(x)
        if self.overlapping:
            return self.get_submodule(f"norm{i + 1}")(blocks(x))
        height, width = x.shape[1:3]
        position = resize_tokens(getattr(self, f"pos_embed{i + 1}"), height, width, mode="bilinear")
        return blocks(x + position.unflatten(1, (height, width)))

    def keep_stages(self, count: int) -> None:
        """Drop the stages after the first `count`."""
        for i in range(count, self.num_stages):
            for part in ("patch_embed", "block", "norm" if self.overlapping else "pos_embed"):
                delattr(self, f"{part}{i + 1}")

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per stage, or per block, each embedding with the first block after it."""
        blocks = [
            (r"^block(\d+)\.(\d+)", None),
            (r"^(?:patch_embed|pos_embed)(\d+)", (0,)),
            *([(r"^norm(\d+)", (99999,))] if self.overlapping else []),
        ]
        stage = "patch_embed|block|norm" if self.overlapping else "patch_embed|pos_embed|block"
        return dict(stem=r"^(?:patch_embed1|pos_embed1)\b", blocks=rf"^(?:{stage})(\d+)" if coarse else blocks)


def _init_conv(module: nn.Module) -> None:
    """Initialise a convolution as PVTv2 does: normal, by the number of outputs that an input reaches."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)
