_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/schedule_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(model_name="nat_base", drop_path_rate=0.5)
