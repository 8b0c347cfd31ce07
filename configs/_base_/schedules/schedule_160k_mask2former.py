# Mask2Former's 160k iterations at 8 GPUs x 2 images in full precision, no warmup, learning rate falling to zero by a
# power of 0.9. The backbone's is a tenth; norms and embeddings are not decayed.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        # the longest key that fits a name holds alone, so that the backbone's norms are named by their ends
        custom_keys=dict(
            backbone=dict(lr_mult=0.1),
            query_embed=dict(decay_mult=0.0),
            query_feat=dict(decay_mult=0.0),
            level_embed=dict(decay_mult=0.0),
            **{
                f".{norm}.{part}": dict(lr_mult=0.1, decay_mult=0.0)
                for norm in ("norm", "norm0", "norm1", "norm2", "norm3")
                for part in ("weight", "bias")
            },
        ),
    ),
    clip_grad=dict(max_norm=0.01, norm_type=2),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)

param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=160000)]

train_cfg = dict(type="IterBasedTrainLoop", max_iters=160000, val_interval=5000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=5000, max_keep_ckpts=3, save_best="mIoU"),
    visualization=dict(type="SegVisualizationHook"),
)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=False)
