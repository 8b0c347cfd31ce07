"""Heads of `densezoo.heads` in mmseg's segmentors; `densezoo.openmmlab` imports this when a config names one."""

from collections.abc import Sequence

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from densezoo.heads.fpenet import MEUDecoder
from densezoo.heads.p2at import P2ATDecoder, P2ATPredictor
from densezoo.openmmlab import MODELS


@MODELS.register_module(force=True)
class MEUHead(BaseDecodeHead):
    """FPENet's decoder (arXiv 1909.08599).

    Args:
        in_channels: Width of each level of `in_index`, finest first.
        channels: Width of the decoder.
        kwargs: Those of mmseg's BaseDecodeHead; `in_index` says which levels.

    Raises:
        ValueError: There are not two levels or more, or `in_index` has not one for each.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 64, **kwargs):
        _check_levels(in_channels, **kwargs)
        super().__init__(in_channels, channels, input_transform="multiple_select", **kwargs)
        self.decoder = MEUDecoder(in_channels, channels)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Take levels (B, in_channels[i], H_i, W_i) to logits (B, num_classes, H_0, W_0)."""
        return self.cls_seg(self.decoder(self._transform_inputs(inputs)))


@MODELS.register_module(force=True)
class P2ATHead(BaseDecodeHead):
    """P2AT's decoder (arXiv 2310.15025), with the losses of its two auxiliary predictions.

    Args:
        in_channels: Width of the four levels, finest first.
        channels: Width of the decoder.
        decoder: Other arguments of `densezoo.heads.p2at.P2ATDecoder`.
        aux_weight: Of each auxiliary loss.
        kwargs: Those of mmseg's BaseDecodeHead; `in_index` says which levels.

    Raises:
        ValueError: There are not four levels, or `in_index` has not one for each.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 64,
        decoder: dict | None = None,
        aux_weight: float = 0.4,
        **kwargs,
    ):
        _check_levels(in_channels, **kwargs)
        kwargs = dict(dropout_ratio=0, init_cfg=None) | kwargs
        super().__init__(in_channels, channels, input_transform="multiple_select", **kwargs)
        self.aux_weight = aux_weight
        self.decoder = P2ATDecoder(in_channels, channels, **(decoder or {}))
        self.conv_seg = P2ATPredictor(channels, self.out_channels)
        self.aux_segs = nn.ModuleList(P2ATPredictor(channels, self.out_channels) for _ in range(2))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Take levels (B, in_channels[i], H_i, W_i) to logits (B, num_classes, H_0, W_0)."""
        return self.cls_seg(self.decoder(self._transform_inputs(inputs))[0])

    def loss(self, inputs: Sequence[Tensor], batch_data_samples: list, train_cfg: dict) -> dict[str, Tensor]:
        """Return the loss, and under `aux_0` and `aux_1` those of the auxiliary predictions."""
        x, fused = self.decoder(self._transform_inputs(inputs))
        losses = self.loss_by_feat(self.cls_seg(x), batch_data_samples)
        for i, (predict, aux) in enumerate(zip(self.aux_segs, fused, strict=True)):
            for name, value in self.loss_by_feat(predict(aux), batch_data_samples).items():
                losses[f"aux_{i}.{name}"] = value * self.aux_weight if "loss" in name else value
        return losses


def _check_levels(in_channels: Sequence[int], in_index: Sequence[int] | None = None, **_) -> None:
    """Raise ValueError where `in_index` does not say which level each width of `in_channels` is of."""
    are_lists = isinstance(in_channels, Sequence) and isinstance(in_index, Sequence)
    if not are_lists or len(in_channels) != len(in_index):
        raise ValueError(f"in_index: got {in_index!r}, expected a level for each width of in_channels, {in_channels!r}")
