_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.AgentSwin",
        arch="tiny",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="https://cloud.tsinghua.edu.cn/f/a2ddc1190c224f768a41?dl=1"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
# no decay on the tables of relative positions and the biases of agents either: all have _bias in their names
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_bias=dict(decay_mult=0.0))))
