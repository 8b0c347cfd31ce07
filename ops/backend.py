"""The choice between an operator's Triton kernels and its plain-PyTorch reference."""

import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable

import torch

BACKENDS = ("auto", "triton", "reference")

_log = logging.getLogger("densezoo")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # an import hook forbids it
        return False


def _missing() -> tuple[str | None, str | None]:
    """Return what Triton lacks here to run in its interpreter, and to run on a GPU."""
    if not _is_installed("triton"):
        return 2 * ("triton is not installed (pip install triton)",)
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    # Triton links its kernels to Python when it first runs.
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        return None, "triton finds no C compiler (Debian: apt-get install gcc)"
    if not os.path.exists(header):
        return None, f"triton finds no {header} (Debian: apt-get install python3-dev)"
    return None, None


missing = _missing()
interprets = os.environ.get("TRITON_INTERPRET") == "1"
_logged: set[str] = set()


def set_backend(name: str) -> None:
    """Choose how the zoo's operators run, for the whole process.

    Args:
        name: `auto` takes the Triton kernels for tensors on a GPU that the kernels support and the reference elsewhere;
            `triton` raises where the kernels cannot run; `reference` always takes plain PyTorch. The environment
            variable `DENSEZOO_BACKEND` sets it at import.

    Raises:
        ValueError: `name` is none of these.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)} (see DENSEZOO_BACKEND)")
    _backend = name


def get_backend() -> str:
    """Return the backend in force: `auto`, `triton` or `reference`."""
    return _backend


def is_exporting() -> bool:
    """Return whether torch.export is tracing; torch 2.11's own function says so under torch.compile too."""
    return torch.compiler._is_exporting_flag


def takes_triton(
    op: str, tensor: torch.Tensor, unsupported: Callable[..., str | None] | None = None, *inputs: object
) -> bool:
    """Return whether `op` runs its Triton kernels on `tensor`, in the backend in force.

    Args:
        op: The operator's name, for messages.
        tensor: An input of the operator; its device decides.
        unsupported: Function of `inputs` to why the operator's kernels cannot take them, or None where they can; asked
            where there is a choice alone, since an answer would limit the sizes that an exported graph serves.

    Raises:
        RuntimeError: The backend is `triton` and the kernels cannot run; the message says why.
    """
    # An exported graph holds standard operators only, so that it runs where densezoo is not installed.
    if _backend == "reference" or is_exporting():
        return False
    reason = missing[1 if tensor.is_cuda else 0]
    if not reason:
        if _backend == "auto" and not tensor.is_cuda:
            return False
        if tensor.is_cuda or interprets:
            reason = unsupported(*inputs) if unsupported else None
        else:
            reason = f"its inputs are on {tensor.device}, the kernels need a GPU or TRITON_INTERPRET=1"
    if reason is None:
        return True
    fall_back(op, reason)
    return False


def fall_back(op: str, reason: str) -> None:
    """Say once that `op` takes the reference, or raise RuntimeError where the backend in force is `triton`."""
    if _backend == "triton":
        raise RuntimeError(f"{op}: cannot run on triton: {reason}")
    if not torch.compiler.is_compiling() and (message := f"{op}: takes the reference: {reason}") not in _logged:
        _logged.add(message)
        _log.warning(message)


set_backend(os.environ.get("DENSEZOO_BACKEND", "auto"))
