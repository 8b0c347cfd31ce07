"""Operators on a GPU with too little shared memory for their kernels: they fall back to their references."""

import importlib

import pytest
import torch
from densezoo.ops import backend, channel_attention, registration, set_backend
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import KernelInterface

cuda = torch.cuda.is_available()
DEVICE = "cuda" if cuda else "cpu"
REASON = "a kernel needs 264192 bytes of shared memory, the GPU has 101376"

# By module: the operator, the shapes of its tensors, how many of them come in a list at the end, and its options.
CASES = {
    "window": ("window_attention", [(2, 6, 7, 48), (2, 7, 7)], 0, (2, (4, 4), (1, 2), False, 0.3)),
    "neighborhood": ("na2d", [*3 * [(2, 6, 7, 2, 8)], (2, 5, 5)], 0, ((3, 3), (1, 1), (2, 1), (False, True), 0.3)),
    "neighborhood qkv": ("na2d_qkv", [(2, 6, 7, 3, 2, 8), (2, 5, 5)], 0, ((3, 3), (1, 1), (2, 1), (False, True), 0.3)),
    "channel qkv": ("channel_attention_qkv", [(2, 5, 6, 3, 2, 8)], 0, ((1, 2, 0), 0.3)),
    "channel": ("channel_attention", 3 * [(2, 5, 6, 2, 8)], 0, (0.3,)),
    "agent": ("agent_attention", [*3 * [(2, 30, 2, 8)], (2, 9, 2, 8), (2, 9, 30), (2, 30, 9)], 0, (0.3,)),
    "linear": ("focused_linear_attention", [*3 * [(2, 20, 2, 8)], (2, 8), (20, 2, 8)], 0, (3,)),
    "focal": ("focal_modulation", [(1, 3, 4, 8), (1, 3, 4, 3), (8, 1, 3, 3), (8, 1, 5, 5)], 2, (True,)),
    "quadtree": ("quadtree_attention", [*3 * [(1, 6, 7, 2, 8)], (1, 3, 4, 2, 8)], 2, (3, 0.3)),
    "deformable": ("ms_deform_attn", [(2, 26, 2, 8), (2, 9, 2, 2, 3, 2), (2, 9, 2, 2, 3)], 0, ()),
    "mbconv": ("activated_conv", [(2, 42, 8), (8,), (8,), (8, 1, 3, 3)], 0, ([6, 7], 2, [1, 1], "silu")),
    "plugins": ("map_conv", [(2, 2, 5, 7), (1, 2, 3, 3)], 0, ()),
}


class Case:
    """An operator's kernels, with inputs."""

    def __init__(self, module, dtype=torch.float32):
        self.name, shapes, self.listed, self.options = CASES[module]
        kernels = importlib.import_module(f"densezoo.ops.{module.partition(' ')[0]}.kernels")
        self.function = getattr(kernels, f"{self.name}_triton")
        # A feature's scale, (heads, dim), is positive.
        tensors = (torch.randn(shape) if len(shape) > 2 else torch.rand(shape) + 0.5 for shape in shapes)
        self.tensors = [t.to(DEVICE, dtype).requires_grad_() for t in tensors]
        self.levels = torch.tensor([(4, 5), (2, 3)], device=DEVICE), torch.tensor([0, 20], device=DEVICE)

    def run(self, *tensors):
        args = list(tensors)
        if self.listed:
            args[-self.listed :] = [args[-self.listed :]]
        if self.name == "ms_deform_attn":
            args[1:1] = self.levels
        return self.function(*args, *self.options)


class Gpu:
    """Counts launches of kernels, which fail while it `lacks` memory."""

    lacks, launches = False, 0

    def results(self, case, *failing, run=None):
        """Return a case's result and gradients, where the kernels of the passes named fail."""
        self.lacks = "forward" in failing
        out = (run or case.run)(*case.tensors)
        self.lacks = "backward" in failing
        grad = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        grads = torch.autograd.grad(out, case.tensors, grad)
        self.lacks = False
        return [out, *grads]


@pytest.fixture
def gpu(monkeypatch):
    gpu, launch = Gpu(), KernelInterface.__getitem__

    def launch_if_enough(kernel, grid):
        gpu.launches += 1
        if gpu.lacks:
            raise OutOfResources(264192, 101376, "shared memory")
        return launch(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", launch_if_enough)
    monkeypatch.setattr(registration, "_lacking", {})
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(backend, "_backend", "auto")
    # The references' convolutions.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return gpu


def messages(caplog):
    """Return what the zoo logged."""
    return [record.message for record in caplog.records if record.name == "densezoo"]


def check(got, expected, allowed=1e-4):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= allowed * b.double().norm()


@pytest.mark.parametrize("failing", [("forward",), ("backward",)], ids="+".join)
@pytest.mark.parametrize("module", CASES)
def test_operators_fall_back(module, failing, gpu, caplog):
    case = Case(module)
    expected = gpu.results(case)
    assert gpu.launches and not messages(caplog)
    got = gpu.results(case, *failing)
    check(got, expected)
    assert [t.stride() for t in got] == [t.stride() for t in expected]
    assert messages(caplog) == [f"{case.name}: takes the reference: {REASON}"]
    # What failed once is not tried again.
    gpu.launches = 0
    check(gpu.results(case, "forward", "backward"), expected)
    assert gpu.launches == 0 and len(messages(caplog)) == 1


@pytest.mark.parametrize("failing", ["forward", "backward"])
def test_triton_raises(failing, gpu):
    case = Case("channel")
    expected = gpu.results(case)
    set_backend("triton")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"channel_attention: cannot run on triton: {REASON}"):
            gpu.results(case, failing)
    # Kernels that were refused may have changed.
    gpu.lacks, gpu.launches = False, 0
    check(gpu.results(case), expected)
    assert gpu.launches
    set_backend("auto")
    gpu.results(case, failing)
    set_backend("triton")
    with pytest.raises(RuntimeError, match=f"channel_attention: cannot run on triton: {REASON}"):
        gpu.results(case)


def test_other_inputs_keep_the_kernels(gpu):
    case, other = Case("channel"), Case("channel")
    gpu.results(case, "forward")
    other.options, gpu.launches = (0.4,), 0
    gpu.results(other)
    assert gpu.launches
    gpu.launches = 0
    gpu.results(Case("window"))
    assert gpu.launches


def test_missing_tensors_have_no_gradient(gpu):
    case = Case("agent")
    case.tensors = case.tensors[:4]
    case.options = (None, None, 0.3)
    expected = gpu.results(case)
    check(gpu.results(case, "forward", "backward"), expected)


# The interpreter's products of bfloat16 are wrong.
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("module", ["window", "deformable"] if cuda else ["window"])
def test_16_bit(module, dtype, gpu):
    case = Case(module, dtype)
    expected = gpu.results(case)
    with torch.autocast(DEVICE, dtype):
        check(gpu.results(case, "forward", "backward"), expected, 2e-2)


@pytest.mark.parametrize("failing", [("forward",), ("backward",)], ids="+".join)
@pytest.mark.parametrize("module", CASES if cuda else ["channel"])
def test_compiled_operators_fall_back(module, failing, gpu, caplog):
    torch._dynamo.reset()
    case = Case(module)
    expected = gpu.results(case)
    compiled = torch.compile(case.run, fullgraph=True, backend="inductor" if cuda else "aot_eager")
    check(gpu.results(case, run=compiled), expected)
    check(gpu.results(case, *failing, run=compiled), expected)
    assert messages(caplog) == [f"{case.name}: takes the reference: {REASON}"]


def test_operator_contract(gpu):
    case = Case("channel")
    gpu.results(case, "forward")
    torch.library.opcheck(torch.ops.densezoo.channel_attention, (*case.tensors, *case.options))
    assert len(registration._lacking) >= 1


def test_flops_are_those_of_the_operator(gpu):
    case, counts = Case("channel"), []
    for failing in ((), ("forward", "backward")):
        with FlopCounterMode(display=False) as counter:
            gpu.results(case, *failing)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_setting_that_is_too_large(name, monkeypatch, caplog):
    """Triton's own error, and the reference in a CUDA graph."""
    from densezoo.ops.channel import kernels

    monkeypatch.setattr(registration, "_lacking", {})
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(backend, "_backend", "auto")
    monkeypatch.setitem(kernels.LAUNCH, name, kernels.LAUNCH[name]._replace(channels=128, stages=40))
    kernels._problem.cache_clear()
    leaves = [torch.randn(2, 40, 40, 2, 64, device="cuda", requires_grad=True) for _ in range(3)]
    grad = torch.randn_like(leaves[0])

    def step():
        out = channel_attention(*leaves, scale=1e-3)
        return out, *torch.autograd.grad(out, leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step()
    (message,) = messages(caplog)
    assert message.startswith("channel_attention: takes the reference: a kernel needs") and "shared memory" in message
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    graph.replay()
    set_backend("reference")
    expected = step()
    set_backend("triton")
    with pytest.raises(RuntimeError, match="channel_attention: cannot run on triton: a kernel needs .* shared memory"):
        step()
    kernels._problem.cache_clear()
    check(got, expected)
    check(captured, expected)
