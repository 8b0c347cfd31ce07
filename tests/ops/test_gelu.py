"""The GELU of kernels against its definition."""

import pytest
import torch
import triton
import triton.language as tl
from densezoo.ops import gelu

cuda = torch.cuda.is_available()


@triton.jit
def _apply(z, out, NARROW: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, gelu.gelu(tl.load(z + place), NARROW))


@triton.jit
def _exact_tanh(z):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * z))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("narrow, allowed", [(False, 1e-6), (True, 3e-4), (3, 3e-5)])
def test_fits(narrow, allowed, device, monkeypatch):
    """Also far from zero, where a fit's polynomials would leave the function."""
    if device == "cpu":
        if cuda:
            pytest.skip("the kernels run on the GPU")
        # The interpreter lacks the GPU's.
        monkeypatch.setattr(gelu, "_tanh", _exact_tanh)
    elif narrow:
        allowed += 5e-5  # what the GPU's tangent adds
    z = torch.cat([torch.linspace(-8, 8, 4000), torch.linspace(-300, 300, 96)]).to(device)
    out = torch.empty_like(z)
    _apply[(1,)](z, out, narrow, len(z))
    error = (out.double() - torch.nn.functional.gelu(z.double())).abs()
    # Of large numbers float32 keeps 24 bits.
    assert (error - 1e-7 * z.abs()).max() < allowed
