_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.PoolFormer",
        arch="s24",
        # the first output is not used
        out_norms=(1, 2, 3),
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/sail-sg/poolformer/releases/download/v1.0/poolformer_s24.pth.tar",
        ),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
