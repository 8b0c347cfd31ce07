# Cascade R-CNN with DetectoRS' recursive feature pyramid (arXiv 2006.02334): mmdet's, whose ResNet takes the feedback.
_base_ = [
    "../_base_/models/cascade-rcnn_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/schedule_1x_sgd.py",
    "../_base_/default_runtime.py",
]

backbone = dict(
    type="DetectoRS_ResNet",
    depth=50,
    num_stages=4,
    out_indices=(0, 1, 2, 3),
    frozen_stages=1,
    norm_cfg=dict(type="BN", requires_grad=True),
    norm_eval=True,
    style="pytorch",
    conv_cfg=dict(type="ConvAWS"),
    init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
)
model = dict(
    backbone=dict(**backbone, output_img=True),
    neck=dict(
        type="RFP",
        in_channels=[256, 512, 1024, 2048],
        rfp_steps=2,
        aspp_out_channels=64,
        aspp_dilations=(1, 3, 6, 1),
        rfp_backbone=dict(**backbone, rfp_inplanes=256),
    ),
)
