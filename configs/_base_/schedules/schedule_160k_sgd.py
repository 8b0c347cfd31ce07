# 160k iterations by SGD at 8 GPUs x 2 images in full precision, learning rate falling by a power of 0.9, no warmup.
_base_ = "./schedule_160k.py"

optim_wrapper = dict(
    _delete_=True, type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=5e-4)
)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=160000)]
