"""FcaNet's multi-spectral channel attention."""

import math

import torch
from densezoo.ops.plugins.parts import pooled_basis, squeeze_mlp
from densezoo.ops.shapes import per_axis, positive
from torch import Tensor, nn

# The released code's choices: frequencies of a 7x7 grid, (along the height, along the width), the best first.
FREQUENCIES = {
    "top": (
        (0, 0, 6, 0, 0, 1, 1, 4, 5, 1, 3, 0, 0, 0, 3, 2, 4, 6, 3, 5, 5, 2, 6, 5, 5, 3, 3, 4, 2, 2, 6, 1),
        (0, 1, 0, 5, 2, 0, 2, 0, 0, 6, 0, 4, 6, 3, 5, 2, 6, 3, 3, 3, 5, 1, 1, 2, 4, 2, 1, 1, 3, 0, 5, 3),
    ),
    "low": ((0, 0, 1, 1, 0, 2, 2, 1, 2, 0, 3, 4, 0, 1, 3, 0), (0, 1, 0, 1, 2, 0, 1, 2, 2, 3, 0, 0, 4, 3, 1, 5)),
    "bot": ((6, 1, 3, 3, 2, 4, 1, 2, 4, 4, 5, 1, 4, 6, 2, 5), (6, 4, 4, 6, 6, 3, 1, 4, 4, 5, 6, 5, 2, 2, 5, 1)),
}
CHOICES = {f"{k}{n}": (h[:n], w[:n]) for k, (h, w) in FREQUENCIES.items() for n in (1, 2, 4, 8, 16, 32) if n <= len(h)}


class FCA(nn.Module):
    """FcaNet's multi-spectral channel attention (arXiv 2012.11879): SE with frequencies in the place of the mean.

    The channels are cut into as many groups as there are frequencies; a channel's number is its projection on its
    group's function of the two-dimensional DCT-II. A map of another size than the DCT's is first pooled to that size,
    averaging over what falls into each cell; both are one linear function, which reads the map once.

    The released code keeps the functions in its checkpoints (`dct_layer.weight`); here they are computed, and a file's
    are compared with them on loading.

    Args:
        channels: C.
        dct_size: Of the DCT, or (height, width); 7 at least. The released networks have 56, 28, 14 and 7 by stage.
        reduction: The two linear layers meet at C / reduction; a divisor of C.
        frequencies: Which, and how many: "top16" and others of `CHOICES`; the number divides C.

    Raises:
        ValueError: An argument is out of its range; says what the range is.
    """

    def __init__(
        self,
        channels: int,
        dct_size: int | tuple[int, int] = 7,
        reduction: int = 16,
        frequencies: str = "top16",
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if frequencies not in CHOICES:
            raise ValueError(f"frequencies: got {frequencies!r}, expected one of {', '.join(CHOICES)}")
        groups = len(CHOICES[frequencies][0])
        if positive("channels", channels) % groups:
            raise ValueError(f"channels: got {channels}, expected a multiple of {groups}, as in {frequencies!r}")
        if min(size := per_axis("dct_size", dct_size)) < 7:
            raise ValueError(f"dct_size: got {dct_size!r}, expected 7 at least, for the frequencies of a 7x7 grid")
        self.fc = squeeze_mlp(channels, reduction, device=device, dtype=dtype)
        place = torch.empty(0, device=device).device
        # No file holds them, which a model built on the meta device needs all the same.
        place = torch.device("cpu") if place.type == "meta" else place
        for name, frequency, n in zip(("rows", "columns"), CHOICES[frequencies], size, strict=True):
            basis = _cosines(frequency, n).to(place, dtype or torch.get_default_dtype())
            self.register_buffer(name, basis, persistent=False)
        self.register_load_state_dict_pre_hook(_pop_published)

    def check_published(self, weight: Tensor) -> None:
        """Raise ValueError where `weight`, the `dct_layer.weight` of a published file, is not what is computed here."""
        basis = (self.rows[:, :, None] * self.columns[:, None]).to(weight)
        width = self.fc[0].in_features // len(basis)
        expected = basis.repeat_interleave(width, 0)
        # The files went through half precision.
        if weight.shape != expected.shape or (weight - expected).abs().max() > 0.01 * expected.abs().max():
            raise ValueError(
                f"dct_layer.weight: {tuple(weight.shape)} is of another dct_size or other frequencies than this "
                f"module's, {tuple(expected.shape)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, C, H, W) to the same shape."""
        rows, columns = pooled_basis(self.rows, x.shape[2]), pooled_basis(self.columns, x.shape[3])
        basis = (rows[:, :, None] * columns[:, None]).flatten(1).to(x)
        groups = x.flatten(2).unflatten(1, (len(basis), -1))  # (B, frequencies, channels of each, H * W)
        return x * self.fc((groups @ basis[:, :, None]).flatten(1))[..., None, None]


def _cosines(frequency: tuple[int, ...], size: int) -> Tensor:
    """Return the orthonormal DCT-II's functions of one axis, (frequencies, size), in float64."""
    frequency = torch.tensor(frequency, dtype=torch.float64, device="cpu")[:, None] * (size // 7)
    position = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / size
    scale = torch.where(frequency == 0, 1.0, math.sqrt(2)) / math.sqrt(size)
    return scale * torch.cos(math.pi * frequency * position)


def _pop_published(module: FCA, state_dict: dict, prefix: str, *args) -> None:
    published = state_dict.pop(f"{prefix}dct_layer.weight", None)
    if published is not None:
        try:
            module.check_published(published)
        except ValueError as error:
            args[-1].append(f"{prefix}{error}")
