_base_ = [
    "../_base_/models/timm_classifier_plain.py",
    "../_base_/datasets/imagenet_224_crop-flip.py",
    "../_base_/schedules/schedule_100e_sgd.py",
    "../_base_/default_runtime.py",
]

model = dict(model_name="se_resnet34")

# 8 GPUs x 128 images
train_dataloader = dict(batch_size=128)
optim_wrapper = dict(optimizer=dict(lr=0.6))
auto_scale_lr = dict(base_batch_size=1024)
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, begin=0, end=90, milestones=[50, 70], gamma=0.1)]
train_cfg = dict(max_epochs=90)
