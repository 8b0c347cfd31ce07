_base_ = [
    "../_base_/models/timm_classifier_plain.py",
    "../_base_/datasets/imagenet_224_crop-flip.py",
    "../_base_/schedules/schedule_100e_sgd.py",
    "../_base_/default_runtime.py",
]

model = dict(
    model_name="fcanet152",
    loss=dict(_delete_=True, type="LabelSmoothLoss", label_smooth_val=0.1, num_classes=1000),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="RandomResizedCrop",
        scale=224,
        crop_ratio_range=(0.1, 1.0),
        aspect_ratio_range=(0.8, 1.25),
        backend="pillow",
        interpolation="bilinear",
    ),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=True, begin=5, end=100, convert_to_iter_based=True),
]
