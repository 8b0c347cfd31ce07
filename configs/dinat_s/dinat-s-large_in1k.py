_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/schedule_30e.py",
    "../_base_/default_runtime.py",
]

# without mixup and cutmix
model = dict(model_name="dinat_s_large", drop_path_rate=0.35, train_cfg=None)
train_dataloader = dict(batch_size=64)
# all but the head, which is for other classes
load_from = "https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224.pth"
