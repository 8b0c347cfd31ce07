# Mask R-CNN with a small NAT and FPN on drawn handwritten digits (tools/draw_digits.py), from scratch, in minutes on
# two CPU cores.
_base_ = ["../_base_/models/mask-rcnn_fpn.py", "../_base_/default_runtime.py"]
default_scope = "mmdet"

channels = 64
norm_cfg = dict(type="GN", num_groups=8)
# Digits are 15 to 55 pixels wide and high: levels at strides 4, 8 and 16 with anchors of 20, 40 and 80 pixels.
strides = [4, 8, 16]
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        type="densezoo.NAT",
        arch=dict(embed_dim=32, depths=(1, 2, 3), num_heads=(1, 2, 4), mlp_ratio=2.0, kernel_size=5),
    ),
    neck=dict(in_channels=[32, 64, 128], out_channels=channels, num_outs=3, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[5], ratios=[1.0, 1.8], strides=strides),
    ),
    roi_head=dict(
        # One sample a bin, a cell or two wide, is a ninth faster than adaptive sampling.
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=1), out_channels=channels, featmap_strides=strides[:1]),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=10, reg_class_agnostic=True),
        mask_roi_extractor=dict(out_channels=channels, featmap_strides=strides[:1]),
        mask_head=dict(
            num_convs=2,
            in_channels=channels,
            conv_out_channels=32,
            num_classes=10,
            class_agnostic=True,
            norm_cfg=norm_cfg,
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=50),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(max_per_img=20)),
)

data_root = "data/digits/"
classes = tuple("0123456789")
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    # after Resize: boxes and masks are scored at the size of the original image
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        metainfo=dict(classes=classes),
        ann_file="annotations/instances_training.json",
        data_prefix=dict(img="images/training/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        metainfo=dict(classes=classes),
        ann_file="annotations/instances_validation.json",
        data_prefix=dict(img="images/validation/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file=data_root + "annotations/instances_validation.json", metric=["bbox", "segm"]
)
test_evaluator = val_evaluator

max_epochs = 4
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(rpb=dict(decay_mult=0.0))),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type="CosineAnnealingLR", T_max=max_epochs, eta_min=1e-6, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=25),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=1),
)
log_processor = dict(window_size=25)
visualizer = dict(type="DetLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")])
