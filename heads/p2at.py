"""P2AT's decoder for real-time segmentation."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from densezoo.ops.shapes import check_features, check_widths, positive
from torch import Tensor, nn


class P2ATDecoder(nn.Module):
    """P2AT's decoder (arXiv 2310.15025): axial attention over a pooled coarsest level, fused into the finer ones.

    Published at github.com/mohamedac29/P2AT, whose sizes and choices these are, but for its pyramid pooling: there the
    first of the three maps stands twice in place of the second; here are all three, as in the paper.

    Args:
        in_channels: Width of the four levels, at strides 4, 8, 16 and 32.
        channels: Width inside and of the results.
        num_heads: Of the axial attention.
        key_dim: Width of its queries and keys, a head; values are twice as wide.
        num_blocks: How many blocks of axial attention.
        pos_embed_size: Length of the position embeddings of rows and columns, which are resized to the map's sides.

    Raises:
        ValueError: An argument is out of its range, or there are not four levels.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 64,
        num_heads: int = 8,
        key_dim: int = 16,
        num_blocks: int = 2,
        pos_embed_size: int = 16,
    ):
        super().__init__()
        self.in_channels = check_widths(in_channels)
        if len(in_channels) != 4:
            raise ValueError(f"in_channels: got {in_channels!r}, expected the widths of four levels")
        numbers = dict(channels=channels, num_heads=num_heads, key_dim=key_dim, num_blocks=num_blocks)
        for name, number in (numbers | dict(pos_embed_size=pos_embed_size)).items():
            positive(name, number)
        c1, c2, c3, c4 = self.in_channels
        self.reduce = conv(c4, channels)
        blocks = (AxialBlock(channels, num_heads, key_dim, pos_embed_size) for _ in range(num_blocks))
        self.blocks = nn.Sequential(*blocks)
        self.decoders = nn.ModuleList(DecoderBlock(channels, kernel_size) for kernel_size in (3, 5, 7))
        self.fusions = nn.ModuleList(BiF(detail, skip, channels) for detail, skip in ((c2, c3), (c1, c2)))
        self.enhancers = nn.ModuleList(GlobalContext(channels) for _ in range(2))
        self.refiners = nn.ModuleList(conv(channels, channels, 3) for _ in range(3))
        self.merges = nn.ModuleList(conv(2 * channels, channels, 3) for _ in range(2))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode a pyramid.

        Args:
            maps: Levels (B, in_channels[i], H_i, W_i), finest first.

        Returns:
            A map (B, channels, H_0, W_0), and those for the auxiliary losses, (B, channels, H_1, W_1) and
            (B, channels, H_0, W_0).
        """
        check_features(maps, self.in_channels, "maps")
        c1, c2, c3, c4 = maps
        x = self.decoders[0](self.blocks(self.reduce(c4)))
        decoded, fused = [x], []
        levels = ((c2, c3), (c1, c2))
        for level, fusion, enhancer, decoder in zip(
            levels, self.fusions, self.enhancers, self.decoders[1:], strict=True
        ):
            fused.append(fusion(*level, decoded[-1]))
            decoded.append(decoder(enhancer(fused[-1])))
        x = self.refiners[2](decoded[2])
        for i in (1, 0):
            x = self.refiners[i](self.merges[i](torch.cat([resize(decoded[i], x), x], 1)))
        return x, fused


class P2ATPredictor(nn.Sequential):
    """P2AT's prediction of classes (B, num_classes, H, W) from maps (B, channels, H, W)."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, num_classes, 1),
        )


class AxialBlock(nn.Module):
    """Pyramid pooling axial attention and an MLP with a depthwise convolution, both residual."""

    def __init__(self, channels: int, num_heads: int, key_dim: int, pos_embed_size: int, mlp_ratio: int = 4):
        super().__init__()
        self.attn = PooledAxialAttention(channels, num_heads, key_dim, pos_embed_size)
        hidden = mlp_ratio * channels
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take a map (B, channels, H, W) to the same shape."""
        x = x + self.attn(x)
        return x + self.mlp(x)


class PooledAxialAttention(nn.Module):
    """Attention among the rows' means and among the columns' means of a map that is pooled at three scales."""

    def __init__(self, channels: int, num_heads: int, key_dim: int, pos_embed_size: int, value_ratio: int = 2):
        super().__init__()
        keys, values = num_heads * key_dim, num_heads * key_dim * value_ratio
        self.num_heads, self.keys, self.values = num_heads, keys, values
        self.pool_in = conv(channels, channels)
        self.pool_out = conv(3 * channels, channels, 3, groups=channels)
        self.detail1 = conv(channels, channels, activate=False)
        self.detail2 = conv(channels, channels, 3, activate=False)
        self.qkv = nn.Conv2d(channels, 2 * keys + values, 1, bias=False)
        self.row_pos, self.column_pos = (nn.Parameter(torch.randn(1, 2 * keys, pos_embed_size)) for _ in range(2))
        self.row = conv(values, values)
        self.column = nn.Conv2d(values, values, 1, bias=False)
        self.proj = conv(values, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map (B, channels, H, W) to the same shape."""
        details = self.detail1(x)
        details = details + self.detail2(details)
        x = self.pool_in(x)
        pooled = [x]
        for size in (3, 5, 7):
            pooled.append(F.avg_pool2d(pooled[-1], size, stride=1, padding=size // 2))
        qkv = self.qkv(x * self.pool_out(torch.cat(pooled[1:], 1)))
        rows = self.row(self.attend(qkv.mean(3), self.row_pos)[..., None])
        columns = self.column(self.attend(qkv.mean(2), self.column_pos)[:, :, None])
        return details * self.proj(qkv[:, 2 * self.keys :] + rows + columns)

    def attend(self, qkv: Tensor, positions: Tensor) -> Tensor:
        """Attend along an axis: queries, keys and values (B, 2 keys + values, L) to (B, values, L)."""
        positions = F.interpolate(positions, qkv.shape[2:], mode="linear", align_corners=False)
        qk, v = qkv.split([2 * self.keys, self.values], 1)
        q, k = (qk + positions.to(qk.dtype)).chunk(2, 1)
        q, k, v = (t.unflatten(1, (self.num_heads, -1)).transpose(2, 3) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)


class DecoderBlock(nn.Module):
    """A residual of a depthwise convolution and a pointwise MLP, scaled by channel."""

    def __init__(self, channels: int, kernel_size: int, mlp_ratio: int = 4, layer_scale: float = 1e-6):
        super().__init__()
        dwconv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.mlp = nn.Sequential(
            dwconv,
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, mlp_ratio * channels, 1),
            nn.Hardswish(),
            nn.Conv2d(mlp_ratio * channels, channels, 1),
        )
        self.gamma = nn.Parameter(layer_scale * torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Take a map (B, channels, H, W) to the same shape."""
        return x + self.gamma * self.mlp(x)


class BiF(nn.Module):
    """Bidirectional fusion of a fine level, the next coarser one and the decoded map."""

    def __init__(self, detail_channels: int, skip_channels: int, channels: int):
        super().__init__()
        self.detail = conv(detail_channels, channels)
        self.detail_local, self.detail_global, self.detail_out = (
            nn.Conv2d(channels, channels, 1, bias=False) for _ in range(3)
        )
        self.skip = conv(skip_channels, channels, activate=False)
        self.up = conv(channels, channels)
        self.up_gate = nn.Conv2d(channels, channels, 1)
        self.fuse = conv(3 * channels, channels, activate=False)

    def forward(self, detail: Tensor, skip: Tensor, up: Tensor) -> Tensor:
        """Take maps of three sizes to (B, channels, H, W), the size of `detail` (B, detail_channels, H, W)."""
        detail = self.detail(detail)
        context = self.detail_global(detail.mean((2, 3), keepdim=True))
        detail = self.detail_out(context + self.detail_local(detail).sigmoid())
        up = resize(self.up(up) * self.up_gate(up).softmax(1), detail)
        skip = resize(self.skip(skip), detail)
        return self.fuse(torch.cat([detail, up, skip], 1)) + skip * up + (skip * detail).sigmoid()


class GlobalContext(nn.Module):
    """Add a function of the map's mean to it."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.conv2 = conv(channels, channels, 7)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map (B, channels, H, W) to the same shape."""
        context = self.conv1(x.mean((2, 3), keepdim=True))
        return x + self.conv2(context * self.weight + self.bias)


def conv(
    in_channels: int, channels: int, kernel_size: int = 1, groups: int = 1, activate: bool = True
) -> nn.Sequential:
    """Return a convolution, a batch norm and, with `activate`, PReLU."""
    layers = OrderedDict(
        conv=nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False),
        bn=nn.BatchNorm2d(channels),
    )
    if activate:
        layers["act"] = nn.PReLU(channels)
    return nn.Sequential(layers)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Return `x` at the height and width of `like`."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
