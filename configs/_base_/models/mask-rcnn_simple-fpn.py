# ViTDet's Mask R-CNN (arXiv 2203.16527), 80 classes: a simple feature pyramid from one map of stride 16, two
# convolutions in the RPN, four in the box head, LayerNorms. A config adds `backbone` and `neck.in_channels`.
_base_ = "./mask-rcnn_fpn.py"

norm_cfg = dict(type="mmpretrain.LN2d")
model = dict(
    data_preprocessor=dict(
        # in training alone: all images are of this size
        batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=True)],
    ),
    neck=dict(type="densezoo.SimpleFeaturePyramid"),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
