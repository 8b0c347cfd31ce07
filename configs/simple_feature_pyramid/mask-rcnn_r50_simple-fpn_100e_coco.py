# ViTDet's simple feature pyramid (arXiv 2203.16527) on ResNet-50's map of stride 16.
_base_ = [
    "../_base_/models/mask-rcnn_simple-fpn.py",
    "../_base_/datasets/coco_instance_lsj.py",
    "../_base_/schedules/schedule_100e_vitdet.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="ResNet",
        depth=50,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=True,
        style="pytorch",
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=dict(in_channels=[1024]),
)

train_dataloader = dict(batch_size=1)
