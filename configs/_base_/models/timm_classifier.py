# A timm model as classifier of 1000 classes, with mixup or cutmix on every batch and label smoothing. A config adds
# `model_name` and `drop_path_rate`.
model = dict(
    type="TimmClassifier",
    data_preprocessor=dict(
        type="ClsDataPreprocessor",
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, num_classes=1000),
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]),
)
