_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn-p3-p7.py",
    "../_base_/datasets/coco_instance_lsj_896x896.py",
    "../_base_/schedules/schedule_200e_maxvit.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.MaxViT",
        arch="base_tf_224",
        out_indices=(1, 2, 3),
        window_size=28,
        drop_path_rate=0.8,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://huggingface.co/timm/maxvit_base_tf_224.in1k/resolve/main/model.safetensors",
        ),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)

# 64 GPUs x 4 images
train_dataloader = dict(batch_size=4)
