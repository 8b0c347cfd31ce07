_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_224_squash.py",
    "../_base_/schedules/schedule_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(model_name="agent_cswin_tiny", drop_path_rate=0.2)
optim_wrapper = dict(clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=2e-5, by_epoch=True, begin=0, end=300, convert_to_iter_based=True),
]
# decay 0.99984
custom_hooks = [dict(type="EMAHook", momentum=1.6e-4, priority="ABOVE_NORMAL")]
