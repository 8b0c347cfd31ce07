"""Sharded training: weights, gradients and optimizer state split over the processes, by mmengine's wrapper of FSDP.

All that comes before the first step (initial weights, checkpoints, parameter groups) happens to the plain model, which
`shard` then splits. `gathered` is the way back, for a checkpoint that is the same as an unsharded run's: either run
goes on from the other's.

mmengine's `FSDPStrategy` itself is not used: it gives `FSDP.optim_state_dict_to_load` its arguments in the order of
torch 2.0, so it cannot resume; it names a GPU as the device; it clips gradients by the norm of each process's part; and
its runner has another way to save, read and check than `densezoo.runner`.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.model import BaseDataPreprocessor, MMFullyShardedDataParallel
from mmengine.optim import OptimWrapper
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from densezoo.backbones.staged import Blocks


def asks_for_sharding(model_wrapper_cfg: dict | None) -> bool:
    """Return whether the `model_wrapper_cfg` of a config is about mmengine's wrapper of FSDP."""
    kind = (model_wrapper_cfg or {}).get("type")
    return getattr(kind, "__name__", str(kind)).split(".")[-1] == "MMFullyShardedDataParallel"


def shard(model: nn.Module, optim_wrapper: OptimWrapper, settings: dict[str, Any]) -> MMFullyShardedDataParallel:
    """Split a model over all processes, and with it the state and the parameters of its optimizer, in place.

    Args:
        model: Has the same weights in every process.
        optim_wrapper: Built for `model`; the loaded state of a run to resume is split too.
        settings: A config's `model_wrapper_cfg`: arguments of mmengine's wrapper.

    Raises:
        ValueError: A parameter is a single number, or `optim_wrapper` clips gradients in a way that needs them whole.
    """
    if numbers := [name for name, parameter in model.named_parameters() if parameter.ndim == 0]:
        raise ValueError(f"{numbers[0]}: is a single number, which sharded training cannot split; train without --fsdp")
    clip = optim_wrapper.clip_grad_kwargs or {}
    clips_norm = bool(clip) and optim_wrapper.grad_name == "grad_norm"
    if clips_norm and (unknown := clip.keys() - {"max_norm", "norm_type"}):
        raise ValueError(f"optim_wrapper.clip_grad.{min(unknown)}: sharded training takes max_norm and norm_type only")
    optimizer = optim_wrapper.optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    state = _named(optimizer.state_dict(), groups)
    whole = model.state_dict(keep_vars=True)
    saved = {id(tensor): name for name, tensor in whole.items()}
    tensors = chain(model.named_parameters(), model.named_buffers())
    renamed = {name: saved[id(tensor)] for name, tensor in tensors if name not in whole and id(tensor) in saved}
    for module in model.modules():
        if isinstance(module, BaseDataPreprocessor):
            module.to(get_device())

    settings = {key: value for key, value in settings.items() if key != "type"}
    settings.setdefault("auto_wrap_policy", wrap_policy(model))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    sharded = MMFullyShardedDataParallel(module=model, device_id=device, **settings)
    # For `gathered`: mmpretrain's TimmClassifier saves its tensors under other names than it has them.
    sharded.renamed = renamed

    parts = {name.replace("_fsdp_wrapped_module.", ""): parameter for name, parameter in sharded.named_parameters()}
    optimizer.state.clear()
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [parts[name] for name in members]
    if state["state"]:
        set_optimizer_state_dict(sharded, optimizer, state, options=StateDictOptions(full_state_dict=True))
    if clips_norm:
        # The norm is that of all parts together.
        optim_wrapper.clip_func = lambda parameters, **kwargs: sharded.clip_grad_norm_(**kwargs)
    return sharded


def wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """Return the policy that gathers the blocks of a model's backbones one by one; the rest is one part.

    Of a block nothing but its output is asked for, of other modules weights too, which are only there in its own part.
    """
    lists = (
        module
        for name, module in model.named_modules()
        # timm's families, and the one of the zoo whose blocks take a size, have plain lists of this name
        if isinstance(module, Blocks) or isinstance(module, nn.ModuleList | nn.Sequential) and name.endswith(".blocks")
    )
    blocks = set(chain.from_iterable(lists))
    return partial(lambda_auto_wrap_policy, lambda_fn=blocks.__contains__)


@contextmanager
def gathered(model: MMFullyShardedDataParallel, optim_wrapper: OptimWrapper) -> Iterator[None]:
    """Have the model and the optimizer tell their whole state in the main process, without asking the other ones.

    Every process has to enter, as the state comes from all of them.
    """
    optimizer, inner = optim_wrapper.optimizer, model.module
    # What is offloaded from a CPU to itself is freed there, and read again: a segmentation fault of torch 2.12.
    options = StateDictOptions(full_state_dict=True, cpu_offload=torch.cuda.is_available())
    weights, state = get_state_dict(model, optimizer, options=options)
    if is_main_process():
        weights = OrderedDict((model.renamed.get(name, name), tensor) for name, tensor in weights.items())
        state = _numbered(state)
    inner.state_dict, optimizer.state_dict = lambda: weights, lambda: state
    try:
        yield
    finally:
        del inner.state_dict, optimizer.state_dict


def _named(state: dict, groups: list[list[str]]) -> dict:
    """Return an optimizer's state with the parameters' names for their numbers."""
    names = list(chain.from_iterable(groups))
    return {
        "state": {names[number]: value for number, value in state["state"].items()},
        "param_groups": [
            dict(group, params=members) for group, members in zip(state["param_groups"], groups, strict=True)
        ],
    }


def _numbered(state: dict) -> dict:
    """Return what `_named` was made of."""
    names = list(chain.from_iterable(group["params"] for group in state["param_groups"]))
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {number: state["state"][name] for name, number in numbers.items() if name in state["state"]},
        "param_groups": [
            dict(group, params=[numbers[name] for name in group["params"]]) for group in state["param_groups"]
        ],
    }
