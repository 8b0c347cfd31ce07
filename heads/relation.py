"""Relation-DETR's position relation, for the self-attention of detection transformers."""

import torch
from densezoo.ops.shapes import positive
from torch import Tensor, nn


class PositionRelation(nn.Module):
    """Relation-DETR's position relation (arXiv 2407.11699): a bias of self-attention from pairs of boxes.

    Published at github.com/xiuqhou/Relation-DETR (Apache-2.0); parameters are named as there. Boxes get no gradients.

    Args:
        num_heads: Of the attention.
        embed_dim: Width of the sine code of each of four numbers, even: the distances of centres, as multiples of the
            first box, and the ratios of sides, by their logarithms.
        temperature: Ratio of the code's longest wave to its shortest, nearly.
        scale: Factor of the numbers before they are coded.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, num_heads: int = 8, embed_dim: int = 16, temperature: float = 10000.0, scale: float = 100.0):
        super().__init__()
        positive("num_heads", num_heads)
        if positive("embed_dim", embed_dim) % 2:
            raise ValueError(f"embed_dim: got {embed_dim}, expected a positive even number, for sines and cosines")
        self.pos_proj = nn.Sequential(nn.Conv2d(4 * embed_dim, num_heads, 1), nn.ReLU())
        frequencies = scale * temperature ** -(torch.arange(0, embed_dim, 2) / embed_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, boxes: Tensor, others: Tensor) -> Tensor:
        """Relate boxes (B, N, 4) to others (B, M, 4), each cx, cy, w, h, normalised; return (B, num_heads, N, M)."""
        for name, value in (("boxes", boxes), ("others", others)):
            if value.ndim != 3 or value.shape[2] != 4:
                raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected (B, N, 4)")
        with torch.no_grad():
            angles = box_relations(boxes.float(), others.float())[..., None] * self.frequencies
            code = torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)
        return self.pos_proj(code.permute(0, 3, 1, 2))


def box_relations(boxes: Tensor, others: Tensor, eps: float = 1e-5) -> Tensor:
    """Return log(distance / own side + 1) of both axes and log(own side / other side), (B, N, M, 4)."""
    (centers, sides), (other_centers, other_sides) = (x.split(2, -1) for x in (boxes, others))
    sides, other_sides = sides[:, :, None] + eps, other_sides[:, None] + eps
    distances = (centers[:, :, None] - other_centers[:, None]).abs()
    return torch.cat([(distances / sides).log1p(), (sides / other_sides).log()], -1)
