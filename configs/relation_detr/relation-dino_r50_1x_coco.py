_base_ = [
    "../_base_/models/dino.py",
    "../_base_/datasets/coco_detection_ms-crop.py",
    "../_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    type="densezoo.RelationDINO",
    num_hybrid_queries=1500,
    backbone=dict(
        type="ResNet",
        depth=50,
        out_indices=(1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=False),
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=dict(in_channels=[512, 1024, 2048]),
    bbox_head=dict(
        type="densezoo.RelationDINOHead",
        hybrid_assign=6,
        loss_cls=dict(_delete_=True, type="densezoo.IoUAwareFocalLoss", alpha=0.25, gamma=2.0, loss_weight=1.0),
    ),
)

train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=False)))
optim_wrapper = dict(
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys=dict(backbone=dict(lr_mult=0.1), sampling_offsets=dict(lr_mult=0.1)),
    ),
)
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[10], gamma=0.1)]
