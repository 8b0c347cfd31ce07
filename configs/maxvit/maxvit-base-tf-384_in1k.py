_base_ = [
    "../_base_/models/timm_classifier.py",
    "../_base_/datasets/imagenet_384_whole_randaugment-15.py",
    "../_base_/schedules/schedule_300e.py",
    "../_base_/default_runtime.py",
]

# mixup alone; drop path as at 224, as the published fine-tuning of the tiny model has it
model = dict(
    model_name="densezoo_maxvit_base_tf_384",
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3),
    drop_path_rate=0.4,
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8)]),
)

# 16 GPUs x 32 images, at one learning rate
train_dataloader = dict(batch_size=32)
optim_wrapper = dict(
    optimizer=dict(lr=5e-5, weight_decay=1e-8),
    paramwise_cfg=dict(custom_keys=dict(rel_pos=dict(decay_mult=0.0))),
    clip_grad=dict(max_norm=1.0),
)
auto_scale_lr = dict(base_batch_size=512)
param_scheduler = []
train_cfg = dict(max_epochs=30)
# decay 0.9999
custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
# trained at 224: its bias tables are resized
load_from = "https://huggingface.co/timm/maxvit_base_tf_224.in1k/resolve/main/model.safetensors"
