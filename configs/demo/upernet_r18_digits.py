# UPerNet with ResNet-18 on the drawn digits, from scratch.
_base_ = "./upernet_nat_digits.py"

widths = [64, 128, 256, 512]
model = dict(
    backbone=dict(_delete_=True, type="ResNet", depth=18),
    decode_head=dict(in_channels=widths, in_index=[0, 1, 2, 3]),
    auxiliary_head=dict(in_channels=widths[2], in_index=2),
)

train_dataloader = dict(batch_size=8, sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True))
val_dataloader = dict(batch_size=8)
test_dataloader = dict(batch_size=8)

# As those of the detectors that learn slower than Faster R-CNN.
max_epochs = 3
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", T_max=max_epochs, eta_min=1e-6, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(interval=25, log_metric_by_epoch=True), checkpoint=dict(by_epoch=True, interval=1, max_keep_ckpts=1)
)
log_processor = dict(by_epoch=True)
