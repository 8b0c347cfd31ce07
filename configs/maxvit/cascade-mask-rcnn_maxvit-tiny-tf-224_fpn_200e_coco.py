_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn-p3-p7.py",
    "../_base_/datasets/coco_instance_lsj_896x896.py",
    "../_base_/schedules/schedule_200e_maxvit.py",
    "../_base_/default_runtime.py",
]

# The learning rate is the paper's; what else differs from the larger ones is the authors' code's for 640x640, as it has
# no config of this size at 896x896. The paper's rates of stochastic depth (0.8, 0.3 and 0.3) are not those of the code.
model = dict(
    backbone=dict(
        type="densezoo.MaxViT",
        arch="tiny_tf_224",
        out_indices=(1, 2, 3),
        window_size=28,
        drop_path_rate=0.7,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://huggingface.co/timm/maxvit_tiny_tf_224.in1k/resolve/main/model.safetensors",
        ),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)

# 64 GPUs x 4 images
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=1e-4))
