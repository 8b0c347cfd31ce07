# ATSS (arXiv 1912.02424) with RCNet's neck (arXiv 2110.12130): 42.6 box AP were published.
_base_ = [
    "../_base_/models/atss_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/schedule_1x_sgd.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="ResNet",
        depth=50,
        num_stages=4,
        out_indices=(1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=True,
        style="pytorch",
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=dict(_delete_=True, type="densezoo.RCNet", in_channels=[512, 1024, 2048], out_channels=256, num_outs=5),
)

# for the batch norm, on fewer GPUs
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=0.01))
