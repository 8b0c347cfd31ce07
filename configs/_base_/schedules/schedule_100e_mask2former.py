# Mask2Former's 100 epochs of COCO, in iterations, a tenth of the learning rate after 89 % and again after 96 %.
_base_ = "./schedule_160k_mask2former.py"

param_scheduler = [
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=737500, milestones=[655556, 710184], gamma=0.1)
]
train_cfg = dict(max_iters=737500)
default_hooks = dict(checkpoint=dict(save_best="coco/segm_mAP"), visualization=dict(type="DetVisualizationHook"))
