# COCO 2017 panoptic segmentation, 80 things and 53 kinds of stuff, with large-scale jittering.
_base_ = "./coco_instance_lsj.py"

data_root = "data/coco/"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadPanopticAnnotations", with_bbox=True, with_mask=True, with_seg=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomResize", scale=(1024, 1024), ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(
        type="RandomCrop",
        crop_type="absolute",
        crop_size=(1024, 1024),
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    # after Resize: segments are scored at the size of the original image
    dict(type="LoadPanopticAnnotations", with_bbox=True, with_mask=True, with_seg=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]

train_dataloader = dict(
    dataset=dict(
        type="CocoPanopticDataset",
        ann_file="annotations/panoptic_train2017.json",
        data_prefix=dict(seg="annotations/panoptic_train2017/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        type="CocoPanopticDataset",
        ann_file="annotations/panoptic_val2017.json",
        data_prefix=dict(seg="annotations/panoptic_val2017/"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

# the masks of things are scored as instances too
val_evaluator = [
    dict(
        type="CocoPanopticMetric",
        ann_file=data_root + "annotations/panoptic_val2017.json",
        seg_prefix=data_root + "annotations/panoptic_val2017/",
    ),
    dict(type="CocoMetric", ann_file=data_root + "annotations/instances_val2017.json", metric=["bbox", "segm"]),
]
test_evaluator = val_evaluator
