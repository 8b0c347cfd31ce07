# RetinaNet with SEPC-lite (arXiv 2005.03101): 38.5 box AP were published.
_base_ = "./retinanet_r50_sepc_1x_coco.py"

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
        dict(type="densezoo.SEPC", lcconv_deform=True, ibn=True),
    ],
)
