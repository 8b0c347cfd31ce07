# ImageNet-1k at 288x288, evaluated on whole images that are resized to a square.
_base_ = "./imagenet_224.py"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomResizedCrop", scale=288, backend="pillow", interpolation=interpolation)]
            for interpolation in ("bilinear", "bicubic")
        ],
    ),
    *_base_.augment,
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(288, 288), backend="pillow", interpolation="bicubic"),
    dict(type="PackInputs"),
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
