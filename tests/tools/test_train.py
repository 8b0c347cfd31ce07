"""tools/train.py and dist_train.sh: training, resuming, several processes, and what a mistake gives."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmengine")

from tiny import CLASSIFIER, DETECTOR, TOOLS, losses, run_processes, tool, write_classes, write_config

train = tool("train").main
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU takes no part where there is a GPU")

WORKERS = """
train_dataloader.update(num_workers=2, persistent_workers=True)
"""
# Counts iterations instead of epochs, in a loop that never sees the end of an epoch.
BY_ITERATION = """
train_cfg = dict(type="IterBasedTrainLoop", max_iters=12, val_interval=5)
train_dataloader["sampler"] = dict(type="InfiniteSampler")
param_scheduler = dict(type="PolyLR", by_epoch=False, begin=0, end=12)
default_hooks["checkpoint"].update(by_epoch=False, interval=3)
log_processor = dict(window_size=5, by_epoch=False)
"""
# What several processes together compute exactly as one does.
NO_DROP_PATH = """
model["backbone"]["drop_path_rate"] = 0.0
log_processor = dict(window_size=1)
randomness = dict(seed=2)
"""
NOT_PERSISTENT = "train_dataloader.persistent_workers=False"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture
def config(tmp_path, images, monkeypatch):
    """Return a function that writes a config; the test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def write(changes="", base=CLASSIFIER, root=images):
        # mmengine keeps loggers by the config's name
        return str(write_config(tmp_path / f"{tmp_path.name}.py", base, root, changes))

    return write


def fail(capsys, *args):
    """Run the tool; return its message."""
    with pytest.raises(SystemExit) as end:
        train([*args, "--work-dir", "work"])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert not Path("work").exists()
    (message,) = [line for line in err.splitlines() if "error: " in line]
    return message


def test_train(config, capfd):
    path = config()
    train([path])
    work_dir = Path("work_dirs", Path(path).stem)
    assert (work_dir / Path(path).name).is_file()
    # one kept, and the best one
    assert len(list(work_dir.glob("*.pth"))) == 2
    assert Path((work_dir / "last_checkpoint").read_text()).name == "epoch_3.pth"
    assert not list(work_dir.glob(".*"))
    assert sorted(losses(work_dir)) == list(range(1, 13))
    for file in work_dir.glob("*.pth"):
        checkpoint = torch.load(file, weights_only=True)
        assert checkpoint["meta"]["dataset_meta"]["classes"] == ("a", "b", "c", "d")

    (line,) = [line for line in capfd.readouterr().out.splitlines() if "Training on" in line]
    assert "1 process(es) x 4 images = batch 4; largest learning rate 0.001 (not scaled" in line
    assert "--auto-scale-lr makes it 0.0005" in line
    assert str(work_dir) in line


def test_auto_scale_lr(config, capfd):
    train([config(), "--auto-scale-lr", "--work-dir", "work", "--cfg-options", "train_cfg.max_epochs=1"])
    assert "learning rate 0.0005 (scaled linearly by 0.5: configured for a batch of 8)" in capfd.readouterr().out


@on_a_cpu
def test_amp_on_a_cpu(config):
    path = config("randomness = dict(seed=1)")
    train([path, "--work-dir", "float32"])
    train([path, "--work-dir", "mixed", "--amp"])
    full, mixed = losses(Path("float32")), losses(Path("mixed"))
    assert full != mixed
    assert mixed == pytest.approx(full, rel=0.05)
    state = torch.load("mixed/epoch_3.pth", weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_compile(config, monkeypatch):
    # The real backend takes a minute and a C++ compiler; what is compiled and saved does not depend on it.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setitem(train.__globals__, "check_compiler", lambda: None)
    compiled, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self) or compile_module(self))
    path = config("randomness = dict(seed=1)\nval_dataloader = val_evaluator = val_cfg = None")
    options = ["--cfg-options", "train_cfg.max_epochs=1"]
    train([path, "--work-dir", "eager", *options])
    train([path, "--work-dir", "compiled", "--compile", *options])
    assert [type(module).__name__ for module in compiled] == ["NAT"]
    assert losses(Path("compiled")) == pytest.approx(losses(Path("eager")), rel=1e-5)
    states = [torch.load(f"{name}/epoch_1.pth", weights_only=True)["state_dict"] for name in ("eager", "compiled")]
    assert states[0].keys() == states[1].keys()


@on_a_cpu
def test_what_compile_needs(config, capsys, monkeypatch, tmp_path):
    compilers, tools = ["g++"], train.__globals__
    monkeypatch.setitem(tools, "shutil", SimpleNamespace(which=lambda name: name in compilers))
    monkeypatch.setitem(tools, "sysconfig", SimpleNamespace(get_path=lambda name: str(tmp_path)))
    headers = f"{tmp_path}/Python.h (Debian: apt-get install python3-dev"
    message = fail(capsys, config(), "--compile")
    assert headers in message and "a C++ compiler" not in message
    (tmp_path / "Python.h").touch()
    tools["check_compiler"]()
    compilers.clear()
    message = fail(capsys, config(), "--compile")
    assert "a C++ compiler (Debian: apt-get install g++)" in message and "Python.h" not in message


@on_a_cpu
@pytest.mark.parametrize("changes", ["", BY_ITERATION], ids=["epochs", "iterations"])
def test_resume_after_kill(config, tmp_path, changes):
    """A run killed in the middle of its second epoch and resumed has every loss of an unbroken one, bit for bit."""
    Path("killer.py").write_text(
        "import os, signal\n"
        "from mmengine.hooks import Hook\n"
        "from mmengine.registry import HOOKS\n"
        "@HOOKS.register_module()\n"
        "class KillHook(Hook):\n"
        "    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):\n"
        "        if runner.iter == 6:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = config(WORKERS + changes)
    seed = ["--cfg-options", "randomness.seed=5"]
    mortal = tmp_path / "mortal.py"
    mortal.write_text(
        f"_base_ = {path!r}\ncustom_imports = dict(imports=['densezoo.openmmlab', 'killer'])\n"
        "custom_hooks = [dict(type='KillHook')]\n"
    )
    command = [sys.executable, str(TOOLS / "train.py"), str(mortal), "--work-dir", "broken", *seed]
    killed = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, stdout=subprocess.DEVNULL)
    train([path, "--work-dir", "unbroken", *seed])
    assert killed.wait(300) == -signal.SIGKILL
    assert max(losses(Path("broken"))) == 6

    # Seed and number of workers come from elsewhere now; neither may matter.
    options = ["--cfg-options", "train_dataloader.num_workers=0", NOT_PERSISTENT]
    train([path, "--work-dir", "broken", "--resume", *options])
    assert losses(Path("broken")) == losses(Path("unbroken"))
    final = Path((Path("unbroken") / "last_checkpoint").read_text()).name
    states = [torch.load(Path(run, final), weights_only=True)["state_dict"] for run in ("broken", "unbroken")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_kill_while_saving(config, monkeypatch):
    """A save that dies half-way, with one checkpoint to keep, leaves the previous one and everything that names it."""
    train([config(), "--work-dir", "work", "--cfg-options", "train_cfg.max_epochs=1"])
    save = torch.save

    def save_half(checkpoint, file, *args):
        save(checkpoint, file, *args)
        file.truncate(file.tell() // 2)
        Path("work/.epoch_2.pth.tmp").write_bytes(file.getvalue())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save_half)
        train([config(), "--work-dir", "work", "--resume"])
    assert Path("work/last_checkpoint").read_text().endswith("epoch_1.pth")
    assert torch.load("work/epoch_1.pth", weights_only=True)["meta"]["epoch"] == 1
    train([config(), "--work-dir", "work", "--resume"])
    assert Path("work/last_checkpoint").read_text().endswith("epoch_3.pth")
    assert not Path("work/.epoch_2.pth.tmp").exists()


def test_resume(config, capsys):
    path = config()
    short = ["--cfg-options", "train_cfg.max_epochs=1"]
    train([path, "--work-dir", "first", "--resume", *short])
    assert "no checkpoint in first; starting from the beginning" in capsys.readouterr().out
    # also after the folder has moved, and from a given file
    os.rename("first", "moved")
    train([path, "--work-dir", "moved", "--resume", "auto", "--cfg-options", "train_cfg.max_epochs=2"])
    assert sorted(losses(Path("moved"))) == list(range(1, 9))
    train([path, "--work-dir", "second", "--resume", "moved/epoch_2.pth"])
    assert sorted(losses(Path("second"))) == [9, 10, 11, 12]

    message = fail(capsys, path, "--resume", "moved/epoch_3.pth")
    assert "moved/epoch_3.pth" in message and "did you mean moved/epoch_2.pth?" in message
    message = fail(capsys, path, "--resume", "moved/epoch_2.pth", "--cfg-options", "model.backbone.arch.mlp_ratio=1.0")
    assert "59 of the 71 tensors" in message
    assert "12 have another shape (backbone.levels.0.blocks.0.mlp.fc1.weight: (32, 16) there, (16, 16) here" in message
    torch.save(torch.load("moved/epoch_2.pth", weights_only=True)["state_dict"], "weights.pth")
    assert "start from it with load_from" in fail(capsys, path, "--resume", "weights.pth")
    # without the optimizer it would go on as if from the beginning
    best = max(Path("moved").glob("best_*.pth"))  # of each epoch, where the second is better: the first has moved
    assert f"--resume {best}: holds weights but no state of a training" in fail(capsys, path, "--resume", str(best))


class Code:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("option", ["resume", "load_from", "init_cfg"])
def test_checkpoints_are_not_run(config, capsys, option):
    torch.save({"meta": {"epoch": 1, "iter": 1}, "state_dict": Code()}, "hostile.pth")
    changes = "model['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='hostile.pth')"
    arguments = {
        "resume": [config(), "--resume", "hostile.pth"],
        "load_from": [config(), "--cfg-options", "load_from=hostile.pth"],
        "init_cfg": [config(changes)],
    }
    assert "hostile.pth" in (message := fail(capsys, *arguments[option])) and "code" in message
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "option, place, nearest",
    [
        ("train_dataloder.batch_size=2", "no key train_dataloder", "train_dataloader"),
        ("train_dataloader.batch_sise=2", "no key train_dataloader.batch_sise", "batch_size"),
        ("train_dataloader.dataset.pipeline.1.scal=3", "train_dataloader.dataset.pipeline.1.scal: RandomResi", "scale"),
        ("train_dataloader.dataset.type=CustomDatset", "train_dataloader.dataset.type: no 'CustomDat", "CustomDataset"),
        ("train_cfg.max_epoch=2", "train_cfg.max_epoch: EpochBasedTrainLoop takes no such argument", "max_epochs"),
        ("train_cfg.type=IterBasedTrainLop", "train_cfg.type: no 'IterBasedTrainLop' is known", "IterBasedTrainLoop"),
        ("model.type=ImageClasifier", "model.type: no 'ImageClasifier' is known", "ImageClassifier"),
        ("model.backbone.drop_path_rat=1", "model.backbone.drop_path_rat: NAT takes no such arg", "drop_path_rate"),
        ("model.backbone.type=densezoo.NTA", "model.backbone.type: no 'densezoo.NTA' is known", "densezoo.NAT"),
        ("model.backbone.arch=tinny", "model.backbone: arch: NAT has no 'tinny'", "tiny"),
        ("optim_wrapper.optimizer.l=1", "optim_wrapper.optimizer.l: AdamW takes no such argument", "lr"),
        ("optim_wrapper.optimizer.type=AdmW", "optim_wrapper.optimizer.type: no 'AdmW' is known", "AdamW"),
        ("optim_wrapper.clip_grad.max_nrm=1", "optim_wrapper.clip_grad.max_nrm: there is no such key", "max_norm"),
        ("param_scheduler.T_mx=3", "param_scheduler.T_mx: CosineAnnealingLR takes no such argument", "T_max"),
        ("param_scheduler.type=PolLR", "param_scheduler.type: no 'PolLR' is known", "PolyLR"),
        ("default_hooks.checkpoint.max_keep_ckpt=2", "checkpoint.max_keep_ckpt: CheckpointHo", "max_keep_ckpts"),
        ("val_evaluator.type=Acuracy", "val_evaluator.type: no 'Acuracy' is known", "Accuracy"),
        ("randomness.sed=1", "randomness.sed: set_randomness takes no such argument", "seed"),
        ("env_cfg.cudnn_benchmrk=True", "env_cfg.cudnn_benchmrk: there is no such key", "cudnn_benchmark"),
        ("default_scope=mmdt", "default_scope: there is no package 'mmdt'", "mmdet"),
    ],
)
def test_misspelled_option(config, capsys, option, place, nearest):
    message = fail(capsys, config(), "--cfg-options", option)
    assert place in message and f"; did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    "option, expected",
    [
        ("train_dataloader.dataset.pipeline.9.scale=3", "train_dataloader.dataset.pipeline is a list of 4: no index 9"),
        ("train_dataloader.dataset.data_prefix=tran", "/tran: No such file or directory; did you mean /"),
        ("train_dataloader.num_workers=-1", "train_dataloader: num_workers option should be non-negative"),
        ("train_dataloader.sampler.type=InfiniteSampler", "an InfiniteSampler never ends an epoch"),
        ("model.head=3", "model.head: is 3, expected a dict"),
        ("model.head.num_classes=2", "model.head.num_classes: is 2, but the dataset has 4 classes"),
        ("load_from=missing.pth", "load_from: there is no checkpoint missing.pth"),
        ("no-value", "--cfg-options no-value: expected KEY=VALUE"),
        ("a.b=[1,2", "Imbalanced brackets"),
    ],
)
def test_wrong_option(config, capsys, option, expected):
    assert expected in fail(capsys, config(), "--cfg-options", option)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("train_dataloder = dict(batch_size=2)", "train_dataloder: there is no such key; did you mean 'train_dataloa"),
        ("model = dict(neck=dict(", "line 2: '(' was never closed"),
        ("x = y", "NameError: name 'y' is not defined"),
        ("model = dict(neck=dict(type='GlobalPool'))", "model.neck.type: no 'GlobalPool' is known"),
        ("custom_imports = dict(imports=['densezoo.openmlab'])", "openmlab; did you mean 'densezoo.openmmlab'?"),
        ("model = None", "model is missing"),
    ],
)
def test_wrong_config(config, capsys, text, expected):
    Path("child.py").write_text(f"_base_ = {config()!r}\n{text}\n")
    assert expected in fail(capsys, "child.py")


def test_missing_config(config, capsys, tmp_path):
    Path("orphan.py").write_text("_base_ = './parnt.py'\n")
    Path("parent.py").write_text("")
    assert f"parnt.py: No such file or directory; did you mean {tmp_path}/parent.py?" in fail(capsys, "orphan.py")
    assert "orfan.py: there is no such config; did you mean orphan.py?" in fail(capsys, "orfan.py")
    message = fail(capsys, "mask-rcnn_nat-tiny_fpn_3x_coco.py")
    assert "configs/nat/mask-rcnn_nat-tiny_fpn_3x_coco.py?" in message


def test_missing_data(config, capsys, tmp_path):
    from datasets import make_coco

    root = make_coco(tmp_path / "coco")
    path = config(base=DETECTOR, root=root)
    message = fail(capsys, path, "--cfg-options", "val_evaluator.ann_file=coco/annotations/instances_val2018.json")
    assert "val_evaluator: coco/annotations/instances_val2018.json: No such file" in message
    assert f"did you mean {root}/annotations/instances_val2017.json?" in message
    message = fail(capsys, path, "--cfg-options", "train_dataloader.dataset.metainfo.classes=(a,b)")
    assert "train_dataloader.dataset: the dataset is empty" in message
    (root / "train2017" / "000000000002.jpg").unlink()
    message = fail(capsys, path)
    assert f"1 of 2 image and label files are missing: {root}/train2017/000000000002.jpg" in message


def test_failed_start_changes_nothing(config, capsys):
    """A folder with an earlier run keeps what it has, and gets nothing."""
    path = config()
    Path("work").mkdir()
    Path("work", Path(path).name).write_text("of an earlier run")
    with pytest.raises(SystemExit):
        train([path, "--work-dir", "work", "--cfg-options", "optim_wrapper.optimizer.l=1"])
    assert [file.name for file in Path("work").iterdir()] == [Path(path).name]
    assert Path("work", Path(path).name).read_text() == "of an earlier run"


def test_errors_of_a_step_are_not_hidden(config):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train([config(), "--work-dir", "work", "--cfg-options", "model.head.in_channels=12"])


@on_a_cpu
def test_two_processes(config):
    """Two CPU processes log the losses of one with their total batch, from the same augmented images."""
    path = config(NO_DROP_PATH + WORKERS)
    train([path, "--work-dir", "one", "--cfg-options", "train_dataloader.num_workers=0", NOT_PERSISTENT])
    result = run_processes(path, 2, "--work-dir", "two", "--cfg-options", "train_dataloader.batch_size=2")
    assert result.returncode == 0, result.stderr
    assert "2 process(es) x 2 images = batch 4" in result.stdout
    assert losses(Path("two")) == pytest.approx(losses(Path("one")), rel=1e-5)


@pytest.mark.parametrize(
    "launcher, theirs",
    [
        ("slurm", dict(SLURM_PROCID="1", SLURM_NTASKS="4", SLURM_LOCALID="0", SLURM_NODELIST="node[3-4]")),
        ("mpi", dict(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_RANK="0")),
    ],
)
def test_launchers(config, capsys, monkeypatch, tmp_path, launcher, theirs):
    """What a launcher says about the processes becomes what torch reads."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        # restored afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    first = next(iter(theirs))
    assert f"--launcher {launcher}: {first} is not set; start" in fail(capsys, config(), "--launcher", launcher)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    if launcher == "slurm":
        scontrol = tmp_path / "bin/scontrol"
        scontrol.parent.mkdir()
        scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[3-4]" ] && echo "node3\nnode4"')
        scontrol.chmod(0o755)
        monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    else:
        assert "--launcher mpi: set MASTER_ADDR" in fail(capsys, config(), "--launcher", launcher)
        monkeypatch.setenv("MASTER_ADDR", "node3")
    from _launch import set_environment

    set_environment(launcher, None)
    assert [os.environ[name] for name in names] == ["1", "4", "0", "node3", "29500"]


def test_slurm_script(monkeypatch, tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"')
    srun.chmod(0o755)
    script = ["bash", TOOLS / "slurm_train.sh"]
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python", "GPUS": "16"}
    done = subprocess.run([*script, "gpu", "nat", "a b.py", "--amp"], env=env, capture_output=True, text=True)
    words = done.stdout.splitlines()
    assert words[words.index("--ntasks") + 1] == "16" and words[words.index("--gres") + 1] == "gpu:8"
    assert words[-6:] == ["-u", f"{TOOLS}/train.py", "a b.py", "--launcher", "slurm", "--amp"]
    usage = subprocess.run([*script, "gpu"], env=env, capture_output=True, text=True)
    assert usage.returncode == 2 and "usage: " in usage.stderr


def test_error_of_processes(config, capsys, monkeypatch, tmp_path):
    """Each process meets the error; the first tells it, and the launcher adds no traceback of its own."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    fail(capsys, config(), "--cfg-options", "train_cfg.max_epoch=2")
    assert max(waits) >= 10

    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit(2)")
    command = [sys.executable, TOOLS / "_torchrun.py", "--standalone", "--local-addr=127.0.0.1"]
    command += ["--nproc-per-node", "1", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@pytest.mark.gpu
def test_two_gpus(config):
    """Two GPUs through NCCL log the losses of one with their total batch."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    path = config(NO_DROP_PATH)
    one = run_processes(path, 1, "--work-dir", "one")
    two = run_processes(path, 2, "--work-dir", "two", "--cfg-options", "train_dataloader.batch_size=2")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert losses(Path("two")) == pytest.approx(losses(Path("one")), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("flag", ["--amp", "--compile"])
def test_faster_on_a_gpu(config, flag):
    path = config("randomness = dict(seed=2)")
    train([path, "--work-dir", "plain"])
    train([path, "--work-dir", "faster", flag])
    assert losses(Path("faster")) == pytest.approx(losses(Path("plain")), rel=0.02)
