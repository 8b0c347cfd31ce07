# FCOS with ResNet-18 on the drawn digits, from scratch, with the levels of faster-rcnn_r18_digits.py.
_base_ = [
    "../_base_/models/fcos_fpn.py",
    "../_base_/datasets/digits_detection.py",
    "../_base_/schedules/schedule_digits.py",
    "../_base_/default_runtime.py",
]
default_scope = "mmdet"

channels = 64
strides = [8, 16, 32]
model = dict(
    backbone=dict(type="densezoo.PluginResNet", depth=18, norm_eval=False),
    neck=dict(
        _delete_=True, type="FPN", in_channels=[64, 128, 256, 512], start_level=1, out_channels=channels, num_outs=3
    ),
    bbox_head=dict(
        in_channels=channels,
        feat_channels=channels,
        stacked_convs=2,
        num_classes=10,
        norm_cfg=dict(type="GN", num_groups=8),
        strides=strides,
        regress_ranges=((-1, 16), (16, 32), (32, 1e8)),
    ),
    test_cfg=dict(nms_pre=200, max_per_img=20),
)

# Dense heads learn slower from scratch than Faster R-CNN: an epoch more.
max_epochs = 3
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", T_max=max_epochs, eta_min=1e-6, by_epoch=True, convert_to_iter_based=True),
]
