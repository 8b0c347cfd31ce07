_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/schedule_3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.FocalNet",
        arch="base_lrf",
        focal_windows=(9, 9, 9, 9),
        drop_path_rate=0.3,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/microsoft/FocalNet/releases/download/v1.0.0/focalnet_base_lrf.pth",
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

# 12 epochs, a tenth of the learning rate from epochs 9 and 11 on
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[9, 11], gamma=0.1),
]
train_cfg = dict(max_epochs=12)
