_base_ = [
    "../_base_/models/deeplabv3plus.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.NAT",
        arch="mini",
        # the second output is not used
        out_norms=(0, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth"),
    ),
    # the last stage has stride 32, where the paper's rates at stride 16 halve
    decode_head=dict(in_channels=512, c1_in_channels=64, dilations=(1, 3, 6, 9)),
    auxiliary_head=dict(in_channels=256),
)
