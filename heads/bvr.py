"""RelationNet++: bridging visual representations, in dense heads and in Faster R-CNN's."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from densezoo.ops.backend import is_exporting
from densezoo.ops.shapes import check_features, positive
from torch import Tensor, nn

CORNERS = ("top_left_corner", "bottom_right_corner")
KINDS = (*CORNERS, "center")
# Weights of the losses of key points' scores and offsets.
SCORE_WEIGHT, OFFSET_WEIGHT = 0.25, 1.0


class BVR(nn.Module):
    """Bridging visual representations (arXiv 2010.15831) between the towers and the predictions of a dense head.

    A key point head finds objects' centres and corners. Every position of the classification maps attends to the
    likeliest centres, and of the regression maps to the likeliest corners, with their relative positions. Published at
    github.com/microsoft/RelationNet2 (MIT); parameters are named and start as there, with group norm, as in its
    ResNet-50 model.

    Args:
        num_classes: Of objects.
        in_channels: Width of the pyramid's levels.
        channels: Width of the towers, a multiple of 32 and of `num_heads`.
        strides: Of the levels, in pixels, finest first.
        num_heads: Of the attention.
        points_per_level: How many key points of a kind each level proposes.
        num_keys: How many of them, of all levels, are attended to.

    Raises:
        ValueError: An argument is out of its range, or there are not as many levels as strides.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 256,
        channels: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        num_heads: int = 8,
        points_per_level: int = 20,
        num_keys: int = 50,
    ):
        super().__init__()
        numbers = dict(num_classes=num_classes, in_channels=in_channels, channels=channels)
        numbers |= dict(points_per_level=points_per_level, num_keys=num_keys)
        for name, number in numbers.items():
            positive(name, number)
        if channels % 32:
            raise ValueError(f"channels: got {channels}, expected a positive multiple of 32, one for each group")
        if not isinstance(strides, Sequence) or not strides:
            raise ValueError(f"strides: got {strides!r}, expected the strides of one level or more, finest first")
        self.in_channels, self.channels = in_channels, channels
        self.strides = tuple(positive("strides", stride) for stride in strides)
        self.points_per_level, self.num_keys = points_per_level, num_keys
        self.keypoint_head = KeyPointHead(num_classes, in_channels, channels)
        self.cls_transformer = Bridge(channels, num_heads, cell=strides[0])
        self.reg_transformer = Bridge(channels, num_heads, num_kinds=2, cell=strides[0])

    def init_weights(self) -> None:
        """Start as published where a head's own start has changed it."""
        self.keypoint_head.init_weights()

    def forward(
        self, maps: Sequence[Tensor], cls_maps: Sequence[Tensor], reg_maps: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, list[tuple[Tensor, Tensor]]]]:
        """Bridge centres and corners into the outputs of a head's towers.

        Args:
            maps: The pyramid, (B, in_channels, H_i, W_i) each level.
            cls_maps: Outputs of the classification tower, (B, channels, H_i, W_i).
            reg_maps: Outputs of the regression tower, (B, channels, H_i, W_i).

        Returns:
            The maps that take the place of `cls_maps` and `reg_maps`, and what `loss` takes: of each kind of key point
            and each level its logits (B, num_classes, H_i, W_i) and offsets (B, 2, H_i, W_i) in cells, x before y.
        """
        if not len(maps) == len(cls_maps) == len(reg_maps) == len(self.strides):
            found = (len(maps), len(cls_maps), len(reg_maps))
            raise ValueError(f"maps, cls_maps, reg_maps: got {found} levels, expected {len(self.strides)} each")
        for name, levels, width in (
            ("maps", maps, self.in_channels),
            ("cls_maps", cls_maps, self.channels),
            ("reg_maps", reg_maps, self.channels),
        ):
            check_features(levels, len(levels) * [width], name)
        points = self.keypoint_head(maps)
        cells = cell_centers([m.shape[2:] for m in maps], self.strides, maps[0].device)
        chosen = {kind: self.choose(levels, cells) for kind, levels in points.items()}
        cls_maps = bridge_maps(self.cls_transformer, cls_maps, cells, [chosen["center"]])
        reg_maps = bridge_maps(self.reg_transformer, reg_maps, cells, [chosen[kind] for kind in CORNERS])
        return cls_maps, reg_maps, points

    def choose(self, levels: list[tuple[Tensor, Tensor]], cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return cells (B, num_keys), counted over all levels, and positions (B, num_keys, 2) of the best of a kind."""
        scores, indices, positions = [], [], []
        start = 0
        for stride, (logits, offsets) in zip(self.strides, levels, strict=True):
            heat = logits.float().sigmoid()
            heat = heat * (F.max_pool2d(heat, 3, stride=1, padding=1) == heat)
            count, area = self.points_per_level, heat.shape[2] * heat.shape[3]
            # a level of one cell may have fewer
            count = count if is_exporting() else min(count, heat.shape[1] * area)
            best, index = heat.flatten(1).topk(count)
            index = index % area
            shift = offsets.float().flatten(2).gather(2, index[:, None].expand(-1, 2, -1)).transpose(1, 2)
            scores.append(best)
            indices.append(start + index)
            positions.append(cells[start + index] + stride * shift)
            start = start + area
        scores = torch.cat(scores, 1)
        best = scores.topk(min(self.num_keys, scores.shape[1])).indices
        positions = torch.cat(positions, 1).gather(1, best[..., None].expand(-1, -1, 2))
        return torch.cat(indices, 1).gather(1, best), positions

    def loss(
        self, points: dict[str, list[tuple[Tensor, Tensor]]], boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of the key points' losses and the number of positive cells to divide them by.

        Args:
            points: As from `forward`.
            boxes: Each image's objects, (N, 4) as x1, y1, x2, y2 in pixels.
            labels: Their classes, (N,).

        Returns:
            The weighted losses of scores and of offsets, and the number of positive cells, which may be 0.
        """
        sizes = [logits.shape[2:] for logits, _ in points["center"]]
        device = boxes[0].device
        cells = cell_centers(sizes, self.strides, device).split([h * w for h, w in sizes])
        score_loss, offset_loss, positives = (torch.zeros((), device=device) for _ in range(3))
        for kind, levels in points.items():
            logits = torch.cat([logits.float().flatten(2) for logits, _ in levels], 2)
            offsets = torch.cat([offsets.float().flatten(2) for _, offsets in levels], 2)
            for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
                targets = point_targets(box, label, kind, cells, self.strides, logits.shape[1])
                scores, shifts, positive = targets
                score_loss = score_loss + gaussian_focal_loss(logits[i], scores)
                offset_loss = offset_loss + F.smooth_l1_loss(offsets[i][:, positive], shifts, reduction="sum")
                positives = positives + positive.sum()
        return SCORE_WEIGHT * score_loss, OFFSET_WEIGHT * offset_loss, positives


class RoIBVR(nn.Module):
    """Bridging visual representations (arXiv 2010.15831) in the second stage of Faster R-CNN.

    Each proposal's own features give its likeliest centre and corners, by convolutions like a mask head's; the
    proposals of an image attend to the best of all: the features of classification to centres, those of regression to
    corners. No code was published of it. Where the paper leaves it open, as in `BVR`: a point's target is a Gaussian
    around the cell that is nearest to it, and proposals of the background have none.

    Args:
        in_channels: Width of the proposals' maps.
        channels: Width of their vectors, a multiple of `num_heads`.
        num_heads: Of the attention.
        num_keys: How many points of a kind are attended to in an image.
        cell: The unit of relative positions, in pixels.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self, in_channels: int = 256, channels: int = 1024, num_heads: int = 8, num_keys: int = 50, cell: float = 8
    ):
        super().__init__()
        for name, number in dict(in_channels=in_channels, channels=channels, num_keys=num_keys).items():
            positive(name, number)
        if cell <= 0:
            raise ValueError(f"cell: got {cell}, expected a positive number of pixels")
        self.num_keys = num_keys
        convs = [layer for _ in range(4) for layer in (nn.Conv2d(in_channels, in_channels, 3, padding=1), nn.ReLU())]
        self.convs = nn.Sequential(*convs, nn.ConvTranspose2d(in_channels, in_channels, 2, stride=2), nn.ReLU())
        self.scores = nn.Conv2d(in_channels, len(KINDS), 1)
        self.offsets = nn.Conv2d(in_channels, 2 * len(KINDS), 1)
        options = dict(key_channels=in_channels, base_size=None, cell=cell)
        self.cls_transformer = Bridge(channels, num_heads, **options)
        self.reg_transformer = Bridge(channels, num_heads, num_kinds=2, **options)
        # as in a mask head
        for module in self.convs:
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        init_predictions(self.scores, self.offsets)

    def forward(
        self, maps: Tensor, vectors: Tensor, rois: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Bridge centres and corners into proposals.

        Args:
            maps: Of the proposals of all images, one image after the other, (R, in_channels, S, S).
            vectors: Made of them, (R, channels).
            rois: The proposals of each image, (R_i, 4) as x1, y1, x2, y2 in pixels.

        Returns:
            Vectors (R, channels) for classification and for regression, and what `loss` takes: logits (R, 3, 2 S, 2 S)
            and offsets (R, 6, 2 S, 2 S) of top left corners, bottom right corners and centres.
        """
        maps = self.convs(maps)
        logits, offsets = self.scores(maps), self.offsets(maps)
        best, index = logits.float().sigmoid().flatten(2).max(2)
        shifts = offsets.float().unflatten(1, (3, 2)).flatten(3)
        shifts = shifts.gather(3, index[:, :, None, None].expand(-1, -1, 2, -1))[..., 0]
        side = logits.shape[3]
        cells = torch.stack([index % side, index // side], 2) + 0.5 + shifts
        boxes = torch.cat(list(rois)).float()
        positions = boxes[:, None, :2] + cells * (boxes[:, None, 2:] - boxes[:, None, :2]) / side  # (R, 3, 2)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        features = maps.flatten(2).gather(2, index[:, None].expand(-1, maps.shape[1], -1))  # (R, in_channels, 3)

        counts = [len(r) for r in rois]
        cls_vectors, reg_vectors = [], []
        for tensors in zip(*(t.split(counts) for t in (vectors, centers, best, features, positions)), strict=True):
            vector, center, score, feature, position = tensors
            keys = []
            for i in range(len(KINDS)):
                first = score[:, i].topk(min(self.num_keys, len(score))).indices
                keys.append((feature[first, :, i][None], position[first, i][None]))
            cls_vectors.append(self.cls_transformer(vector[None], center[None], keys[2:])[0])
            reg_vectors.append(self.reg_transformer(vector[None], center[None], keys[:2])[0])
        return torch.cat(cls_vectors), torch.cat(reg_vectors), (logits, offsets)

    def loss(self, points: tuple[Tensor, Tensor], rois: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of the points' losses and the number of points to divide them by.

        Args:
            points: As from `forward`, of N proposals of objects, then of background.
            rois: Those of objects, (N, 4) as x1, y1, x2, y2 in pixels.
            boxes: Their objects, (N, 4) likewise.

        Returns:
            The weighted losses of scores and of offsets, and the number of points, which may be 0.
        """
        logits, offsets = (t.float() for t in points)
        side = logits.shape[3]
        scale = side / (rois[:, 2:] - rois[:, :2]).clamp(min=1)
        boxes = ((boxes.unflatten(1, (2, 2)) - rois[:, None, :2]) * scale[:, None]).flatten(1)
        cells = cell_centers([(side, side)], [1], rois.device) + 0.5
        sigma = gaussian_sigma(boxes)
        targets, offset_loss = torch.zeros_like(logits), logits.sum() * 0
        for i, kind in enumerate(KINDS):
            point = points_of(boxes, kind)
            nearest = (cells[None] - point[:, None]).square().sum(-1).argmin(1)  # (N,)
            distance = (cells[None] - cells[nearest][:, None]).square().sum(-1)
            targets[: len(boxes), i] = (-distance / (2 * sigma[:, None] ** 2)).exp().unflatten(1, (side, side))
            shifts = offsets[: len(boxes), 2 * i : 2 * i + 2].flatten(2)
            shifts = shifts.gather(2, nearest[:, None, None].expand(-1, 2, -1))[..., 0]
            offset_loss = offset_loss + F.smooth_l1_loss(shifts, point - cells[nearest], reduction="sum")
        count = torch.tensor(float(len(KINDS) * len(boxes)), device=rois.device)
        return SCORE_WEIGHT * gaussian_focal_loss(logits, targets), OFFSET_WEIGHT * offset_loss, count


class KeyPointHead(nn.Module):
    """Scores and offsets of objects' corners and centres at every cell of a pyramid."""

    def __init__(self, num_classes: int, in_channels: int, channels: int):
        super().__init__()

        def tower(*last: nn.Module) -> nn.Sequential:
            return nn.Sequential(conv_norm(channels, channels), *last)

        def conv(width: int) -> nn.Conv2d:
            return nn.Conv2d(channels, width, 3, padding=1)

        first = {kind: nn.Sequential(conv_norm(in_channels, channels), *tower()) for kind in KINDS}
        self.keypoint_layers = nn.ModuleDict(first)
        self.keypoint_cls_heads = nn.ModuleDict({kind: tower(conv(num_classes)) for kind in KINDS})
        self.keypoint_offset_heads = nn.ModuleDict({kind: tower(conv(2)) for kind in KINDS})
        self.init_weights()

    def init_weights(self) -> None:
        """Start as published, scores near 0.01."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        for kind in KINDS:
            init_predictions(self.keypoint_cls_heads[kind][-1], self.keypoint_offset_heads[kind][-1])

    def forward(self, maps: Sequence[Tensor]) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Return each kind's logits (B, num_classes, H_i, W_i) and offsets (B, 2, H_i, W_i) of every level."""
        points = {kind: [] for kind in KINDS}
        for kind, levels in points.items():
            for x in maps:
                x = self.keypoint_layers[kind](x)
                levels.append((self.keypoint_cls_heads[kind](x), self.keypoint_offset_heads[kind](x)))
        return points


class Bridge(nn.Module):
    """Attention of positions to key points of several kinds, biased by their relative positions.

    Args:
        channels: Width of the queries, a multiple of `num_heads`.
        num_heads: Of each attention.
        num_kinds: Of key points; each has its own attention, all one embedding of relative positions.
        cell: The unit of relative positions, in pixels.
        key_channels: Width of the keys, by default that of the queries.
        base_size: Side of the table of relative positions, in cells, an even number: they are interpolated in it. None
            computes each exactly.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 8,
        num_kinds: int = 1,
        cell: float = 8,
        key_channels: int | None = None,
        base_size: int | None = 400,
    ):
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            heads = [n for n in range(1, 33) if channels % n == 0]
            raise ValueError(f"num_heads: got {num_heads} for {channels} channels, expected a divisor such as {heads}")
        key_channels = key_channels or channels
        self.cell = cell
        self.decoder = nn.ModuleList(
            KeyPointAttention(channels, num_heads, kdim=key_channels, vdim=key_channels) for _ in range(num_kinds)
        )
        self.relative_positional_encoding = RelativePosition(key_channels, num_heads, base_size)

    def forward(self, queries: Tensor, positions: Tensor, keys: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Attend to key points.

        Args:
            queries: (B, L, channels).
            positions: Of the queries, (B or 1, L, 2), x and y in pixels.
            keys: Of each kind features (B, K, key_channels) and positions (B, K, 2).

        Returns:
            Queries (B, L, channels) and their attentions, added up and rectified.
        """
        if len(keys) != len(self.decoder):
            raise ValueError(f"keys: got {len(keys)} kinds of key points, expected {len(self.decoder)}")
        out = queries
        for attention, (features, points) in zip(self.decoder, keys, strict=True):
            if not points.shape[1]:  # of an image without proposals
                continue
            cells = (points[:, None] - positions[:, :, None]) / self.cell
            out = out + attention(queries, features, self.relative_positional_encoding(cells))
        return out.relu()


class KeyPointAttention(nn.MultiheadAttention):
    """Attention with a bias; parameters as torch's, whose own way to them would fix the sizes in an export."""

    def forward(self, queries: Tensor, features: Tensor, bias: Tensor) -> Tensor:
        """Let queries (B, L, embed_dim) attend to features (B, K, kdim), biased by (B, num_heads, L, K)."""
        weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        inputs, biases = (queries, features, features), self.in_proj_bias.chunk(3)
        projected = (F.linear(*args) for args in zip(inputs, weights, biases, strict=True))
        query, key, value = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        # A view of all heads would not hold in ONNX, where they lie in another order.
        return self.out_proj(torch.cat(out.unbind(1), 2))


class RelativePosition(nn.Module):
    """The logarithms of learned functions of relative positions, one for each head."""

    def __init__(self, channels: int, num_heads: int, base_size: int | None, temperature: float = 1000.0):
        super().__init__()
        if channels < 1 or channels % 4:
            raise ValueError(
                f"channels: got {channels}, expected a positive multiple of 4: sines and cosines of x and y"
            )
        if base_size is not None and (base_size < 2 or base_size % 2):
            raise ValueError(f"base_size: got {base_size}, expected a positive even number or None")
        self.base_size = base_size
        conv = nn.Conv2d(channels, num_heads, 1)
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(conv.bias)
        self.embedding_transform = nn.Sequential(nn.Sequential(OrderedDict(conv=conv)))
        exponents = torch.arange(channels // 4) * 4 / channels
        self.register_buffer("frequencies", temperature**-exponents, persistent=False)

    def axis(self, cells: Tensor, weight: Tensor) -> Tensor:
        """Return the share (..., heads) of one coordinate, by its columns (heads, channels / 2) of the weight."""
        angles = cells[..., None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1) @ weight.T

    def forward(self, cells: Tensor) -> Tensor:
        """Take relative positions (B, L, K, 2), x and y in cells, to (B, heads, L, K), in float32."""
        conv = self.embedding_transform[0].conv
        with torch.autocast(cells.device.type, enabled=False):
            cells, (weight_x, weight_y) = cells.float(), conv.weight.float().flatten(1).chunk(2, 1)
            if self.base_size is None:
                out = self.axis(cells[..., 0], weight_x) + self.axis(cells[..., 1], weight_y) + conv.bias.float()
                out = out.permute(0, 3, 1, 2)
            else:
                half = self.base_size // 2
                side = torch.arange(-half, half + 1, device=cells.device, dtype=cells.dtype)
                # the code of a position is that of x next to that of y, so that a table of it is their sum
                x, y = self.axis(side, weight_x).T, self.axis(side, weight_y).T
                table = x[:, None] + y[:, :, None] + conv.bias.float()[:, None, None]
                table = table.expand(cells.shape[0], -1, -1, -1)
                out = F.grid_sample(table, cells / half, padding_mode="border", align_corners=False)
            return out.clamp(min=1e-6).log()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        # published files hold the code of the whole table
        state_dict.pop(f"{prefix}base_embedding", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def conv_norm(in_channels: int, channels: int) -> nn.Sequential:
    """Return a 3x3 convolution, a norm of 32 groups and ReLU."""
    conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, gn=nn.GroupNorm(32, channels), activate=nn.ReLU()))


def init_predictions(scores: nn.Conv2d, offsets: nn.Conv2d) -> None:
    """Start scores near 0.01 and offsets near 0."""
    for conv, bias in ((scores, -math.log(99)), (offsets, 0.0)):
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.constant_(conv.bias, bias)


def cell_centers(sizes: Sequence[Sequence[int]], strides: Sequence[int], device: torch.device) -> Tensor:
    """Return the centres (cells, 2), x and y in pixels, of all levels' cells; half a stride is rounded down."""
    centers = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        y = torch.arange(height, device=device)[:, None].expand(-1, width)
        x = torch.arange(width, device=device).expand(height, -1)
        centers.append(stride * torch.stack([x, y], -1).flatten(0, 1) + stride // 2)
    return torch.cat(centers).float()


def bridge_maps(
    bridge: Bridge, maps: Sequence[Tensor], cells: Tensor, chosen: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, ...]:
    """Let all positions of maps attend to cells of them, chosen by index (B, K) and position (B, K, 2)."""
    tokens = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)
    keys = [(tokens.gather(1, i[..., None].expand(-1, -1, tokens.shape[2])), position) for i, position in chosen]
    tokens = bridge(tokens, cells[None], keys).transpose(1, 2)
    parts = tokens.split([m.shape[2] * m.shape[3] for m in maps], 2)
    return tuple(part.unflatten(2, m.shape[2:]) for part, m in zip(parts, maps, strict=True))


def points_of(boxes: Tensor, kind: str) -> Tensor:
    """Return the points (N, 2) of a kind of boxes (N, 4)."""
    first, last = boxes[:, :2], boxes[:, 2:]
    return dict(zip(KINDS, (first, last, (first + last) / 2), strict=True))[kind]


def gaussian_sigma(boxes: Tensor, overlap: float = 0.7) -> Tensor:
    """Return the standard deviations (N,) of boxes' (N, 4) targets.

    A sixth of 2 r + 1, where corners moved by up to r keep that overlap, by CornerNet's rule (arXiv 1808.01244).
    """
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).unbind(1)
    area, half = width * height, width + height

    def root(a: float, b: Tensor, c: Tensor, sign: int) -> Tensor:
        return (b + sign * (b**2 - 4 * a * c).clamp(min=0).sqrt()) / (2 * a)

    radius = torch.stack(
        [
            root(1, half, area * (1 - overlap) / (1 + overlap), -1),
            root(4, 2 * half, area * (1 - overlap), -1),
            root(4 * overlap, -2 * overlap * half, area * (overlap - 1), 1),
        ]
    ).amin(0)
    return (2 * radius + 1) / 6


def point_targets(
    boxes: Tensor, labels: Tensor, kind: str, cells: Sequence[Tensor], strides: Sequence[int], num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one image's targets of a kind of key points: a Gaussian around each object's nearest cell of every level.

    Returns:
        Scores (num_classes, cells), offsets (2, positives), and which cells are positive (cells,).
    """
    count = sum(len(c) for c in cells)
    scores = boxes.new_zeros(num_classes, count)
    positive = torch.zeros(count, dtype=torch.bool, device=boxes.device)
    if not len(boxes):
        return scores, boxes.new_zeros(2, 0), positive
    points, sigma = points_of(boxes, kind), gaussian_sigma(boxes)
    heat, start = [], 0
    for level in cells:
        nearest = (level[:, None] - points).square().sum(-1).argmin(0)
        distance = (level[:, None] - level[nearest]).square().sum(-1)
        heat.append((-distance / (2 * sigma**2)).exp())
        positive[start + nearest] = True
        start += len(level)
    best, owner = torch.cat(heat).max(1)
    scores[labels[owner], torch.arange(count, device=boxes.device)] = best
    stride = torch.cat([level.new_full((len(level),), s) for level, s in zip(cells, strides, strict=True)])
    offsets = (points[owner] - torch.cat(list(cells))) / stride[:, None]
    return scores, offsets[positive].T, positive


def gaussian_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of CornerNet's focal loss (arXiv 1808.01244) of logits, whose targets are 1 at points."""
    p = logits.sigmoid()
    positive = F.logsigmoid(logits) * (1 - p) ** 2
    negative = F.logsigmoid(-logits) * p**2 * (1 - targets) ** 4
    return -torch.where(targets == 1, positive, negative).sum()
