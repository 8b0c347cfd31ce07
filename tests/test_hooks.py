"""What checkpoints hold, and when old ones go."""

import io
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.model import BaseModel
from torch import nn

from densezoo.hooks import CheckpointHook, to_plain
from densezoo.runner import Runner


def test_to_plain(monkeypatch):
    warnings = []
    monkeypatch.setattr("densezoo.hooks.print_log", lambda message, *_: warnings.append(message))
    value = {
        "float": np.float64(0.5),
        np.int64(3): (np.int32(1), [np.bool_(True)]),
        "array": np.arange(3),
        "path": Path("a/b"),
        "deque": deque([1]),
        "tensor": torch.ones(2),
        "nested": OrderedDict(function=len),
    }
    plain = to_plain(value, "state")
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    torch.testing.assert_close(loaded.pop("tensor"), torch.ones(2))
    assert loaded == {
        "float": 0.5, 3: (1, [True]), "array": [0, 1, 2], "path": "a/b", "deque": [1], "nested": {"function": None}
    }  # fmt: skip
    assert type(plain["float"]) is float
    (warning,) = warnings
    assert warning.startswith("state.nested.function is a builtin_function_or_method")


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x, mode="tensor"):
        loss = self.layer(torch.stack(x)).square().mean()
        return {"loss": loss} if mode == "loss" else [loss]


class Values(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"x": torch.ones(1) * index}


class Scores:
    """Gives one score after another, in place of mmengine's Evaluator."""

    def __init__(self, *scores):
        self.scores = iter(scores)

    def process(self, **kwargs):
        pass

    def evaluate(self, size):
        return {"acc": next(self.scores)}


@pytest.fixture
def make_runner(tmp_path, monkeypatch):
    def make(scores, **settings):
        # mmengine asks for a class of its own
        monkeypatch.setattr("mmengine.runner.loops.Evaluator", Scores)
        loader = dict(batch_size=2, num_workers=0, dataset=Values(), sampler=dict(type="DefaultSampler"))
        return Runner(
            model=Line(),
            work_dir=str(tmp_path / "work"),
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=len(scores)),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
            val_dataloader=loader,
            val_cfg=dict(),
            val_evaluator=Scores(*scores),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1, save_best="acc", **settings)),
            experiment_name=tmp_path.name,
        )

    return make


def test_kept_checkpoints(make_runner, tmp_path):
    make_runner([1.0, 3.0, 2.0], max_keep_ckpts=2).train()
    work_dir = tmp_path / "work"
    assert {path.name for path in work_dir.glob("*.pth")} == {"epoch_2.pth", "epoch_3.pth", "best_acc_epoch_2.pth"}
    hub = torch.load(work_dir / "epoch_3.pth", weights_only=True)["message_hub"]["runtime_info"]
    assert hub["keep_ckpt_ids"] == [2, 3] and hub["best_score"] == 3.0


def test_old_ones_go_after_new_ones_are_there(make_runner, tmp_path, monkeypatch):
    """At every removal, what replaces the file is complete."""
    runner = make_runner([1.0, 2.0, 3.0], max_keep_ckpts=1)
    removed = []

    def remove(hook, path):
        removed.append(Path(path).name)
        kept = {file.name: torch.load(file, weights_only=True) for file in Path(path).parent.glob("*.pth")}
        del kept[removed[-1]]
        newest = Path((tmp_path / "work" / "last_checkpoint").read_text()).name
        assert newest in kept
        if removed[-1].startswith("best"):
            assert any(name.startswith("best") for name in kept)
        Path(path).unlink()

    monkeypatch.setattr(CheckpointHook, "_remove", remove)
    runner.train()
    assert sorted(removed) == ["best_acc_epoch_1.pth", "best_acc_epoch_2.pth", "epoch_1.pth", "epoch_2.pth"]


def test_unknown_arguments():
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_keep_ckpt'"):
        CheckpointHook(max_keep_ckpt=3)
