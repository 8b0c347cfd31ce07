_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_384.py",
    "../_base_/schedules/schedule_30e.py",
    "../_base_/default_runtime.py",
]

# without mixup and cutmix
model = dict(model_name="dinat_large_384_11x11", drop_path_rate=0.35, train_cfg=None)
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-10))
# all but the head, which is for other classes
load_from = "https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_large_in22k_224_11x11interp.pth"
