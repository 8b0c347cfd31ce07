# Cascade R-CNN with DetectoRS' recursive feature pyramid (arXiv 2006.02334) on two NATs, by AdamW.
_base_ = [
    "../_base_/models/cascade-rcnn_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]

backbone = dict(
    type="densezoo.NAT",
    arch="mini",
    drop_path_rate=0.2,
    init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth"),
)
model = dict(
    backbone=dict(**backbone, output_img=True),
    neck=dict(type="densezoo.RFP", in_channels=[64, 128, 256, 512], rfp_backbone=backbone),
)
