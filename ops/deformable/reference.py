"""Multi-scale deformable attention in plain PyTorch: the CPU path, the export path and the truth for the kernels."""

import torch
import torch.nn.functional as F
from densezoo.ops.precision import widen, without_autocast
from torch import Tensor


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute `densezoo.ops.ms_deform_attn` level by level and corner by corner, all queries at once.

    The sizes of the levels stay tensors: nothing waits for the device, and an exported graph takes any pyramid. 16-bit
    inputs are computed in float32.
    """
    dtype = value.dtype
    value, locations, weights = widen(value, sampling_locations, attention_weights)
    batch, keys, heads, dim = value.shape
    # Row (b * keys + key) * heads + head of the table is a key's value; the last row is for what lies outside.
    table = F.pad(value.reshape(batch * keys * heads, dim), (0, 0, 0, 1))
    image = torch.arange(batch, device=value.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=value.device).view(-1, 1)
    out = 0
    for level, ((height, width), start) in enumerate(zip(spatial_shapes, level_start_index, strict=True)):
        x = locations[:, :, :, level, :, 0] * width - 0.5
        y = locations[:, :, :, level, :, 1] * height - 0.5
        top, left = y.detach().floor(), x.detach().floor()
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            row, column = top + i, left + j
            inside = (y > -1) & (x > -1) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            key = start + (row * width + column).where(inside, 0).long()
            inside = inside & (key >= 0) & (key < keys)
            place = ((image * keys + key) * heads + head).where(inside, batch * keys * heads)
            share = (y - top if i else 1 - y + top) * (x - left if j else 1 - x + left)
            # What is far outside, or nowhere, has no share to multiply the zeros by.
            share = (share * weights[:, :, :, level]).where(inside, 0)
            with without_autocast(value):
                out = out + (share.to(value.dtype)[..., None, :] @ F.embedding(place, table)).squeeze(-2)
    return out.flatten(2).to(dtype)
