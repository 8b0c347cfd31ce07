_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/schedule_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(model_name="densezoo_focalnet_tiny_srf", drop_path_rate=0.2)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=0, end=300, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=300)
