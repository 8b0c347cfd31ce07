# Cascade R-CNN with FPN (arXiv 1712.00726, 1612.03144), 80 classes. A config adds `backbone` and `neck.in_channels`.
_base_ = "./cascade-mask-rcnn_fpn.py"

model = dict(
    data_preprocessor=dict(pad_mask=False),
    roi_head=dict(
        mask_roi_extractor=None,
        mask_head=None,
        bbox_head=[
            dict(
                type="Shared2FCBBoxHead",
                in_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0], target_stds=target_stds),
                reg_class_agnostic=True,
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
            )
            for target_stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
        ],
    ),
)
