# Mask2Former (arXiv 2112.01527), 80 classes, for instances. A config adds `backbone` and `panoptic_head.in_channels`.
model = dict(
    type="Mask2Former",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_mask=True,
        pad_size_divisor=32,
        # in training alone: all images are of this size
        batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=True)],
    ),
    panoptic_head=dict(
        type="Mask2FormerHead",
        strides=[4, 8, 16, 32],
        feat_channels=256,
        out_channels=256,
        num_things_classes=80,
        num_stuff_classes=0,
        num_queries=100,
        num_transformer_feat_level=3,
        pixel_decoder=dict(
            type="MSDeformAttnPixelDecoder",
            num_outs=3,
            norm_cfg=dict(type="GN", num_groups=32),
            act_cfg=dict(type="ReLU"),
            encoder=dict(
                num_layers=6,
                layer_cfg=dict(
                    self_attn_cfg=dict(embed_dims=256, num_heads=8, num_levels=3, num_points=4, dropout=0.0),
                    ffn_cfg=dict(embed_dims=256, feedforward_channels=1024, ffn_drop=0.0),
                ),
            ),
            positional_encoding=dict(num_feats=128, normalize=True),
        ),
        positional_encoding=dict(num_feats=128, normalize=True),
        transformer_decoder=dict(
            num_layers=9,
            return_intermediate=True,
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=256, num_heads=8),
                cross_attn_cfg=dict(embed_dims=256, num_heads=8),
                ffn_cfg=dict(embed_dims=256, feedforward_channels=2048, ffn_drop=0.0),
            ),
        ),
        # the last class is "no object"
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, class_weight=[1.0] * 80 + [0.1], loss_weight=2.0),
        loss_mask=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=5.0),
        loss_dice=dict(type="DiceLoss", use_sigmoid=True, naive_dice=True, eps=1.0, loss_weight=5.0),
    ),
    panoptic_fusion_head=dict(type="MaskFormerFusionHead", num_things_classes=80, num_stuff_classes=0),
    train_cfg=dict(
        num_points=12544,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
        assigner=dict(
            type="HungarianAssigner",
            match_costs=[
                dict(type="ClassificationCost", weight=2.0),
                dict(type="CrossEntropyLossCost", use_sigmoid=True, weight=5.0),
                dict(type="DiceCost", pred_act=True, eps=1.0, weight=5.0),
            ],
        ),
        sampler=dict(type="MaskPseudoSampler"),
    ),
    test_cfg=dict(
        panoptic_on=False,
        instance_on=True,
        max_per_image=100,
        # of panoptic results: the least score and visible part of a segment; its pixels are those of at least 0.5
        object_mask_thr=0.8,
        iou_thr=0.8,
        filter_low_score=True,
    ),
)
