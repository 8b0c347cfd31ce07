"""mmengine's Runner with strict and safe checkpoints, exact resuming, and nothing on disk until a run really starts."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from shutil import rmtree
from typing import Any

import mmengine.runner
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.device import get_device
from mmengine.dist import is_distributed, master_only
from mmengine.logging import MMLogger
from mmengine.model import (
    BaseTTAModel,
    MMFullyShardedDataParallel,
    convert_sync_batchnorm,
    is_model_wrapper,
    revert_sync_batchnorm,
)
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset

from densezoo.checkpoints import read_checkpoint
from densezoo.fsdp import asks_for_sharding, gathered, shard
from densezoo.hooks import AverageNamesHook, CheckpointHook, MeanLossHook, ProgressHook, SeedHook
from densezoo.seeding import SeededSampler, seed_samples


class Runner(mmengine.runner.Runner):
    """mmengine's Runner; differs in what follows.

    - Before the first step, everything that a config can get wrong is built and checked, down to every image file. When
      that fails, the folders made for the run go again, and `started` is False.
    - Checkpoints are read as data, never as code, and have to fit the model; only `load_from` of a training may leave
      gaps, which are logged. They are written whole or not at all (see `CheckpointHook`).
    - A resumed run repeats the unbroken one (see `densezoo.seeding`).
    - Several processes work on a CPU (gloo), and so does `AmpOptimWrapper` (in bfloat16).
    - `model_wrapper_cfg` of the type MMFullyShardedDataParallel splits the model over the processes of a training (see
      `densezoo.fsdp`); its checkpoints are those of any other run.
    """

    def __init__(self, model: Any, work_dir: str, *args, **kwargs):
        self.started = False
        folder = Path(work_dir).absolute()
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        CheckpointLoader.register_scheme(["", "http://", "https://"], _read_for_mmengine, force=True)
        with self._starting():
            super().__init__(model, work_dir, *args, **kwargs)
            for hook in (MeanLossHook(), SeedHook(), ProgressHook(), AverageNamesHook()):
                self.register_hook(hook)

    def train(self) -> nn.Module:
        """Train as configured; return the model."""
        with self._starting():
            return super().train()

    def test(self) -> dict:
        """Test as configured, on a checkpoint that fits strictly; return the metrics."""
        self._is_test = True
        with self._starting():
            return super().test()

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call every hook; what comes after `before_train` and `before_test` is no longer the start."""
        super().call_hook(fn_name, **kwargs)
        if fn_name in ("before_train", "before_test") and not self.started:
            self.started = True
            self.dump_config()
            if fn_name == "before_train":
                self.logger.info(self.summary())

    def dump_config(self) -> None:
        """Write the config to the work dir, once the run has started."""
        if self.started:
            super().dump_config()

    def summary(self) -> str:
        """Return one line about the device, processes, batch, learning rate, seed and place of a training."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else get_device()
        batch = _batch_size(self.train_dataloader)
        steps = self._accumulated_steps(self.optim_wrapper)
        total = batch * self.world_size * steps
        scaling = self.auto_scale_lr or {}
        configured = scaling.get("base_batch_size")
        lr = max(group.get("initial_lr", group["lr"]) for group in self.optim_wrapper.param_groups)
        if configured and scaling.get("enable"):
            note = f"scaled linearly by {total / configured:g}: configured for a batch of {configured}"
        elif configured and configured != total:
            scaled = f"{lr * total / configured:g}"
            note = f"not scaled, though configured for a batch of {configured}: --auto-scale-lr makes it {scaled}"
        else:
            note = f"as configured{f' for a batch of {configured}' if configured else ''}"
        return (
            f"Training on {device}: {self.world_size} process(es){' sharing the weights' if self._sharding else ''}"
            f" x {batch} images"
            f"{f' x {steps} accumulated steps' if steps > 1 else ''} = batch {total}; "
            f"largest learning rate {lr:g} ({note}); seed {self.seed}; saving to {self.work_dir}"
            + (f"; going on from {self._load_from} at iteration {self.iter}" if self._resume else "")
        )

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scale the learning rate if asked to, by the batch of one update: that of all its accumulated steps."""
        if auto_scale_lr and auto_scale_lr.get("base_batch_size"):
            base = auto_scale_lr["base_batch_size"] / self._accumulated_steps(optim_wrapper)
            auto_scale_lr = dict(auto_scale_lr, base_batch_size=base)
        super().scale_lr(optim_wrapper, auto_scale_lr)

    @staticmethod
    def _accumulated_steps(optim_wrapper: OptimWrapper) -> int:
        return getattr(optim_wrapper, "_accumulative_counts", 1)

    def setup_env(self, env_cfg: dict) -> None:
        """Set up processes; on a CPU they talk through gloo, whatever `dist_cfg` says."""
        if self.distributed and not torch.cuda.is_available() and not is_distributed():
            torch.distributed.init_process_group("gloo")
        super().setup_env(env_cfg)
        # mmengine finds loggers by the config's name and the second, so two runs must not share one.
        while MMLogger.check_instance_created(f"{Path(self.cfg.filename or '').stem}_{self.timestamp}"):
            time.sleep(0.1)
            super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap for several processes; on a CPU there is no device to name, and no SyncBN."""
        on_cpu = self.distributed and not torch.cuda.is_available()
        if on_cpu:
            model = revert_sync_batchnorm(model)
        if self._sharding:
            # `load_or_resume` splits it, when it has its weights
            if self.cfg.get("sync_bn") and not on_cpu:
                model = convert_sync_batchnorm(model, self.cfg.sync_bn)
            return model.to(get_device())
        if on_cpu and model_wrapper_cfg is None:
            unused = self.cfg.get("find_unused_parameters", False)
            model_wrapper_cfg = dict(device_ids=None, broadcast_buffers=False, find_unused_parameters=unused)
        return super().wrap_model(model_wrapper_cfg, model)

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Build the optimizer; `AmpOptimWrapper` becomes `CpuAmpOptimWrapper` on a CPU."""
        if isinstance(optim_wrapper, dict) and get_device() == "cpu" and optim_wrapper.get("type") == "AmpOptimWrapper":
            scaling = ("type", "loss_scale", "dtype", "use_fsdp")
            config = {key: value for key, value in optim_wrapper.items() if key not in scaling}
            return build_optim_wrapper(self.model, dict(config, type=CpuAmpOptimWrapper))
        if isinstance(optim_wrapper, dict) and optim_wrapper.get("type") == "AmpOptimWrapper" and self._sharding:
            optim_wrapper = dict(optim_wrapper, use_fsdp=True)
        return super().build_optim_wrapper(optim_wrapper)

    def load_or_resume(self) -> None:
        """Load or resume as configured; a training that splits its model does so then."""
        sharding = self._sharding and isinstance(self.optim_wrapper, OptimWrapper) and not is_model_wrapper(self.model)
        if sharding:
            # so that a GPU never holds more than its part of the optimizer's state
            self.model.cpu()
        super().load_or_resume()
        if sharding:
            self.model = shard(self.model, self.optim_wrapper, self.cfg.model_wrapper_cfg)

    @property
    def _sharding(self) -> bool:
        return self.distributed and asks_for_sharding(self.cfg.get("model_wrapper_cfg"))

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build a loader whose samples are seeded one by one, over a dataset whose files are all there."""
        if isinstance(dataloader, DataLoader):
            return dataloader
        if isinstance(dataloader.get("sampler"), dict):
            dataloader = dict(dataloader, sampler=dict(type=SeededSampler, sampler=dataloader["sampler"]))
        loader = mmengine.runner.Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        check_dataset(loader.dataset)
        seed_samples(loader)
        return loader

    def build_train_loop(self, loop: Any) -> Any:
        """Build the loop, and check that an epoch ends and that the model's heads know all classes of the dataset."""
        loop = super().build_train_loop(loop)
        sampler = getattr(loop.dataloader.sampler, "sampler", None)
        if isinstance(loop, EpochBasedTrainLoop) and isinstance(sampler, InfiniteSampler):
            raise ValueError("train_dataloader.sampler: an InfiniteSampler never ends an epoch; use a DefaultSampler")
        metainfo = getattr(loop.dataloader.dataset, "metainfo", None) or {}
        classes = metainfo.get("classes")
        # Panoptic heads split the classes among them.
        if classes and "thing_classes" not in metainfo:
            for path, size in _head_sizes(self.cfg.get("model"), "model"):
                if len(classes) > size:
                    raise ValueError(f"{path}: is {size}, but the dataset has {len(classes)} classes")
        return loop

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register them, with the zoo's checkpoint hook for mmengine's."""
        hooks = dict(hooks or {})
        saving = hooks.get("checkpoint", dict(type="CheckpointHook", interval=1))
        if isinstance(saving, dict) and saving.get("type") in ("CheckpointHook", "mmengine.CheckpointHook"):
            hooks["checkpoint"] = dict(saving, type=CheckpointHook)
        super().register_default_hooks(hooks)

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        """Save a checkpoint, whole or not at all; every process has to call this."""
        sharded = isinstance(self.model, MMFullyShardedDataParallel)
        with gathered(self.model, self.optim_wrapper) if sharded else nullcontext():
            self._write_checkpoint(out_dir, filename, *args, **kwargs)

    @master_only
    def _write_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        # under a temporary name until it is whole
        if "://" in str(out_dir):
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        temporary = f".{filename}.tmp"
        super().save_checkpoint(out_dir, temporary, *args, **kwargs)
        os.replace(Path(out_dir, temporary), Path(out_dir, filename))

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", strict: bool = False, revise_keys: Any = None
    ) -> dict:
        """Load a checkpoint's weights into the model, strictly unless a training takes them as its beginning.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no checkpoint of plain data, or does not fit the model.
        """
        checkpoint = read_checkpoint(filename)
        if "state_dict" not in checkpoint:
            checkpoint = {"state_dict": checkpoint}
        # mmengine would run this text as Python.
        checkpoint.get("meta", {}).pop("config", None)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        # Test-time augmentation wraps the model once more.
        model = model.module if isinstance(model, BaseTTAModel) else model
        self.logger.info(load_weights(model, checkpoint, filename, strict or self._is_test or self._resume))
        self._has_loaded = True
        return checkpoint

    _is_test = False

    @contextmanager
    def _starting(self) -> Iterator[None]:
        """Remove the folders that were made for this run, if it fails before it has started."""
        try:
            yield
        except BaseException:
            if not self.started:
                if hasattr(self, "_log_dir"):
                    rmtree(self._log_dir, ignore_errors=True)
                for folder in self._made:
                    # others may have put something there since
                    if folder.is_dir() and not any(folder.iterdir()):
                        folder.rmdir()
            raise


class CpuAmpOptimWrapper(OptimWrapper):
    """Mixed precision on a CPU: bfloat16, which needs no loss scaling."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward pass under autocast."""
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


def load_weights(model: nn.Module, checkpoint: dict, name: str, strict: bool = True) -> str:
    """Load the weights of a checkpoint of mmengine, or of a bare state dict, into a model.

    Returns:
        How many tensors were loaded, and which were not.

    Raises:
        ValueError: Names and shapes differ, and `strict`, or no tensor fits.
    """
    state = checkpoint.get("state_dict", checkpoint)
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    own = model.state_dict()
    unfit = [key for key in state if key in own and state[key].shape != own[key].shape]
    result = model.load_state_dict({key: value for key, value in state.items() if key not in unfit}, strict=False)
    missing = [key for key in result.missing_keys if key not in unfit]
    matched = len(own) - len(missing) - len(unfit)

    report = [f"{name}: {matched} of the {len(own)} tensors of this {type(model).__name__} are in the checkpoint"]
    shapes = [f"{key}: {tuple(state[key].shape)} there, {tuple(own[key].shape)} here" for key in unfit]
    for what, keys in (
        ("have another shape", shapes),
        ("are missing", missing),
        ("are in the checkpoint alone", result.unexpected_keys),
    ):
        if keys:
            report.append(f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    if matched == 0 or strict and len(report) > 1:
        origin = checkpoint.get("meta", {}).get("experiment_name")
        if isinstance(origin, str):
            report.append(f"it was saved by the run {origin}: use that run's config")
        raise ValueError("; ".join(report))
    return "; ".join(report)


def check_dataset(dataset: Dataset) -> None:
    """Check that a dataset has samples and that the files of all of them exist.

    Raises:
        ValueError: It is empty.
        FileNotFoundError: Names the first image or label map that is missing.
    """
    if len(dataset) == 0:
        raise ValueError(f"{type(dataset).__name__}: has no samples; check ann_file, data_prefix and metainfo.classes")
    names_in: dict[str, set[str]] = {}
    missing, total = [], 0
    for part in _parts(dataset):
        for info in map(part.get_data_info, range(len(part))):
            for path in (info[key] for key in ("img_path", "seg_map_path") if isinstance(info.get(key), str)):
                if "://" in path:
                    continue
                folder, name = os.path.split(path)
                if folder not in names_in:
                    names_in[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
                total += 1
                if name not in names_in[folder]:
                    missing.append(path)
    if missing:
        raise FileNotFoundError(
            f"{type(dataset).__name__}: {len(missing)} of {total} image and label files are missing: {missing[0]}, ..."
        )


def _parts(dataset: Dataset) -> Iterator[Dataset]:
    """Yield the datasets inside mmengine's and mmdet's wrappers."""
    for inner in (*getattr(dataset, "datasets", ()), getattr(dataset, "dataset", None)):
        if inner is not None:
            yield from _parts(inner)
    if not hasattr(dataset, "datasets") and not hasattr(dataset, "dataset") and hasattr(dataset, "get_data_info"):
        yield dataset


def _head_sizes(config: Any, path: str) -> Iterator[tuple[str, int]]:
    """Yield the place and value of every `num_classes` of a model's heads."""
    if isinstance(config, list | tuple):
        for i, item in enumerate(config):
            yield from _head_sizes(item, f"{path}.{i}")
    elif isinstance(config, dict) and not path.endswith("rpn_head") and not config.get("class_agnostic"):
        size = config.get("num_classes")
        if isinstance(size, int) and ("head" in path or path == "model"):
            yield f"{path}.num_classes", size
        for key, item in config.items():
            yield from _head_sizes(item, f"{path}.{key}")


def _batch_size(loader: DataLoader) -> int:
    return loader.batch_size or loader.batch_sampler.batch_size


def _read_for_mmengine(filename: str, map_location: Any = None) -> dict:
    return read_checkpoint(filename)
