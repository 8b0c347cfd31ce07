"""The GELU and its derivative in Triton, of float32 numbers."""

import triton
import triton.language as tl


@triton.jit
def _tanh(z):
    """The GPU's own hyperbolic tangent, right to 5e-4; to 1e-5 on an H200."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], tl.float32, True, 1)


@triton.jit
def normal(z, NARROW: tl.constexpr):
    """Cumulative distribution of the normal distribution, z times which is right to 6e-7.

    If NARROW, for bfloat16, it takes one instruction of the few units for these, not two, and a fit right to 3e-4; 3
    asks for one of three terms, for float16, right to 3e-5. The error of the tangent comes besides.
    """
    s = z * z
    if NARROW == 3:
        # Beyond the bound the distribution is 0 or 1, and the fit would turn back.
        s = tl.minimum(s, 50.0)
        fit = tl.fma(tl.fma(s, -0.00035310623163507424, 0.03701543472710981), s, 0.7974971224372241)
        below = tl.fma(_tanh(z * fit), 0.5, 0.5)
    elif NARROW:
        below = tl.fma(_tanh(z * tl.fma(s, 0.03470101294052817, 0.8001568115708235)), 0.5, 0.5)
    else:
        # 1 / (1 + 2^(z p)), with a polynomial p of z^2 fitted to it: cheaper than erf, and the tails keep their digits.
        p = -5.209907543800543e-09 * s + 3.850449398212734e-07
        p = p * s - 1.1452428973382406e-05
        p = p * s + 1.5939940480161385e-04
        p = p * s + 9.559295651805719e-05
        p = p * s - 0.10483858127994435
        p = p * s - 2.302207203588972
        # Its square is fewer instructions than a division, which allows for numbers that do not occur.
        root = tl.rsqrt(1.0 + tl.exp2(z * p))
        below = root * root
    return below


@triton.jit
def gelu(z, NARROW: tl.constexpr):
    """GELU (arXiv 1606.08415) of float32 numbers; see `normal` for NARROW."""
    return z * normal(z, NARROW)


@triton.jit
def gelu_slope(z, below):
    """Derivative of the GELU, given the cumulative distribution."""
    # The density as a power of 2: -log2(e) / 2 and the logarithm of its value at 0.
    return tl.fma(z, tl.exp2(tl.fma(z * z, -0.7213475204444817, -1.3257480647361593)), below)
