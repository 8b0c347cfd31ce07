# PANet's neck (arXiv 1803.01534), mmdet's own, on NAT, by AdamW.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.NAT",
        arch="mini",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth"),
    ),
    neck=dict(type="PAFPN", in_channels=[64, 128, 256, 512]),
)
