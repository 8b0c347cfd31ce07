_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection_ms-crop.py",
    "../_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.DaViT",
        arch="base",
        # the first output is not used
        out_norms=(1, 2, 3),
        drop_path_rate=0.1,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://huggingface.co/timm/davit_base.msft_in1k/resolve/main/model.safetensors",
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
# 1x too has multi-scale training, and decay on everything
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
