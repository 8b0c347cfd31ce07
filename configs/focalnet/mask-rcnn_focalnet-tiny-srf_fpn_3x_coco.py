_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/schedule_3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.FocalNet",
        arch="tiny_srf",
        focal_windows=(9, 9, 9, 9),
        drop_path_rate=0.3,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/microsoft/FocalNet/releases/download/v1.0.0/focalnet_tiny_srf.pth",
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
