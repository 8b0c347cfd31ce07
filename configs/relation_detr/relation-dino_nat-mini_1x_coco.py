_base_ = "./relation-dino_r50_1x_coco.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="densezoo.NAT",
        arch="mini",
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
