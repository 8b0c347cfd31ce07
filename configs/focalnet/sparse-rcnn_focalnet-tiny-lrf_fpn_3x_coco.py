_base_ = [
    "../_base_/models/sparse-rcnn_fpn.py",
    "../_base_/datasets/coco_detection_ms-crop.py",
    "../_base_/schedules/schedule_3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.FocalNet",
        arch="tiny_lrf",
        focal_windows=(11, 9, 9, 7),
        drop_path_rate=0.3,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/microsoft/FocalNet/releases/download/v1.0.0/focalnet_tiny_lrf.pth",
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
# full precision, and decay on everything
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2.5e-5, betas=(0.9, 0.999), weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)
