"""Agent Attention in DeiT, PVT, Swin and CSwin (arXiv 2312.08874).

Code and weights were published at github.com/LeapLabTHU/Agent-Attention, which states no licence of its own; its Swin
and CSwin files build on MIT-licensed ones, its dense ones are Apache-2.0. Parameter names are those of the published
checkpoints.

The published classifiers run at their trained size alone. Here maps of any size work, as in the published dense models:
tables of positions are resized, which changes nothing at the trained size. Those models also pool more agents than the
classifiers that they start from: `agent_sizes` says how many.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from densezoo.backbones.cswin import CSwin
from densezoo.backbones.dinat_s import PatchEmbed
from densezoo.backbones.nat import spread_drop_path
from densezoo.backbones.pvt import NORM_EPS, PVT, Block
from densezoo.backbones.staged import (
    StagedBackbone,
    check_per_stage,
    init_weights,
    pretrained_filter,
    resize_table,
    resize_tokens,
    square_side,
)
from densezoo.backbones.swin import Swin, resize_bias_table
from densezoo.ops import agent_attention
from densezoo.ops.backend import is_exporting
from densezoo.ops.depthwise import DepthwiseConv
from densezoo.ops.mlp import Mlp
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import global_pool_nlc
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

AGENT_NUMS = (9, 16, 49, 49)
AGENT_BIASES = ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias")


class AgentBase(nn.Module):
    """What agent attention is in every host: agents pooled from the queries, and six tables of position biases.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        map_size: Side of the map that the tables are made for.
        agent_num: Agents that the tables are made for, a square number.
        agent_size: Side of the square that agents are pooled to; sqrt(agent_num) by default. The tables are resized
            bilinearly to another one, as they are to maps of another size.
    """

    def __init__(self, dim: int, num_heads: int, map_size: int, agent_num: int, agent_size: int | None = None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of dim {dim}")
        if math.isqrt(agent_num) ** 2 != agent_num:
            raise ValueError(f"agent_nums: got {agent_num}, expected square numbers")
        self.num_heads = num_heads
        self.agent_num = agent_num
        self.agent_size = agent_size or math.isqrt(agent_num)
        for name, shape in dict(
            an_bias=(num_heads, agent_num, 7, 7),
            na_bias=(num_heads, agent_num, 7, 7),
            ah_bias=(1, num_heads, agent_num, map_size, 1),
            aw_bias=(1, num_heads, agent_num, 1, map_size),
            ha_bias=(1, num_heads, map_size, 1, agent_num),
            wa_bias=(1, num_heads, 1, map_size, agent_num),
        ).items():
            setattr(self, name, nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AgentBase":
        # `.to(memory_format=torch.channels_last)` takes no tensor of five axes, which published tables have.
        return super()._apply(lambda t: fn(t[0])[None] if t.dim() == 5 else fn(t), recurse)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend over a map: (B, H, W, dim) each, with the heads together, to the same."""
        size = query.shape[1:3]
        agent = pool_map(query, self.agent_size)
        return self.attend_tokens(*(x.flatten(1, 2) for x in (query, key, value, agent)), *size).unflatten(1, size)

    def attend_tokens(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        agent: Tensor,
        height: int | torch.SymInt,
        width: int | torch.SymInt,
    ) -> Tensor:
        """Attend over tokens (B, N, dim) of a map, through agents (B, agents, dim)."""
        aggregation_bias, broadcast_bias = self.position_biases(height, width)
        heads = (x.unflatten(-1, (self.num_heads, -1)) for x in (query, key, value, agent))
        return agent_attention(*heads, aggregation_bias=aggregation_bias, broadcast_bias=broadcast_bias).flatten(2)

    def position_biases(self, height: int | torch.SymInt, width: int | torch.SymInt) -> tuple[Tensor, Tensor]:
        """Return the biases (heads, agents, height * width) and (heads, height * width, agents) of a map."""
        rows, columns = (table[0].movedim(-1, 1) for table in (self.ha_bias, self.wa_bias))
        # Those of both steps together: (2, heads, agents, 7, 7), (2, heads, agents, side, 1), (..., 1, side)
        tables = (self.an_bias, self.na_bias), (self.ah_bias[0], rows), (self.aw_bias[0], columns)
        sizes = {3: height, 4: width}, {3: height}, {4: width}
        table, rows, columns = (
            resize_table(self._resize_agents(torch.stack(pair)), size) for pair, size in zip(tables, sizes, strict=True)
        )
        aggregation, broadcast = (table + rows + columns).flatten(3).unbind()
        return aggregation, broadcast.mT

    def _resize_agents(self, table: Tensor) -> Tensor:
        """Resize the third axis of (2, heads, agents, rows, columns), a square of agents, to `agent_size`."""
        side, size = math.isqrt(self.agent_num), self.agent_size
        if side == size:
            return table
        return resize_table(table.unflatten(2, (side, side)), {2: size, 3: size}).flatten(2, 3)


def pool_map(x: Tensor, size: int) -> Tensor:
    """Average a map (B, H, W, C) over (size, size) bins that may overlap, as adaptive average pooling does.

    It is two matrix products, whose gradients are deterministic on a GPU; those of torch's operator are not.
    """
    rows, columns = (_bins(side, size, x) for side in x.shape[1:3])
    if is_exporting():
        # Channels first: broadcasting over rows asks whether a batch of one divides them, which bounds their number.
        return (rows @ x.permute(0, 3, 1, 2) @ columns.mT).permute(0, 2, 3, 1)
    x = columns @ x
    return (rows @ x.flatten(2)).unflatten(-1, x.shape[2:])


def _bins(side: int | torch.SymInt, size: int, like: Tensor) -> Tensor:
    """Return the weight of each of `side` positions in each of `size` bins, (size, side)."""
    i = torch.arange(size, device=like.device)[:, None]
    start, stop = i * side // size, ((i + 1) * side + size - 1) // size
    position = torch.arange(side, device=like.device)
    inside = (position >= start) & (position < stop)
    return inside.to(like.dtype) / (stop - start)


class AgentAttention(AgentBase):
    """Agent attention of Swin and PVT (`fused` False) over a map (B, H, W, dim), with a convolution of the values."""

    def __init__(
        self, dim: int, num_heads: int, map_size: int, agent_num: int, agent_size: int | None, fused: bool = True
    ):
        super().__init__(dim, num_heads, map_size, agent_num, agent_size)
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q = nn.Linear(dim, dim)
            self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dwc = DepthwiseConv(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        # As tokens: torch.compile would store a map that two layers take as it likes convolutions to, rows innermost.
        sides, x = x.shape[1:3], x.flatten(1, 2)
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), *self.kv(x).chunk(2, -1))
        q, k, v = (part.unflatten(1, sides) for part in parts)
        return self.proj(self.attend(q, k, v) + self.dwc(v))


class CSwinAgentAttention(AgentBase):
    """Agent attention of CSwin: takes a projected map (B, H, W, 3 * dim) to (B, H, W, dim)."""

    def __init__(self, dim: int, num_heads: int, map_size: int, agent_num: int, agent_size: int | None):
        super().__init__(dim, num_heads, map_size, agent_num, agent_size)
        self.get_v = DepthwiseConv(dim)

    def forward(self, qkv: Tensor) -> Tensor:
        """Return the map."""
        q, k, v = qkv.chunk(3, -1)
        return self.attend(q, k, v) + self.get_v(v)


class DeiTAgentAttention(AgentBase):
    """Agent attention of DeiT over a class token and a map, (B, 1 + H * W, dim).

    The class token takes part as query and as key, with biases of its own; agents and convolution see the map alone.
    """

    def __init__(self, dim: int, num_heads: int, map_size: int, agent_num: int):
        super().__init__(dim, num_heads, map_size, agent_num)
        self.ac_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_heads, agent_num, 1), std=0.02))
        self.ca_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_heads, 1, agent_num), std=0.02))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dwc = DepthwiseConv(dim)

    def forward(self, x: Tensor, height: int | torch.SymInt, width: int | torch.SymInt) -> Tensor:
        """Return tokens of the shape of `x`."""
        q, k, v = self.qkv(x).chunk(3, -1)
        query_map, value_map = (t[:, 1:].unflatten(1, (height, width)) for t in (q, v))
        x = self.attend_tokens(q, k, v, pool_map(query_map, self.agent_size).flatten(1, 2), height, width)
        return self.proj(x + F.pad(self.dwc(value_map).flatten(1, 2), (0, 0, 1, 0)))

    def position_biases(self, height: int | torch.SymInt, width: int | torch.SymInt) -> tuple[Tensor, Tensor]:
        """Return the biases (heads, agents, 1 + height * width) and (heads, 1 + height * width, agents)."""
        aggregation, broadcast = super().position_biases(height, width)
        return torch.cat((self.ac_bias[0], aggregation), 2), torch.cat((self.ca_bias[0], broadcast), 1)


class SoftmaxAttention(nn.Module):
    """Multi-head attention of DeiT over tokens (B, N, dim)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, height: int | torch.SymInt, width: int | torch.SymInt) -> Tensor:
        """Return tokens of the shape of `x`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TokenPool(nn.Module):
    """Pool tokens (B, 1 + N, C) as timm's name says: the class token, or over the others; '' leaves them."""

    def __init__(self, pool_type: str):
        super().__init__()
        if pool_type not in ("token", "avg", "max", "avgmax", ""):
            raise ValueError(f"global_pool: got {pool_type!r}, expected 'token', 'avg', 'max', 'avgmax' or ''")
        self.pool_type = pool_type

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C)."""
        return global_pool_nlc(x, self.pool_type, num_prefix_tokens=1)


class AgentDeiT(StagedBackbone):
    """Agent attention in all or the first blocks of DeiT: patches of 16x16, a class token, one width, one stage.

    Images of any size: sides that 16 does not divide are zero-padded at the bottom or right, and the position embedding
    is resized bicubically. `forward_features` returns tokens (B, 1 + H * W, C); the outputs of stages are maps.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: 'token' for the class token, 'avg', 'max' or 'avgmax' over the others, '' for none.
        embed_dim: Width.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over the width.
        agent_num: Agents, a square number.
        agent_depth: Blocks with agent attention, the first ones; the others have softmax attention. All by default.
        img_size: Image side that the position tables are made for.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: (0,) for a norm on the dense output, in place of the final norm and the classifier.

    Raises:
        ValueError: An argument does not fit the others; the message names it.
    """

    position_tables = ("pos_embed", "cls_token")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        agent_num: int = 49,
        agent_depth: int | None = None,
        img_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        super().__init__()
        patch_size = 16
        side = square_side(img_size) // patch_size
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + side * side, embed_dim), std=0.02))
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.patch_embed.norm = nn.Identity()
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(spread_drop_path(drop_path_rate, [depth])[0]):
            if agent_depth is None or i < agent_depth:
                attn = DeiTAgentAttention(embed_dim, num_heads, side, agent_num)
            else:
                attn = SoftmaxAttention(embed_dim, num_heads)
            self.blocks.append(Block(embed_dim, attn, Mlp(embed_dim, int(embed_dim * mlp_ratio)), rate))
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module="blocks")]
        self.apply(init_weights)
        self.build_head(num_classes, global_pool, drop_rate, out_norms, norm_eps=NORM_EPS)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier (0 classes: none) and, where given, the pooling ('' returns the tokens)."""
        pool = TokenPool(self.global_pool.pool_type if global_pool is None else global_pool)
        super().reset_classifier(num_classes, "avg")
        self.global_pool = pool

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Sequence[int | torch.SymInt]]:
        """Take images to the normed tokens (B, 1 + H * W, C) after the last block, and to the map's (H, W)."""
        x = self.patch_embed(x)
        size = x.shape[1:3]
        position = torch.cat((self.pos_embed[:, :1], resize_tokens(self.pos_embed[:, 1:], *size)), 1)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)), 1) + position
        for block in self.blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, *size, use_reentrant=False)
            else:
                x = block(x, *size)
        return x, size

    def forward_features(self, x: Tensor) -> Tensor:
        """Take images (B, in_chans, H, W) to normed tokens (B, 1 + H' * W', C), the class token first."""
        return self.norm_output(0, self.forward_tokens(x)[0])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Tensor | list[Tensor]]:
        """Return the features (tokens) and the map of the only stage; arguments as in `StagedBackbone`."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW' or 'NHWC'")
        feature_take_indices(self.num_stages, indices)
        tokens, size = self.forward_tokens(x)
        out = self.norm_output(0, tokens, final_norm=norm)[:, 1:].unflatten(1, size)
        intermediates = [out.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else out]
        if intermediates_only:
            return {"image_intermediates": intermediates} if output_dict else intermediates
        x = self.norm_output(0, tokens)
        return {"image_features": x, "image_intermediates": intermediates} if output_dict else (x, intermediates)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer groups: one per block."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^(?:cls_token|pos_embed|patch_embed)", blocks=blocks)


class AgentPVT(PVT):
    """Agent attention in every stage of PVT.

    Images of any size from 32x32; rows and columns that the last patch does not reach are left out. The published dense
    models have no norms on their outputs, and pool agents to `DENSE_AGENT_SIZES`.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dims: Width of each stage.
        depths: Blocks per stage.
        num_heads: Attention heads per stage.
        mlp_ratios: Hidden width of the MLPs over the stage's width.
        agent_nums: Agents per stage that the bias tables are made for, square numbers.
        agent_sizes: Side of the square that agents are pooled to, per stage. By default the classifier's,
            sqrt(agent_nums), and with `out_norms` the published dense models'.
        img_size: Image side that the position tables are made for.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output; where given, the model has no classifier.

    Raises:
        ValueError: An argument does not fit the others; the message names it.
    """

    DENSE_AGENT_SIZES = (12, 16, 28, 28)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        agent_nums: Sequence[int] = AGENT_NUMS,
        agent_sizes: Sequence[int] | None = None,
        img_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        sizes = pooled_sizes(depths, agent_nums, agent_sizes, self.DENSE_AGENT_SIZES if out_norms else None)

        def attention(i: int, dim: int, heads: int, side: int) -> nn.Module:
            return AgentAttention(dim, heads, side, agent_nums[i], sizes[i], fused=False)

        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            img_size=img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            out_norms=out_norms,
            attention=attention,
        )


class AgentSwin(Swin):
    """Agent attention in the first blocks of Swin's stages, Swin's windows in the others.

    Images of any size from 32x32: sides are rounded up at each stage, and padded to whole windows inside the attention.
    The published dense models pool agents to `DENSE_AGENT_SIZES`.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dim: Width of the first stage; each next one is twice as wide.
        depths: Blocks per stage.
        num_heads: Attention heads per stage.
        mlp_ratio: Hidden width of the MLPs over the stage's width.
        agent_depths: Blocks with agent attention per stage, the first ones.
        agent_nums: Agents per stage that the bias tables are made for, square numbers.
        agent_sizes: Side of the square that agents are pooled to, per stage. By default the classifier's,
            sqrt(agent_nums), and with `out_norms` the published dense models'.
        window_size: Side of a window.
        img_size: Image side that the position tables are made for.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output; where given, the model has no final norm and no classifier,
            and shifts the windows of every second block, those of the last stage too.

    Raises:
        ValueError: An argument does not fit the others; the message names it.
    """

    DENSE_AGENT_SIZES = (9, 12, 14, 7)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        agent_depths: Sequence[int] = (2, 2, 6, 0),
        agent_nums: Sequence[int] = AGENT_NUMS,
        agent_sizes: Sequence[int] | None = None,
        window_size: int = 7,
        img_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        sizes = pooled_sizes(depths, agent_nums, agent_sizes, self.DENSE_AGENT_SIZES if out_norms else None)
        check_per_stage(depths, agent_depths=agent_depths)

        def attention(i: int, j: int, dim: int, heads: int, side: int) -> nn.Module | None:
            return AgentAttention(dim, heads, side, agent_nums[i], sizes[i]) if j < agent_depths[i] else None

        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            window_size=window_size,
            img_size=img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            out_norms=out_norms,
            attention=attention,
        )
        if out_norms:
            # The published dense recipes decay no agent bias, the classifiers' do.
            self.position_tables += AGENT_BIASES


class AgentCSwin(CSwin):
    """Agent attention in the first two stages of CSwin, then its stripes, then attention over the whole map.

    Images of any size from 32x32. No dense models were published.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for none.
        embed_dim: Width of the first stage; each next one is twice as wide.
        depths: Blocks per stage.
        num_heads: Attention heads per stage.
        mlp_ratio: Hidden width of the MLPs over the stage's width.
        agent_nums: Agents in the first two stages that the bias tables are made for, square numbers.
        agent_sizes: Side of the square that agents are pooled to in those stages; sqrt(agent_nums) by default.
        stripe_width: Width of the stripes of the third stage.
        img_size: Image side that the position tables are made for.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; linear from 0 at the first.
        out_norms: Stages with a norm on their dense output; where given, the model has no final norm and no classifier.

    Raises:
        ValueError: An argument does not fit the others; the message names it.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        agent_nums: Sequence[int] = AGENT_NUMS[:2],
        agent_sizes: Sequence[int] | None = None,
        stripe_width: int = 7,
        img_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: Sequence[int] = (),
    ):
        sizes = pooled_sizes((0, 0), agent_nums, agent_sizes, None)

        def attention(i: int, dim: int, heads: int, side: int) -> nn.Module:
            return CSwinAgentAttention(dim, heads, side, agent_nums[i], sizes[i])

        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            stripe_width=stripe_width,
            img_size=img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            out_norms=out_norms,
            attention=attention,
        )


def pooled_sizes(
    depths: Sequence[int], agent_nums: Sequence[int], agent_sizes: Sequence[int] | None, default: Sequence[int] | None
) -> Sequence[int | None]:
    """Return the side of each stage's square of agents, None for the one that its tables are made for."""
    sizes = (default or (None,) * len(depths))[: len(depths)] if agent_sizes is None else agent_sizes
    check_per_stage(depths, agent_nums=agent_nums, agent_sizes=sizes)
    return sizes


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert a published state dict, classification or dense, to the keys and shapes of `model`.

    The index tables and masks that Swin's files hold are dropped: here they are computed. Tables of positions made for
    another image size are resized as the published code does for fine-tuning: the rows and columns of agent biases
    linearly, others bicubically.
    """
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    converted = {}
    for name, value in state_dict.items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("relative_position_index", "attn_mask"):
            continue
        shape = own.get(name, value.shape)
        if value.shape == shape:
            pass
        elif leaf in ("ah_bias", "aw_bias"):
            value = resize_table(value, {3: shape[3], 4: shape[4]})
        elif leaf in ("ha_bias", "wa_bias"):
            value = resize_table(value, {2: shape[2], 3: shape[3]})
        elif leaf == "pos_embed":
            value = torch.cat((value[:, :1], resize_square(value[:, 1:], shape[1] - 1)), 1)
        elif leaf.startswith("pos_embed"):
            value = resize_square(value, shape[1])
        elif leaf == "relative_position_bias_table":
            value = resize_bias_table(value, shape[0])
        converted[name] = value
    return converted


def resize_square(tokens: Tensor, count: int) -> Tensor:
    """Resize the table of a square map (1, N, C) bicubically to another square map of `count` positions."""
    return resize_tokens(tokens, math.isqrt(count), math.isqrt(count))


_SMALL_DEIT = dict(embed_dim=384, num_heads=6)
_SWIN_SMALL = dict(depths=(2, 2, 18, 2), agent_depths=(2, 2, 0, 0))
_SWIN_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), agent_depths=(2, 2, 2, 0))
_CSWIN_BASE = dict(embed_dim=96, depths=(3, 6, 29, 2), num_heads=(4, 8, 16, 32))

VARIANTS: dict[str, dict] = {
    "agent_deit_tiny": dict(embed_dim=192, num_heads=3),
    "agent_deit_small": _SMALL_DEIT,
    "agent_deit_small_448": dict(_SMALL_DEIT, img_size=448),
    "agent_deit_base": dict(embed_dim=768, num_heads=12, agent_num=81, agent_depth=4),
    "agent_pvt_tiny": dict(depths=(2, 2, 2, 2)),
    "agent_pvt_small": dict(depths=(3, 4, 6, 3)),
    "agent_pvt_medium": dict(depths=(3, 4, 18, 3)),
    "agent_pvt_medium_256": dict(depths=(3, 4, 18, 3), img_size=256),
    "agent_pvt_large": dict(depths=(3, 8, 27, 3)),
    "agent_swin_tiny": dict(depths=(2, 2, 6, 2), agent_depths=(2, 2, 6, 0)),
    "agent_swin_small": _SWIN_SMALL,
    "agent_swin_small_288": dict(_SWIN_SMALL, window_size=9, img_size=288),
    "agent_swin_base": _SWIN_BASE,
    "agent_swin_base_384": dict(_SWIN_BASE, window_size=12, img_size=384),
    "agent_cswin_tiny": dict(depths=(2, 4, 18, 1)),
    "agent_cswin_small": dict(depths=(3, 6, 29, 2)),
    "agent_cswin_base": _CSWIN_BASE,
    "agent_cswin_base_384": dict(_CSWIN_BASE, stripe_width=12, img_size=384),
}


def leaplab_cfg(file: str | None, first_conv: str, size: int = 224, **kwargs) -> dict:
    """Return timm's description of weights that LeapLabTHU published under the id `file`; None for none.

    The papers evaluate on images resized to a square of 256 / 224 of the size, then cropped.
    """
    cfg = dict(
        # Published with a slash before the question mark, to which it is redirected: without, timm has a name to cache.
        url=f"https://cloud.tsinghua.edu.cn/f/{file}?dl=1" if file else "",
        # The repositories state none.
        license="unknown",
        num_classes=1000,
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        crop_pct=0.875,
        crop_mode="squash",
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv=first_conv,
        classifier="head",
    )
    return cfg | kwargs


def _deit(file: str, size: int = 224) -> dict:
    return leaplab_cfg(file, "patch_embed.proj", size, pool_size=None)


def _pvt(file: str, size: int = 224) -> dict:
    return leaplab_cfg(file, "patch_embed1.proj", size)


def _swin(file: str, size: int = 224) -> dict:
    return leaplab_cfg(file, "patch_embed.proj", size, crop_pct=0.875 if size == 224 else 1.0)


def _cswin(file: str, size: int = 224) -> dict:
    return leaplab_cfg(file, "stage1_conv_embed.0", size)


default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.in1k": _deit("57e0904221824ee7b7af"),
        "agent_deit_small.in1k": _deit("fdd43304372541db8ea7"),
        "agent_deit_small_448.in1k": _deit("a228f86241c445f1969b", 448),
        "agent_deit_base.in1k": _deit("5115f15fdd7e4ab58fbc"),
        "agent_pvt_tiny.in1k": _pvt("13fdf0e0a7c5498c934f"),
        "agent_pvt_small.in1k": _pvt("36b8be9a8863456685a3"),
        "agent_pvt_medium.in1k": _pvt("4d00ecacf18b45f9b88c"),
        "agent_pvt_medium_256.in1k": _pvt("654df734121643b19c52", 256),
        "agent_pvt_large.in1k": _pvt("040cfe0cfbbe4762ad09"),
        "agent_swin_tiny.in1k": _swin("a2ddc1190c224f768a41"),
        "agent_swin_small.in1k": _swin("f607172c9fea4d6e99bb"),
        "agent_swin_small_288.in1k": _swin("09760394e93b4046a25e", 288),
        "agent_swin_base.in1k": _swin("4fcd2d0114bb490483c3"),
        "agent_swin_base_384.in1k": _swin("bb84ee9058954706a557", 384),
        "agent_cswin_tiny.in1k": _cswin("8c562a74441e46d5902b"),
        "agent_cswin_small.in1k": _cswin("30eb8af675bc4b7a8747"),
        "agent_cswin_base.in1k": _cswin("c8035b0839b2410c8c9f"),
        "agent_cswin_base_384.in1k": _cswin("1239be0df44b47719432", 384),
    }
)


def create(
    cls: type[StagedBackbone], variant: str, pretrained: bool, filter_fn: Callable, kwargs: dict
) -> StagedBackbone:
    """Build a variant of a LeapLabTHU family, whose files hold yacs's settings, as dicts, beside the weights."""
    with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
        return build_model_with_cfg(
            cls,
            variant,
            pretrained,
            pretrained_filter_fn=pretrained_filter(filter_fn),
            feature_cfg=dict(out_indices=tuple(range(len(kwargs.get("depths", [0])))), feature_cls="getter"),
            **kwargs,
        )


def _create(cls: type[StagedBackbone], variant: str, pretrained: bool, **kwargs) -> StagedBackbone:
    return create(cls, variant, pretrained, checkpoint_filter_fn, VARIANTS[variant] | kwargs)


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Tiny, ImageNet-1k."""
    return _create(AgentDeiT, "agent_deit_tiny", pretrained, **kwargs)


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Small, ImageNet-1k."""
    return _create(AgentDeiT, "agent_deit_small", pretrained, **kwargs)


@register_model
def agent_deit_small_448(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Small, ImageNet-1k at 448x448."""
    return _create(AgentDeiT, "agent_deit_small_448", pretrained, **kwargs)


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Base, ImageNet-1k."""
    return _create(AgentDeiT, "agent_deit_base", pretrained, **kwargs)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Tiny, ImageNet-1k."""
    return _create(AgentPVT, "agent_pvt_tiny", pretrained, **kwargs)


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Small, ImageNet-1k."""
    return _create(AgentPVT, "agent_pvt_small", pretrained, **kwargs)


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Medium, ImageNet-1k."""
    return _create(AgentPVT, "agent_pvt_medium", pretrained, **kwargs)


@register_model
def agent_pvt_medium_256(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Medium, ImageNet-1k at 256x256."""
    return _create(AgentPVT, "agent_pvt_medium_256", pretrained, **kwargs)


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Large, ImageNet-1k."""
    return _create(AgentPVT, "agent_pvt_large", pretrained, **kwargs)


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Tiny, ImageNet-1k."""
    return _create(AgentSwin, "agent_swin_tiny", pretrained, **kwargs)


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Small, ImageNet-1k."""
    return _create(AgentSwin, "agent_swin_small", pretrained, **kwargs)


@register_model
def agent_swin_small_288(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Small, ImageNet-1k at 288x288."""
    return _create(AgentSwin, "agent_swin_small_288", pretrained, **kwargs)


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Base, ImageNet-1k."""
    return _create(AgentSwin, "agent_swin_base", pretrained, **kwargs)


@register_model
def agent_swin_base_384(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Base, ImageNet-1k at 384x384."""
    return _create(AgentSwin, "agent_swin_base_384", pretrained, **kwargs)


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs) -> AgentCSwin:
    """Agent-CSwin-Tiny, ImageNet-1k."""
    return _create(AgentCSwin, "agent_cswin_tiny", pretrained, **kwargs)


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs) -> AgentCSwin:
    """Agent-CSwin-Small, ImageNet-1k."""
    return _create(AgentCSwin, "agent_cswin_small", pretrained, **kwargs)


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs) -> AgentCSwin:
    """Agent-CSwin-Base, ImageNet-1k."""
    return _create(AgentCSwin, "agent_cswin_base", pretrained, **kwargs)


@register_model
def agent_cswin_base_384(pretrained: bool = False, **kwargs) -> AgentCSwin:
    """Agent-CSwin-Base, ImageNet-1k at 384x384."""
    return _create(AgentCSwin, "agent_cswin_base_384", pretrained, **kwargs)
