_base_ = [
    "../_base_/models/faster-rcnn_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/schedule_1x_sgd.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.BAMResNet",
        arch="101",
        frozen_stages=1,
        norm_eval=True,
        # none were published of this depth: those of bam-resnet101_in1k.py
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/bam_resnet101.pth"),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
