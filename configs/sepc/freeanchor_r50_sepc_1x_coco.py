# FreeAnchor (arXiv 1909.02466) with SEPC (arXiv 2005.03101): 43.0 box AP were published.
_base_ = "./retinanet_r50_sepc_1x_coco.py"

model = dict(
    bbox_head=dict(
        type="densezoo.SEPCFreeAnchorRetinaHead",
        bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_bbox=dict(loss_weight=0.75),
    )
)
