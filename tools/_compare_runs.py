"""The configs of tools/compare.py, and what it does with them in processes of their own."""

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from hashlib import sha256
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import torch
from _compare_variations import VARIATIONS, config_of
from _errors import check_option
from _files import replacing
from mmengine.config import Config

from densezoo.runner import Runner

METRICS = {"mmdet": "coco/bbox_mAP", "mmseg": "mIoU"}


def import_all() -> None:
    """Import what runs need, once for all of them: mmengine does so when it builds a part, which takes long."""
    ours = ("openmmlab", "mmdet_backbones", "mmdet_heads", "mmdet_sepc", "mmseg_heads")
    theirs = [f"{library}.{part}" for library in METRICS for part in ("datasets", "engine", "evaluation", "models")]
    # Ours first: mmcv then has its operators.
    for module in (*(f"densezoo.{part}" for part in ours), *theirs):
        import_module(module)


def prepare(name: str, root: Path, options: dict) -> tuple[Config, str]:
    """Return the config of a variation on the digits under `root`, and a digest of all but the place and the seed."""
    cfg = config_of(name)
    for option in options:
        check_option(cfg, option)
    cfg.merge_from_dict(options)
    content = json.dumps([cfg.to_dict(), (root / "digits.json").read_text()], sort_keys=True, default=str)
    for split in ("train", "val", "test"):
        cfg[f"{split}_dataloader"].dataset.data_root = f"{root}/"
    if cfg.default_scope == "mmdet":
        cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = f"{root}/annotations/instances_validation.json"
    return cfg, sha256(content.encode()).hexdigest()[:12]


def start(target: Callable[..., dict], out: Path, gpu: int | None, threads: int, *args: Any) -> BaseProcess:
    """Start `target(*args)` in a copy of this process, which has imported all; its dict goes to `out`, text beside."""
    out.unlink(missing_ok=True)
    process = get_context("fork").Process(target=_run, args=(target, out, gpu, threads, args))
    process.start()
    return process


def _run(target: Callable[..., dict], out: Path, gpu: int | None, threads: int, args: tuple) -> None:
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    torch.set_num_threads(threads)
    cv2.setNumThreads(1)
    try:
        result = target(*args)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        result = dict(error=f"{type(error).__name__}: {lines[0]}"[:300])
    with replacing(out) as file:
        file.write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    # What a library left running does not hold this process up.
    os._exit(0)


def train(name: str, cfg: Config, seed: int, work_dir: Path) -> dict:
    """Train a variation and evaluate it once; return its score, parameters and seconds."""
    begin = time.perf_counter()
    shutil.rmtree(work_dir, ignore_errors=True)
    cfg.work_dir = str(work_dir)
    cfg.randomness = dict(seed=seed)
    cfg.default_hooks.checkpoint.update(interval=cfg.train_cfg.max_epochs, save_optimizer=False)
    cfg.train_cfg.val_interval = cfg.train_cfg.max_epochs
    if torch.cuda.is_available():
        # Samples do not depend on what loads them.
        cfg.train_dataloader.update(num_workers=1, persistent_workers=True)
    runner = Runner.from_cfg(cfg)
    VARIATIONS[name].prepare(runner.model)
    runner.train()
    score = runner.message_hub.log_scalars.get(f"val/{METRICS[cfg.default_scope]}")
    return dict(
        # Without any prediction there is no AP; mmseg tells percentages.
        score=0.0 if score is None else float(score.current()) / (100 if cfg.default_scope == "mmseg" else 1),
        parameters=sum(p.numel() for p in runner.model.parameters()),
        seconds=round(time.perf_counter() - begin, 1),
    )
