"""tools/get_flops.py: what it counts, and what it answers to a wrong name."""

import re

import pytest
import timm
import torch

pytest.importorskip("triton")

from tiny import tool

get_flops = tool("get_flops")


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["get_flops.py", *arguments])
    get_flops.main()
    return [re.findall(r"[\w.]+", line) for line in capsys.readouterr().out.splitlines() if "nat_mini" in line]


def test_table(monkeypatch, capsys):
    ((_, size, parameters, operations),) = run(monkeypatch, capsys, "nat_mini")
    assert (size, parameters, operations) == ("224x224", "19.98", "2.69")
    # Maps of twice the sides have four times the positions, with windows of the same size.
    ((_, size, _, more),) = run(monkeypatch, capsys, "nat_mini", "--size", "448", "448")
    assert size == "448x448" and float(more) == pytest.approx(4 * 2.69, abs=0.03)


def test_neighborhoods_are_counted_and_the_model_is_left_alone():
    kwargs = dict(embed_dim=32, depths=(1,), num_heads=(1,), num_classes=0)
    models = [timm.create_model("nat_mini", kernel_size=size, **kwargs) for size in (3, 7)]
    state = {name: value.clone() for name, value in models[0].state_dict().items()}
    few, many = (get_flops.count_multiply_adds(model, (3, 64, 64)) for model in models)
    # Products with the keys and with the values, 32 channels each, on a map of 16x16.
    assert many - few == 2 * 16 * 16 * 32 * (7 * 7 - 3 * 3)
    assert all(torch.equal(value, state[name]) for name, value in models[0].state_dict().items())


def test_unknown_model(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, "nat_minni")
    assert end.value.code == 2
    assert "model: got 'nat_minni'" in capsys.readouterr().err
