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


@pytest.fixture
def check_cuda_graph():
    """A check that `step`, which returns tensors, computes the same when a CUDA graph replays it."""

    def check(step):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

    return check
