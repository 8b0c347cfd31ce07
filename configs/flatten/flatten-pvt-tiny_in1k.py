_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_224_squash.py",
    "../_base_/schedules/schedule_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(model_name="flatten_pvt_tiny", drop_path_rate=0.1)
optim_wrapper = dict(clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=2e-5, by_epoch=True, begin=0, end=300, convert_to_iter_based=True),
]
