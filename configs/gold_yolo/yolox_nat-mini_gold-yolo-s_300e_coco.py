# Gold-YOLO-S's neck (arXiv 2309.11331) on NAT, which has the widths that it was published for, by AdamW.
_base_ = [
    "../_base_/models/yolox_gold-yolo.py",
    "../_base_/datasets/coco_detection_mosaic.py",
    "../_base_/schedules/schedule_300e_yolo.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.NAT",
        arch="mini",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth"),
    ),
    neck=[
        dict(type="densezoo.GatherDistribute", in_channels=[64, 128, 256, 512], arch="s"),
        dict(type="ChannelMapper", in_channels=[64, 128, 256], out_channels=128, kernel_size=1),
    ],
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=True, begin=0, end=3, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=3, end=300, convert_to_iter_based=True),
]
