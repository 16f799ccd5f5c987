"""Samples by number: loaders are drawn from like their Dataset, and what is held out stays apart."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from swap_prune.samples.calibration import CalibrationStream
from swap_prune.samples.numbered import NumberedSamples
from tests.cases import but_long, generator

WHOLE = TensorDataset(torch.arange(70)[:, None].float(), torch.arange(70))


def numbers(batches):
    return [int(i) for batch in batches for i in batch[1]]


class Moving(DataLoader):
    """Changes batches on their way."""

    def __iter__(self):
        return ((inputs + 1, targets) for inputs, targets in super().__iter__())


class Flow(IterableDataset):
    def __iter__(self):
        return iter(WHOLE)


def loaders():
    return {
        "in order": DataLoader(WHOLE, batch_size=8),
        "shuffled": DataLoader(WHOLE, batch_size=8, shuffle=True),
        "last dropped": DataLoader(WHOLE, batch_size=8, shuffle=True, drop_last=True),
        "of a part": DataLoader(Subset(WHOLE, range(70)), batch_size=100, shuffle=True),
        "with workers": DataLoader(WHOLE, batch_size=8, num_workers=2),
        "with a collate function": DataLoader(WHOLE, batch_size=8, collate_fn=TwoLists()),
    }


class TwoLists:
    """A collate function that can be sent to a worker."""

    def __call__(self, samples):
        return torch.stack([inputs for inputs, _ in samples]), torch.stack([target for _, target in samples])


@pytest.mark.parametrize("name", loaders())
def test_a_loader_is_drawn_from_like_its_dataset(name):
    streams = [CalibrationStream(data, generator(), size=7) for data in (loaders()[name], WHOLE)]
    for _ in range(3):
        first, second = (stream.draw(30) for stream in streams)
        assert numbers(first) == numbers(second) != sorted(numbers(second))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    fitting, apart = zip(*(stream.draw_apart(50, 30, 4) for stream in streams), strict=True)
    assert numbers(fitting[0]) == numbers(fitting[1]) and numbers(apart[0]) == numbers(apart[1])
    assert numbers(streams[0].hold_out(9)) == numbers(streams[1].hold_out(9))


@pytest.mark.parametrize("name", but_long(loaders(), short=loaders().keys() - {"with workers"}))
def test_what_is_held_out_of_a_loader_is_never_fitted_or_trained_on(name):
    stream = CalibrationStream(loaders()[name], generator())
    judged = set(numbers(stream.hold_out(10)))
    kept_apart = set()
    for _ in range(4):
        fitting, apart = map(numbers, stream.draw_apart(40, 10, 4))
        kept_apart |= set(apart)
        assert len(apart) == 10 == len(kept_apart) and len(set(fitting)) == 40
        assert not set(fitting) & kept_apart and not judged & {*fitting, *apart}
    trained = numbers(batch for _, batch in stream.read_pass(8, generator()))
    assert not judged & set(trained) and len(trained) == len(set(trained))


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(WHOLE, batch_size=8, sampler=WeightedRandomSampler(torch.ones(70), 70)),
        DataLoader(WHOLE, batch_size=8, sampler=RandomSampler(WHOLE, replacement=True)),
        DataLoader(WHOLE, batch_size=8, sampler=RandomSampler(WHOLE, num_samples=16)),
        DataLoader(WHOLE, batch_sampler=BatchSampler(SequentialSampler(WHOLE), 8, drop_last=False)),
        DataLoader(WHOLE, batch_size=None),
        Moving(WHOLE, batch_size=8),
        DataLoader(Flow(), batch_size=8),
        Flow(),
        [WHOLE[:8]],
    ],
)
def test_what_has_an_order_or_batches_of_its_own_has_no_numbers(data):
    assert NumberedSamples.of(data) is None


def test_a_pass_of_training_is_the_loaders():
    in_order = CalibrationStream(DataLoader(WHOLE, batch_size=8), generator())
    batches = list(in_order.read_pass(5, generator()))
    assert numbers(batch for _, batch in batches) == list(range(70))
    assert [share for share, _ in batches] == [start / 70 for start in range(0, 70, 5)]
    assert [len(batch[1]) for _, batch in in_order.read_pass(100, generator())] == [8] * 8 + [6]
    shuffled = CalibrationStream(DataLoader(WHOLE, batch_size=8, shuffle=True, drop_last=True), generator())
    passes = [list(shuffled.read_pass(100, generator(seed))) for seed in (0, 0, 1)]
    first, again, other = (numbers(batch for _, batch in one) for one in passes)
    assert first == again != other and len(set(first)) == 64
    assert [len(batch[1]) for _, batch in passes[0]] == [8] * 8
    alone = CalibrationStream(DataLoader(WHOLE, batch_size=100, drop_last=True), generator())
    assert len(numbers(batch for _, batch in alone.read_pass(100, generator()))) == 70, "the only batch is no rest"


def test_loaders_of_sorted_data_give_every_class():
    labels = torch.arange(1000) // 100
    loader = DataLoader(TensorDataset(torch.zeros(1000, 1), labels), batch_size=10)
    assert set(numbers(CalibrationStream(loader, generator()).draw(100))) == set(range(10))


class Failing(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", but_long([KeyError("label"), ValueError("no such\nimage")]))
def test_samples_that_fail_are_one_value_error(workers, error):
    stream = CalibrationStream(DataLoader(Failing(error), batch_size=4, num_workers=workers), generator())
    with pytest.raises(ValueError, match=r"image|label") as caught:
        stream.draw(4)
    assert "Traceback" not in str(caught.value)


@pytest.mark.long
def test_augmentation_is_reproducible_and_differs_from_batch_to_batch():
    class Noisy(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return torch.rand(3), index

    for workers in (0, 2):
        loader = DataLoader(Noisy(), batch_size=8, num_workers=workers)
        streams = [CalibrationStream(loader, generator(seed), size=8) for seed in (0, 0, 1)]
        before = torch.get_rng_state()
        first, again, other = (torch.cat([batch[0] for batch in stream.draw(40)]) for stream in streams)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(first, 2))


class Flagged(TensorDataset):
    """Its samples have what a worker's own beginning has written."""

    flag = 0

    def __getitem__(self, index):
        return *super().__getitem__(index), torch.tensor(self.flag)


def write_flag(worker):
    get_worker_info().dataset.flag = 5


def test_workers_begin_as_the_loader_says():
    loader = DataLoader(Flagged(torch.randn(8, 2)), batch_size=4, num_workers=1, worker_init_fn=write_flag)
    drawn = CalibrationStream(loader, generator()).draw(8)
    assert torch.cat([flags for _, flags in drawn]).tolist() == [5] * 8
