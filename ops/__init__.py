"""The zoo's operators: one folder each, with a public function, a plain-PyTorch reference and Triton kernels."""

from densezoo.ops.agent import agent_attention
from densezoo.ops.backend import get_backend, set_backend
from densezoo.ops.channel import channel_attention, channel_attention_qkv
from densezoo.ops.deformable import ms_deform_attn
from densezoo.ops.depthwise import depthwise_conv
from densezoo.ops.focal import focal_modulation
from densezoo.ops.linear import focused_linear_attention
from densezoo.ops.mbconv import activated_conv, activated_conv_mean
from densezoo.ops.mlp import mlp
from densezoo.ops.neighborhood import na2d, na2d_qkv
from densezoo.ops.norm import layer_norm
from densezoo.ops.pooling import pool_mix
from densezoo.ops.quadtree import quadtree_attention
from densezoo.ops.window import window_attention

__all__ = [
    "activated_conv",
    "activated_conv_mean",
    "agent_attention",
    "channel_attention",
    "channel_attention_qkv",
    "depthwise_conv",
    "focal_modulation",
    "focused_linear_attention",
    "get_backend",
    "layer_norm",
    "mlp",
    "ms_deform_attn",
    "na2d",
    "na2d_qkv",
    "pool_mix",
    "quadtree_attention",
    "set_backend",
    "window_attention",
]
