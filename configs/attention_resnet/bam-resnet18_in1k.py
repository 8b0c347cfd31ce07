_base_ = [
    "../_base_/models/timm_classifier_plain.py",
    "../_base_/datasets/imagenet_224_crop-flip.py",
    "../_base_/schedules/schedule_100e_sgd.py",
    "../_base_/default_runtime.py",
]

model = dict(model_name="bam_resnet18")
