_base_ = [
    "../_base_/models/deeplabv3plus.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_160k_sgd.py",
    "../_base_/default_runtime.py",
]

norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(
        type="ResNetV1c",
        depth=50,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=True,
        norm_cfg=norm_cfg,
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://resnet50_v1c"),
    ),
    # the last stage has stride 8
    decode_head=dict(in_channels=2048, c1_in_channels=256, dilations=(1, 12, 24, 36)),
    auxiliary_head=dict(in_channels=1024),
)
