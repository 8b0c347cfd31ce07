# PANet's neck (arXiv 1803.01534), mmdet's own.
_base_ = "../fpn/mask-rcnn_r50_fpn_1x_coco.py"

model = dict(neck=dict(type="PAFPN"))
