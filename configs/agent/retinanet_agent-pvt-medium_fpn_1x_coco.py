_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.AgentPVT",
        arch="medium",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="https://cloud.tsinghua.edu.cn/f/4d00ecacf18b45f9b88c?dl=1"),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
