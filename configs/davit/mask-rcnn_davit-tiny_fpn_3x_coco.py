_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/schedule_3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.DaViT",
        arch="tiny",
        drop_path_rate=0.2,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://huggingface.co/timm/davit_tiny.msft_in1k/resolve/main/model.safetensors",
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
# decay on everything
optim_wrapper = dict(paramwise_cfg=None)
