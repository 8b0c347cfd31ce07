"""Sharded training: what plain training computes, from and to the same checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")

from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from test_openmmlab import TYPES
from tiny import CLASSIFIER, TOOLS, losses, run_processes, tool, write_classes, write_config

from densezoo.fsdp import shard

train = tool("train").main
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU takes no part where there is a GPU")

# What several processes together compute exactly as one does, gradients clipped.
EXACT = """
model["backbone"]["drop_path_rate"] = 0.0
log_processor = dict(window_size=1)
randomness = dict(seed=2)
optim_wrapper["clip_grad"] = dict(max_norm=0.5)
# it ends with the run otherwise, which a shorter one would change
param_scheduler["end"] = 3
"""
# Saves its tensors under other names than it has them.
TIMM = """
model = dict(
    type="TimmClassifier", model_name="nat_mini", num_classes=4, loss=dict(type="CrossEntropyLoss"),
    embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), kernel_size=3,
    data_preprocessor=model["data_preprocessor"],
)
"""
SWITCHES = ["--accumulate", "2", "--layer-decay", "0.8"]
HALF = ["--cfg-options", "train_dataloader.batch_size=2"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return a function that writes a config; the test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    images = write_classes(tmp_path / "classes")
    return lambda changes="": str(write_config(tmp_path / f"{tmp_path.name}.py", CLASSIFIER, images, changes))


def fail(capsys, message, path, *options):
    with pytest.raises(SystemExit) as end:
        train([path, "--work-dir", "work", "--fsdp", *options])
    assert end.value.code == 2 and not Path("work").exists()
    assert f"error: {message}" in capsys.readouterr().err


def sharded(path, *args):
    done = run_processes(path, 2, "--fsdp", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@on_a_cpu
def test_every_family():
    """Two processes with a half of the batch each take the step of one with all of it, recomputing activations."""
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": str(tests), "DENSEZOO_BACKEND": "reference"}
    command = [sys.executable, TOOLS / "_torchrun.py", "--standalone", "--local-addr=127.0.0.1"]
    command += ["--nproc-per-node", "2", tests / "sharded_families.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.split() == list(TYPES)


@pytest.mark.slow
@on_a_cpu
def test_runs_go_on_from_each_other(config):
    """A plain run, a sharded one that stops and goes on, and a plain one that goes on from it have the same losses."""
    path = config(EXACT)
    train([path, "--work-dir", "plain", *SWITCHES])
    out = sharded(path, "--work-dir", "sharded", *SWITCHES, *HALF, "train_cfg.max_epochs=2")
    assert "2 process(es) sharing the weights x 2 images x 2 accumulated steps = batch 8" in out
    train([path, "--work-dir", "other", "--resume", "sharded/epoch_2.pth", *SWITCHES])
    sharded(path, "--work-dir", "sharded", "--resume", *SWITCHES, *HALF)
    expected = losses(Path("plain"))
    assert losses(Path("sharded")) == pytest.approx(expected, rel=1e-5)
    assert losses(Path("other")) == pytest.approx({step: expected[step] for step in range(9, 13)}, rel=1e-5)

    ours, theirs = (torch.load(f"{run}/epoch_3.pth", weights_only=True) for run in ("sharded", "plain"))
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=1e-3, atol=1e-5)
    assert ours["optimizer"].keys() == theirs["optimizer"].keys()
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    torch.testing.assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], rtol=1e-2, atol=1e-5)


@pytest.mark.slow
@on_a_cpu
def test_classifiers_of_timm(config):
    """In bfloat16, with a best checkpoint; what is saved fits the plain model strictly."""
    path = config(TIMM)
    sharded(path, "--work-dir", "work", "--bf16", *HALF, "train_cfg.max_epochs=1")
    init_default_scope("mmpretrain")
    for name in ("epoch_1.pth", "best_accuracy_top1_epoch_1.pth"):
        state = torch.load(Path("work", name), weights_only=True)["state_dict"]
        assert "patch_embed.proj.0.weight" in state
        assert {value.dtype for value in state.values()} == {torch.float32}
        MODELS.build(Config.fromfile(path).model).load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--fsdp: needs several processes; start with tools/dist_train.sh CONFIG PROCESSES --fsdp"),
        (["--ema", "0.1"], "--fsdp: does not go with --ema"),
        (["--compile"], "--fsdp: does not go with --compile"),
        (["--channels-last"], "--fsdp: does not go with --channels-last"),
    ],
)
def test_what_it_does_not_go_with(config, capsys, options, message):
    fail(capsys, message, config(), *options)


def test_no_averages_by_the_config(config, capsys):
    path = config("custom_hooks = [dict(type='EMAHook')]")
    fail(capsys, "--fsdp: does not go with custom_hooks.0, an EMAHook; take it out of the config", path)


def test_clipping_that_needs_whole_gradients():
    model = torch.nn.Linear(1, 1)
    clip = dict(max_norm=1.0, foreach=True)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), clip_grad=clip)
    with pytest.raises(ValueError, match="optim_wrapper.clip_grad.foreach: sharded training takes max_norm and norm"):
        shard(model, wrapper, {})


def test_parameters_without_a_dimension():
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="scale: is a single number, which sharded training cannot split; train"):
        shard(model, OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)), {})


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "rel"), [([], 1e-4), (["--amp"], 0.02), (["--bf16"], 0.05)])
def test_two_gpus(config, precision, rel):
    """Two GPUs that share the weights, stop and go on log the losses of one with their total batch."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    path = config(EXACT)
    one = run_processes(path, 1, "--work-dir", "one", *precision, *SWITCHES)
    assert one.returncode == 0, one.stderr
    sharded(path, "--work-dir", "two", *precision, *SWITCHES, *HALF, "train_cfg.max_epochs=2")
    sharded(path, "--work-dir", "two", "--resume", *precision, *SWITCHES, *HALF)
    assert losses(Path("two")) == pytest.approx(losses(Path("one")), rel=rel)
