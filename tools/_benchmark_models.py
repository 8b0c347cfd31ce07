"""Whole models for tools/benchmark.py: inference and training, eager and compiled, beside timm's."""

from collections.abc import Callable, Iterable, Iterator

import timm
import torch
from torch import Tensor, nn
from triton.testing import do_bench

import densezoo  # noqa: F401  (registers the models)

SWIN = "swin_tiny_patch4_window7_224"
# What a user would take instead of each: timm's version, or the network that it modifies. timm has neither CSwin nor
# the first PVT: their descendants stand beside Swin and the second PVT.
RIVALS = {
    "densezoo_davit_tiny": "davit_tiny",
    "densezoo_maxvit_tiny_tf_224": "maxvit_tiny_tf_224",
    "densezoo_focalnet_tiny_srf": "focalnet_tiny_srf",
    "densezoo_focalnet_tiny_lrf": "focalnet_tiny_lrf",
    "densezoo_poolformer_s12": "poolformer_s12",
    "nat_tiny": SWIN,
    "dinat_tiny": SWIN,
    "dinat_s_tiny": SWIN,
    "quadtree_b2": "pvt_v2_b2",
    "agent_deit_tiny": "deit_tiny_patch16_224",
    "agent_pvt_tiny": "pvt_v2_b1",
    "agent_swin_tiny": SWIN,
    "agent_cswin_tiny": SWIN,
    "flatten_pvt_tiny": "pvt_v2_b1",
    "flatten_swin_tiny": SWIN,
    "flatten_cswin_tiny": SWIN,
    "flatten_pvt_v2_b1": "pvt_v2_b1",
}
MODELS = (*dict.fromkeys((SWIN, "convnext_tiny", *RIVALS.values(), *RIVALS)),)


def per_second(step: Callable[[], object], images: int) -> float:
    """Return the images per second of a step over `images`, by its median time."""
    return images / do_bench(step, warmup=200, rep=1000, return_mode="median") * 1e3


def build(name: str, dense: bool, size: tuple[int, int], device: str = "cuda") -> nn.Module:
    """Build a model, or its dense backbone for inputs of `size`, on a device."""
    kwargs = dict(features_only=True) if dense else {}
    try:
        model = timm.create_model(name, **kwargs, img_size=size if dense else 224)
    except (TypeError, ValueError):  # takes any size
        model = timm.create_model(name, **kwargs)
    return model.to(device).to(memory_format=torch.channels_last)


def model_rows(names: Iterable[str], dense: bool, mode: str) -> Iterator[dict]:
    """Time each model in bfloat16 autocast, channels last: 128 images of 224x224, or a dense backbone on 2 of 800x1216.

    Compiled with torch.compile's `mode`.

    Yields:
        The model's name and images per second, and the peak memory of training in MiB, of each way.
    """
    batch, size = (2, (800, 1216)) if dense else (128, (224, 224))
    x = torch.randn(batch, 3, *size, device="cuda").to(memory_format=torch.channels_last)
    for name in names:
        row = {"model": name}
        for way in ("eager", "compiled"):
            torch._dynamo.reset()
            try:
                model = build(name, dense, size)
                forward = torch.compile(model, dynamic=False, mode=mode) if way == "compiled" else model

                def infer(model=model, forward=forward) -> None:
                    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                        forward(x)

                def train(model=model, forward=forward) -> None:
                    with torch.autocast("cuda", torch.bfloat16):
                        out = forward(x)
                    loss = (
                        out.float().logsumexp(1).mean()
                        if isinstance(out, Tensor)
                        else sum(o.float().mean() for o in out)
                    )
                    model.zero_grad(set_to_none=True)
                    loss.backward()

                model.eval()
                row[f"{way} inference"] = per_second(infer, batch)
                model.train()
                torch.cuda.reset_peak_memory_stats()
                row[f"{way} training"] = per_second(train, batch)
                row[f"{way} peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
            except Exception as e:  # what cannot run this size is a result too
                row[f"{way} error"] = f"{type(e).__name__}: {str(e).splitlines()[0][:150]}"
        yield row
