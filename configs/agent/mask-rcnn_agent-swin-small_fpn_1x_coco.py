_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.AgentSwin",
        arch="small",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="https://cloud.tsinghua.edu.cn/f/f607172c9fea4d6e99bb?dl=1"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
# no decay on the tables of relative positions and the biases of agents either: all have _bias in their names
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0), _bias=dict(decay_mult=0.0))),
)
