# MaxViT's Cascade Mask R-CNN (arXiv 2204.01697, as in the TensorFlow Model Garden), 80 classes: a pyramid of strides 8
# to 128, nine anchors a place, two stages of boxes at IoU 0.6 and 0.7, synchronised batch norm, images of 896x896. Here
# each stage has a mask head, as in mmdet; there only the last. A config adds `backbone` and `neck.in_channels`.
_base_ = "./cascade-mask-rcnn_fpn.py"

norm_cfg = dict(type="SyncBN", eps=1e-3, momentum=0.01, requires_grad=True)
model = dict(
    data_preprocessor=dict(pad_size_divisor=896),
    neck=dict(add_extra_convs="on_output", relu_before_extra_convs=True, norm_cfg=norm_cfg, no_norm_on_lateral=True),
    rpn_head=dict(
        num_convs=2,
        anchor_generator=dict(
            _delete_=True,
            type="AnchorGenerator",
            octave_base_scale=3,
            scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64, 128],
        ),
    ),
    roi_head=dict(
        num_stages=2,
        stage_loss_weights=[1, 1],
        bbox_roi_extractor=dict(featmap_strides=[8, 16, 32, 64, 128], finest_scale=112),
        bbox_head=[
            dict(
                type="ConvFCBBoxHead",
                num_shared_convs=4,
                num_shared_fcs=1,
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0], target_stds=target_stds),
                reg_class_agnostic=True,
                norm_cfg=norm_cfg,
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
            )
            for target_stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1])
        ],
        mask_roi_extractor=dict(featmap_strides=[8, 16, 32, 64, 128], finest_scale=112),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn=dict(allowed_border=-1),
        rcnn=[
            dict(
                assigner=dict(
                    type="MaxIoUAssigner",
                    pos_iou_thr=pos_iou_thr,
                    neg_iou_thr=neg_iou_thr,
                    min_pos_iou=pos_iou_thr,
                    match_low_quality=False,
                    ignore_iof_thr=-1,
                ),
                sampler=dict(type="RandomSampler", num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
                mask_size=28,
                pos_weight=-1,
                debug=False,
            )
            for pos_iou_thr, neg_iou_thr in ((0.6, 0.5), (0.7, 0.7))
        ],
    ),
)
