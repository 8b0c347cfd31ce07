# RetinaNet with SEPC (arXiv 2005.03101): 39.6 box AP were published.
_base_ = "../fpn/retinanet_r50_fpn_1x_coco.py"

model = dict(
    neck=[
        dict(
            type="FPN",
            in_channels=[256, 512, 1024, 2048],
            out_channels=256,
            start_level=1,
            add_extra_convs="on_input",
            num_outs=5,
        ),
        dict(type="densezoo.SEPC", pconv_deform=True, lcconv_deform=True, ibn=True),
    ],
    bbox_head=dict(
        type="densezoo.SEPCRetinaHead",
        stacked_convs=0,
        loss_bbox=dict(_delete_=True, type="SmoothL1Loss", beta=0.11, loss_weight=1.0),
    ),
)

# for the batch norm, on fewer GPUs
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
