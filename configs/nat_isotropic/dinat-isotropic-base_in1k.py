_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/schedule_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(model_name="dinat_isotropic_base", drop_path_rate=0.4)

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=50, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, by_epoch=True, begin=0, end=300, convert_to_iter_based=True),
]
# decay 0.9998
custom_hooks = [dict(type="EMAHook", momentum=2e-4, priority="ABOVE_NORMAL")]
