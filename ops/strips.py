"""Convolutions down the rows of a strip in Triton, on tuples: a row's columns, the KERNEL rows at work, all taps."""

import triton
import triton.language as tl


@triton.jit
def wide(number, NARROW: tl.constexpr):
    """A number in float32. NARROW, beyond what LLVM sees: it would make pairs of such numbers, and take them apart."""
    if NARROW:
        asm: tl.constexpr = "{ .reg .b32 bits; cvt.u32.u16 bits, $1; shl.b32 $0, bits, 16; }"
        value = tl.inline_asm_elementwise(asm, "=r,h", [number], tl.float32, True, 1)
    else:
        value = number.to(tl.float32)
    return value


@triton.jit
def widen(numbers, COUNT: tl.constexpr, NARROW: tl.constexpr):
    """A row's numbers in float32."""
    new = ()
    for i in tl.static_range(COUNT):
        new = new + (wide(numbers[i], NARROW),)
    return new


@triton.jit
def spread(sums, row, taps, KERNEL: tl.constexpr, COLS: tl.constexpr):
    """Add a row's products to the sums of the KERNEL rows that it reaches."""
    new = ()
    for k in tl.static_range(KERNEL):
        for x in tl.static_range(COLS):
            value = sums[k * COLS + x]
            for j in tl.static_range(KERNEL):
                value = tl.fma(row[x + j], taps[(KERNEL - 1 - k) * KERNEL + j], value)
            new = new + (value,)
    return new


@triton.jit
def correlate(sums, window, row, KERNEL: tl.constexpr, COLS: tl.constexpr):
    """Add to each tap's sum the products of the numbers that it joins: KERNEL rows of inputs, one of gradients."""
    new = ()
    for k in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            value = sums[k * KERNEL + j]
            for x in tl.static_range(COLS):
                value = tl.fma(window[k * COLS + x], row[x + KERNEL - 1 - j], value)
            new = new + (value,)
    return new


@triton.jit
def move_on(rows, row, KERNEL: tl.constexpr, COLS: tl.constexpr):
    """Drop the first of KERNEL rows and take another as the last."""
    new = ()
    for i in tl.static_range(KERNEL * COLS - COLS):
        new = new + (rows[COLS + i],)
    for i in tl.static_range(COLS):
        new = new + (row[i],)
    return new
