"""Convolutions down the rows of a strip in Triton, on tuples: a row's columns, the KERNEL rows at work, all taps."""

import triton
import triton.language as tl


@triton.jit
def wide(number, NARROW: tl.constexpr):
    """A number in float32. NARROW, beyond what LLVM sees: it would make pairs of such numbers, and take them apart."""
    if NARROW:
        bfloat: tl.constexpr = "{ .reg .b32 bits; cvt.u32.u16 bits, $1; shl.b32 $0, bits, 16; }"
        asm: tl.constexpr = bfloat if number.dtype == tl.bfloat16 else "cvt.f32.f16 $0, $1;"
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


@triton.jit
def repeat(value, COUNT: tl.constexpr):
    """A tuple of COUNT times the value."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (value,)
    return values


@triton.jit
def fetch(
    x, image, row, left, c, height, width, channels, stride_b, stride_h, stride_w, COLS: tl.constexpr,
    CHANNELS: tl.constexpr, INDEX: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Bring a strip's row AHEAD rows on into the L2 cache, 32 bytes a thread."""
    SECTOR: tl.constexpr = 256 // x.dtype.element_ty.primitive_bitwidth
    if AHEAD > 0 and CHANNELS >= 32:
        row = tl.minimum(row + AHEAD, height - 1)
        lane = tl.arange(0, CHANNELS)[None, :]
        column = tl.minimum(left + tl.minimum(lane % SECTOR, COLS - 1), width - 1)
        channel = tl.minimum(c - lane + lane // SECTOR * SECTOR, channels - 1)
        at = x + image * stride_b + row.to(INDEX) * stride_h + (column.to(INDEX) * stride_w + channel)
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l", [at.to(tl.int64)], tl.int32, False, 1)
