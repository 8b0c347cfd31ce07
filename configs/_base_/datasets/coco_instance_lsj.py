# COCO with large-scale jittering (arXiv 2012.07177): images of 0.1 to 2 times 1024x1024, cropped there and padded to it
# by the model's data_preprocessor. Batches come by iterations.
_base_ = "./coco_instance.py"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomResize", scale=(1024, 1024), ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(
        type="RandomCrop",
        crop_type="absolute",
        crop_size=(1024, 1024),
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    # objects of which a crop leaves nothing
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-5, 1e-5), by_mask=True),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    sampler=dict(type="InfiniteSampler", shuffle=True),
    # all of one shape
    batch_sampler=None,
    dataset=dict(pipeline=train_pipeline),
)
