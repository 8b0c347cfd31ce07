# DetectoRS (arXiv 2006.02334) on Cascade R-CNN: the recursive feature pyramid with switchable atrous convolution in the
# stages from the second on, mmdet's and mmcv's own.
_base_ = "./cascade-rcnn_r50_rfp_1x_coco.py"

sac = dict(sac=dict(type="SAC", use_deform=True), stage_with_sac=(False, True, True, True))
model = dict(backbone=dict(**sac), neck=dict(rfp_backbone=dict(**sac)))
