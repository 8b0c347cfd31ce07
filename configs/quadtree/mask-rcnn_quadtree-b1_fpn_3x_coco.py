_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/schedule_3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.QuadTree",
        arch="b1",
        drop_path_rate=0.1,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/Tangshitao/QuadTreeAttention/releases/download/QuadTreeAttention/b1.pth",
        ),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
# full precision
optim_wrapper = dict(type="OptimWrapper")
