# ViTDet's 100 epochs of COCO at 64 GPUs x 1 image, in iterations and mixed precision, a tenth of the learning rate
# after 89 % and again after 96 %. The published recipe also lowers learning rates layer by layer (0.7, for ViT-B).
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(rpb=dict(decay_mult=0.0))),
)
auto_scale_lr = dict(enable=False, base_batch_size=64)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=184375, milestones=[163889, 177546], gamma=0.1),
]

train_cfg = dict(type="IterBasedTrainLoop", max_iters=184375, val_interval=5000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=5000, max_keep_ckpts=3, save_best="coco/bbox_mAP"),
    visualization=dict(type="DetVisualizationHook"),
)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=False)
