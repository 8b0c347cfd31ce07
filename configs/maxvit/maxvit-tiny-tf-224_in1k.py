_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_224_randaugment-15.py",
    "../_base_/schedules/schedule_300e.py",
    "../_base_/default_runtime.py",
]

# mixup alone
model = dict(
    model_name="densezoo_maxvit_tiny_tf_224",
    drop_path_rate=0.2,
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8)]),
)

# 32 GPUs x 128 images
optim_wrapper = dict(
    optimizer=dict(lr=3e-3),
    paramwise_cfg=dict(custom_keys=dict(rel_pos=dict(decay_mult=0.0))),
    clip_grad=dict(max_norm=1.0),
)
auto_scale_lr = dict(base_batch_size=4096)
# the warmup is 10000 iterations
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=32, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=0, end=300, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=300)
# decay 0.9999
custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
