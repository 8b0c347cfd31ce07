"""Matrix products in Triton of float32 tiles, rounded to the precision of an operator's inputs."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + a @ b, float32, with operands rounded to `dtype`.

    Where that is float16, rows of `a` and columns of `b` are scaled by their largest entries if they are float32: what
    is computed on the chip may leave the range of float16, or lie among its subnormal numbers.
    """
    if dtype == tl.float16:
        if a.dtype == tl.float32 and b.dtype == tl.float32:
            top_a = tl.maximum(tl.max(tl.abs(a), 1), 1e-30)[:, None]
            top_b = tl.maximum(tl.max(tl.abs(b), 0), 1e-30)[None, :]
            acc += tl.dot((a / top_a).to(dtype), (b / top_b).to(dtype)) * top_a * top_b
        elif a.dtype == tl.float32:
            top_a = tl.maximum(tl.max(tl.abs(a), 1), 1e-30)[:, None]
            acc += tl.dot((a / top_a).to(dtype), b) * top_a
        elif b.dtype == tl.float32:
            top_b = tl.maximum(tl.max(tl.abs(b), 0), 1e-30)[None, :]
            acc += tl.dot(a, (b / top_b).to(dtype)) * top_b
        else:
            acc = tl.dot(a, b, acc)
    else:
        acc = tl.dot(a.to(dtype), b.to(dtype), acc, input_precision=PRECISION)
    return acc
