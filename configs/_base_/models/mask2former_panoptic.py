# Mask2Former (arXiv 2112.01527) for panoptic segmentation: the 80 things and 53 kinds of stuff of COCO.
_base_ = "./mask2former.py"

model = dict(
    data_preprocessor=dict(
        pad_seg=True,
        batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=True, pad_seg=True)],
    ),
    panoptic_head=dict(num_stuff_classes=53, loss_cls=dict(class_weight=[1.0] * 133 + [0.1])),
    panoptic_fusion_head=dict(num_stuff_classes=53),
    test_cfg=dict(panoptic_on=True),
)
