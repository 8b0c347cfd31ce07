"""Random numbers of samples and steps depend on their place alone."""

import pickle
import random

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from torch.utils.data import Dataset

from densezoo.runner import Runner
from densezoo.seeding import SampleIndex, seed_step


class Draws(Dataset):
    """Eight samples, each its index and what every generator gives."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        assert type(index) is int
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def load(kind="DefaultSampler", batch_size=2, seed=3, epoch=0, skip=0, count=4, **settings):
    """Return the samples of `count` batches, in order."""
    config = dict(batch_size=batch_size, num_workers=0, collate_fn=list, sampler=dict(type=kind), dataset=Draws())
    loader = Runner.build_dataloader(config | settings, seed=seed)
    sampler = loader.batch_sampler.sampler
    sampler.set_epoch(epoch)
    if skip:
        sampler.skip(skip)
    batches = iter(loader)
    return [sample for _ in range(count) for sample in next(batches)]


def test_samples_do_not_depend_on_who_loads_them():
    samples = load()
    assert sorted(sample[0] for sample in samples) == list(range(8))
    assert len({sample[1:] for sample in samples}) == 8
    torch.manual_seed(123)
    assert load() == samples
    assert load(batch_size=4, count=2) == samples
    assert load(num_workers=2) == samples
    assert load(num_workers=3, prefetch_factor=4) == samples
    assert load(batch_sampler=dict(type=torch.utils.data.BatchSampler, drop_last=False)) == samples


def test_samples_depend_on_seed_and_epoch():
    def draws(**settings):
        return {sample[1:] for sample in load(**settings)}

    assert not draws() & draws(seed=4)
    assert not draws() & draws(epoch=1)


def test_infinite_sampler_goes_on_after_a_skip():
    whole = load("InfiniteSampler", count=12)
    # the same sample again is drawn anew
    assert len({sample[1:] for sample in whole}) == 24
    assert load("InfiniteSampler", skip=10, count=7) == whole[10:]
    assert load("InfiniteSampler", skip=10, count=7, num_workers=2) == whole[10:]
    assert not hasattr(
        Runner.build_dataloader(dict(sampler=dict(type="DefaultSampler"), dataset=Draws())).sampler, "skip"
    )


def test_processes_share_the_samples_of_one(monkeypatch):
    """Two processes load together what one loads, batch by batch."""
    whole = load(batch_size=4, count=2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("mmengine.dataset.sampler.get_dist_info", lambda rank=rank: (rank, 2))
        monkeypatch.setattr("densezoo.seeding.get_dist_info", lambda rank=rank: (rank, 2))
        parts.append(load(count=2))
    assert [sample for pair in zip(*parts, strict=True) for sample in pair] == whole


def test_steps():
    def draws(*place):
        seed_step(*place)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draws(1, 5) == draws(1, 5)
    assert len({draws(seed, step) for seed in range(3) for step in range(3)}) == 9


def test_index_travels_to_workers():
    index = pickle.loads(pickle.dumps(SampleIndex(5, (1, 2))))
    assert index == 5 and index.entropy == (1, 2)
