# ImageNet-1k by SGD: 400 epochs at 8 GPUs x 12 images in full precision, no warmup, 2 % less learning rate each epoch.
# All is decayed.
_base_ = "./schedule_100e_sgd.py"

optim_wrapper = dict(optimizer=dict(lr=0.045, weight_decay=4e-5))
auto_scale_lr = dict(base_batch_size=96)
param_scheduler = [dict(type="ExponentialLR", by_epoch=True, begin=0, end=400, gamma=0.98)]
train_cfg = dict(max_epochs=400)
