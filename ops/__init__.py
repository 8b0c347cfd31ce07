"""The zoo's operators: one folder each, with a public function, a plain-PyTorch reference and Triton kernels."""

from densezoo.ops.backend import get_backend, set_backend
from densezoo.ops.neighborhood import na2d

__all__ = ["get_backend", "na2d", "set_backend"]
