"""The zoo's operators: one folder each, with a public function, a plain-PyTorch reference and Triton kernels."""

from densezoo.ops.backend import get_backend, set_backend
from densezoo.ops.channel import channel_attention
from densezoo.ops.neighborhood import na2d
from densezoo.ops.window import window_attention

__all__ = ["channel_attention", "get_backend", "na2d", "set_backend", "window_attention"]
