"""What this machine has for the zoo: `python -m densezoo.env`.

It prints versions and GPUs, which backend each operator would run on and why, and what is missing with the command that
installs it.
"""

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator

import torch

from densezoo import ops
from densezoo.publishing import code_version

# What goes with which extra: the distribution, as pip calls it.
CORE = ("torch", "torchvision", "triton", "timm", "safetensors", "numpy")
EXTRAS = {
    "openmmlab": (
        *("onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation", "onedl-mmpretrain"),
        *("pycocotools", "opencv-python-headless", "setuptools", "matplotlib", "tensorboard"),
    ),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}


def versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Return the installed version of each distribution, None where it is missing."""
    found = {}
    for name in names:
        # Either build of OpenCV is one.
        for alias in (name, name.removesuffix("-headless")):
            try:
                found[name] = importlib.metadata.version(alias)
                break
            except importlib.metadata.PackageNotFoundError:
                found[name] = None
    return found


def gpus() -> list[str]:
    """Return a line about each GPU."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    lines = []
    for p in found:
        # What a kernel may ask for; AMD's have no more than the rest.
        shared = getattr(p, "shared_memory_per_block_optin", p.shared_memory_per_block)
        memory = f"{p.total_memory / 2**30:.0f} GiB, {shared / 2**10:.0f} KiB of shared memory for a kernel"
        lines.append(f"{p.name}, {memory}, compute capability {p.major}.{p.minor}")
    return lines


def operators() -> Iterator[tuple[str, str, str]]:
    """Yield each operator's name, the backend that it would run on here (of float32 tensors), and why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ops.__all__:
        module = getattr(ops, name).__module__
        if name in ("get_backend", "set_backend"):
            continue
        yield name, *backend_of(name, importlib.util.find_spec(f"{module}.kernels") is not None, device)


def backend_of(name: str, has_kernels: bool, device: str) -> tuple[str, str]:
    """Return the backend of an operator for tensors on a device, and why."""
    chosen = ops.get_backend()
    if chosen == "reference":
        return "reference", "DENSEZOO_BACKEND or set_backend says so"
    if not has_kernels:
        return "reference", "it has no kernels: plain PyTorch on every device"
    try:
        takes = ops.backend.takes_triton(name, torch.empty(0, device=device))
    except RuntimeError as error:
        return "none", str(error)
    if takes:
        where = "tensors are on the GPU" if device == "cuda" else "in Triton's interpreter (TRITON_INTERPRET=1)"
        return "triton", where
    return "reference", ops.backend.missing[device == "cuda"] or "tensors are on the CPU: torch finds no GPU"


def mmcv_operators() -> str:
    """Return whose the operators of mmcv are."""
    spec = importlib.util.find_spec("mmcv")
    if spec is None:
        return "none: mmcv is not installed"
    compiled = importlib.util.find_spec("mmcv._ext") is not None
    return "mmcv's own, compiled" if compiled else "densezoo's, on torchvision: mmcv has no compiled module"


def missing() -> Iterator[tuple[str, str]]:
    """Yield what is not installed, and the command that installs it."""
    for name, version in versions(CORE).items():
        if version is None and not (name == "triton" and platform.system() != "Linux"):
            yield name, f"pip install {name}"
    for extra, names in EXTRAS.items():
        absent = [name for name, version in versions(names).items() if version is None]
        if absent:
            yield ", ".join(absent), f"pip install 'densezoo[{extra}]'"
    if not torch.cuda.is_available():
        build = "torch is built without CUDA" if torch.version.cuda is None else "no driver or no GPU"
        yield f"a GPU that torch can use ({build})", "https://pytorch.org/get-started/locally, for the machine's driver"


def report() -> str:
    """Return all of it as text."""
    code = code_version()
    lines = [f"densezoo {code['densezoo']}" + (f" (commit {code['commit']})" if "commit" in code else "")]
    lines += [f"Python {platform.python_version()} at {sys.executable}, {platform.platform()}", ""]
    for title, names in (("core", CORE), *EXTRAS.items()):
        lines.append(f"{title}:")
        lines += [f"  {name:24} {version or 'missing'}" for name, version in versions(names).items()]
    cuda = torch.version.cuda or "none"
    lines += ["", f"CUDA of torch: {cuda}", "GPUs:" if gpus() else "GPUs: none"]
    lines += [f"  {i}: {line}" for i, line in enumerate(gpus())]
    lines += ["", f"operators (backend {ops.get_backend()!r}):"]
    lines += [f"  {name:24} {backend:10} {why}" for name, backend, why in operators()]
    lines += [f"  {'mmcv.ops':24} {mmcv_operators()}", "", "missing:"]
    lines += [f"  {what}: {command}" for what, command in missing()] or ["  nothing"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
