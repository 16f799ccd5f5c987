"""The calibration stream: what is drawn from data sets, lists, loaders and generators."""

from collections.abc import Mapping

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from swap_prune.experiments.images import ImageTensors
from swap_prune.samples.calibration import CalibrationStream
from swap_prune.samples.peek import peek
from swap_prune.samples.shares import share_out_samples
from tests.cases import batches_of, generator


def stream(data, seed=0):
    return CalibrationStream(data, generator(seed))


def drawn(source, samples):
    """The numbers of the samples of one draw; inputs and targets must still belong together."""
    numbers = []
    for inputs, targets in source.draw(samples):
        assert inputs.shape == (len(targets), 1) and torch.equal(inputs[:, 0], targets.float() * 10)
        numbers += targets.tolist()
    return numbers


class OneByOne(Dataset):
    """A map-style data set without ``__getitems__``."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if not 0 <= index < 10:
            raise IndexError
        return torch.tensor([index * 10.0]), index


class Flow(IterableDataset):
    def __iter__(self):
        return ((torch.tensor([i * 10.0]), i) for i in range(10))


def datasets():
    inputs, targets = batches_of(10)[0]
    whole = TensorDataset(inputs, targets)
    more = TensorDataset(*batches_of(20)[0])
    return {"tensors": whole, "one by one": OneByOne(), "subset": Subset(more, range(10))}


@pytest.mark.parametrize("name", datasets())
def test_a_dataset_is_drawn_at_random_without_repetition(name):
    source = stream(datasets()[name])
    draws = [drawn(source, 5) for _ in range(4)]
    assert sorted(draws[0] + draws[1]) == sorted(draws[2] + draws[3]) == list(range(10))
    assert draws[0] + draws[1] != list(range(10)), "shuffled"
    assert draws[0] + draws[1] != draws[2] + draws[3], "and shuffled anew"


def test_a_draw_across_the_end_of_a_dataset_repeats_nothing():
    source = stream(OneByOne())
    for size in (4, 4, 4, 7, 7, 3, 9):
        numbers = drawn(source, size)
        assert len(numbers) == len(set(numbers)) == size


def test_every_sample_of_a_dataset_is_seen_before_any_is_seen_twice():
    source = stream(OneByOne())
    numbers = [i for _ in range(5) for i in drawn(source, 4)]
    assert sorted(numbers[:10]) == sorted(set(numbers[10:]) | set(numbers[8:10])) == list(range(10))


def test_more_samples_than_a_dataset_has():
    source = stream(OneByOne())
    assert sorted(drawn(source, 25)) == sorted(drawn(source, 25)) == list(range(10))


def test_a_large_draw_comes_in_batches():
    count = 300
    data = TensorDataset(torch.arange(count)[:, None].float() * 10, torch.arange(count))
    parts = stream(data).draw(290)
    assert len(parts) > 1 and sum(len(targets) for _, targets in parts) == 290


def test_the_seed_decides():
    first, second, other = stream(OneByOne(), 1), stream(OneByOne(), 1), stream(OneByOne(), 2)
    state = torch.get_rng_state()
    one, two, three = ([drawn(s, 6) for _ in range(3)] for s in (first, second, other))
    assert one == two and one != three
    assert torch.equal(torch.get_rng_state(), state)


def iterables():
    return {
        "list": lambda: batches_of(4, 4, 2),
        "tuple": lambda: tuple(batches_of(4, 4, 2)),
        "loader": lambda: DataLoader(OneByOne(), batch_sampler=[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        "generator": lambda: (batch for batch in batches_of(4, 4, 2)),
        "iterator": lambda: iter(batches_of(4, 4, 2)),
        "iterable dataset": Flow,
        "with empty batches": lambda: [*batches_of(0, 4), *batches_of(0), *batches_of(4, 4, 2)[1:], *batches_of(0)],
    }


@pytest.mark.parametrize("name", iterables())
def test_batches_are_read_in_order_and_from_the_start_again(name):
    source = stream(iterables()[name]())
    assert drawn(source, 3) == [0, 1, 2]
    assert drawn(source, 3) == [3, 4, 5], "the remainder of a batch comes first"
    assert drawn(source, 6) == [6, 7, 8, 9, 0, 1]
    assert drawn(source, 10) == [2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


@pytest.mark.parametrize("name", iterables())
def test_more_samples_than_there_are(name):
    source = stream(iterables()[name]())
    assert drawn(source, 64) == list(range(10)), "all, once"
    assert sorted(drawn(source, 64)) == list(range(10))
    source = stream(iterables()[name]())
    assert drawn(source, 7) == list(range(7))
    assert sorted(drawn(source, 64)) == list(range(10)), "also from the middle"


def test_a_draw_that_ends_with_the_data():
    source = stream(batches_of(4, 4, 2))
    assert drawn(source, 10) == list(range(10))
    assert drawn(source, 4) == [0, 1, 2, 3]


def test_a_generator_is_read_no_further_than_needed():
    read = []

    def source():
        for batch in batches_of(4, 4, 2):
            read.append(len(batch[1]))
            yield batch

    calibration = stream(source())
    assert read == []
    drawn(calibration, 5)
    assert read == [4, 4]


def test_a_generator_that_never_ends():
    def endless():
        while True:
            yield from batches_of(3)

    assert drawn(stream(endless()), 8) == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("data", [[], iter([]), DataLoader([], batch_size=2), batches_of(0), TensorDataset()])
def test_data_without_a_sample(data):
    if isinstance(data, TensorDataset):
        data = TensorDataset(torch.zeros(0, 1), torch.zeros(0))
    source = stream(data)
    for _ in range(2):
        with pytest.raises(ValueError, match="empty"):
            source.draw(4)


def test_a_generator_that_was_read_before():
    data = (batch for batch in batches_of(4))
    list(data)
    with pytest.raises(ValueError, match="exhausted"):
        stream(data).draw(4)


@pytest.mark.parametrize("data", [torch.zeros(4, 2), "mnist", {"inputs": torch.zeros(4)}, 7, None])
def test_data_that_is_none(data):
    with pytest.raises(ValueError, match=f"data must be .*{type(data).__name__}"):
        stream(data)


class Encoding(Mapping):
    """A mapping that is not a dict, as tokenizers return it."""

    def __init__(self, **parts):
        self._parts = parts

    def __getitem__(self, key):
        return self._parts[key]

    def __iter__(self):
        return iter(self._parts)

    def __len__(self):
        return len(self._parts)


@pytest.mark.parametrize("make", [dict, Encoding])
def test_mapping_batches(make):
    data = [make(ids=torch.arange(4), mask=torch.ones(4, 3)), make(ids=torch.arange(4, 7), mask=torch.ones(3, 3))]
    source = stream(data)
    parts = source.draw(6)
    assert [part["ids"].tolist() for part in parts] == [[0, 1, 2, 3, 4, 5]]
    assert [tuple(part["mask"].shape) for part in parts] == [(6, 3)]
    assert source.draw(1)[0]["ids"].tolist() == [6]


def test_the_data_are_left_alone():
    data = batches_of(4, 4, 2)
    source = stream(data)
    for _ in range(5):
        source.draw(3)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(data, batches_of(4, 4, 2), strict=True))


def test_opaque_batches_come_whole():
    class Opaque:
        def __init__(self, size):
            self.size = size

        def __len__(self):
            return self.size

    data = [Opaque(3), Opaque(3), Opaque(3)]
    source = stream(data)
    assert source.draw(4) == data[:2]
    assert source.draw(1) == data[2:]


def passed(source, size, seed=0):
    """Shares, sizes and numbers of one pass."""
    shares, sizes, numbers = [], [], []
    for share, (inputs, targets) in source.read_pass(size, generator(seed)):
        assert torch.equal(inputs[:, 0], targets.float() * 10)
        shares.append(share)
        sizes.append(len(targets))
        numbers += targets.tolist()
    return shares, sizes, numbers


def test_a_pass_over_a_dataset_is_whole_in_a_new_order_and_changes_no_draw():
    source, other = stream(datasets()["tensors"]), stream(datasets()["tensors"])
    first, second = passed(source, 4, seed=1), passed(source, 4, seed=2)
    assert first[:2] == ([0.0, 0.4, 0.8], [4, 4, 2])
    assert sorted(first[2]) == sorted(second[2]) == list(range(10)) and first[2] != second[2]
    assert passed(source, 4, seed=1) == first
    assert [drawn(source, 4) for _ in range(3)] == [drawn(other, 4) for _ in range(3)]


def test_a_pass_over_batches_splits_them_and_goes_on_where_it_was():
    source = stream(batches_of(4, 6))
    assert passed(source, 3) == ([0.0, 0.25, 0.4, 0.7], [2, 2, 3, 3], list(range(10))), "the length is learned"
    assert drawn(source, 5) == [0, 1, 2, 3, 4]
    shares, sizes, numbers = passed(source, 100)
    assert (shares, sizes) == ([0.0, 0.5, 0.9], [5, 4, 1]) and numbers == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert drawn(source, 3) == [5, 6, 7], "the rest of a batch that a pass ended in"
    assert passed(source, 100)[2] == [8, 9, *range(8)]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_pass_that_is_left_early_goes_on_where_it_was_left(steps):
    source, seen = stream(batches_of(10)), []
    for _ in range(10):
        for _, (_, (_, targets)) in zip(range(steps), source.read_pass(4, generator()), strict=False):
            seen += targets.tolist()
    assert seen == [number % 10 for number in range(len(seen))] and len(seen) > 20
    following = (seen[-1] + 1) % 10
    assert drawn(source, 3) == [(following + number) % 10 for number in range(3)]


def test_large_batches_of_a_loader_are_split_and_no_sample_stays_alone():
    source = CalibrationStream(batches_of(4, 17), generator(), size=8)
    assert [len(batch[0]) for batch in source.draw(21)] == [4, 5, 6, 6]
    fitting, apart = source.draw_apart(12, 5)
    assert sum(len(batch[0]) for batch in fitting) == 12 and sum(len(batch[0]) for batch in apart) == 5
    assert max(len(batch[0]) for batch in [*fitting, *apart]) <= 9


@pytest.mark.parametrize("name", ["dataset", "loader", "batches"])
def test_a_stream_beside_another_changes_none_of_its_draws_and_has_nothing_that_is_held_out(name):
    whole = TensorDataset(*batches_of(60)[0])
    data = {"dataset": whole, "loader": DataLoader(whole, batch_size=7), "batches": batches_of(60)}[name]
    source, alone = CalibrationStream(data, generator()), CalibrationStream(data, generator())
    beside = source.beside(None, generator(1))
    if name == "batches":
        assert beside is source, "there is one order only"
        return
    own = {int(i) for batch in source.hold_out(10) for i in batch[1]}
    alone.hold_out(10)
    for _ in range(3):
        assert set(drawn(beside, 60)) == set(range(60)) - own
        assert drawn(source, 25) == drawn(alone, 25)
    again = CalibrationStream(data, generator()).beside(None, generator(1))
    assert drawn(again, 20) == drawn(CalibrationStream(data, generator(1)), 20)


def test_what_is_held_out_is_left_out_of_the_same_samples_in_another_form():
    whole, form = TensorDataset(*batches_of(60)[0]), TensorDataset(torch.zeros(60, 1), torch.arange(60))
    source = CalibrationStream(whole, generator())
    same, other = (source.beside(data, generator(1)) for data in (form, TensorDataset(*batches_of(61)[0])))
    own = {int(i) for batch in source.hold_out(10) for i in batch[1]}
    assert {int(i) for batch in same.draw(60) for i in batch[1]} == set(range(60)) - own
    assert {int(i) for _, batch in same.read_pass(7, generator()) for i in batch[1]} == set(range(60)) - own
    assert set(drawn(other, 61)) == set(range(61))


class Counted(Dataset):
    """Ten samples that count how often one was asked for."""

    def __init__(self):
        self.asked = 0

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.asked += 1
        return torch.tensor([10.0 * index]), index


def test_batches_are_read_when_their_turn_comes_and_are_those_of_a_draw():
    counted = Counted()
    source = CalibrationStream(counted, generator(), size=3)
    parts = source.read(10)
    assert [counted.asked for _ in parts] == [9, 10, 10], "two batches ahead"
    loader = DataLoader(counted, batch_size=2)
    expected = CalibrationStream(loader, generator(), size=3).draw(10)
    counted.asked = 0
    found = []
    for part in CalibrationStream(loader, generator(), size=3).read(10):
        found.append(part)
        assert counted.asked <= sum(len(one[1]) for one in found) + 6
    assert [part[1].tolist() for part in found] == [part[1].tolist() for part in expected]


@pytest.mark.parametrize(
    ("size", "shares"),
    [
        (100, (20, 10)),
        (30, (20, 10)),
        (28, (20, 8)),
        (24, (20, 4)),
        (21, (17, 4)),
        (19, (19, 0)),
        (10, (10, 0)),
        (4, (4, 0)),
    ],
)
def test_few_samples_are_shared_out(size, shares):
    assert share_out_samples(size, 20, 10) == shares
    for data in (TensorDataset(*batches_of(size)[0]), batches_of(size)):
        fitting, apart = (sum(len(part[1]) for part in parts) for parts in stream(data).draw_apart(20, 10))
        assert (fitting, apart) == shares


def test_a_few_samples_are_not_held_out_whatever_was_asked_for():
    assert [share_out_samples(1000, samples, samples) for samples in (2, 3, 4)] == [(2, 0), (3, 0), (4, 4)]
    assert share_out_samples(12, 10, 10) == (10, 0)
    for data in (TensorDataset(*batches_of(12)[0]), batches_of(12)):
        fitting, apart = stream(data).draw_apart(10, 10)
        assert sum(len(part[1]) for part in fitting) == 10 and apart == []


def test_passes_over_a_generator_repeat_it_without_knowing_its_length():
    source = stream(batch for batch in batches_of(4, 6))
    assert passed(source, 6) == passed(source, 6) == ([0.0, 0.0], [4, 6], list(range(10)))


def test_a_pass_over_nothing():
    for data in (TensorDataset(torch.zeros(0, 2)), [], iter([])):
        with pytest.raises(ValueError, match="empty"):
            list(stream(data).read_pass(2, generator()))


@pytest.mark.parametrize("data", [[None], [batches_of(3)[0], None, batches_of(3)[0]]])
def test_none_is_no_batch(data):
    with pytest.raises(ValueError, match="gave None for a batch"):
        stream(data).draw(5)


def test_a_loader_that_shuffles_gives_the_same_samples_and_leaves_the_global_random_state():
    whole = TensorDataset(*batches_of(50)[0])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = drawn(stream(DataLoader(whole, batch_size=8, shuffle=True)), 40)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert drawn(stream(DataLoader(whole, batch_size=8, shuffle=True)), 40) == first != list(range(40))
    assert drawn(stream(DataLoader(whole, batch_size=8, shuffle=True), seed=1), 40) != first


@pytest.mark.parametrize("gradients", [True, False])
def test_data_are_read_in_the_callers_gradient_mode(gradients):
    seen = []

    class Watched(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            seen.append(torch.is_grad_enabled())
            return torch.zeros(1), 0

    with torch.set_grad_enabled(gradients):
        streams = [CalibrationStream(data, generator(), size=2) for data in (Watched(), DataLoader(Watched()))]
    for source in streams:
        with torch.set_grad_enabled(not gradients):
            assert len([torch.is_grad_enabled() for _ in source.read(6)]) == 3
            assert torch.is_grad_enabled() is not gradients
    assert seen == [gradients] * 12


class Broken(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise KeyError("label")


class Endless(Dataset):
    def __getitem__(self, index):
        return torch.zeros(1), 0


class Shy(Dataset):
    def __len__(self):
        raise NotImplementedError

    def __getitem__(self, index):
        return torch.zeros(1), 0


class ShyBatches:
    def __len__(self):
        raise NotImplementedError

    def __iter__(self):
        return iter(batches_of(4, 6))


def test_a_length_that_is_not_told_is_unknown():
    assert passed(stream(ShyBatches()), 6) == ([0.0, 0.0], [4, 6], list(range(10)))


def failing():
    yield batches_of(2)[0]
    raise RuntimeError("disk gone")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Broken(), "KeyError: 'label'"),
        (Endless(), "needs a length"),
        (Shy(), "needs a length"),
        (failing(), "RuntimeError: disk gone"),
        (
            DataLoader(TensorDataset(torch.zeros(3)), batch_sampler=BatchSampler(range(3), 4, drop_last=True)),
            "with drop_last=True no batch may be",
        ),
    ],
    ids=["broken", "endless", "shy", "failing", "all dropped"],
)
def test_data_that_fail_are_one_value_error(data, message):
    with pytest.raises(ValueError, match=message):
        stream(data).draw(3)


def test_what_is_held_out_is_never_drawn_again():
    source = stream(TensorDataset(*batches_of(20)[0]))
    own = [int(i) for batch in source.hold_out(7) for i in batch[1]]
    assert len(own) == 4  # a fifth
    rest = set(range(20)) - set(own)
    for _ in range(3):
        assert set(drawn(source, 20)) == rest
    fitting, apart = source.draw_apart(20, 8)
    assert {int(i) for batch in [*fitting, *apart] for i in batch[1]} == rest
    passed = {int(i) for _, batch in source.read_pass(5, generator(0)) for i in batch[1]}
    assert passed == rest


def test_a_look_at_augmented_images_draws_nothing() -> None:
    pixels = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator(1))
    images = ImageTensors(pixels, torch.arange(40), (0.5,) * 3, (0.2,) * 3)
    drawn = []
    for looks in (0, 1, 2):
        augmented = Subset(images.augmented(3), range(40))
        assert all(peek(augmented)[0].shape == (1, 3, 8, 8) for _ in range(looks))
        drawn.append(CalibrationStream(augmented, generator(0)).draw(20)[0][0])
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_what_data_draw_from_the_global_random_state_is_not_drawn_again():
    """A loader shuffles anew in each pass, and augmentation of one batch is not that of the next."""
    source = stream(DataLoader(TensorDataset(*batches_of(50)[0]), batch_size=8, shuffle=True))
    assert drawn(source, 50) != drawn(source, 50)

    class Noisy(Dataset):
        def __len__(self):
            return 300

        def __getitem__(self, index):
            return torch.rand(3), index

    parts = stream(Noisy()).draw(300)
    images = torch.cat([part[0] for part in parts])
    assert len(torch.unique(images, dim=0)) == 300


def test_a_look_at_random_data_is_the_same_each_time():
    class Noisy(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.randn(2), index

    state = torch.get_rng_state()
    assert torch.equal(peek(Noisy())[0], peek(DataLoader(Noisy()))[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"batch_size": None}, {"batch_size": 1, "collate_fn": lambda items: items[0]}])
def test_a_look_at_a_loader_whose_items_are_batches_is_at_one_sample(options):
    class Batches(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.full((8, 2), float(index)), torch.arange(8)

    inputs, targets = peek(DataLoader(Batches(), **options))
    assert inputs.tolist() == [[0.0, 0.0]] and targets.tolist() == [0]


def test_a_look_at_a_loader_with_a_batch_sampler_is_at_one_item():
    class Alike(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.full((2,), float(index)), torch.full((2,), -float(index))  # as large: could be stacked

    loader = DataLoader(Alike(), batch_sampler=BatchSampler(SequentialSampler(Alike()), 4, drop_last=False))
    inputs, targets = peek(loader)
    assert inputs.shape == targets.shape == (1, 2)


def test_a_look_for_which_memory_runs_out_says_so():
    class Short(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise MemoryError("none left")

    with pytest.raises(MemoryError, match="none left"):
        peek(Short())
