# ImageNet-1k at 384x384; the evaluation crop is the whole short side.
_base_ = "./imagenet_224.py"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomResizedCrop", scale=384, backend="pillow", interpolation=interpolation)]
            for interpolation in ("bilinear", "bicubic")
        ],
    ),
    *_base_.augment,
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=384, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=384),
    dict(type="PackInputs"),
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
