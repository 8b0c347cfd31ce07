_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/schedule_1x_sgd.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="ResNet",
        depth=50,
        out_indices=(1, 2, 3),
        frozen_stages=1,
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=[
        dict(type="FPN", in_channels=[512, 1024, 2048], out_channels=256, add_extra_convs="on_output", num_outs=5),
        dict(type="densezoo.DyHead", in_channels=256, out_channels=256, num_blocks=6),
    ],
)
optim_wrapper = dict(optimizer=dict(lr=0.01))
