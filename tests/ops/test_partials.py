"""Sums of partial tables."""

import pytest
import torch
from densezoo.ops.partials import total

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((1, 5), 0), ((70, 3), 0), ((2000, 10, 3), 0), ((65, 300), 0), ((2, 130, 4, 33), 1), ((3, 1, 7), 1)],
)
def test_total(shape, dim, dtype, device):
    partial = torch.randn(shape, dtype=dtype, device=device)
    found = total(partial, dim, factor=0.5)
    torch.testing.assert_close(found.double(), partial.double().sum(dim) / 2, rtol=1e-5, atol=1e-4)
    assert torch.equal(found, total(partial, dim, factor=0.5))
    # The interpreter cuts off where a GPU rounds.
    torch.testing.assert_close(total(partial, dim, torch.bfloat16, 0.5), found.bfloat16(), rtol=0.01, atol=0)
    out = torch.full_like(found, torch.nan)
    assert torch.equal(total(partial, dim, factor=0.5, out=out), found) and torch.equal(out, found)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_total_of_nothing(shape):
    assert torch.equal(total(torch.empty(shape)), torch.zeros(shape[1]))
