# What every run shares. Hooks, visualizer and log processor belong to the schedule and the dataset: mmengine lets
# no key stand in two base files.
custom_imports = dict(imports=["densezoo.openmmlab"], allow_failed_imports=False)

env_cfg = dict(
    cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0), dist_cfg=dict(backend="nccl")
)

randomness = dict(seed=0, deterministic=False)
log_level = "INFO"
load_from = None
resume = False
