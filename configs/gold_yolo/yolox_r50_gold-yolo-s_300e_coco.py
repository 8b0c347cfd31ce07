# Gold-YOLO-S's neck (arXiv 2309.11331) on ResNet-50.
_base_ = [
    "../_base_/models/yolox_gold-yolo.py",
    "../_base_/datasets/coco_detection_mosaic.py",
    "../_base_/schedules/schedule_300e_yolo.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="ResNet",
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=True,
        style="pytorch",
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=[
        dict(type="densezoo.GatherDistribute", in_channels=[256, 512, 1024, 2048], arch="s"),
        dict(type="ChannelMapper", in_channels=[64, 128, 256], out_channels=128, kernel_size=1),
    ],
)
