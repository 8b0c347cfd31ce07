"""The switches of tools/train.py: what each one changes in a run."""

from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip("mmengine")

from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from tiny import CLASSIFIER, losses, tool, write_classes, write_config
from torch import nn

import densezoo.openmmlab  # noqa: F401
from densezoo.layer_decay import layer_scales

tools_train = tool("train")
train = tools_train.main
ONE_EPOCH = ["--cfg-options", "train_cfg.max_epochs=1"]
ALONE = """
model["backbone"]["drop_path_rate"] = 0.0
randomness = dict(seed=1)
val_dataloader = val_evaluator = val_cfg = None
default_hooks["checkpoint"].pop("save_best")
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture
def run(tmp_path, images, monkeypatch):
    """Return a function that trains one epoch in a folder of this name, and returns its runner."""
    monkeypatch.chdir(tmp_path)
    path = str(write_config(tmp_path / f"{tmp_path.name}.py", CLASSIFIER, images, ALONE))
    runners, from_cfg = [], tools_train.Runner.from_cfg
    monkeypatch.setattr(tools_train.Runner, "from_cfg", lambda cfg: runners.append(from_cfg(cfg)) or runners[-1])

    def start(name, *options):
        train([path, "--work-dir", name, *options, *ONE_EPOCH])
        return runners[-1]

    return start


def state_of(folder):
    return torch.load(Path(folder, "epoch_1.pth"), weights_only=True)


def test_what_saves_memory_changes_no_loss(run, capfd):
    """Recomputed activations and another memory format give the same losses, up to rounding."""
    run("plain")
    checkpointed = run("checkpointed", "--checkpoint-activations").model
    channels_last = run("channels_last", "--channels-last").model
    assert checkpointed.backbone.grad_checkpointing
    weight = channels_last.backbone.patch_embed.proj[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert losses(Path("checkpointed")) == pytest.approx(losses(Path("plain")), rel=1e-5)
    assert losses(Path("channels_last")) == pytest.approx(losses(Path("plain")), rel=1e-4)
    assert "images = batch 4; " in capfd.readouterr().out


def test_accumulation(run, capfd):
    """Two steps of four images make an update of a batch of eight, for which the config is made."""
    runner = run("accumulated", "--accumulate", "2", "--auto-scale-lr")
    out = capfd.readouterr().out
    assert "1 process(es) x 4 images x 2 accumulated steps = batch 8; " in out
    assert "largest learning rate 0.001 (scaled linearly by 1: configured for a batch of 8)" in out
    (state, *_) = runner.optim_wrapper.state_dict()["state"].values()
    assert int(state["step"]) == 2, "four iterations"


def test_averages(run, capsys):
    run("averaged", "--ema", "0.25")
    checkpoint = state_of("averaged")
    averages, current = checkpoint["state_dict"], checkpoint["ema_state_dict"]
    name = "head.fc.weight"
    assert name in averages and any(key.endswith(name) for key in current)
    other = next(value for key, value in current.items() if key.endswith(name))
    assert not torch.equal(averages[name], other)
    with pytest.raises(SystemExit):
        run("other", "--resume", "averaged/epoch_1.pth")
    message = "--resume averaged/epoch_1.pth: its run kept moving averages; give --ema"
    assert message in capsys.readouterr().err and not Path("other").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the CPU's autocast")
def test_bf16(run):
    run("plain")
    run("half", "--bf16")
    assert losses(Path("half")) != losses(Path("plain"))
    assert losses(Path("half")) == pytest.approx(losses(Path("plain")), rel=0.05)


def test_bf16_needs_no_scaling_of_the_loss():
    from mmengine.config import Config

    switches = __import__("_switches")
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type="AdamW"))))
    switches.set_amp(cfg, bf16=True)
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert (cfg.optim_wrapper.dtype, cfg.optim_wrapper.loss_scale) == ("bfloat16", 1.0)


def test_layer_decay(run):
    runner = run("decayed", "--layer-decay", "0.5")
    rates = {}
    groups = runner.optim_wrapper.optimizer.param_groups
    names = {id(parameter): name for name, parameter in runner.model.named_parameters()}
    for group in groups:
        rates[names[id(group["params"][0])]] = group["initial_lr"]
    assert len(groups) == len(list(runner.model.parameters()))
    # Four blocks of one layer each, what leads from one level to the next with the block before.
    assert rates["head.fc.weight"] == 1e-3
    assert rates["backbone.levels.3.blocks.0.mlp.fc1.weight"] == rates["backbone.levels.3.blocks.0.attn.rpb"]
    blocks = [rates[f"backbone.levels.{i}.blocks.0.mlp.fc1.weight"] for i in range(4)]
    assert blocks == sorted(blocks) and len(set(blocks)) == 4 and blocks[-1] < 1e-3
    assert rates["backbone.patch_embed.proj.0.weight"] < blocks[0]


@pytest.mark.parametrize("name", ["densezoo_poolformer_s12", "quadtree_b0", "flatten_pvt_v2_b0"])
def test_layer_decay_of_a_timm_classifier(name):
    """In a model around timm's, the classifier keeps its learning rate, and every parameter has one."""
    init_default_scope("mmpretrain")
    model = MODELS.build(dict(type="TimmClassifier", model_name=name, loss=dict(type="CrossEntropyLoss")))
    scales = layer_scales(model, 0.8)
    assert scales.keys() == {key for key, _ in model.named_parameters()}
    assert max(scales.values()) == 1 and min(scales.values()) < 0.8**5
    assert scales["model.head.weight"] == scales["model.head.bias"] == 1
    config = dict(optimizer=dict(type="AdamW", lr=1e-3), constructor="LayerDecayConstructor")
    wrapper = build_optim_wrapper(model, dict(config, paramwise_cfg=dict(layer_decay_rate=0.8)))
    assert {round(group["lr"] / 1e-3, 9) for group in wrapper.param_groups} == {round(s, 9) for s in scales.values()}


def test_layer_decay_needs_layers():
    with pytest.raises(ValueError, match="layer_decay_rate: Linear does not tell the layers"):
        layer_scales(nn.Linear(1, 1), 0.8)
    assert layer_scales(nn.ModuleDict(dict(backbone=timm.create_model("quadtree_b0", num_classes=0))), 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accumulate", "0"], "--accumulate: got 0, expected at least 1"),
        (["--ema", "1.5"], "--ema: got 1.5"),
        (["--layer-decay", "0"], "--layer-decay: got 0.0, expected a rate between 0 and 1"),
        (["--bf16", "--cfg-options", "optim_wrapper.type=Apex"], "--bf16: optim_wrapper.type is 'Apex'"),
        (["--bf16", "--amp"], "argument --amp: not allowed with argument --bf16"),
    ],
)
def test_wrong_values(tmp_path, images, capsys, options, message):
    path = write_config(tmp_path / "config.py", CLASSIFIER, images)
    with pytest.raises(SystemExit) as end:
        train([str(path), "--work-dir", str(tmp_path / "work"), *options])
    assert end.value.code == 2 and not (tmp_path / "work").exists()
    assert message in capsys.readouterr().err


def test_tensorboard(run):
    """Its files are beside the others, and hold every loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("logged")
    (file,) = Path("logged").glob("*/vis_data/events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx(losses(Path("logged")), rel=1e-6) and len(found) == 4


@pytest.mark.parametrize("installed", [True, False])
def test_loggers(installed, monkeypatch):
    from mmengine.config import Config

    switches = __import__("_switches")
    monkeypatch.setattr(switches, "find_spec", lambda name: installed)
    cfg = Config(dict(visualizer=dict(type="DetLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")])))
    switches.add_loggers(cfg, wandb=False)
    switches.add_loggers(cfg, wandb=False)
    kinds = [backend["type"] for backend in cfg.visualizer.vis_backends]
    assert kinds == ["LocalVisBackend", "mmengine.TensorboardVisBackend"]
    if installed:
        switches.add_loggers(cfg, wandb=True)
        assert cfg.visualizer.vis_backends[-1]["type"] == "mmengine.WandbVisBackend"
    else:
        with pytest.raises(switches.ConfigError, match="--wandb: wandb is not installed; pip install wandb"):
            switches.add_loggers(cfg, wandb=True)
