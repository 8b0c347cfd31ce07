"""The smallest data sets and configs on which the tools can be tested, one for each task."""

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import numpy as np
from PIL import Image

TOOLS = Path(__file__).parents[2] / "tools"

BACKBONE = """
    type="densezoo.NAT",
    arch=dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), mlp_ratio=2.0, kernel_size=3),
"""
CLASSIFIER = f"""
custom_imports = dict(imports=["densezoo.openmmlab"])
default_scope = "mmpretrain"
model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(num_classes=4, mean=[128.0] * 3, std=[64.0] * 3),
    backbone=dict({BACKBONE} out_indices=(3,), drop_path_rate=0.3),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=4, in_channels=128, loss=dict(type="CrossEntropyLoss"), topk=(1, 2)),
)
load = [dict(type="LoadImageFromFile")]
augment = [dict(type="RandomResizedCrop", scale=32), dict(type="RandomFlip", prob=0.5)]
pack = [dict(type="PackInputs")]
data = dict(type="CustomDataset", data_root="ROOT")
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(**data, data_prefix="train", pipeline=load + augment + pack),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(**data, data_prefix="val", pipeline=load + [dict(type="Resize", scale=(32, 32))] + pack),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1, 2))
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3))
param_scheduler = dict(type="CosineAnnealingLR", T_max=3, by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=3, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=1, save_best="accuracy/top1"),
)
log_processor = dict(window_size=5)
env_cfg = dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0), dist_cfg=dict(backend="nccl"))
"""

BASE = TOOLS.parent / "configs" / "_base_"
SCHEDULE = """
few = dict(batch_size=2, num_workers=0, persistent_workers=False)
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3))
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=1, val_interval=1)
val_cfg = dict()
test_cfg = dict()
"""
DETECTOR = f"""{SCHEDULE}
_base_ = ["{BASE}/models/mask-rcnn_fpn.py", "{BASE}/datasets/coco_instance.py", "{BASE}/default_runtime.py"]
model = dict(
    backbone=dict({BACKBONE}),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16),
    ),
    # an untrained model is sure of nothing
    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=5)),
)
_base_.train_pipeline[2].scale = _base_.test_pipeline[1].scale = (128, 96)
train_dataloader = dict(**few, dataset=dict(data_root="ROOT/", pipeline=_base_.train_pipeline))
val_dataloader = dict(**few, dataset=dict(data_root="ROOT/", pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="ROOT/annotations/instances_val2017.json")
test_evaluator = val_evaluator
"""
SEGMENTOR = f"""{SCHEDULE}
_base_ = ["{BASE}/datasets/ade20k.py", "{BASE}/default_runtime.py"]
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(type="SegDataPreProcessor", size=(64, 64), pad_val=0, seg_pad_val=255),
    backbone=dict({BACKBONE} out_indices=(3,)),
    decode_head=dict(
        type="FCNHead", in_channels=128, in_index=0, channels=16, num_convs=1, num_classes=150, concat_input=False,
        norm_cfg=dict(type="SyncBN"), align_corners=False, loss_decode=dict(type="CrossEntropyLoss"),
    ),
    test_cfg=dict(mode="whole"),
)
_base_.train_pipeline[2].scale = _base_.test_pipeline[1].scale = (128, 64)
_base_.train_pipeline[3].crop_size = (64, 64)
train_dataloader = dict(
    **few, sampler=dict(type="DefaultSampler"), dataset=dict(data_root="ROOT", pipeline=_base_.train_pipeline)
)
val_dataloader = dict(**few, dataset=dict(data_root="ROOT", pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
"""


def tool(name: str) -> ModuleType:
    """Import a tool as a module; its folder is where Python looks when it runs as a script."""
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    # by its path: Python has a package `test` of its own
    spec = spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_processes(config: str, count: int, *args: str) -> subprocess.CompletedProcess:
    """Train in several processes."""
    command = ["bash", TOOLS / "dist_train.sh", config, str(count), *args]
    env = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def losses(work_dir: Path) -> dict[int, float]:
    """Return the loss logged at each step, of a step that was logged twice the last one."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def write_classes(root: Path, num_images: int = 4) -> Path:
    """Write train/ and val/ with four classes of `num_images` images each under `root`; return `root`."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in "abcd":
            (root / split / label).mkdir(parents=True)
            for i in range(num_images):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


def write_config(path: Path, base: str, root: Path, changes: str = "") -> Path:
    """Write a config of this module, over the data in `root`, with lines of Python after it."""
    path.write_text(base.replace("ROOT", str(root)) + dedent(changes))
    return path
