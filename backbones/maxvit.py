"""MaxViT, Multi-Axis Vision Transformer (arXiv 2204.01697): convolution, window attention and grid attention in turn.

Code was published at github.com/google-research/maxvit (Apache-2.0), for TensorFlow. timm converted its weights (`tf`
variants) and trained its own models before the code was out (`rw` variants, `rmlp` with biases from an MLP), all
Apache-2.0. `checkpoint_filter_fn` takes timm's files: parameter names here are timm's, with the zoo's `patch_embed`,
`norm` and `head`; queries, keys and values and the bias tables of `rw` are stored in the order of `tf`.

At sizes whose maps the windows divide the numbers are timm's. Any other size works too, without padding: a window that
reaches over the border holds what is inside, and a grid spreads over the map as evenly as it can. The window is the one
of the variant's training size (1/32 of it) at every size.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import timm.layers
import torch
import torch.nn.functional as F
from densezoo.backbones.nat import resize_bias, spread_drop_path
from densezoo.backbones.staged import (
    Blocks,
    StagedBackbone,
    check_per_stage,
    convolve,
    pretrained_filter,
    rename_keys,
    square_side,
)
from densezoo.ops import window_attention
from densezoo.ops.backend import is_exporting, takes_triton
from densezoo.ops.depthwise import DepthwiseConv
from densezoo.ops.mbconv import activated_conv, activated_conv_mean, batch_norm_affine
from densezoo.ops.mlp import Mlp
from densezoo.ops.norm import PreNorm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerScale, Sigmoid, SqueezeExcite
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


@dataclass(frozen=True)
class Style:
    """Where Google's MaxViT and timm's own differ.

    Attributes:
        conv_act: Activation of the convolutions.
        conv_norm_eps: Epsilon of the BatchNorms.
        conv_bias: Whether the stem and the last convolution of an MBConv have biases.
        same_padding: Whether strided convolutions are padded as TensorFlow does; else by 1 on all sides.
        expand_output: Whether an MBConv is 4 times as wide as its output; else as its input.
        mlp_act: Activation of the MLPs.
        norm_eps: Epsilon of the LayerNorms.
        heads_first: Whether timm's files have the qkv projection's channels in the order head, then query, key, value.
    """

    conv_act: Callable[[], nn.Module]
    conv_norm_eps: float
    conv_bias: bool
    same_padding: bool
    expand_output: bool
    mlp_act: Callable[[], nn.Module]
    norm_eps: float
    heads_first: bool


_tanh_gelu = partial(nn.GELU, approximate="tanh")
STYLES = dict(
    tf=Style(
        conv_act=_tanh_gelu,
        conv_norm_eps=1e-3,
        conv_bias=True,
        same_padding=True,
        expand_output=True,
        mlp_act=_tanh_gelu,
        norm_eps=1e-5,
        heads_first=False,
    ),
    rw=Style(
        conv_act=nn.SiLU,
        conv_norm_eps=1e-5,
        conv_bias=False,
        same_padding=False,
        expand_output=False,
        mlp_act=nn.GELU,
        norm_eps=1e-6,
        heads_first=True,
    ),
)


class SameConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 2, zero-padded as in TensorFlow: on even sides only at the bottom or right."""

    def __init__(self, in_chans: int, out_chans: int, groups: int = 1, bias: bool = True):
        super().__init__(in_chans, out_chans, 3, stride=2, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, in_chans, H, W) to (B, out_chans, ceil(H / 2), ceil(W / 2))."""
        if is_exporting():
            # The same from the other end, where padding does not depend on the size: remainders of free sizes pile up.
            x = F.conv2d(x.flip(2, 3), self.weight.flip(2, 3), self.bias, 2, padding=1, groups=self.groups)
            return x.flip(2, 3)
        return super().forward(F.pad(x, self.pads(*x.shape[2:])))

    @staticmethod
    def pads(height: int | torch.SymInt, width: int | torch.SymInt) -> tuple[int | torch.SymInt, ...]:
        """Return the zeros before and after columns, and before and after rows."""
        return width % 2, 1, height % 2, 1


def conv3x3(in_chans: int, out_chans: int, stride: int, style: Style, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """Return a 3x3 convolution, padded to ceil(size / stride) in the manner of `style`."""
    if stride == 2 and style.same_padding:
        return SameConv2d(in_chans, out_chans, groups=groups, bias=bias)
    return nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, groups=groups, bias=bias)


class MapConv(DepthwiseConv):
    """DepthwiseConv over (B, dim, H, W), which lies in memory as (B, H, W, dim)."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a map of the shape of `input`."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HalvingPool(nn.Module):
    """Average the 2x2 patches of (B, C, H, W); a patch that reaches over the border averages what is inside."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ceil(H / 2), ceil(W / 2))."""
        if not is_exporting():
            return F.avg_pool2d(x, 2, ceil_mode=True)

        def patch_sums(x: Tensor) -> Tensor:
            weight = x.new_ones(x.shape[1], 1, 2, 2)
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2, groups=x.shape[1])

        # Pooling itself would fix the exported sizes.
        return patch_sums(x) / patch_sums(x.new_ones(1, 1, *x.shape[2:]))


class Stem(nn.Module):
    """Take images (B, in_chans, H, W) to a map (B, ceil(H / 2), ceil(W / 2), widths[1]) by two convolutions."""

    def __init__(self, in_chans: int, widths: Sequence[int], style: Style):
        super().__init__()
        self.conv1 = conv3x3(in_chans, widths[0], 2, style, bias=style.conv_bias)
        self.norm1 = nn.BatchNorm2d(widths[0], eps=style.conv_norm_eps)
        self.act = style.conv_act()
        self.conv2 = conv3x3(widths[0], widths[1], 1, style, bias=style.conv_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        x = x.permute(0, 2, 3, 1)
        pads = self.conv1.pads(*x.shape[1:3]) if isinstance(self.conv1, SameConv2d) else None
        x = convolve(self.conv1, x, pads).permute(0, 3, 1, 2)
        return self.conv2(self.act(self.norm1(x))).permute(0, 2, 3, 1)


class MBConv(nn.Module):
    """Inverted bottleneck over a map (B, H, W, dim): 1x1, depthwise 3x3 and 1x1 convolutions, squeezed and excited.

    A stride of 2 halves the sides, rounded up.
    """

    def __init__(self, dim: int, out_dim: int, stride: int, style: Style, drop_path: float):
        super().__init__()
        mid = 4 * (out_dim if style.expand_output else dim)
        self.shortcut = nn.Sequential()
        if stride == 2:
            self.shortcut.add_module("pool", HalvingPool())
        if dim != out_dim:
            self.shortcut.add_module("expand", nn.Conv2d(dim, out_dim, 1, bias=style.conv_bias))
        self.pre_norm = nn.BatchNorm2d(dim, eps=style.conv_norm_eps)
        self.conv1_1x1 = nn.Conv2d(dim, mid, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(mid, eps=style.conv_norm_eps)
        self.conv2_kxk = MapConv(mid, bias=False) if stride == 1 else conv3x3(mid, mid, stride, style, groups=mid)
        self.norm2 = nn.BatchNorm2d(mid, eps=style.conv_norm_eps)
        self.act = style.conv_act()
        self.se = SqueezeExcite(mid, rd_channels=mid // 16, act_layer=nn.SiLU)
        self.conv3_1x1 = nn.Conv2d(mid, out_dim, 1, bias=style.conv_bias)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, ceil(H / stride), ceil(W / stride), out_dim)."""
        if self._takes_kernels(x):
            return self._forward_tokens(x)
        x = x.permute(0, 3, 1, 2)
        y = self.act(self.norm1(self.conv1_1x1(self.pre_norm(x))))
        y = self.se(self.act(self.norm2(self.conv2_kxk(y))))
        return (self.shortcut(x) + self.drop_path(self.conv3_1x1(y))).permute(0, 2, 3, 1)

    def _takes_kernels(self, x: Tensor) -> bool:
        """Return whether kernels can stand for the layers: these are neither replaced nor hooked."""
        norms = (self.pre_norm, self.norm1, self.norm2)
        convs = (self.conv1_1x1, self.conv3_1x1, self.se.fc1, self.se.fc2)
        kinds = {norm: nn.BatchNorm2d for norm in norms} | {conv: nn.Conv2d for conv in convs}
        kinds |= {self.conv2_kxk: (MapConv, SameConv2d, nn.Conv2d), self.act: (nn.GELU, nn.SiLU)}
        kinds |= {self.se: SqueezeExcite, self.se.act: nn.SiLU, self.se.gate: Sigmoid}
        if hasattr(self.shortcut, "expand"):
            kinds[self.shortcut.expand] = nn.Conv2d
        are_plain = all(
            type(module) in (kind if isinstance(kind, tuple) else (kind,))
            and not (module._forward_hooks or module._forward_pre_hooks)
            for module, kind in kinds.items()
        )
        fit = all(norm.running_mean is not None and norm.momentum is not None for norm in norms)
        return are_plain and fit and x.dtype != torch.float64 and takes_triton("activated_conv", x)

    def _forward_tokens(self, x: Tensor) -> Tensor:
        """Compute `forward` on tokens (B, H * W, dim): torch.compile would store maps with their rows innermost."""
        sides, conv = x.shape[1:3], self.conv2_kxk
        stride = conv.stride[0]
        padding = tuple(side % 2 for side in sides) if isinstance(conv, SameConv2d) else (1, 1)
        options = dict(stride=stride, padding=padding, act="silu" if isinstance(self.act, nn.SiLU) else "gelu_tanh")
        # Of a map laid out otherwise than its gradient, PyTorch's BatchNorm gives wrong gradients on a CPU.
        tokens = x.flatten(1, 2).contiguous()
        expand, weight = self.conv1_1x1.weight.flatten(1), conv.weight
        if torch.is_grad_enabled() or self.pre_norm.training or self.norm1.training or self.norm2.training:
            y = F.linear(_normalise(self.pre_norm, tokens), expand)
            y = activated_conv(y.unflatten(1, sides), *batch_norm_affine(self.norm1, y), weight, **options)
            out_sides = y.shape[1:3]
            y = self.act(_normalise(self.norm2, y.flatten(1, 2)))
            mean = y.mean(1)
        else:
            # The norm before a convolution is part of it, and of what the next norm adds.
            (scale, shift), (scale1, shift1), (scale2, shift2) = (
                batch_norm_affine(norm, tokens) for norm in (self.pre_norm, self.norm1, self.norm2)
            )
            shift1 = shift1 + scale1 * (expand * shift).sum(1)
            y = F.linear(tokens, expand * scale).unflatten(1, sides)
            y, mean = activated_conv_mean(y, scale1, shift1, weight * scale2[:, None, None, None], shift2, **options)
            out_sides, y = y.shape[1:3], y.flatten(1, 2)
        gate = self.se.gate(_pointwise(self.se.fc2, self.se.act(_pointwise(self.se.fc1, mean))))
        if y.shape[1] > self.conv3_1x1.out_channels:
            # The gate goes into the weights, of which there are fewer numbers than in the map.
            weight = (self.conv3_1x1.weight.flatten(1) * gate[:, None]).to(y.dtype)
            y = y @ weight.mT
            y = y if self.conv3_1x1.bias is None else y + self.conv3_1x1.bias.to(y.dtype)
        else:
            y = _pointwise(self.conv3_1x1, y * gate[:, None])
        if stride == 2:
            tokens = self.shortcut.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        if hasattr(self.shortcut, "expand"):
            tokens = _pointwise(self.shortcut.expand, tokens)
        return (tokens + self.drop_path(y)).unflatten(1, out_sides)


def _pointwise(conv: nn.Conv2d, tokens: Tensor) -> Tensor:
    """Apply a 1x1 convolution to tokens (..., C)."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


def _normalise(norm: nn.BatchNorm2d, tokens: Tensor) -> Tensor:
    """Apply a BatchNorm to tokens (B, N, C)."""
    return norm(tokens.mT.unsqueeze(-1)).squeeze(-1).mT


class RelPosBias(nn.Module):
    """A relative position bias learned entry by entry: (num_heads, 2 * window_size - 1, 2 * window_size - 1)."""

    def __init__(self, window_size: int, num_heads: int):
        super().__init__()
        side = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_heads, side, side))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self) -> Tensor:
        """Return the table, which goes by key - query."""
        return self.relative_position_bias_table


class RelPosMlp(nn.Module):
    """A relative position bias computed by an MLP from the logarithms of the offsets (arXiv 2111.09883)."""

    def __init__(self, window_size: int, num_heads: int):
        super().__init__()
        self.window_size = window_size
        self.mlp = timm.layers.Mlp(2, 512, num_heads, act_layer=nn.ReLU, drop=(0.125, 0.0))

    def forward(self) -> Tensor:
        """Return a table (num_heads, 2 * window_size - 1, 2 * window_size - 1), which goes by key - query."""
        weight = self.mlp.fc1.weight
        # The MLP takes offsets of query from key.
        offset = torch.arange(self.window_size - 1, -self.window_size, -1, device=weight.device, dtype=weight.dtype)
        offset = offset.sign() * offset.abs().log1p()
        return self.mlp(torch.stack(torch.meshgrid(offset, offset, indexing="ij"), dim=-1)).permute(2, 0, 1)


class Attention(nn.Module):
    """Multi-head attention within the windows or the grids of a map (B, H, W, dim), with relative position bias."""

    def __init__(self, dim: int, num_heads: int, window_size: int, grid: bool, rel_pos: nn.Module):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.grid = grid
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rel_pos = rel_pos
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        x = window_attention(
            self.qkv(x), self.rel_pos(), num_heads=self.num_heads, window_size=self.window_size, grid=self.grid
        )
        return self.proj(x)


class AttentionLayer(nn.Module):
    """Pre-norm attention and MLP over a map (B, H, W, dim), with stochastic depth and, where given, layer scale."""

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, style: Style, layer_scale: float | None, drop_path: float
    ):
        super().__init__()
        self.norm1 = PreNorm(dim, eps=style.norm_eps)
        self.attn = attn
        self.norm2 = PreNorm(dim, eps=style.norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=style.mlp_act)
        self.ls1, self.ls2 = (
            nn.Identity() if layer_scale is None else LayerScale(dim, init_values=layer_scale) for _ in range(2)
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Block(nn.Module):
    """An MBConv, attention within windows and attention within grids."""

    def __init__(self, conv: nn.Module, attn_block: nn.Module, attn_grid: nn.Module):
        super().__init__()
        self.conv = conv
        self.attn_block = attn_block
        self.attn_grid = attn_grid

    def forward(self, x: Tensor) -> Tensor:
        """Take a map (B, H, W, dim) to the convolution's size and width."""
        return self.attn_grid(self.attn_block(self.conv(x)))


class MaxViT(StagedBackbone):
    """MaxViT: a stem and stages at strides 4, 8, 16 and 32 of convolution, window attention and grid attention.

    Images of any size: sides are rounded up at each stage, and windows and grids hold what is inside the map.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none. With `pre_logits` one that keeps the width.
        embed_dim: Width of the first stage; each next one is twice as wide.
        stem_widths: Widths of the stem's two convolutions.
        depths: Blocks per stage.
        num_heads: Attention heads per stage.
        mlp_ratio: Hidden width of the MLPs over the stage's width.
        window_size: Side of the windows and of the grids, in positions.
        img_size: Image side of which the window is 1/32, in place of `window_size`, as in timm.
        style: `tf` for the published details, `rw` for those of timm's own models; see `STYLES`.
        rel_pos: `table` or `mlp`: how the relative position bias is parametrised.
        layer_scale: Initial layer scale of the attention layers; None for none.
        pre_logits: Whether pooling is followed by norm, Linear and tanh; else a norm comes before it.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output; where given, the model has no final norm and no classifier.

    Raises:
        ValueError: `num_heads`, `img_size`, `style`, `rel_pos`, `global_pool` or `out_norms` does not fit the others.
    """

    position_tables = ("rel_pos",)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        stem_widths: Sequence[int] = (64, 64),
        depths: Sequence[int] = (2, 2, 5, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        window_size: int = 7,
        img_size: int | None = None,
        style: str = "tf",
        rel_pos: str = "table",
        layer_scale: float | None = None,
        pre_logits: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__()
        check_per_stage(depths, num_heads=num_heads)
        for name, value, valid in (("style", style, STYLES), ("rel_pos", rel_pos, ("table", "mlp"))):
            if value not in valid:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(valid)}")
        if img_size is not None:
            window_size = square_side(img_size) // 32
        self.style = STYLES[style]
        self.patch_embed = Stem(in_chans, stem_widths, self.style)
        self.stages = nn.ModuleList()
        self.feature_info = []
        dim = stem_widths[1]
        for i, rates in enumerate(spread_drop_path(drop_path_rate, depths)):
            out_dim, heads = embed_dim * 2**i, num_heads[i]
            if out_dim % heads:
                raise ValueError(f"num_heads: got {heads} for stage {i}, expected a divisor of its width {out_dim}")
            blocks = Blocks()
            for j, rate in enumerate(rates):
                layers = (
                    AttentionLayer(
                        out_dim,
                        Attention(
                            out_dim,
                            heads,
                            window_size,
                            grid,
                            (RelPosBias if rel_pos == "table" else RelPosMlp)(window_size, heads),
                        ),
                        mlp_ratio,
                        self.style,
                        layer_scale,
                        rate,
                    )
                    for grid in (False, True)
                )
                blocks.append(Block(MBConv(dim, out_dim, 1 if j else 2, self.style, rate), *layers))
                dim = out_dim
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks)))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate, out_norms, self.style.norm_eps, pool_first=pre_logits)
        if pre_logits and not out_norms:
            self.norm = nn.Sequential(OrderedDict(norm=self.norm, fc=nn.Linear(dim, dim), act=nn.Tanh()))

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Run stage `i` on the output of the one before it (of the stem for the first)."""
        return self.stages[i](x)

    def keep_stages(self, count: int) -> None:
        """Drop the stages after the first `count`."""
        del self.stages[count:]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per stage, or per block."""
        blocks = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^patch_embed", blocks=r"^stages\.(\d+)" if coarse else blocks)


def init_weights(module: nn.Module) -> None:
    """Initialise one module as timm does: convolutions normal by fan-out, Linear Xavier uniform, zero bias."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


_RENAMED = {
    r"^stem\.": "patch_embed.",
    r"^head\.norm\.": "norm.norm.",
    r"^head\.pre_logits\.fc\.": "norm.fc.",
    r"^head\.fc\.": "head.",
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert timm's state dict to the keys and shapes of `model`; one of the zoo's own stays as it is.

    Bias tables of another window size are resized bicubically.
    """
    heads_first = model.style.heads_first and any(name.startswith("stem.") for name in state_dict)
    converted, own = rename_keys(state_dict, _RENAMED), model.state_dict()
    for name in converted.keys() & own.keys():
        value = converted[name]
        if ".attn.qkv." in name and heads_first:
            heads = model.get_submodule(name[: name.index(".qkv.")]).num_heads
            value = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        elif name.endswith(".relative_position_bias_table"):
            if value.ndim == 2:
                # A row an offset from key to query: the offsets from query to key, read backwards.
                side = math.isqrt(len(value))
                value = value.flip(0).mT.unflatten(1, (side, side))
            value = resize_bias(value, own[name].shape[1:])
        converted[name] = value
    return converted


_TINY = dict(embed_dim=64, depths=(2, 2, 5, 2), num_heads=(2, 4, 8, 16))
_SMALL = dict(embed_dim=96, depths=(2, 2, 5, 2), num_heads=(3, 6, 12, 24))
_BASE = dict(_SMALL, depths=(2, 6, 14, 2))
_LARGE = dict(embed_dim=128, stem_widths=(128, 128), depths=(2, 6, 14, 2), num_heads=(4, 8, 16, 32))
_XLARGE = dict(embed_dim=192, stem_widths=(192, 192), depths=(2, 6, 14, 2), num_heads=(6, 12, 24, 48))

_RW = dict(stem_widths=(32, 64), style="rw", pre_logits=False)
_PICO_RW = _RW | dict(embed_dim=32, stem_widths=(24, 32), depths=(2, 2, 5, 2), num_heads=(1, 2, 4, 8))
_NANO_RW = _RW | dict(_TINY, depths=(1, 2, 3, 1))
_TINY_RW = _RW | _TINY
_SMALL_RMLP = _RW | dict(_SMALL, rel_pos="mlp", layer_scale=1e-6)
_BASE_RMLP = _RW | dict(_BASE, rel_pos="mlp", pre_logits=True)

VARIANTS: dict[str, dict] = {
    f"densezoo_maxvit_{size}_tf_{side}": dict(arch, window_size=side // 32)
    for size, arch in dict(tiny=_TINY, small=_SMALL, base=_BASE, large=_LARGE, xlarge=_XLARGE).items()
    for side in (224, 384, 512)
} | {
    "densezoo_maxvit_pico_rw_256": dict(_PICO_RW, window_size=8),
    "densezoo_maxvit_nano_rw_256": dict(_NANO_RW, window_size=8),
    "densezoo_maxvit_tiny_rw_224": dict(_TINY_RW, window_size=7),
    "densezoo_maxvit_tiny_rw_256": dict(_TINY_RW, window_size=8),
    "densezoo_maxvit_rmlp_pico_rw_256": dict(_PICO_RW, window_size=8, rel_pos="mlp"),
    "densezoo_maxvit_rmlp_nano_rw_256": dict(_NANO_RW, window_size=8, rel_pos="mlp"),
    "densezoo_maxvit_rmlp_tiny_rw_256": dict(_TINY_RW, window_size=8, rel_pos="mlp"),
    "densezoo_maxvit_rmlp_small_rw_224": dict(_SMALL_RMLP, window_size=7),
    "densezoo_maxvit_rmlp_small_rw_256": dict(_SMALL_RMLP, window_size=8),
    "densezoo_maxvit_rmlp_base_rw_224": dict(_BASE_RMLP, window_size=7),
    "densezoo_maxvit_rmlp_base_rw_384": dict(_BASE_RMLP, window_size=12),
}


def _cfg(side: int, **kwargs) -> dict:
    cfg = dict(
        url="",
        license="apache-2.0",
        num_classes=1000,
        input_size=(3, side, side),
        pool_size=(side // 32, side // 32),
        crop_pct=0.95 if side < 384 else 1.0,
        crop_mode="center" if side < 384 else "squash",
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        first_conv="patch_embed.conv1",
        classifier="head",
    )
    return cfg | kwargs


_IMAGENET = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)

# timm's name of the published weights, and where they differ from `_cfg`.
_WEIGHTS = {
    **{f"maxvit_{size}_tf_224.in1k": _IMAGENET for size in ("tiny", "small", "base", "large")},
    **{f"maxvit_{size}_tf_{side}.in1k": {} for size in ("tiny", "small", "base", "large") for side in (384, 512)},
    **{f"maxvit_{size}_tf_224.in21k": dict(num_classes=21843) for size in ("base", "large", "xlarge")},
    **{f"maxvit_{size}_tf_{side}.in21k_ft_in1k": {} for size in ("base", "large", "xlarge") for side in (384, 512)},
    "maxvit_nano_rw_256.sw_in1k": {},
    "maxvit_tiny_rw_224.sw_in1k": {},
    "maxvit_rmlp_pico_rw_256.sw_in1k": {},
    "maxvit_rmlp_nano_rw_256.sw_in1k": {},
    "maxvit_rmlp_tiny_rw_256.sw_in1k": {},
    "maxvit_rmlp_small_rw_224.sw_in1k": dict(crop_pct=0.9),
    "maxvit_rmlp_base_rw_224.sw_in12k_ft_in1k": {},
    "maxvit_rmlp_base_rw_384.sw_in12k_ft_in1k": {},
    "maxvit_rmlp_base_rw_224.sw_in12k": dict(num_classes=11821),
}
_UNTRAINED = ("maxvit_pico_rw_256", "maxvit_tiny_rw_256", "maxvit_rmlp_small_rw_256")

default_cfgs = generate_default_cfgs(
    {
        f"densezoo_{name}": _cfg(int(name.partition(".")[0][-3:]), hf_hub_id=f"timm/{name}", **kwargs)
        for name, kwargs in _WEIGHTS.items()
    }
    | {f"densezoo_{name}": _cfg(int(name[-3:])) for name in _UNTRAINED}
)


def _create(variant: str, pretrained: bool, **kwargs) -> MaxViT:
    kwargs = VARIANTS[variant] | kwargs
    return build_model_with_cfg(
        MaxViT,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter(checkpoint_filter_fn),
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["depths"]))), feature_cls="getter"),
        **kwargs,
    )


@register_model
def densezoo_maxvit_tiny_tf_224(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Tiny, ImageNet-1k at 224x224."""
    return _create("densezoo_maxvit_tiny_tf_224", pretrained, **kwargs)


@register_model
def densezoo_maxvit_tiny_tf_384(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Tiny, ImageNet-1k at 384x384."""
    return _create("densezoo_maxvit_tiny_tf_384", pretrained, **kwargs)


@register_model
def densezoo_maxvit_tiny_tf_512(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Tiny, ImageNet-1k at 512x512."""
    return _create("densezoo_maxvit_tiny_tf_512", pretrained, **kwargs)


@register_model
def densezoo_maxvit_small_tf_224(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Small, ImageNet-1k at 224x224."""
    return _create("densezoo_maxvit_small_tf_224", pretrained, **kwargs)


@register_model
def densezoo_maxvit_small_tf_384(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Small, ImageNet-1k at 384x384."""
    return _create("densezoo_maxvit_small_tf_384", pretrained, **kwargs)


@register_model
def densezoo_maxvit_small_tf_512(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Small, ImageNet-1k at 512x512."""
    return _create("densezoo_maxvit_small_tf_512", pretrained, **kwargs)


@register_model
def densezoo_maxvit_base_tf_224(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Base, ImageNet-1k or ImageNet-21k at 224x224."""
    return _create("densezoo_maxvit_base_tf_224", pretrained, **kwargs)


@register_model
def densezoo_maxvit_base_tf_384(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Base, ImageNet-1k, or ImageNet-21k then 1k, at 384x384."""
    return _create("densezoo_maxvit_base_tf_384", pretrained, **kwargs)


@register_model
def densezoo_maxvit_base_tf_512(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Base, ImageNet-1k, or ImageNet-21k then 1k, at 512x512."""
    return _create("densezoo_maxvit_base_tf_512", pretrained, **kwargs)


@register_model
def densezoo_maxvit_large_tf_224(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Large, ImageNet-1k or ImageNet-21k at 224x224."""
    return _create("densezoo_maxvit_large_tf_224", pretrained, **kwargs)


@register_model
def densezoo_maxvit_large_tf_384(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Large, ImageNet-1k, or ImageNet-21k then 1k, at 384x384."""
    return _create("densezoo_maxvit_large_tf_384", pretrained, **kwargs)


@register_model
def densezoo_maxvit_large_tf_512(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Large, ImageNet-1k, or ImageNet-21k then 1k, at 512x512."""
    return _create("densezoo_maxvit_large_tf_512", pretrained, **kwargs)


@register_model
def densezoo_maxvit_xlarge_tf_224(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-XLarge, ImageNet-21k at 224x224."""
    return _create("densezoo_maxvit_xlarge_tf_224", pretrained, **kwargs)


@register_model
def densezoo_maxvit_xlarge_tf_384(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-XLarge, ImageNet-21k then 1k at 384x384."""
    return _create("densezoo_maxvit_xlarge_tf_384", pretrained, **kwargs)


@register_model
def densezoo_maxvit_xlarge_tf_512(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-XLarge, ImageNet-21k then 1k at 512x512."""
    return _create("densezoo_maxvit_xlarge_tf_512", pretrained, **kwargs)


@register_model
def densezoo_maxvit_pico_rw_256(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Pico as timm has it, without weights, for 256x256."""
    return _create("densezoo_maxvit_pico_rw_256", pretrained, **kwargs)


@register_model
def densezoo_maxvit_nano_rw_256(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Nano as timm has it, ImageNet-1k at 256x256."""
    return _create("densezoo_maxvit_nano_rw_256", pretrained, **kwargs)


@register_model
def densezoo_maxvit_tiny_rw_224(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Tiny as timm has it, ImageNet-1k at 224x224."""
    return _create("densezoo_maxvit_tiny_rw_224", pretrained, **kwargs)


@register_model
def densezoo_maxvit_tiny_rw_256(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Tiny as timm has it, without weights, for 256x256."""
    return _create("densezoo_maxvit_tiny_rw_256", pretrained, **kwargs)


@register_model
def densezoo_maxvit_rmlp_pico_rw_256(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Pico as timm has it with biases from an MLP, ImageNet-1k at 256x256."""
    return _create("densezoo_maxvit_rmlp_pico_rw_256", pretrained, **kwargs)


@register_model
def densezoo_maxvit_rmlp_nano_rw_256(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Nano as timm has it with biases from an MLP, ImageNet-1k at 256x256."""
    return _create("densezoo_maxvit_rmlp_nano_rw_256", pretrained, **kwargs)


@register_model
def densezoo_maxvit_rmlp_tiny_rw_256(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Tiny as timm has it with biases from an MLP, ImageNet-1k at 256x256."""
    return _create("densezoo_maxvit_rmlp_tiny_rw_256", pretrained, **kwargs)


@register_model
def densezoo_maxvit_rmlp_small_rw_224(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Small as timm has it with biases from an MLP, ImageNet-1k at 224x224."""
    return _create("densezoo_maxvit_rmlp_small_rw_224", pretrained, **kwargs)


@register_model
def densezoo_maxvit_rmlp_small_rw_256(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Small as timm has it with biases from an MLP, without weights, for 256x256."""
    return _create("densezoo_maxvit_rmlp_small_rw_256", pretrained, **kwargs)


@register_model
def densezoo_maxvit_rmlp_base_rw_224(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Base as timm has it with biases from an MLP, ImageNet-12k, or then 1k, at 224x224."""
    return _create("densezoo_maxvit_rmlp_base_rw_224", pretrained, **kwargs)


@register_model
def densezoo_maxvit_rmlp_base_rw_384(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-Base as timm has it with biases from an MLP, ImageNet-12k then 1k at 384x384."""
    return _create("densezoo_maxvit_rmlp_base_rw_384", pretrained, **kwargs)
