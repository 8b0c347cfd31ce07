"""Matrix products in Triton of float32 tiles, rounded to the precision of an operator's inputs."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + a @ b, float32, of operands rounded to `dtype`, or to tf32 where PRECISION says so.

    Of float32 numbers three products in tf32 ("tf32x3") are as accurate as one in float32, and faster on tensor cores.
    """
    if PRECISION == "tf32":
        acc = tl.dot(a, b, acc, input_precision="tf32")
    else:
        acc = tl.dot(a.to(dtype), b.to(dtype), acc, input_precision=PRECISION)
    return acc
