"""500 damaged or hostile checkpoints: each is refused with a message or loads whole; no crash, no hang, no code run."""

import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import timm
import torch

import densezoo
from densezoo import publishing
from densezoo.checkpoints import load_published

SMALL = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 1), kernel_size=3, mlp_ratio=1.0, num_classes=3)
MARK = "code-was-run"


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


HOSTILE = [
    Call(os.mkdir, MARK),
    Call(os.system, f"mkdir {MARK}"),
    Call(eval, f"__import__('os').mkdir('{MARK}')"),
    Call(exec, f"import os; os.mkdir('{MARK}')"),
    Call(subprocess.check_output, ["mkdir", MARK]),
    Call(getattr, "mkdir", "upper"),
    Call(open, MARK, "w"),
    Call(torch.load, MARK),
    Call(print, MARK),
]


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("nat_mini", **SMALL)


def damage(rng: random.Random, i: int, state: dict, folder: Path) -> Path:
    """Write damaged checkpoint `i` and return its path."""
    kind = ("truncated", "flipped", "keys", "shapes", "hostile", "bomb", "header", "sidecar")[i % 8]
    suffix = rng.choice((".pth", ".old.pth", ".safetensors"))
    path = folder / f"{i}-{kind}{suffix}"
    state = dict(state)
    names = rng.sample(sorted(state), rng.randint(1, 4))
    if kind == "keys":
        for name in names:
            value = state.pop(name)
            state[rng.choice((name + "x", "", "backbone." + name, "\0", name[::-1]))] = value
    if kind == "shapes":
        for name in names:
            shapes = ((0,), (1,) * 9, (*state[name].shape, 1), (3, 5), (2**20,))
            state[name] = torch.zeros(rng.choice(shapes), dtype=rng.choice((torch.float32, torch.int8, torch.bool)))
    if kind == "hostile":
        write_hostile(rng, path := path.with_suffix(".pth"), state)
    elif kind == "bomb":
        write_bomb(rng, path := path.with_suffix(".pth"))
    elif kind == "header":
        write_header(rng, path := path.with_suffix(".safetensors"), state)
    elif kind == "sidecar":
        return write_sidecar(rng, path.with_suffix(".safetensors"), state)
    elif suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pth")
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        del data[rng.randrange(len(data)) :]
    if kind == "flipped":
        # The first bytes decide most.
        for _ in range(rng.choice((1, 3, 30, 300))):
            data[rng.randrange(rng.choice((16, 600, len(data))))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path


def write_hostile(rng: random.Random, path: Path, state: dict) -> None:
    call = rng.choice(HOSTILE)
    content = rng.choice(({"model": state, "meta": call}, {"model": call}, call, [call], {"a": [{"b": call}]}))
    if rng.random() < 0.5:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.7)
    else:
        path.write_bytes(pickle.dumps(content, rng.randint(0, 5)))


def write_bomb(rng: random.Random, path: Path) -> None:
    """A small file that would unpack to a large one, or speaks of one."""
    torch.save({"weight": torch.zeros(1 << 16)}, path)
    with zipfile.ZipFile(path) as plain:
        records = {record.filename: plain.read(record) for record in plain.infolist()}
    way = rng.randrange(3)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if way == 0 else zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, data * (200 if way == 0 and "/data/" in name else 1))
    if way == 1:
        # The sizes in the directory say more than there is.
        data = path.read_bytes()
        at = data.rindex(b"PK\1\2")
        path.write_bytes(data[: at + 20] + struct.pack("<II", 2**31, 2**31) + data[at + 28 :])
    if way == 2:
        # A tensor of far more elements than its storage has.
        pickled = b"\x80\x02}q\x00X\x06\x00\x00\x00weightq\x01]q\x02(" + b"K\x01" * 1000 + b"es."
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records.items():
                archive.writestr(name, pickled if name.endswith("data.pkl") else data)


def write_header(rng: random.Random, path: Path, state: dict) -> None:
    """Safetensors whose header is a lie."""
    safetensors.torch.save_file(state, path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    entry = header[rng.choice(sorted(header))]
    way = rng.randrange(6)
    if way == 0:
        entry["data_offsets"] = [rng.randrange(2**40), rng.randrange(2**62)]
    elif way == 1:
        entry["shape"] = [rng.choice((-1, 2**40, 2**63))]
    elif way == 2:
        entry["dtype"] = rng.choice(("F99", "F8_E4M3", 7, None))
    elif way == 3:
        entry.clear()
    text = b"[" * 10**5 if way == 4 else json.dumps(header).encode()
    size = rng.choice((2**63, 2**40, 0, len(data))) if way == 5 else len(text)
    path.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])


def write_sidecar(rng: random.Random, path: Path, state: dict) -> Path:
    """A good file that is said to be of another model, or of anything."""
    info = publishing.describe_timm("nat_mini", SMALL)
    path = publishing.save(state, path, info)
    wrong = rng.choice((None, [], 10**12, -1, "os.system", {"type": "os.system"}, [[[]]], True))
    place = rng.choice((*info, "config", "library", "file", "sha256"))
    target = info if place in info else info["densezoo"]
    target[place] = wrong
    if rng.random() < 0.3:
        info["model_args"] = {rng.choice((*SMALL, "pretrained", "checkpoint_path", "img_size")): wrong}
    path.with_suffix(".json").write_text(json.dumps(info)[: rng.choice((None, None, 50))])
    return path


def fuzz(folder: Path, start: int, stop: int) -> None:
    """Try damaged checkpoints; print each name before and what came of it after."""
    import resource

    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    good = build().state_dict()
    model = timm.create_model("nat_mini", **SMALL)
    for value in model.state_dict().values():
        value.fill_(0.25)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for i in range(start, stop):
        path = damage(random.Random(i), i, good, folder)
        print(path.name, end=" ", flush=True)
        # Hostile files would do it when their content is printed or thrown away, too.
        try:
            if "sidecar" in path.name:
                densezoo.load(path)
            else:
                load_published(model, path)
        except (ValueError, FileNotFoundError) as error:
            assert path.name.split(".")[0] in str(error) and len(str(error)) < 5000, error
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            print("refused", flush=True)
        else:
            for key, value in model.state_dict().items():
                value.copy_(before[key])
            print("loaded", flush=True)
        assert not Path(MARK).exists(), "code was run"
        for file in folder.iterdir():
            file.unlink()


def test_500_damaged_checkpoints(tmp_path):
    """In a process of its own, which a crash or a hang would end."""
    command = [sys.executable, __file__, str(tmp_path), "0", "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr[-3000:])
    outcomes = [line.split()[1] for line in lines]
    assert len(outcomes) == 500 and set(outcomes) == {"refused", "loaded"}
    # Flipped bits of a weight, and JSON that changes nothing that matters, are no damage that can be told.
    assert outcomes.count("refused") > 350
    for kind in ("truncated", "keys", "shapes", "hostile", "bomb"):
        told = [line.split()[1] for line in lines if kind in line]
        assert told.count("refused") == len(told), kind


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
