# ImageNet-1k at 256x256, evaluated on the centre of images that are resized to a square.
_base_ = "./imagenet_224.py"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomResizedCrop", scale=256, backend="pillow", interpolation=interpolation)]
            for interpolation in ("bilinear", "bicubic")
        ],
    ),
    *_base_.augment,
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(292, 292), backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=256),
    dict(type="PackInputs"),
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
