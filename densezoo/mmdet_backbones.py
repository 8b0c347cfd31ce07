"""Backbones that extend mmdet's; `densezoo.openmmlab` imports this when a config names one."""

from collections.abc import Sequence

from mmcv.cnn import build_plugin_layer
from mmdet.models.backbones import resnet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from densezoo.openmmlab import MODELS


class _BasicBlock(resnet.BasicBlock):
    """mmdet's block of ResNet-18 and 34, with plugins after the last norm, before the shortcut is added."""

    def __init__(self, inplanes: int, planes: int, *args, plugins: Sequence[dict] | None = None, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        self.plugin_names = []
        for plugin in plugins or ():
            self.plugin_names.append(_add_plugin(self, plugin, planes))

    def forward(self, x: Tensor) -> Tensor:
        """Take (B, inplanes, H, W) to (B, planes, H / stride, W / stride)."""
        out = checkpoint(self._add, x, use_reentrant=False) if self.with_cp and x.requires_grad else self._add(x)
        return self.relu(out)

    def _add(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        for name in self.plugin_names:
            out = getattr(self, name)(out)
        return out + (x if self.downsample is None else self.downsample(x))


@MODELS.register_module(force=True)
class PluginResNet(resnet.ResNet):
    """mmdet's ResNet that takes plugins at every depth, and between its stages.

    mmdet's own takes them from ResNet-50 on, in every block: at `after_conv1`, `after_conv2` or `after_conv3`. Here the
    blocks of ResNet-18 and 34 take them at `after_conv2`, and any depth at `after_stage`: once, after the stage's last
    block, as BAM and DAS are published. Without plugins it is mmdet's, but that the last norms of the blocks of
    ResNet-18 and 34 start at one. Arguments are mmdet's.

    Raises:
        ValueError: A plugin has none of these positions or not one entry of `stages` a stage, or two are alike.
    """

    arch_settings = {
        depth: (_BasicBlock if block is resnet.BasicBlock else block, stages)
        for depth, (block, stages) in resnet.ResNet.arch_settings.items()
    }

    def make_stage_plugins(self, plugins: Sequence[dict], stage_idx: int) -> list[dict]:
        """Return the plugins of a stage, as mmdet calls it."""
        inside = ("after_conv2",) if self.block is _BasicBlock else ("after_conv1", "after_conv2", "after_conv3")
        positions = (*inside, "after_stage")
        for plugin in plugins:
            position, stages = plugin.get("position"), plugin.get("stages")
            if position not in positions:
                raise ValueError(
                    f"plugins: got position {position!r} for ResNet-{self.depth}, expected one of {positions}"
                )
            if stages is not None and len(stages) != self.num_stages:
                raise ValueError(f"plugins: got stages {stages!r}, expected {self.num_stages} of them, True or False")
        return super().make_stage_plugins(plugins, stage_idx)

    def make_res_layer(self, plugins: Sequence[dict] | None = None, **kwargs) -> nn.Sequential:
        """Return a stage, as mmdet calls it, and what comes after it."""
        inside = [plugin for plugin in plugins or () if plugin["position"] != "after_stage"]
        stage = super().make_res_layer(plugins=inside or None, **kwargs)
        for plugin in plugins or ():
            if plugin["position"] == "after_stage":
                _add_plugin(stage, plugin, kwargs["planes"] * self.block.expansion)
        return stage


def _add_plugin(module: nn.Module, plugin: dict, channels: int) -> str:
    """Add a plugin layer to a module; return its name there."""
    cfg = dict(plugin["cfg"])
    name, layer = build_plugin_layer(cfg, postfix=cfg.pop("postfix", ""), in_channels=channels)
    if hasattr(module, name):
        raise ValueError(f"plugins: got two called {name!r} in one place, expected each with its 'postfix' in `cfg`")
    module.add_module(name, layer)
    return name
