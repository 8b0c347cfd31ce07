# 12 epochs by SGD at 8 GPUs x 2 images in full precision, a tenth of the learning rate from epochs 8 and 11 on.
_base_ = "./schedule_1x.py"

optim_wrapper = dict(
    _delete_=True, type="OptimWrapper", optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4)
)
