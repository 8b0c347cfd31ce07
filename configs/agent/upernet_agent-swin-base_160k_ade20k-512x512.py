_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.AgentSwin",
        arch="base",
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="https://cloud.tsinghua.edu.cn/f/4fcd2d0114bb490483c3?dl=1"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
# no decay on the tables of relative positions and the biases of agents either: all have _bias in their names
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_bias=dict(decay_mult=0.0))))
