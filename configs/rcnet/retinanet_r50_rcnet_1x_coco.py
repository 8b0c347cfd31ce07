# RetinaNet with RCNet's neck (arXiv 2110.12130): 40.2 box AP were published.
_base_ = "../fpn/retinanet_r50_fpn_1x_coco.py"

model = dict(
    neck=dict(
        _delete_=True,
        type="densezoo.RCNet",
        in_channels=[256, 512, 1024, 2048],
        out_channels=256,
        start_level=1,
        num_outs=5,
    )
)

# for the batch norm, on fewer GPUs
train_dataloader = dict(batch_size=4)
