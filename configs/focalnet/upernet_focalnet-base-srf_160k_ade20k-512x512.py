_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.FocalNet",
        arch="base_srf",
        focal_windows=(9, 9, 9, 9),
        drop_path_rate=0.3,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/microsoft/FocalNet/releases/download/v1.0.0/focalnet_base_srf.pth",
        ),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
