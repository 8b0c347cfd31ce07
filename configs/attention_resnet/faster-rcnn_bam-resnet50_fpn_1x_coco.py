_base_ = [
    "../_base_/models/faster-rcnn_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/schedule_1x_sgd.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.BAMResNet",
        arch="50",
        frozen_stages=1,
        norm_eval=True,
        # the classifier's weights, to be fetched from Google Drive: the model's card says where
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/bam_resnet50.pth"),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
