# ImageNet-1k at 224x224 with timm's training augmentation. Its trainer applies colour jitter only where no
# auto-augmentation is set, so there is none beside RandAugment, whatever its argument says.
default_scope = "mmpretrain"
data_root = "data/imagenet"

# the order of the channels in a loaded image is BGR
bgr_mean = [103.53, 116.28, 123.675]
bgr_std = [57.375, 57.12, 58.395]
filters = ("bilinear", "bicubic")
# RandAugment m9-mstd0.5-inc1, then random erasing with noise; timm draws the interpolation anew each time
augment = [
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(
        type="RandomChoice",
        transforms=[
            [
                dict(
                    type="RandAugment",
                    policies="timm_increasing",
                    num_policies=2,
                    total_level=10,
                    magnitude_level=9,
                    magnitude_std=0.5,
                    hparams=dict(pad_val=[104, 116, 124], interpolation=interpolation),
                )
            ]
            for interpolation in filters
        ],
    ),
    dict(
        type="RandomErasing",
        erase_prob=0.25,
        mode="rand",
        min_area_ratio=0.02,
        max_area_ratio=1 / 3,
        fill_color=bgr_mean,
        fill_std=bgr_std,
    ),
    dict(type="PackInputs"),
]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomResizedCrop", scale=224, backend="pillow", interpolation=interpolation)]
            for interpolation in filters
        ],
    ),
    *augment,
]
# a centre crop of 0.875 of the short side
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=256, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=224),
    dict(type="PackInputs"),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="ImageNet", data_root=data_root, split="train", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="ImageNet", data_root=data_root, split="val", pipeline=test_pipeline),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator

visualizer = dict(type="UniversalVisualizer", vis_backends=[dict(type="LocalVisBackend")])
