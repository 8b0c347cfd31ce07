"""What tests of operators rely on."""

import pytest
import torch
from densezoo.ops import get_backend, set_backend


@pytest.fixture(autouse=True)
def restore_backend():
    before = get_backend()
    yield
    set_backend(before)


@pytest.fixture(autouse=True)
def release_memory():
    """Leave the memory of large tensors to other processes' tests on the same GPU."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**32:
        torch.cuda.empty_cache()


@pytest.fixture
def nan_filled_memory():
    """Fill uninitialised memory with NaN, so that an element which a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
