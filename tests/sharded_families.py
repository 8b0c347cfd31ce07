"""Run in two processes by test_fsdp.py: a step of every family, sharded and plain, has to give the same weights."""

import copy
import gc

import torch
from mmengine.optim import OptimWrapper
from test_openmmlab import TYPES, build, images, randomise
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from densezoo.fsdp import gathered, shard


class Net(nn.Module):
    """A backbone and a loss."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(output.square().mean() for output in self.backbone(x))


def optimizer_of(model: nn.Module) -> OptimWrapper:
    return OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), clip_grad=dict(max_norm=0.5))


distributed.init_process_group("gloo")
rank = distributed.get_rank()
batch = images(2)
for kind in TYPES:
    # no statistics of a batch, of which each process has a half
    model = Net(build(kind, with_cp=True)).eval()
    randomise(model)
    before, plain = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    optimizer = optimizer_of(plain)
    optimizer.update_params(sum(plain(half) for half in batch.chunk(2)) / 2)

    optimizer = optimizer_of(model)
    sharded = shard(model, optimizer, {})
    assert len(FullyShardedDataParallel.fsdp_modules(sharded)) >= 4, kind
    optimizer.update_params(sharded(batch.chunk(2)[rank]))
    with gathered(sharded, optimizer):
        after = sharded.module.state_dict()
    if rank == 0:
        expected = plain.state_dict()
        assert list(after) == list(expected), kind
        print(kind, flush=True)
        torch.testing.assert_close(dict(after), dict(expected), rtol=1e-5, atol=1e-6)
        moved = [name for name, value in expected.items() if not torch.equal(value, before[name])]
        assert len(moved) > 0.9 * len(list(plain.parameters()))
# Modules and optimizers hold the group: it ends with the last of them, and must not outlive the interpreter.
del model, sharded, plain, optimizer
gc.collect()
distributed.destroy_process_group()
