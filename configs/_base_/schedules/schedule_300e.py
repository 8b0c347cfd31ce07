# ImageNet-1k from scratch: 300 epochs and 10 of cooldown at 8 GPUs x 128 images, mixed precision.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    # like timm: no decay on anything one-dimensional, nor on the bias tables
    paramwise_cfg=dict(
        norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0, custom_keys=dict(rpb=dict(decay_mult=0.0))
    ),
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=1024)

# timm's cosine counts from the first iteration; the warmup, from 1e-6, multiplies its beginning
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, by_epoch=True, begin=0, end=300, convert_to_iter_based=True),
]

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=310, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=3, save_best="accuracy/top1"),
    visualization=dict(type="VisualizationHook", enable=False),
)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=True)
