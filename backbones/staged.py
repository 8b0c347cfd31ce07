"""What timm expects of a backbone, written once for every family that is a stem and stages."""

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from densezoo.ops.backend import is_exporting
from densezoo.ops.precision import widen, without_autocast
from timm.layers import create_classifier
from timm.models import checkpoint_seq, clean_state_dict
from timm.models._features import feature_take_indices
from torch import Tensor, nn

_log = logging.getLogger("densezoo")

ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
"""What training code saves a state dict under; averaged weights first, as in timm."""


def pad_map(x: Tensor, height: int | torch.SymInt, width: int | torch.SymInt) -> Tensor:
    """Zero-pad a map (B, H, W, C) at the bottom and right to (B, height, width, C); nothing happens where it fits.

    An exported graph always pads, by nothing where the size fits: a branch would fix the exported sizes.
    """
    if is_exporting() or (height, width) != x.shape[1:3]:
        x = F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    return x


def crop_map(x: Tensor, height: int | torch.SymInt, width: int | torch.SymInt) -> Tensor:
    """Cut a map (B, H, W, C) to its first `height` rows and `width` columns: a view, or a copy in an exported graph.

    Export asks of a view whether it is contiguous, and the answer would fix the exported sizes.
    """
    if is_exporting():
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        return x.index_select(1, rows).index_select(2, columns)
    return x[:, :height, :width]


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad a map (B, H, W, C) at the bottom and right until both sides divide by `multiple`."""
    height, width = ((size + multiple - 1) // multiple * multiple for size in x.shape[1:3])
    return pad_map(x, height, width)


def convolve(conv: nn.Conv2d, x: Tensor, pads: tuple[int | torch.SymInt, ...] | None = None) -> Tensor:
    """Apply a convolution to a map (B, H, W, C).

    That of an image is a product of matrices in a compiled graph: cuDNN takes passes of its own to pad three channels,
    and 0.55 ms for the gradient of a weight over 4x4 patches at 800x1216, batch 2, whose operands are read in 10 us.

    Args:
        pads: Of a convolution that pads by itself, what it adds before and after columns, and before and after rows.
    """
    if x.shape[-1] % 8 == 0 or is_exporting() or not torch.compiler.is_compiling():
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    (rows, columns), (top, left) = conv.kernel_size, conv.padding
    x = F.pad(x, (0, 0, *(pads or (left, left, top, top))))
    patches = x.unfold(1, rows, conv.stride[0]).unfold(2, columns, conv.stride[1]).flatten(3)
    weight = conv.weight.flatten(1)
    # Tensor cores read eight numbers at a time.
    extra = -weight.shape[1] % 8
    return F.linear(F.pad(patches, (0, extra)), F.pad(weight, (0, extra)), conv.bias)


def resize_tokens(
    tokens: Tensor, height: int | torch.SymInt, width: int | torch.SymInt, mode: str = "bicubic"
) -> Tensor:
    """Resize a learned table of a square map (1, side * side, C) to (1, height * width, C), row by row.

    The same tensor comes back where the size fits; an exported graph always resizes, which then changes nothing.
    """
    side = math.isqrt(tokens.shape[1])
    return resize_table(tokens.unflatten(1, (side, side)), {1: height, 2: width}, mode).flatten(1, 2)


def resize_table(table: Tensor, sizes: Mapping[int, int | torch.SymInt], mode: str = "bilinear") -> Tensor:
    """Resize axes of a learned table as F.interpolate does without aligned corners, by a product for each axis.

    The gradient of a product is another one; that of F.interpolate is summed by atomics, slowly and in any order. Where
    no gradients are wanted it is F.interpolate, and in an exported graph, there where the size fits too, which changes
    nothing: views for products would bound it.

    Args:
        table: Any shape; 16-bit tables are resized in float32, under autocast too, whose dtype the gradient's products
            have in a compiled backward alone.
        sizes: New size of one axis or two, counted from 0.
        mode: "bilinear" or "bicubic", each axis on its own.

    Returns:
        A table of `table`'s dtype.
    """
    if not is_exporting() and all(size == table.shape[axis] for axis, size in sizes.items()):
        return table
    if is_exporting() or not torch.is_grad_enabled():
        return _interpolate(table, sizes, mode)
    (x,) = widen(table)
    with without_autocast(x):
        for axis, size in sizes.items():
            if size == x.shape[axis]:
                continue
            weights = _interpolation(x.shape[axis], size, mode, x)
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            x = x.reshape(math.prod(before), x.shape[axis], math.prod(after))
            x = F.linear(x[..., 0], weights) if x.shape[2] == 1 else weights.expand(x.shape[0], -1, -1).bmm(x)
            x = x.view(*before, size, *after)
    return x.to(table.dtype)


def _interpolate(table: Tensor, sizes: Mapping[int, int | torch.SymInt], mode: str) -> Tensor:
    """Compute `resize_table` with torch's operator."""
    last = tuple(range(-len(sizes), 0))
    x = table.movedim(tuple(sizes), last)
    shape = x.shape[: -len(sizes)]
    # The strides that a channels-last table gives its result depend on the size.
    x = x.reshape(1, -1, x.shape[len(shape)], 1 if len(sizes) == 1 else x.shape[-1]).contiguous()
    x = F.interpolate(x, size=(*sizes.values(), 1)[:2], mode=mode, align_corners=False)
    x = x[0].unflatten(0, shape)
    return (x.squeeze(-1) if len(sizes) == 1 else x).movedim(last, tuple(sizes))


def _interpolation(side: int | torch.SymInt, size: int | torch.SymInt, mode: str, like: Tensor) -> Tensor:
    """Return the weight of each of `side` entries in each of `size` places, (size, side): what single ones become."""
    single = torch.eye(side, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(single, size=(size, side), mode=mode, align_corners=False)[0, 0]


def check_per_stage(depths: Sequence[int], **values: Sequence) -> None:
    """Raise ValueError for an argument that has not one value per stage, as `depths` has."""
    for name, value in values.items():
        if not isinstance(value, Sequence) or len(value) != len(depths):
            raise ValueError(f"{name}: got {value!r}, expected one value per stage, as depths {depths!r}")


def check_out_norms(out_norms: Sequence[int], stages: int) -> None:
    """Raise ValueError where `out_norms` are not stage indices."""
    if not isinstance(out_norms, Sequence) or not set(out_norms) <= set(range(stages)):
        raise ValueError(f"out_norms: got {out_norms!r}, expected stage indices from 0 to {stages - 1}")


def square_side(img_size: int | Sequence[int]) -> int:
    """Return the side of square images, given as one number or two equal ones; raise ValueError for anything else."""
    sides = tuple(img_size) if isinstance(img_size, Sequence) else (img_size,) * 2
    if not all(isinstance(side, int) and side >= 32 for side in sides) or len(sides) != 2 or len(set(sides)) != 1:
        raise ValueError(
            f"img_size: got {img_size!r}, expected one side, from 32 on; images of any size work with it, square or not"
        )
    return sides[0]


class Blocks(nn.Sequential):
    """The blocks of a stage; with `grad_checkpointing` each is recomputed in the backward instead of stored.

    `feedback`, where a recursive neck has set it, is a map of the output's shape; it is added after the first block.
    """

    grad_checkpointing = False
    feedback: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks in order."""
        for i, block in enumerate(self):
            x = checkpoint_seq([block], x) if self.grad_checkpointing else block(x)
            if i == 0 and self.feedback is not None:
                x = x + self.feedback
        return x


class StagedBackbone(nn.Module):
    """A stem and stages, with timm's model contract, over channels-last maps or, where `output_fmt` says so, "NCHW".

    A family's class builds `patch_embed` and its stages (their blocks in `Blocks`) under the published names, lists the
    stages in `feature_info`, then calls `build_head`. It defines `forward_stage`, `keep_stages` and `group_matcher`.

    With `out_norms` the model has the *dense layout* of the published detection and segmentation backbones: a LayerNorm
    `norm{i}` on the output of each stage listed, and neither the final `norm` nor the `head`.
    """

    output_fmt = "NHWC"
    # Parts of the names of the parameters that no recipe decays, beside norms and biases.
    position_tables = ("rpb",)

    def build_head(
        self,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        out_norms: Sequence[int],
        norm_eps: float = 1e-5,
        pool_first: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
    ) -> None:
        """Build what follows the stages: the output norms, or the final norm, pooling and classifier.

        With `pool_first` the final norm comes after the pooling: features are raw, and `forward_head` applies it.
        """
        self.num_stages = len(self.feature_info)
        check_out_norms(out_norms, self.num_stages)
        self.out_norms = tuple(sorted(set(out_norms)))
        for i in self.out_norms:
            self.add_module(f"norm{i}", norm_layer(self.feature_info[i]["num_chs"], eps=norm_eps))
        self.num_features = self.feature_info[-1]["num_chs"]
        self.norm = nn.Identity() if out_norms else norm_layer(self.num_features, eps=norm_eps)
        self.pool_first = pool_first
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.reset_classifier(0 if out_norms else num_classes, global_pool)

    def forward_stage(self, i: int, x: Tensor) -> Tensor:
        """Take the output of stage `i - 1` (of the stem for the first) to the output of stage `i`."""
        raise NotImplementedError

    def keep_stages(self, count: int) -> None:
        """Drop every parameter that only the stages after the first `count` use."""
        raise NotImplementedError

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of the position tables."""
        tables = set(self.position_tables)
        return {name for name, _ in self.named_parameters() if tables & set(name.split("."))}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch activation checkpointing of every block."""
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, Blocks):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier, an Identity where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier (0 classes: none) and, where given, the pooling ('' returns the map (B, H, W, C)).

        Raises:
            ValueError: `global_pool` changes the width, and the final norm comes after it.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        if self.pool_first and pool == "catavgmax":
            raise ValueError(
                "global_pool: got 'catavgmax', expected a pooling that keeps the width, for the norm after it"
            )
        self.num_classes = num_classes
        self.global_pool, self.head_drop, self.head = create_classifier(
            self.num_features, num_classes, pool_type=pool, input_fmt=self.output_fmt, drop_rate=self.drop_rate
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        init_weights(self.head)
        weight = next(self.parameters())
        self.head.to(weight.device, weight.dtype)
        for module in (self.global_pool, self.head_drop, self.head):
            module.train(self.training)

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
        """Return the features and the outputs of stages, each through its `norm{i}` where the model has one, else raw.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Stages wanted: all if None, the last n if int, else their indices (negative from the end).
            norm: Whether the last stage's output takes the final norm.
            stop_early: Whether to skip the stages after the last one wanted; its output is then the features.
            output_fmt: 'NCHW' or 'NHWC', of the stage outputs.
            intermediates_only: Whether to leave the features out.
            output_dict: Whether to return {'image_features': ..., 'image_intermediates': [...]}.

        Raises:
            ValueError: `output_fmt` is neither.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW' or 'NHWC'")
        wanted, last = feature_take_indices(self.num_stages, indices)
        intermediates = []
        x = self.patch_embed(x)
        for i in range(last + 1 if stop_early else self.num_stages):
            x = self.forward_stage(i, x)
            if i in wanted:
                out = self.norm_output(i, x, final_norm=norm)
                if output_fmt != self.output_fmt:
                    out = out.permute(0, 3, 1, 2) if output_fmt == "NCHW" else out.permute(0, 2, 3, 1)
                # Contiguous: compiled detection operators read NCHW memory whatever the strides say.
                intermediates.append(out.contiguous() if output_fmt == "NCHW" else out)
        if intermediates_only:
            return {"image_intermediates": intermediates} if output_dict else intermediates
        x = self.norm_output(i, x)
        return {"image_features": x, "image_intermediates": intermediates} if output_dict else (x, intermediates)

    def norm_output(self, i: int, x: Tensor, final_norm: bool = True) -> Tensor:
        """Apply what norm the model has for the output of stage `i`."""
        if i in self.out_norms:
            return self.get_submodule(f"norm{i}")(x)
        return self.norm(x) if final_norm and not self.pool_first and i == self.num_stages - 1 else x

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the outputs of the stages wanted do not need; return their indices."""
        wanted, last = feature_take_indices(self.num_stages, indices)
        ends_early = last < self.num_stages - 1
        for i in set(self.out_norms) - set(wanted):
            delattr(self, f"norm{i}")
        self.out_norms = tuple(i for i in self.out_norms if i in wanted)
        if ends_early:
            self.keep_stages(last + 1)
            self.num_stages = last + 1
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_norm or ends_early:
            self.norm = nn.Identity()
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Take images (B, in_chans, H, W) to the last stage's map (B, H', W', C), normed except with `pool_first`."""
        x = self.patch_embed(x)
        for i in range(self.num_stages):
            x = self.forward_stage(i, x)
        return self.norm_output(self.num_stages - 1, x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map (B, H', W', C) and classify it."""
        x = self.global_pool(x)
        if self.pool_first:
            x = self.norm(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Take images (B, in_chans, H, W) to logits (B, num_classes); to the pooled or plain map without classifier."""
        return self.forward_head(self.forward_features(x))


def init_weights(module: nn.Module) -> None:
    """Initialise one module as the transformers of this zoo do: Linear truncated normal 0.02 with zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def rename_keys(state_dict: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    """Return `state_dict` with every key rewritten by the regular expressions of `rules`, one after another."""
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def pretrained_filter(convert: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]) -> Callable:
    """Return a family's `checkpoint_filter_fn` as what timm calls for `pretrained=True`.

    timm hands a download over as it was saved, and lets gaps pass wherever the classifier is not loaded: with other
    `num_classes` or `features_only`. This one takes the weights out, says how many match, and raises ValueError where
    any but the classifier's, which timm sees to, are missing or unknown.
    """

    @functools.wraps(convert)
    def filter_fn(checkpoint: dict, model: nn.Module) -> dict[str, Tensor]:
        entries = (checkpoint[key] for key in ENTRIES if isinstance(checkpoint.get(key), Mapping) and checkpoint[key])
        converted, own = convert(clean_state_dict(next(entries, checkpoint)), model), model.state_dict()
        # A classifier's file has no norms for dense outputs.
        fresh = model.out_norms and not any(re.match(r"norm\d+\.", name) for name in converted)
        optional = r"(head|norm\d+)\." if fresh else r"head\."
        missing = [name for name in own if name not in converted and not re.match(optional, name)]
        unknown = [name for name in converted if name not in own and not re.match(r"(head|norm\d*)\.", name)]
        cfg = model.pretrained_cfg
        source = cfg.get("file") or cfg.get("url") or cfg.get("hf_hub_id")
        matched = sum(name in converted and converted[name].shape == value.shape for name, value in own.items())
        report = f"{source}: {matched} of {len(own)} tensors of this {type(model).__name__} match"
        if missing or unknown:
            named = [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unknown]
            raise ValueError(f"{report}; {', '.join(named[:4])}{', ...' if len(named) > 4 else ''}")
        _log.info(report)
        return converted

    return filter_fn
