# 160k iterations at 8 GPUs x 2 images, mixed precision, learning rate falling linearly to zero.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0), norm=dict(decay_mult=0.0))),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)

# mmcv 1.x, which the papers ran, multiplies the warmup into the decay; both begin at 0 here too
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160000),
]

train_cfg = dict(type="IterBasedTrainLoop", max_iters=160000, val_interval=16000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=16000, max_keep_ckpts=3, save_best="mIoU"),
    visualization=dict(type="SegVisualizationHook"),
)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=False)
