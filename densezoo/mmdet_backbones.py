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
            if plugin["position"] != "after_conv2":
                raise ValueError(
                    f"plugins: got position {plugin['position']!r}, expected 'after_conv2', the end of a block of two "
                    "convolutions, or 'after_stage'"
                )
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
        ValueError: A plugin's position is none of these.
    """

    arch_settings = {
        depth: (_BasicBlock if block is resnet.BasicBlock else block, stages)
        for depth, (block, stages) in resnet.ResNet.arch_settings.items()
    }

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
    name, layer = build_plugin_layer(dict(plugin["cfg"]), postfix=plugin.get("postfix", ""), in_channels=channels)
    module.add_module(name, layer)
    return name
