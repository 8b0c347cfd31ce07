# ImageNet-1k by SGD: 100 epochs at 8 GPUs x 32 images in full precision, no warmup, a tenth of the learning rate from
# epochs 30, 60 and 90 on. All is decayed.
_base_ = "./schedule_300e.py"

optim_wrapper = dict(
    _delete_=True, type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4)
)
auto_scale_lr = dict(base_batch_size=256)
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, begin=0, end=100, milestones=[30, 60, 90], gamma=0.1)]
train_cfg = dict(max_epochs=100)
