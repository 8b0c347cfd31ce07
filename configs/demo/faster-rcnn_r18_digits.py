# Faster R-CNN with ResNet-18 on the drawn digits, from scratch. tools/compare.py puts the zoo's modules, necks and
# heads into it.
_base_ = [
    "../_base_/models/faster-rcnn_fpn.py",
    "../_base_/datasets/digits_detection.py",
    "../_base_/schedules/schedule_digits.py",
    "../_base_/default_runtime.py",
]
default_scope = "mmdet"

channels = 64
# Digits are 15 to 55 pixels wide and high: anchors of 20, 40 and 80 pixels at the strides that all necks can give.
strides = [8, 16, 32]
model = dict(
    backbone=dict(type="densezoo.PluginResNet", depth=18, norm_eval=False),
    neck=dict(in_channels=[64, 128, 256, 512], start_level=1, out_channels=channels, num_outs=3),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[2.5], ratios=[1.0, 1.8], strides=strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=1), out_channels=channels, featmap_strides=strides[:1]),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=10, reg_class_agnostic=True),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=50),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(max_per_img=20)),
)
