"""python -m densezoo.env: what it says of this machine, and of others."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from densezoo import __version__, env, ops


def test_report():
    done = subprocess.run([sys.executable, "-m", "densezoo.env"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"densezoo {__version__}")
    assert ["torch", torch.__version__.split("+")[0]] in [line.split() for line in lines]
    for name in set(ops.__all__) - {"get_backend", "set_backend"}:
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.split()[1] in ("reference", "triton")
    assert "missing:" in lines
    if not torch.cuda.is_available():
        assert "GPUs: none" in lines


def test_gpus_are_told_apart(monkeypatch):
    gpu = dict(name="GPU", total_memory=24 * 2**30, shared_memory_per_block=48 * 2**10, major=8, minor=6)
    found = [SimpleNamespace(**gpu, shared_memory_per_block_optin=99 * 2**10), SimpleNamespace(**gpu)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: found[i])
    expected = "GPU, 24 GiB, {} KiB of shared memory for a kernel, compute capability 8.6"
    assert env.gpus() == [expected.format(99), expected.format(48)]


@pytest.mark.parametrize(
    ("backend", "kernels", "expected", "why"),
    [
        ("auto", True, "reference", "no GPU"),
        ("auto", False, "reference", "no kernels"),
        ("reference", True, "reference", "DENSEZOO_BACKEND"),
    ],
)
def test_backend_of_a_cpu(monkeypatch, backend, kernels, expected, why):
    monkeypatch.setattr(ops.backend, "_backend", backend)
    monkeypatch.setattr(ops.backend, "missing", (None, None))
    found, reason = env.backend_of("na2d", kernels, "cpu")
    assert found == expected and why in reason


def test_backend_without_triton(monkeypatch):
    monkeypatch.setattr(ops.backend, "_is_installed", lambda module: False)
    monkeypatch.setattr(ops.backend, "missing", ops.backend._missing())
    assert env.backend_of("na2d", True, "cpu") == ("reference", "triton is not installed (pip install triton)")
    monkeypatch.setattr(ops.backend, "_backend", "triton")
    found, reason = env.backend_of("na2d", True, "cpu")
    assert found == "none" and "pip install triton" in reason


@pytest.mark.parametrize(("found", "named"), [(None, "C compiler"), ("/usr/bin/cc", "Python.h")])
def test_what_triton_lacks_on_a_gpu(monkeypatch, tmp_path, found, named):
    monkeypatch.setattr(ops.backend, "_is_installed", lambda module: True)
    monkeypatch.setattr("shutil.which", lambda name: found)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    interpreter, gpu = ops.backend._missing()
    assert interpreter is None and named in gpu and "apt-get install" in gpu


def test_what_triton_lacks_leaves_the_reference(monkeypatch, caplog):
    monkeypatch.setattr(ops.backend, "missing", (None, "triton finds no C compiler"))
    monkeypatch.setattr(ops.backend, "_logged", set())
    tensor = SimpleNamespace(is_cuda=True, device="cuda")
    monkeypatch.setattr(ops.backend, "_backend", "auto")
    assert not any(ops.backend.takes_triton("na2d", tensor) for _ in range(2))
    assert [r.message for r in caplog.records] == ["na2d: takes the reference: triton finds no C compiler"]
    monkeypatch.setattr(ops.backend, "_backend", "triton")
    with pytest.raises(RuntimeError, match="na2d: cannot run on triton: triton finds no C compiler"):
        ops.backend.takes_triton("na2d", tensor)


def test_extras_are_those_of_the_project():
    text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for extra, names in env.EXTRAS.items():
        assert {re.match(r"[\w-]+", requirement)[0] for requirement in extras[extra]} == set(names)


def test_missing_names_the_command(monkeypatch):
    def version(name):
        if name in ("onnx", "triton", "onedl-mmcv"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(env.platform, "system", lambda: "Linux")
    found = dict(env.missing())
    assert found["triton"] == "pip install triton"
    assert found["onnx"] == "pip install 'densezoo[export]'"
    assert found["onedl-mmcv"] == "pip install 'densezoo[openmmlab]'"
