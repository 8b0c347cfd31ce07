_base_ = [
    "../_base_/models/p2at.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.NAT",
        arch="mini",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
)
