"""Cases of tools/benchmark.py, of attention in neighbourhoods and in windows, beside FlexAttention and SDPA."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from _benchmark_cases import Case, reference_ways, worst_error
from densezoo.ops import na2d, window_attention
from densezoo.ops.window.reference import window_attention_reference
from torch import Tensor


def na2d_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Neighbourhood attention, kernel 7 with bias: NAT-T's stages at 224 and 800x1216, and dilated ones of DiNAT-T."""
    shapes = [(128, 56, 56, 2, 1), (128, 28, 28, 4, 1), (128, 14, 14, 8, 1), (128, 56, 56, 2, 8)]
    shapes += [(2, 200, 304, 2, 1), (2, 100, 152, 4, 1), (2, 200, 304, 2, 28)]
    for batch, height, width, heads, dilation in shapes:
        qkv = torch.randn(batch, height, width, 3, heads, 32, device=device, dtype=dtype)
        inputs = (*qkv.unbind(3), torch.randn(heads, 13, 13, device=device))

        def run(q, k, v, rpb, dilation=dilation):
            return na2d(q, k, v, 7, dilation=dilation, rpb=rpb)

        ways = {"densezoo": run, **flex_ways(height, width, heads, dilation, device)}
        check = partial(worst_error, run, [t[:1] if t.dim() == 5 else t for t in inputs])
        yield Case(f"na2d {batch}, {height}x{width}, {heads}x32, dilation {dilation}", inputs, ways, check)


def flex_ways(height: int, width: int, heads: int, dilation: int, device: str) -> dict[str, Callable[..., Tensor]]:
    """Return FlexAttention's way to neighbourhood attention of kernel 7 with the bias."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def window(position, size):
        length = (size - position % dilation + dilation - 1) // dilation
        return torch.minimum((position // dilation - 3).clamp(min=0), length - 7)

    rows, cols = torch.arange(height, device=device), torch.arange(width, device=device)
    start_h, start_w = window(rows, height), window(cols, width)

    def near(q, k, start):
        return (q % dilation == k % dilation) & (k // dilation >= start[q]) & (k // dilation < start[q] + 7)

    def mask(b, h, q, k):
        return near(q // width, k // width, start_h) & near(q % width, k % width, start_w)

    # Compiled, it holds no mask of all pairs, but at 100x152 its compilation does not end.
    tokens = height * width
    blocks = create_block_mask(mask, None, None, tokens, tokens, device=device, _compile=tokens**2 > 2**30)
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(q, k, v, rpb):
        def bias(score, b, h, i, j):
            row = (j // width) // dilation - (i // width) // dilation + 6
            col = (j % width) // dilation - (i % width) // dilation + 6
            return score + rpb[h, row.clamp(0, 12), col.clamp(0, 12)]

        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, score_mod=bias, block_mask=blocks).transpose(1, 2)

    return {"FlexAttention": flex}


def window_attention_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Window attention with bias, with and without shift: Swin-T's stages at 224 and 800x1216, and windows of 8x8."""
    shapes = [(128, 56, 56, 3, 7), (128, 28, 28, 6, 7), (128, 14, 14, 12, 7), (2, 203, 308, 3, 7), (64, 64, 64, 3, 8)]
    for batch, height, width, heads, window in shapes:
        for shift in (0, window // 2):
            qkv = torch.randn(batch, height, width, 3 * heads * 32, device=device, dtype=dtype)
            inputs = (qkv, torch.randn(heads, 2 * window - 1, 2 * window - 1, device=device))

            def run(qkv, bias, heads=heads, window=window, shift=shift):
                return window_attention(qkv, bias, num_heads=heads, window_size=window, shift=shift)

            def reference(qkv, bias, heads=heads, window=window, shift=shift):
                pairs = ((window, window), (shift, shift))
                return window_attention_reference(qkv, bias, heads, *pairs, False, 32**-0.5)

            ways = {
                "densezoo": run,
                **reference_ways(reference),
                **sdpa_ways(height, width, heads, window, shift, device),
            }
            name = f"window_attention {batch}, {height}x{width}, {heads}x32, window {window}, shift {shift}"
            check = partial(worst_error, run, [inputs[0][:2], inputs[1]])
            yield Case(name, inputs, ways, check)


def sdpa_ways(
    height: int, width: int, heads: int, window: int, shift: int, device: str
) -> dict[str, Callable[..., Tensor]]:
    """Return window attention as Swin's users compile it: cyclic shift, partition, SDPA with bias and mask, merge."""
    place = torch.arange(window, device=device)
    entry = place[None, :] - place[:, None] + window - 1
    rows, cols = (
        torch.arange(size, device=device).roll(-shift) < shift for size in (height, width)
    )  # positions that the shift brought round
    run = 2 * rows[:, None].int() + cols[None, :].int()
    n, m = height // window, width // window
    run = run.view(n, window, m, window).transpose(1, 2).reshape(n * m, 1, window * window)
    mask = torch.where(run == run.mT, 0.0, -100.0)

    def sdpa(qkv, bias):
        batch = qkv.shape[0]
        x = qkv.roll((-shift, -shift), (1, 2)) if shift else qkv
        x = x.view(batch, n, window, m, window, 3, heads, 32).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = x.reshape(3, batch * n * m, heads, window * window, 32).unbind()
        attn_mask = bias[:, entry[:, None, :, None], entry[None, :, None, :]].flatten(3).flatten(1, 2)
        if shift:
            attn_mask = (attn_mask + mask[:, None]).repeat(batch, 1, 1, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask.to(q.dtype))
        out = out.view(batch, n, m, heads, window, window, 32).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(batch, height, width, heads * 32)
        return out.roll((shift, shift), (1, 2)) if shift else out

    return {"compiled SDPA": torch.compile(sdpa, dynamic=False)}
