# Faster R-CNN with FPN (arXiv 1506.01497, 1612.03144), 80 classes. A config adds `backbone` and `neck.in_channels`.
_base_ = "./mask-rcnn_fpn.py"

model = dict(
    type="FasterRCNN",
    data_preprocessor=dict(pad_mask=False),
    roi_head=dict(mask_roi_extractor=None, mask_head=None),
    train_cfg=dict(rcnn=dict(assigner=dict(match_low_quality=False))),
)
