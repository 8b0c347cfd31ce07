_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_384_whole.py",
    "../_base_/schedules/schedule_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(model_name="flatten_swin_base_384", drop_path_rate=0.5)
train_dataloader = dict(batch_size=32)
optim_wrapper = dict(
    optimizer=dict(lr=1e-5, weight_decay=1e-8),
    paramwise_cfg=dict(custom_keys=dict(relative_position_bias_table=dict(decay_mult=0.0))),
)
auto_scale_lr = dict(base_batch_size=256)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-7, by_epoch=True, begin=0, end=30, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30)
# trained at 224: its tables of positions are resized
load_from = "https://cloud.tsinghua.edu.cn/f/7a9e5186bad04e7fb3a9?dl=1"
