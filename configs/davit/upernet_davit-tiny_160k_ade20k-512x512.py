_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.DaViT",
        arch="tiny",
        drop_path_rate=0.3,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://huggingface.co/timm/davit_tiny.msft_in1k/resolve/main/model.safetensors",
        ),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768], norm_cfg=dict(type="BN")),
    auxiliary_head=dict(in_channels=384, norm_cfg=dict(type="BN")),
)
# decay on everything
optim_wrapper = dict(paramwise_cfg=None)
