# ViTDet's simple feature pyramid (arXiv 2203.16527) on Agent-DeiT.
_base_ = [
    "../_base_/models/mask-rcnn_simple-fpn.py",
    "../_base_/datasets/coco_instance_lsj.py",
    "../_base_/schedules/schedule_100e_vitdet.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.AgentDeiT",
        arch="small",
        drop_path_rate=0.1,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://cloud.tsinghua.edu.cn/f/fdd43304372541db8ea7?dl=1",
        ),
    ),
    neck=dict(in_channels=[384]),
)

train_dataloader = dict(batch_size=1)
