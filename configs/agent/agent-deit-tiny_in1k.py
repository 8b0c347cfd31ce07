_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_224_squash.py",
    "../_base_/schedules/schedule_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(model_name="agent_deit_tiny", drop_path_rate=0.0)
train_dataloader = dict(batch_size=512)
optim_wrapper = dict(
    optimizer=dict(lr=4e-3),
    paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0))),
)
auto_scale_lr = dict(base_batch_size=4096)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=4e-5, by_epoch=True, begin=0, end=300, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=300)
