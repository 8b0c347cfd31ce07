# ViTDet's simple feature pyramid (arXiv 2203.16527) on isotropic FocalNet.
_base_ = [
    "../_base_/models/mask-rcnn_simple-fpn.py",
    "../_base_/datasets/coco_instance_lsj.py",
    "../_base_/schedules/schedule_100e_vitdet.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.FocalNet",
        arch="small_iso",
        drop_path_rate=0.1,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://projects4jw.blob.core.windows.net/focalnet/release/classification/focalnet_small_iso_16.pth",
        ),
    ),
    neck=dict(in_channels=[384]),
)

train_dataloader = dict(batch_size=1)
