_base_ = [
    "../_base_/models/semantic-fpn.py",
    "../_base_/datasets/ade20k_multiple-of-32.py",
    "../_base_/schedules/schedule_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.QuadTree",
        arch="b0",
        drop_path_rate=0.1,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/Tangshitao/QuadTreeAttention/releases/download/QuadTreeAttention_cls/b0.pth",
        ),
    ),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
# full precision, and ten times the learning rate in the head
optim_wrapper = dict(type="OptimWrapper", paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10.0))))
