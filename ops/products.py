"""Matrix products in Triton of float32 tiles, rounded to the precision of an operator's inputs."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + a @ b, float32, with operands rounded to `dtype`, or of float32 to tf32 where PRECISION says so."""
    if PRECISION == "tf32":
        acc = tl.dot(a, b, acc, input_precision="tf32")
    else:
        acc = tl.dot(a.to(dtype), b.to(dtype), acc, input_precision="ieee")
    return acc
