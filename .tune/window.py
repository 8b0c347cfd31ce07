"""Times candidate launch settings of window attention's kernels at the benchmark's shapes. python3 .tune/window.py"""
import os, sys, time
T0 = time.time()
sys.path.insert(0, os.getcwd())
import torch
from triton.testing import do_bench

try:
    import densezoo.ops.window.kernels as K
except ImportError:  # not installed: map the folders as pyproject.toml does
    import types
    for name, path in (("densezoo", "densezoo"), ("densezoo.ops", "ops")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]
    import densezoo.ops.window.kernels as K
from densezoo.ops.window.reference import window_attention_reference as reference

L = K._Launch
BW = 4.2e6
FORWARD = [L(4, 2, 1, 128), L(4, 3, 1, 128), L(4, 2, 1, 96), L(4, 2, 1), L(2, 2, 1)]
BACKWARD = [L(4, 2, 1), L(4, 2, 1, 168), L(4, 1, 1, 168), L(4, 2, 1, 128)]
PROGRAMS = {"forward_whole": (4, 8, 16), "backward_whole": (2, 3, 6, 12)}
SHAPES = [(128, 56, 56, 3, 7), (128, 28, 28, 6, 7), (128, 14, 14, 12, 7), (2, 203, 308, 3, 7), (64, 64, 64, 3, 8)]


def err(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def bench(f):
    return do_bench(f, warmup=5, rep=20, return_mode="median") * 1e3


def check(title, qkv, bias, args, backward_too=True):
    try:
        small = qkv[:2]
        ref = [small.double().requires_grad_(), bias.double().requires_grad_()]
        o = reference(*ref, *args)
        g = torch.randn_like(o)
        expected = [o, *torch.autograd.grad(o, ref, g)]
        opt = (args[0], list(args[1]), list(args[2]), *args[3:])
        out, lse = K._window_attention(small, bias, *opt)
        got = [out, *K._window_attention_backward(g.to(small.dtype), small, bias, out, lse, *opt)]
        print(f"  {title}: errors out, qkv, bias: " + " ".join(f"{err(a, b):.1e}" for a, b in zip(got, expected)), flush=True)
    except Exception as e:
        print(f"  {title}: FAILED {type(e).__name__}: {str(e).splitlines()[-1][:200]}", flush=True)


def sweep(name, candidates, run, floor, title):
    before, rows = K.LAUNCH[name], []
    for c in candidates:
        for programs in PROGRAMS[name]:
            K.LAUNCH[name] = c._replace(programs=programs)
            try:
                run()
                rows.append((bench(run), tuple(K.LAUNCH[name])))
            except Exception as e:
                print(f"  {title} {tuple(c)}: {type(e).__name__}: {str(e).splitlines()[-1][:160]}", flush=True)
                break
    K.LAUNCH[name] = before
    rows.sort()
    best = {}
    for us, c in rows:  # best programs of every (warps, stages, registers)
        best.setdefault((c[0], c[1], c[3]), f"{c}: {us:.1f} ({us / floor:.2f})")
    print(f"{title} {name}: floor {floor:.1f} | " + " | ".join(best.values()) + f"  [{time.time() - T0:.0f}s]", flush=True)


src = torch.randn(2**28, device="cuda"); dst = torch.empty_like(src)
print(f"copy {2 * src.nbytes / bench(lambda: dst.copy_(src)) / 1e6:.2f} TB/s; (warps, stages, programs an SM, registers)")
del src, dst
for B, H, W, h, w in SHAPES:
    for shift in (0, w // 2):
        qkv = torch.randn(B, H, W, 96 * h, device="cuda", dtype=torch.bfloat16)
        bias = torch.randn(h, 2 * w - 1, 2 * w - 1, device="cuda")
        args = (h, (w, w), (shift, shift), False, 32**-0.5)
        opt = (args[0], list(args[1]), list(args[2]), *args[3:])
        title = f"{B}x{H}x{W}x{h} window {w} shift {shift}"
        if shift or w == 8:
            check(title, qkv, bias, args)
        out, lse = K._window_attention(qkv, bias, *opt)
        grad = torch.randn_like(out)
        floor = (qkv.nbytes + out.nbytes) / BW
        late = (B, H) not in ((128, 56), (128, 14), (2, 203))  # the other shapes: the first candidates alone
        sweep("forward_whole", FORWARD[:3] if late else FORWARD, lambda: K._window_attention(qkv, bias, *opt), floor, title)
        # The kernel with the sum of its partials, as the benchmark counts it.
        sweep("backward_whole", BACKWARD[:2] if late else BACKWARD,
              lambda: K._window_attention_backward(grad, qkv, bias, out, lse, *opt), 2 * floor, title)
for fn in (K._forward_whole, K._backward_whole):  # what the driver says of registers and spills
    for cache in fn.device_caches.values():
        print(fn.__name__, sorted({(c.metadata.num_warps, c.metadata.num_stages, c.metadata.maxnreg, "regs", c.n_regs,
                                    "spills", c.n_spills, "shared", c.metadata.shared) for c in cache[0].values()}, key=str))
for setting in ((2, 28, 28, 4, 14, 7), (2, 48, 48, 2, 12, 12), (2, 40, 56, 2, 40, 2)):  # windows of several tiles
    B, H, W, h, *win = setting
    qkv = torch.randn(B, H, W, 96 * h, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(h, 2 * win[0] - 1, 2 * win[1] - 1, device="cuda")
    check(f"tiles {setting}", qkv, bias, (h, tuple(win), (0, 0), False, 32**-0.5))
init = K._Problem.__init__
for precision in ("tf32x3", "tf32", "ieee"):  # of float32: accuracy, and seconds to compile
    def patched(self, *a):
        init(self, *a)
        self.constants["PRECISION"] = precision
    K._Problem.__init__ = patched
    K._problem.cache_clear()
    t = time.time()
    if precision == "ieee" and t - T0 > 75:
        print("  float32 ieee left out: late"); break
    check(f"float32 {precision}", torch.randn(2, 14, 14, 192, device="cuda"), torch.randn(2, 13, 13, device="cuda"),
          (2, (7, 7), (3, 3), False, 32**-0.5))
    print(f"  {time.time() - t:.1f}s", flush=True)
print(f"total {time.time() - T0:.0f}s")
