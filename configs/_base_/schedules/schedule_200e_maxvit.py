# MaxViT's 90000 iterations of COCO, about 200 epochs of 256 images, in bfloat16: a linear warmup, a cosine to 3 %, and
# averaged weights (decay 0.9998).
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    optimizer=dict(type="AdamW", lr=3e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys=dict(rel_pos=dict(decay_mult=0.0))),
    clip_grad=dict(max_norm=1.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=256)

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-4, by_epoch=False, begin=0, end=6000),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.03, by_epoch=False, begin=0, end=90000, T_max=90000),
]
custom_hooks = [dict(type="EMAHook", momentum=2e-4, update_buffers=True, priority="ABOVE_NORMAL")]

train_cfg = dict(type="IterBasedTrainLoop", max_iters=90000, val_interval=5000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=5000, max_keep_ckpts=3, save_best="coco/bbox_mAP"),
    visualization=dict(type="DetVisualizationHook"),
)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=False)
