"""The switches of tools/train.py: what each changes in a config."""

from argparse import ArgumentParser, Namespace
from importlib.util import find_spec

from _errors import ConfigError
from mmengine.config import Config

from densezoo.fsdp import asks_for_sharding


def add_switches(parser: ArgumentParser) -> None:
    """Add the arguments, all of them off unless given."""
    group = parser.add_argument_group("switches, of every family")
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--amp", action="store_true",
                           help="mixed precision: float16 with loss scaling on a GPU, bfloat16 on a CPU")  # fmt: skip
    precision.add_argument("--bf16", action="store_true",
                           help="mixed precision in bfloat16, which needs no loss scaling")  # fmt: skip
    group.add_argument("--accumulate", type=int, metavar="STEPS",
                       help="gradient accumulation: update the weights once in so many steps")  # fmt: skip
    group.add_argument("--ema", type=float, metavar="MOMENTUM",
                       help="validate and save moving averages of the weights too, such as with 0.0002")  # fmt: skip
    group.add_argument("--layer-decay", type=float, metavar="RATE",
                       help="multiply the learning rate by this for each layer below the backbone's end")  # fmt: skip
    group.add_argument("--checkpoint-activations", action="store_true",
                       help="recompute the backbone's activations in the backward pass, to save memory")  # fmt: skip
    group.add_argument("--channels-last", action="store_true", help="keep convolutions' weights in that memory format")
    group.add_argument("--fsdp", action="store_true",
                       help="split weights, gradients and optimizer state over the processes")  # fmt: skip
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")


def apply_switches(cfg: Config, args: Namespace) -> None:
    """Put the switches into the config.

    Raises:
        ConfigError: A value is out of range, or the config cannot have it.
    """
    optimizer = cfg.optim_wrapper
    if args.amp or args.bf16:
        set_amp(cfg, args.bf16)
    if args.accumulate is not None:
        if args.accumulate < 1:
            raise ConfigError(f"--accumulate: got {args.accumulate}, expected at least 1")
        optimizer.accumulative_counts = args.accumulate
    if args.ema is not None:
        if not 0 < args.ema < 1:
            raise ConfigError(f"--ema: got {args.ema}, expected the new weights' share, between 0 and 1")
        hook = dict(type="mmengine.EMAHook", momentum=args.ema, priority=49)
        cfg.custom_hooks = [*(other for other in cfg.get("custom_hooks") or () if not is_average(other)), hook]
    if args.layer_decay is not None:
        if not 0 < args.layer_decay <= 1:
            raise ConfigError(f"--layer-decay: got {args.layer_decay}, expected a rate between 0 and 1")
        optimizer.constructor = "LayerDecayConstructor"
        optimizer.paramwise_cfg = dict(optimizer.get("paramwise_cfg") or {}, layer_decay_rate=args.layer_decay)
    if optimizer.get("constructor") == "LayerDecayConstructor":
        # registers it
        import densezoo.layer_decay  # noqa: F401
    if args.checkpoint_activations:
        # mmpretrain's classifiers around timm models are their own backbone
        target = cfg.model.get("backbone") or cfg.model
        target["with_cp"] = True
    if args.fsdp:
        set_fsdp(cfg, args)
    add_loggers(cfg, args.wandb)


def set_amp(cfg: Config, bf16: bool) -> None:
    """Choose mixed precision."""
    kind = cfg.optim_wrapper.setdefault("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ConfigError(f"--{'bf16' if bf16 else 'amp'}: optim_wrapper.type is {kind!r}, expected 'OptimWrapper'")
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    if bf16:
        cfg.optim_wrapper.update(dtype="bfloat16", loss_scale=1.0)
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def set_fsdp(cfg: Config, args: Namespace) -> None:
    """Split the model over the processes."""
    for option in ("compile", "channels_last", "ema"):
        if getattr(args, option):
            raise ConfigError(f"--fsdp: does not go with --{option.replace('_', '-')}; leave one of them out")
    for i, hook in enumerate(cfg.get("custom_hooks") or ()):
        if is_average(hook):
            raise ConfigError(f"--fsdp: does not go with custom_hooks.{i}, an EMAHook; take it out of the config")
    if args.launcher == "none":
        raise ConfigError("--fsdp: needs several processes; start with tools/dist_train.sh CONFIG PROCESSES --fsdp")
    if not asks_for_sharding(cfg.get("model_wrapper_cfg")):
        cfg.model_wrapper_cfg = dict(type="MMFullyShardedDataParallel")


def is_average(hook: dict) -> bool:
    """Return whether this is the config of a hook that keeps moving averages of the weights."""
    return "EMAHook" in str(hook)


def add_loggers(cfg: Config, wandb: bool) -> None:
    """Log to TensorBoard, and to Weights & Biases if asked to."""
    if wandb and not find_spec("wandb"):
        raise ConfigError("--wandb: wandb is not installed; pip install wandb")
    visualizer = cfg.get("visualizer") or dict(type="mmengine.Visualizer")
    backends = list(visualizer.get("vis_backends") or [dict(type="LocalVisBackend")])
    for name in ("TensorboardVisBackend", *["WandbVisBackend"] * wandb):
        if not any(name in str(backend) for backend in backends):
            backends.append(dict(type=f"mmengine.{name}"))
    cfg.visualizer = dict(visualizer, vis_backends=backends)
