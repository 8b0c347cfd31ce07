_base_ = [
    "../_base_/models/semantic-fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_40k.py",
    "../_base_/default_runtime.py",
]

# no recipe was published: PVT's
model = dict(
    backbone=dict(
        type="densezoo.FLattenPVT",
        arch="tiny",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="https://cloud.tsinghua.edu.cn/f/3ab1d773f19d45648690?dl=1"),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
