_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/schedule_1x_sgd.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.ECAResNet",
        arch="50",
        frozen_stages=1,
        norm_eval=True,
        # the classifier's weights, to be fetched from Google Drive: the model's card says where
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/eca_resnet50_k3557.pth.tar"),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
# 8 images in all
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=0.01))
