_base_ = [
    "../_base_/models/semantic-fpn.py",
    "../_base_/datasets/ade20k_multiple-of-32.py",
    "../_base_/schedules/schedule_40k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.PoolFormer",
        arch="s36",
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/sail-sg/poolformer/releases/download/v1.0/poolformer_s36.pth.tar",
        ),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(base_batch_size=32)
