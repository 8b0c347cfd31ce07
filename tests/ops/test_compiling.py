"""Kernels compiled in the background, before the first launch that needs them."""

import os
import subprocess
import sys
import textwrap

import pytest

# A process of its own, without the interpreter, whose compilations are recorded: (kernel, thread, whether cached).
HEAD = """
import threading
import torch
from concurrent.futures import wait
from triton import knobs
from densezoo.ops import compiling

compiled = []

def listen(*, src, cache_hit, **_):
    assert not cache_hit
    compiled.append((src.name, threading.current_thread().name.partition("_")[0]))

knobs.compilation.listener = listen
"""
# Compilations for an H200, where there may be none.
NO_GPU = """
from contextlib import nullcontext
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, get_current_stream=lambda _: 0
))
torch.cuda.device = lambda _: nullcontext()
compiling._is_new = lambda *_: True


# Has launches compile, and do no more.
def dry():
    launch = compiling.JITFunction.run
    compiling.JITFunction.run = lambda *args, warmup, **kwargs: launch(*args, warmup=True, **kwargs)
"""


def run(code, tmp_path, *head):
    file = tmp_path / "run.py"
    file.write_text("\n".join([HEAD, *head, textwrap.dedent(code)]))
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0", "DENSEZOO_BACKEND": "auto"}
    done = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("trains", [False, True])
def test_passes_are_foreseen(tmp_path, trains):
    """Each kernel once, by threads; a launch waits for them, and one that was not foreseen compiles for itself."""
    code = f"""
    from densezoo.ops.channel import kernels

    q, k, v = torch.empty(2, 8, 8, 3, 2, 16, dtype=torch.bfloat16).requires_grad_({trains}).unbind(3)
    for _ in range(2):
        compiling.foresee(kernels._channel_attention, kernels._channel_attention_backward, (q, k, v, 0.3), 3)
    dry()
    kernels._channel_attention(q, k, v, 0.3)
    assert compiled.count(("_forward", "densezoo-compile")) == 1 and not kernels._forward.coming
    wait(kernels._backward.coming)
    foreseen = ["_backward", "_forward"] if {trains} else ["_forward"]
    assert sorted(compiled) == [(name, "densezoo-compile") for name in foreseen], compiled

    kernels._channel_attention(q.float(), k.float(), v.float(), 0.3)
    assert compiled[len(foreseen) :] == [("_forward", "MainThread")], compiled
    """
    run(code, tmp_path, NO_GPU)


def test_tuples_are_foreseen(tmp_path):
    """Kernels of several gates take tuples of tensors, as a compiler's graph has them."""
    code = """
    from densezoo.ops.plugins import kernels
    from torch._subclasses.fake_tensor import FakeTensorMode

    maps, weight = torch.empty(2, 2, 20, 14), torch.empty(1, 2, 7, 7)
    with FakeTensorMode() as mode:
        for _ in range(2):
            compiling.foresee_fake(kernels._map_conv, (mode.from_tensor(maps), mode.from_tensor(weight)))
    wait(kernels._conv.coming)
    assert compiled == [("_conv", "densezoo-compile")], compiled
    dry()
    kernels._map_conv(maps, weight)
    assert len(compiled) == 1
    """
    run(code, tmp_path, NO_GPU)


def test_other_options_are_other_kernels(tmp_path):
    """Tensors of one kind with another shift, or without gradients, may take other kernels."""
    code = """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def operator(x, shift):
        return x

    compiling.THREADS = 2
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
        for args in ((x, [0, 0]), (x, [3, 3]), (x.clone().requires_grad_(), [3, 3]), (x.mT, [3, 3])):
            assert [compiling._is_new(operator, args) for _ in range(2)] == [True, False], args
    """
    run(code, tmp_path)


def test_nothing_depends_on_it(tmp_path):
    """What cannot be foreseen raises nothing, nor does what cannot be compiled before its launch."""
    code = """
    def fails(x):
        raise ValueError

    @compiling.kernel
    def wrong(x):
        undefined(x)

    def launches(x):
        wrong[(1,)](x)
        return x

    x = torch.empty(4)
    compiling.foresee(fails, fails, (x,), 1)
    compiling.foresee(launches, None, (x,), 1)
    assert not compiling._here.gathers
    assert [type(future.exception()).__name__ for future in wrong.coming] == ["CompilationError"]
    """
    run(code, tmp_path, NO_GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["training", "inference", "compiled"])
def test_first_call(tmp_path, way):
    """The first call compiles all kernels in the background, and computes what the reference does."""
    code = f"""
    from densezoo.ops import channel_attention_qkv, set_backend

    qkv = torch.randn(2, 16, 16, 3, 2, 32, device="cuda", dtype=torch.bfloat16).requires_grad_()
    call = torch.compile(channel_attention_qkv) if {way == "compiled"} else channel_attention_qkv
    results = []
    for backend in ("triton", "triton", "reference"):
        set_backend(backend)
        if {way == "inference"}:
            with torch.inference_mode():
                results.append([call(qkv)])
        else:
            out = call(qkv)
            results.append([out.detach(), *torch.autograd.grad(out, qkv, torch.ones_like(out))])
    for got, expected in zip(results[0], results[2], strict=True):
        assert (got.double() - expected.double()).norm() / expected.double().norm() < 2e-2
    ours = [thread for name, thread in compiled if not name.startswith("triton_")]
    assert len(ours) >= {1 if way == "inference" else 2} and set(ours) == {{"densezoo-compile"}}, compiled
    """
    run(code, tmp_path)
