# RetinaNet with RCNet's neck (arXiv 2110.12130) on NAT, by AdamW.
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.NAT",
        arch="mini",
        # the first output is not used
        out_norms=(1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth"),
    ),
    neck=dict(
        _delete_=True,
        type="densezoo.RCNet",
        in_channels=[64, 128, 256, 512],
        out_channels=256,
        start_level=1,
        num_outs=5,
    ),
)

# for the batch norm, on fewer GPUs
train_dataloader = dict(batch_size=4)
