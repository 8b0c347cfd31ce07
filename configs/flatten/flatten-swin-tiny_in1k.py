_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_224_squash.py",
    "../_base_/schedules/schedule_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(model_name="flatten_swin_tiny", drop_path_rate=0.2)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(relative_position_bias_table=dict(decay_mult=0.0))))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=0, end=300, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=300)
