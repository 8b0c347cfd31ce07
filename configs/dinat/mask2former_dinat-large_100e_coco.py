_base_ = [
    "../_base_/models/mask2former.py",
    "../_base_/datasets/coco_instance_lsj.py",
    "../_base_/schedules/schedule_100e_mask2former.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        type="densezoo.DiNAT",
        arch="large",
        kernel_size=11,
        dilations=[[1, 14, 1], [1, 4, 1, 7], [1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3], [1]],
        drop_path_rate=0.3,
        init_cfg=dict(
            type="Pretrained",
            # of a 7x7 kernel: its bias tables are resized
            checkpoint="https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth",
        ),
    ),
    panoptic_head=dict(in_channels=[192, 384, 768, 1536], num_queries=200),
)
