"""Gold-YOLO's gather-and-distribute mechanism."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from densezoo.necks.parts import conv_norm
from densezoo.ops.shapes import check_features, check_widths, positive
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Width of the finest output, width of the low branch, blocks a level, share of a CSP stage's width (0: no CSP), kind of
# block, depth and heads of the high branch, whether the coarsest output takes p4 and not n4.
ARCHS: dict[str, dict] = {
    "n": dict(out_channels=32, low_dim=96, repeats=4),
    "s": dict(out_channels=64, low_dim=128, repeats=4),
    "m": dict(out_channels=96, low_dim=192, repeats=7, csp_ratio=2 / 3),
    "l": dict(
        out_channels=128,
        low_dim=192,
        repeats=12,
        csp_ratio=1 / 2,
        reparam=False,
        depth=3,
        num_heads=8,
        coarsest_from_p4=True,
    ),
}


class GatherDistribute(nn.Module):
    """Gold-YOLO's neck (arXiv 2309.11331): levels meet in two global maps, which are injected into each of them.

    The low branch gathers all inputs at stride 16 and fuses them by convolutions, for p4 and p3; the high branch
    gathers p3, p4 and c5 at stride 64 and fuses them by attention, for n4 and n5. From inputs of strides 4, 8, 16 and
    32 come p3, n4 and n5 of strides 8, 16 and 32, each twice as wide as the one before.

    Parameters are named as in the published code. That needs c3 twice as wide as p3; here any widths do. Not taken
    over: its batch norms' momentum of 0.03 and epsilon of 1e-3.

    Args:
        in_channels: The widths of c2, c3, c4 and c5.
        out_channels: The width of p3; n4 has twice, n5 four times as much. That of `arch` by default.
        arch: The published size: 'n', 's', 'm' or 'l'.
        drop_path_rate: Stochastic depth of the last block of the high branch; from 0 on, linear over the blocks.

    Raises:
        ValueError: There are not four levels, there is no such size, a width is not positive, or `drop_path_rate` is
            no share.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int | None = None,
        arch: str = "s",
        drop_path_rate: float = 0.1,
    ):
        super().__init__()
        self.in_channels = check_widths(in_channels)
        if len(self.in_channels) != 4:
            raise ValueError(f"in_channels: got {self.in_channels}, expected four widths, of c2, c3, c4 and c5")
        if not isinstance(arch, str) or arch not in ARCHS:
            raise ValueError(f"arch: got {arch!r}, expected one of {', '.join(ARCHS)}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate: got {drop_path_rate}, expected 0 or more and less than 1")
        options = dict(ARCHS[arch])
        if out_channels is not None:
            options["out_channels"] = positive("out_channels", out_channels)
        self._build(drop_path_rate=drop_path_rate, **options)

    def _build(
        self,
        out_channels: int,
        low_dim: int,
        repeats: int,
        drop_path_rate: float,
        csp_ratio: float = 0,
        reparam: bool = True,
        depth: int = 2,
        num_heads: int = 4,
        coarsest_from_p4: bool = False,
    ) -> None:
        p3, p4, n5 = out_channels, 2 * out_channels, 4 * out_channels
        c2, c3, c4, c5 = self.in_channels
        self.out_channels = [p3, p4, n5]
        self.coarsest_from_p4 = coarsest_from_p4
        block = RepVGGBlock if reparam else ConvBlock

        def stage(width: int) -> nn.Module:
            return CSPStage(width, repeats, csp_ratio, block) if csp_ratio else RepStage(width, repeats, block)

        self.low_IFM = nn.Sequential(
            conv_norm(sum(self.in_channels), low_dim, 1, norm="bn", act=nn.SiLU()),
            *(block(low_dim) for _ in range(3)),
            conv_norm(low_dim, p4 + p3, 1, norm="bn", act=nn.SiLU()),
        )
        self.reduce_layer_c5 = conv_norm(c5, p4, 1, norm="bn", act=nn.ReLU())
        self.LAF_p4 = LocalFusion((c3, c4, p4), p4)
        self.Inject_p4 = Injection(p4)
        self.Rep_p4 = stage(p4)
        self.reduce_layer_p4 = conv_norm(p4, p3, 1, norm="bn", act=nn.ReLU())
        self.LAF_p3 = LocalFusion((c2, c3, p3), p3)
        self.Inject_p3 = Injection(p3)
        self.Rep_p3 = stage(p3)

        high_dim = p3 + p4 + c5
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        blocks = nn.Sequential(*(AttentionBlock(high_dim, num_heads, rate) for rate in rates))
        self.high_IFM = nn.Sequential(OrderedDict(transformer_blocks=blocks))
        self.conv_1x1_n = nn.Conv2d(high_dim, p4 + n5, 1)
        self.Inject_n4 = Injection(p4)
        self.Rep_n4 = stage(p4)
        self.Inject_n5 = Injection(n5)
        self.Rep_n5 = stage(n5)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Take c2, c3, c4, c5 (B, in_channels[i], H_i, W_i) to p3, n4, n5 of the sizes of c3, c4, c5."""
        check_features(features, self.in_channels)
        c2, c3, c4, c5 = features
        size = c4.shape[2:]
        low = self.low_IFM(torch.cat([pool(c2, size), pool(c3, size), c4, enlarge(c5, size)], 1))
        p3_width, p4_width, n5_width = self.out_channels
        low_p4, low_p3 = low.split([p4_width, p3_width], 1)
        c5_half = self.reduce_layer_c5(c5)
        p4 = self.Rep_p4(self.Inject_p4(self.LAF_p4(c3, c4, c5_half), low_p4))
        p4_half = self.reduce_layer_p4(p4)
        p3 = self.Rep_p3(self.Inject_p3(self.LAF_p3(c2, c3, p4_half), low_p3))

        size = [(side + 1) // 2 for side in c5.shape[2:]]
        high = self.conv_1x1_n(self.high_IFM(torch.cat([pool(x, size) for x in (p3, p4, c5)], 1)))
        high_n4, high_n5 = high.split([p4_width, n5_width], 1)
        local = torch.cat([pool(p3, p4_half.shape[2:]), p4_half], 1)
        n4 = self.Rep_n4(self.Inject_n4(local, high_n4))
        local = torch.cat([pool(p4 if self.coarsest_from_p4 else n4, c5_half.shape[2:]), c5_half], 1)
        n5 = self.Rep_n5(self.Inject_n5(local, high_n5))
        return p3, n4, n5

    def fuse(self) -> None:
        """Make one convolution of every re-parameterized block, in place, which then computes the same, faster.

        Raises:
            ValueError: The neck is in training mode, in which batch norms are no constant factors.
        """
        if self.training:
            raise ValueError("fuse: the neck is in training mode; call eval() before")
        for module in self.modules():
            if isinstance(module, RepVGGBlock):
                module.fuse()


def pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """Average a map (B, C, H, W) to a smaller size."""
    return F.adaptive_avg_pool2d(x, size)


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a map (B, C, H, W) bilinearly."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class LocalFusion(nn.Module):
    """Joins a level with its neighbours: the finer one pooled as it is, the coarser one enlarged."""

    def __init__(self, in_channels: tuple[int, int, int], out_channels: int):
        super().__init__()
        finer, same, coarser = in_channels
        self.cv1 = conv_norm(same, out_channels, 1, norm="bn", act=nn.ReLU())
        self.cv_fuse = conv_norm(finer + out_channels + coarser, out_channels, 1, norm="bn", act=nn.ReLU())

    def forward(self, finer: Tensor, same: Tensor, coarser: Tensor) -> Tensor:
        """Take three maps to one of the size of `same`."""
        size = same.shape[2:]
        return self.cv_fuse(torch.cat([pool(finer, size), self.cv1(same), enlarge(coarser, size)], 1))


class Injection(nn.Module):
    """Gates a level by the global map and adds the global map to it.

    The published code pools a global map that is the larger one; here it never is.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.local_embedding = conv_norm(channels, channels, 1, norm="bn")
        self.global_embedding = conv_norm(channels, channels, 1, norm="bn")
        self.global_act = conv_norm(channels, channels, 1, norm="bn")

    def forward(self, local: Tensor, glob: Tensor) -> Tensor:
        """Take a level (B, C, H, W) and a map (B, C, h, w) to (B, C, H, W)."""
        size = local.shape[2:]
        gate = enlarge(F.hardsigmoid(self.global_act(glob)), size)
        return self.local_embedding(local) * gate + enlarge(self.global_embedding(glob), size)


class AttentionBlock(nn.Module):
    """Attention over all pixels and an MLP with a depth-wise convolution, of batch-normed projections."""

    def __init__(self, dim: int, num_heads: int, drop_path: float):
        super().__init__()
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, dim, H, W) to the same shape."""
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


class Attention(nn.Module):
    """Multi-head attention with unscaled logits, keys of width 8 and values of width 16 a head."""

    def __init__(self, dim: int, num_heads: int, key_dim: int = 8, value_dim: int = 16):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = projection(dim, num_heads * key_dim)
        self.to_k = projection(dim, num_heads * key_dim)
        self.to_v = projection(dim, num_heads * value_dim)
        self.proj = nn.Sequential(nn.ReLU6(), projection(num_heads * value_dim, dim))
        # starts as the identity, with the shortcut
        nn.init.zeros_(self.proj[1].bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, dim, H, W) to the same shape."""
        # (B, heads, H * W, dim of a head)
        q, k, v = (to(x).flatten(2).unflatten(1, (self.num_heads, -1)).mT for to in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.proj(out.mT.flatten(1, 2).unflatten(2, x.shape[2:]))


class Mlp(nn.Module):
    """Two projections with a depth-wise 3x3 convolution and ReLU6 between them."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = projection(dim, dim)
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.fc2 = projection(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, dim, H, W) to the same shape."""
        return self.fc2(F.relu6(self.dwconv(self.fc1(x))))


def projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 1x1 convolution and its batch norm."""
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(OrderedDict(c=conv, bn=nn.BatchNorm2d(out_channels)))


class RepVGGBlock(nn.Module):
    """RepVGG's block (arXiv 2101.03697): the ReLU of a 3x3, a 1x1 and an identity branch, each batch-normed."""

    def __init__(self, channels: int):
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(channels)
        self.rbr_dense = conv_norm(channels, channels, 3, norm="bn")
        self.rbr_1x1 = conv_norm(channels, channels, 1, norm="bn")
        self.rbr_reparam = None

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        if self.rbr_reparam is not None:
            return self.rbr_reparam(x).relu()
        return (self.rbr_dense(x) + self.rbr_1x1(x) + self.rbr_identity(x)).relu()

    @torch.no_grad()
    def fuse(self) -> None:
        """Replace the branches by the convolution that computes their sum."""
        if self.rbr_reparam is not None:
            return
        conv, point, norm = fuse_conv_bn_eval(*self.rbr_dense), fuse_conv_bn_eval(*self.rbr_1x1), self.rbr_identity
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        conv.weight += F.pad(point.weight + scale.diag()[..., None, None], (1, 1, 1, 1))
        conv.bias += point.bias + norm.bias - norm.running_mean * scale
        self.rbr_reparam = conv
        del self.rbr_identity, self.rbr_dense, self.rbr_1x1


class ConvBlock(nn.Module):
    """A 3x3 convolution with a bias, as published, batch norm and SiLU."""

    def __init__(self, channels: int):
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.block = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels), act=nn.SiLU()))

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        return self.block(x)


class RepStage(nn.Module):
    """Blocks in a row."""

    def __init__(self, channels: int, repeats: int, block: type[nn.Module]):
        super().__init__()
        self.conv1 = block(channels)
        self.block = nn.Sequential(*(block(channels) for _ in range(repeats - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        return self.block(self.conv1(x))


class Bottleneck(nn.Module):
    """Two blocks beside a scaled shortcut."""

    def __init__(self, channels: int, block: type[nn.Module]):
        super().__init__()
        self.conv1 = block(channels)
        self.conv2 = block(channels)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        return self.conv2(self.conv1(x)) + self.alpha * x


class CSPStage(nn.Module):
    """Bottlenecks on one part of the features, beside another part (YOLOv6's BepC3)."""

    def __init__(self, channels: int, repeats: int, ratio: float, block: type[nn.Module]):
        super().__init__()
        width = int(channels * ratio)
        act = nn.ReLU if block is RepVGGBlock else nn.SiLU
        self.cv1 = conv_norm(channels, width, 1, norm="bn", act=act())
        self.cv2 = conv_norm(channels, width, 1, norm="bn", act=act())
        self.cv3 = conv_norm(2 * width, channels, 1, norm="bn", act=act())
        self.m = RepStage(width, repeats // 2, lambda dim: Bottleneck(dim, block))

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))
