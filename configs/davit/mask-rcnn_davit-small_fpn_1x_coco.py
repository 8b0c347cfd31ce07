_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.DaViT",
        arch="small",
        drop_path_rate=0.1,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://huggingface.co/timm/davit_small.msft_in1k/resolve/main/model.safetensors",
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
# 1x too has multi-scale training, and decay on everything
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
