# COCO with large-scale jittering of 0.1 to 2.5 times 896x896, cropped there; tested as large as fits into 896x896. The
# model's data_preprocessor pads to it. Batches come by iterations.
_base_ = "./coco_instance_lsj.py"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomResize", scale=(896, 896), ratio_range=(0.1, 2.5), keep_ratio=True),
    dict(
        type="RandomCrop",
        crop_type="absolute",
        crop_size=(896, 896),
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    # objects of which a crop leaves nothing
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-5, 1e-5), by_mask=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(896, 896), keep_ratio=True),
    # after Resize: boxes and masks are scored at the size of the original image
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
