_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_384_squash.py",
    "../_base_/schedules/schedule_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(model_name="flatten_cswin_base_384", drop_path_rate=0.7)
train_dataloader = dict(batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=2.5e-6, weight_decay=1e-8), clip_grad=None)
auto_scale_lr = dict(base_batch_size=256)
# no warmup, 10 epochs of cooldown
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=2.5e-7, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30)
# decay 0.99982
custom_hooks = [dict(type="EMAHook", momentum=1.8e-4, priority="ABOVE_NORMAL")]
# trained at 224, by the other config, as none was published: its tables of positions are resized
load_from = "work_dirs/flatten-cswin-base_in1k/epoch_310.pth"
