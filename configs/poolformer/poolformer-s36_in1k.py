_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/schedule_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(model_name="densezoo_poolformer_s36", drop_path_rate=0.2)
optim_wrapper = dict(clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=0, end=300, convert_to_iter_based=True),
]

# a centre crop of 0.9 of the short side
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=248, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=224),
    dict(type="PackInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
