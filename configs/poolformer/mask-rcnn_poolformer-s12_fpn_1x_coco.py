_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.PoolFormer",
        arch="s12",
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/sail-sg/poolformer/releases/download/v1.0/poolformer_s12.pth.tar",
        ),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
