# From ImageNet-22k to ImageNet-1k: 30 epochs at 8 GPUs x 64 images in full precision, no warmup.
_base_ = "./schedule_300e.py"

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=5e-5, weight_decay=1e-4))
auto_scale_lr = dict(base_batch_size=512)

# linear, down to the 5e-6 where timm's schedules end
param_scheduler = [
    dict(type="LinearLR", start_factor=1.0, end_factor=0.1, by_epoch=True, begin=0, end=30, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30)
