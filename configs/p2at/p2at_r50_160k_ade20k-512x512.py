_base_ = [
    "../_base_/models/p2at.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_160k_sgd.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="ResNetV1c",
        depth=50,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://resnet50_v1c"),
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
)
