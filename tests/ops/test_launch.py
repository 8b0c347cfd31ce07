"""Launch settings: those in the code, and those of files."""

import importlib
import json
import logging
import re
from typing import NamedTuple

import densezoo.ops
import pytest
import torch
from densezoo.ops import backend, launch


class Setting(NamedTuple):
    tile: tuple[int, int]
    warps: int
    registers: int | None = None


DEFAULTS = {("forward", 32): Setting((8, 8), 4), "backward": (Setting((2, 8), 4, 168), Setting((4, 4), 2))}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "file_here", lambda: tmp_path / "sm_90.json")
    return tmp_path / "sm_90.json"


def table():
    return launch.Table("na2d", DEFAULTS)


def test_a_gpu_has_a_file(monkeypatch):
    assert torch.cuda.is_available() or launch.file_here() is None
    monkeypatch.setattr(backend, "interprets", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert launch.file_here() == launch.FOLDER / "sm_120.json"
    monkeypatch.setattr(backend, "interprets", True)
    assert launch.file_here() is None


def test_settings_of_the_code(file, caplog):
    file.write_text('{"window_attention": {"tiles": {"warps": 8}}}')
    settings = table()
    assert settings["forward", 32] == Setting((8, 8), 4)
    assert settings["backward", 1] == Setting((4, 4), 2) and len(settings) == 3
    assert not caplog.records


def test_settings_of_a_file(file, monkeypatch):
    monkeypatch.setattr(launch, "file_here", None)
    settings = table()
    # The GPU is asked for at the first look-up.
    monkeypatch.setattr(launch, "file_here", lambda: file)
    part = {"forward 32": {"tile": [4, 16], "registers": 128}, "backward 0": {"registers": None, "warps": 8}}
    file.write_text(json.dumps({"na2d": part}))
    assert settings["forward", 32] == Setting((4, 16), 4, 128)
    assert settings["backward", 0] == Setting((2, 8), 8)
    assert settings["backward", 1] == settings.defaults["backward", 1] == Setting((4, 4), 2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "line 1"),
        ("[1]", "JSON object"),
        ('{"na2d": 1}', "JSON object"),
        ('{"na3d": {}}', "got operator 'na3d', expected of activated_conv"),
        ('{"na2d": {"forward 64": {"warps": 8}}}', "na2d: got 'forward 64'.*expected fields of one of 'forward 32'"),
        ('{"na2d": {"forward 32": 8}}', "na2d: got 'forward 32': 8"),
        ('{"na2d": {"forward 32": {"warps": 8, "stages": 2}}}', "forward 32: got stages 2, expected of tile"),
        ('{"na2d": {"forward 32": {"warps": 8.0}}}', "got warps 8.0, expected of .*warps .int."),
        ('{"na2d": {"forward 32": {"warps": true}}}', "got warps True"),
        ('{"na2d": {"forward 32": {"warps": null}}}', "got warps None"),
        ('{"na2d": {"forward 32": {"tile": 8}}}', "got tile 8, expected of tile .tuple"),
        ('{"na2d": {"forward 32": {"tile": [8]}}}', r"got tile \[8\]"),
        ('{"na2d": {"forward 32": {"registers": "128"}}}', "got registers '128'"),
    ],
)
def test_a_wrong_file_leaves_the_settings(text, named, file, caplog):
    file.write_text(text)
    settings = table()
    for _ in range(2):
        assert settings["forward", 32] == Setting((8, 8), 4)
    assert dict(settings) == settings.defaults
    (record,) = caplog.records
    assert record.name == "densezoo" and record.levelno == logging.WARNING
    assert str(file) in record.message and re.search(named, record.message)


def test_kernels_take_the_settings_of_a_file(file, monkeypatch):
    from densezoo.ops.channel import kernels

    file.write_text('{"channel_attention": {"forward": {"tokens": 16, "warps": 8}}}')
    monkeypatch.setattr(kernels, "LAUNCH", launch.Table("channel_attention", kernels.LAUNCH.defaults))
    _, constants = kernels._Problem(torch.Size((2, 8, 8, 2, 32)), None, 2, False).forward
    assert constants["TOKENS"] == 16 and constants["num_warps"] == 8


@pytest.mark.parametrize("path", sorted(launch.FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_files_fit_the_kernels(path, monkeypatch, caplog):
    monkeypatch.setattr(launch, "file_here", lambda: path)
    for name in launch.read(path):
        kernels = importlib.import_module(f"{getattr(densezoo.ops, name).__module__}.kernels")
        settings = launch.Table(name, kernels.LAUNCH.defaults)
        settings.overlay()
        assert dict(settings) != settings.defaults
    assert not caplog.records
