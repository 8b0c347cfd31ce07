"""Random numbers that depend on the seed and the place in the training alone: resumed runs repeat unbroken ones.

mmengine seeds each process once: a run that starts again from a checkpoint then draws other numbers than one that never
stopped. Here each training step runs under a seed made from (seed, iteration), and each sample is loaded under one made
from (seed, epoch, place in the epoch). Loader workers, their number, persistence and prefetching do not matter, and for
the samples neither does the number of processes that share them.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import DataLoader, Dataset, Sampler


def seed_step(seed: int, iteration: int) -> None:
    """Seed Python, NumPy and torch, on all devices, for one training step."""
    torch.manual_seed(_seed_host(seed, 0, iteration))


class SampleIndex(int):
    """A dataset index that carries the numbers from which its sample's seed is made."""

    def __new__(cls, index: int, entropy: tuple[int, ...]):
        """Return the int `index` with `entropy`."""
        self = super().__new__(cls, index)
        self.entropy = entropy
        return self

    def __reduce__(self):
        return SampleIndex, (int(self), self.entropy)


class SeededSampler(Sampler):
    """Yields what another sampler yields, as indices that carry their sample's seed.

    Args:
        sampler: Config of the other sampler; everything else that is asked of this one is answered by it.
        dataset: The dataset to sample from.
        seed: As mmengine gives it to a sampler; None lets the other one draw a seed that all processes share.
    """

    def __init__(self, sampler: dict, dataset: Dataset, seed: int | None):
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=seed))
        self.seed = getattr(self.sampler, "seed", seed) or 0
        self.rank, self.world_size = get_dist_info()
        self.epoch = self.start = 0
        # mmengine's iteration-based loop looks for this method when it resumes.
        if hasattr(self.sampler, "skip"):
            self.skip = self._skip

    def __iter__(self) -> Iterator[SampleIndex]:
        for place, index in enumerate(self.sampler, self.start):
            yield SampleIndex(index, (self.seed, 1, self.epoch, place * self.world_size + self.rank))

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the seeds of an epoch."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def _skip(self, num_samples: int) -> None:
        self.sampler.skip(num_samples)
        self.start = num_samples


def seed_samples(loader: DataLoader) -> None:
    """Let a loader over a `SeededSampler` load every sample under its own seed, in whichever process that happens."""
    # torch's batched form of __getitem__; set on the object, so that the dataset keeps its class and attributes
    loader.dataset.__getitems__ = partial(_load, loader.dataset)


def _load(dataset: Dataset, indices: Sequence[int]) -> list:
    samples = []
    for index in indices:
        if isinstance(index, SampleIndex):
            torch.default_generator.manual_seed(_seed_host(*index.entropy))
        samples.append(dataset[int(index)])
    return samples


def _seed_host(*entropy: int) -> int:
    """Seed Python and NumPy; return a seed for torch."""
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    return int(words[2]) << 32 | int(words[3])
