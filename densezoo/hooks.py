"""Hooks that `densezoo.runner.Runner` adds to every run."""

import os
import sys
from collections import deque
from pathlib import Path

import numpy as np
import torch
from mmengine import hooks
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseAveragedModel
from mmengine.runner import Runner
from tqdm import tqdm

from densezoo.seeding import seed_step


class SeedHook(Hook):
    """Seeds every training step from the run's seed and the iteration."""

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Seed all generators; the batch is loaded already."""
        seed_step(runner.seed, runner.iter)


class MeanLossHook(Hook):
    """Logs losses as means over all processes, where mmengine logs those of the first process."""

    # before RuntimeInfoHook, which records them
    priority = "HIGHEST"

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        """Replace every scalar of `outputs`."""
        names = [name for name, value in (outputs or {}).items() if isinstance(value, torch.Tensor)]
        if names and get_world_size() > 1:
            means = torch.stack([outputs[name].detach().float() for name in names])
            all_reduce(means, "mean")
            outputs.update(zip(names, means, strict=True))


class AverageNamesHook(Hook):
    """Names the averaged weights of every `EMAHook` as the model names its own, which the `EMAHook` counts on.

    mmpretrain's `TimmClassifier` leaves `model.` out of its tensors' names, but only where it is the outermost module.
    """

    # after every EMAHook has made its average
    priority = "LOWEST"

    def before_run(self, runner: Runner) -> None:
        """Have every average return the names that its model gives."""
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                hook.ema_model.register_state_dict_post_hook(_name_as_outermost)


def _name_as_outermost(average: BaseAveragedModel, state: dict, prefix: str, metadata: dict) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}module.")]:
        del state[name]
    state.update({f"{prefix}module.{name}": value for name, value in average.module.state_dict().items()})


class CheckpointHook(hooks.CheckpointHook):
    """mmengine's hook, with checkpoints that hold plain data and with never a moment without a whole one.

    A checkpoint is whole before `last_checkpoint` names it and before older ones are removed. It holds tensors and
    plain Python values only, so `torch.load(weights_only=True)` reads it; the logged histories are in `log_history`.
    Unknown arguments raise TypeError when the hook is built, not at the first checkpoint.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.args:
            raise TypeError(f"CheckpointHook.__init__() got an unexpected keyword argument '{next(iter(self.args))}'")

    def before_train(self, runner: Runner) -> None:
        """Find the folder, and clear what a killed run left unfinished there."""
        super().before_train(runner)
        if is_main_process() and Path(self.out_dir).is_dir():
            for unfinished in Path(self.out_dir).glob(".*.tmp"):
                unfinished.unlink()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Turn everything but the weights into plain data."""
        histories = checkpoint["message_hub"].pop("log_scalars")
        checkpoint["log_history"] = {
            name: {"values": torch.from_numpy(values), "counts": torch.from_numpy(counts)}
            for name, (values, counts) in ((name, history.data) for name, history in histories.items())
        }
        checkpoint["message_hub"]["log_scalars"] = {}
        for part in checkpoint.keys() - {"state_dict", "log_history"}:
            checkpoint[part] = to_plain(checkpoint[part], part)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Give the logged histories back to mmengine."""
        for name, history in checkpoint.pop("log_history", {}).items():
            checkpoint["message_hub"]["log_scalars"][name] = HistoryBuffer(
                history["values"].cpu().numpy(), history["counts"].cpu().numpy()
            )

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = None
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
        )
        if is_main_process():
            temporary = Path(runner.work_dir, ".last_checkpoint.tmp")
            temporary.write_text(self.last_ckpt)
            os.replace(temporary, Path(runner.work_dir, "last_checkpoint"))
            if outdated is not None:
                self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated)))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best:
            return
        # mmengine removes the best file so far before it writes the new one; it must not know of it until then.
        single = len(self.key_indicators) == 1
        best = {None: self.best_ckpt_path} if single else self.best_ckpt_path_dict
        if single:
            self.best_ckpt_path = None
        else:
            self.best_ckpt_path_dict = dict.fromkeys(best)
        super()._save_best_checkpoint(runner, metrics)
        for indicator, previous in best.items():
            current = self.best_ckpt_path if single else self.best_ckpt_path_dict[indicator]
            if current is None and single:
                self.best_ckpt_path = previous
            elif current is None:
                self.best_ckpt_path_dict[indicator] = previous
            elif previous and previous != current and is_main_process():
                self._remove(previous)

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)


class ProgressHook(Hook):
    """Shows a bar on a terminal, with log lines above it; adds nothing to a log file or a pipe."""

    def __init__(self):
        self.bars: list[tqdm] = []

    def before_run(self, runner: Runner) -> None:
        """Let the log lines of the terminal pass above the bar."""
        for handler in runner.logger.handlers if sys.stderr.isatty() else ():
            if getattr(handler, "stream", None) is sys.stdout:
                handler.setStream(_AboveBar())

    def before_train(self, runner: Runner) -> None:
        """Open the bar of the training."""
        self._open("train", runner.max_iters, runner.iter)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        """Count a step and show its loss and learning rate."""
        if not self.bars[-1].disable:
            scalars = runner.message_hub.log_scalars
            shown = {name: scalars[f"train/{name}"].current() for name in ("loss", "lr") if f"train/{name}" in scalars}
            self.bars[-1].set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        self.bars[-1].update()

    def before_val_epoch(self, runner: Runner) -> None:
        """Open a bar below that of the training."""
        self._open("val", len(runner.val_dataloader))

    def before_test_epoch(self, runner: Runner) -> None:
        """Open the bar of a test."""
        self._open("test", len(runner.test_dataloader))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Count a batch."""
        self.bars[-1].update()

    after_test_iter = after_val_iter

    def after_train(self, runner: Runner) -> None:
        """Close the last bar."""
        self.bars.pop().close()

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Close the last bar."""
        self.bars.pop().close()

    after_test_epoch = after_val_epoch

    def _open(self, name: str, total: int, initial: int = 0) -> None:
        hidden = not (is_main_process() and sys.stderr.isatty())
        self.bars.append(tqdm(desc=name, total=total, initial=initial, leave=not self.bars, disable=hidden))


class _AboveBar:
    """A text stream to the terminal that leaves the progress bar below what is written."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout, end="")

    def flush(self) -> None:
        sys.stdout.flush()


def to_plain(value, name: str = ""):
    """Return `value` as tensors and plain Python values; anything else is left out, with a warning that names it."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist(), name)
    if isinstance(value, dict):
        return {to_plain(key, name): to_plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | deque):
        kind = type(value) if type(value) in (tuple, set) else list
        return kind(to_plain(item, f"{name}.{i}") for i, item in enumerate(value))
    for kind in (bool, int, float, complex, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    print_log(f"{name} is a {type(value).__name__}, which checkpoints do not hold; it is left out", "current", 30)
    return None
