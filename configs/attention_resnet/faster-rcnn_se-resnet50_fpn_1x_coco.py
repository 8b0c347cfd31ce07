_base_ = [
    "../_base_/models/faster-rcnn_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/schedule_1x_sgd.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.SEResNet",
        arch="50",
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/moskomule/senet.pytorch/releases/download/archive/"
            "seresnet50-60a8950a85b2b.pkl",
        ),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
