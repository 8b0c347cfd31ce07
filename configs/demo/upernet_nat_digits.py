# UPerNet with a small NAT on drawn handwritten digits (tools/draw_digits.py), which lie in ADE20K's folder format, from
# scratch, in minutes on two CPU cores.
_base_ = ["../_base_/models/upernet.py", "../_base_/default_runtime.py"]
default_scope = "mmseg"

norm_cfg = dict(type="BN", requires_grad=True)
# Labels 1 to 11 in the files; 0, the blurred outlines, is ignored.
classes = (*"0123456789", "background")
model = dict(
    data_preprocessor=dict(size=None, size_divisor=16),
    backbone=dict(
        type="densezoo.NAT",
        arch=dict(embed_dim=32, depths=(1, 2, 3), num_heads=(1, 2, 4), mlp_ratio=2.0, kernel_size=5),
    ),
    decode_head=dict(
        in_channels=[32, 64, 128], in_index=[0, 1, 2], channels=64, num_classes=len(classes), norm_cfg=norm_cfg
    ),
    auxiliary_head=dict(in_channels=128, channels=64, num_classes=len(classes), norm_cfg=norm_cfg),
)

data_root = "data/digits/"
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    reduce_zero_label=True,
    metainfo=dict(classes=classes, palette=[[(i * 67) % 256, (i * 131) % 256, (i * 29) % 256] for i in range(1, 12)]),
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", reduce_zero_label=True),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(128, 128), keep_ratio=True),
            # after Resize: the map is scored at the size of the original image
            dict(type="LoadAnnotations", reduce_zero_label=True),
            dict(type="PackSegInputs"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

max_iters = 3000
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=500)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(rpb=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=max_iters),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=500, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")])
