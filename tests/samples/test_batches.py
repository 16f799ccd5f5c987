"""Batches counted, cut, joined and mapped."""

from collections import namedtuple

import pytest
import torch

from swap_prune.samples.batches import (
    batch_size,
    is_single,
    is_sliceable,
    join_batches,
    map_tensors,
    select_samples,
    slice_batch,
    split_batches,
)
from tests.cases import batches_of

Pair = namedtuple("Pair", ["x", "y"])


def test_map_tensors_keeps_the_structure():
    batch = {"a": [torch.ones(2), "text"], "b": Pair(torch.ones(1), (None, torch.zeros(3)))}
    doubled = map_tensors(lambda t: t * 2, batch)
    assert doubled["a"][0].tolist() == [2, 2] and doubled["a"][1] == "text"
    assert isinstance(doubled["b"], Pair) and doubled["b"].x.tolist() == [2] and doubled["b"].y[0] is None
    assert batch["a"][0].tolist() == [1, 1]


def test_slicing_and_sizes():
    batch = (torch.arange(6).view(3, 2), {"y": torch.arange(3), "scale": torch.tensor(2.0), "table": torch.zeros(5)})
    part = slice_batch(batch, 1, 3)
    assert part[0].tolist() == [[2, 3], [4, 5]] and part[1]["y"].tolist() == [1, 2]
    assert part[1]["scale"].item() == 2 and part[1]["table"].shape == (5,)
    assert batch_size(batch) == 3 and batch_size(part) == 2 and batch_size([1, 2, 3, 4]) == 4
    assert batch_size(object()) == 1
    assert is_sliceable(batch) and not is_sliceable(object())
    assert is_sliceable((batch[0], batch[1] | {"table": torch.zeros(1, 5)}))
    assert not is_sliceable((batch[0], batch[1] | {"table": torch.zeros(2)}))  # two of the three would cut the table
    assert is_sliceable((torch.zeros(1, 6), torch.eye(6))) and is_single((torch.zeros(1, 6), torch.eye(6)))


def test_split_batches_keeps_every_sample_in_order():
    batches = [(torch.arange(7), torch.arange(7)), (torch.arange(7, 10), torch.arange(7, 10))]
    parts = split_batches(batches, 3)
    assert [batch_size(part) for part in parts] == [2, 2, 3, 3]
    assert torch.cat([part[1] for part in parts]).tolist() == list(range(10))
    whole = [object()]
    assert split_batches(whole, 1)[0] is whole[0]


@pytest.mark.parametrize(
    ("sizes", "joined"),
    [
        ((2, 2, 2), [6]),
        ((5, 5, 5), [5, 5, 5]),
        ((4, 4, 4), [8, 4]),
        ((8, 1), [9]),  # one alone has no variance
        ((1, 8, 8), [9, 8]),
        ((8, 1, 8, 1), [9, 9]),
        ((1,) * 20, [8, 8, 4]),  # a loader of single samples
        ((1,) * 17, [8, 9]),
        ((1,), [1]),
        ((20, 3), [23]),  # few have hardly a variance
        ((20, 4), [20, 4]),
        ((), []),
    ],
)
def test_small_batches_are_joined(sizes, joined):
    parts = list(join_batches(batches_of(*sizes) if sizes else [], 8))
    assert [len(part[1]) for part in parts] == joined
    assert [i for part in parts for i in part[1].tolist()] == list(range(sum(sizes)))
    assert all(torch.equal(part[0][:, 0], part[1].float() * 10) for part in parts)


def test_batches_that_differ_stay_apart():
    ragged = [(torch.zeros(2, length), torch.zeros(2)) for length in (3, 4, 4)]
    assert [part[0].shape for part in join_batches(ragged, 8)] == [(2, 3), (4, 4)]
    kinds = [torch.zeros(2), torch.zeros(2).long(), {"a": torch.zeros(2)}, {"b": torch.zeros(2)}, [torch.zeros(2)]]
    assert len(list(join_batches(kinds, 8))) == 5
    named = [Pair(torch.zeros(2), torch.ones(2))] * 2
    (one,) = join_batches(named, 8)
    assert isinstance(one, Pair) and one.y.tolist() == [1.0] * 4
    assert list(join_batches(["text", "text"], 8)) == ["text", "text"]


@pytest.mark.parametrize(("size", "parts"), [(8, [4, 4]), (9, [3, 3, 3]), (10, [3, 3, 4]), (1, [1]), (5, [2, 3])])
def test_the_parts_of_a_batch_are_alike(size, parts):
    assert [batch_size(part) for part in split_batches(batches_of(size), 4)] == parts


@pytest.mark.parametrize("size", [128, 129, 130, 135, 136, 250, 257])
def test_a_few_samples_are_no_batch(size):
    parts = list(join_batches(split_batches(batches_of(*[16] * (size // 16), size % 16 or 16), 128), 128))
    assert min(len(part[1]) for part in parts) >= 8 and max(len(part[1]) for part in parts) <= 128 + 7


def test_what_all_samples_share_is_kept_once_and_stands_in_the_way_where_it_differs():
    table, mask = torch.tensor([[0.5, 0.25, 0.25]]), torch.eye(5)[None]
    parts = [{"x": torch.zeros(n, 8), "y": torch.arange(n), "table": table, "mask": mask, "no": None} for n in (4, 3)]
    (one,) = join_batches(parts, 8)
    assert one["x"].shape == (7, 8) and one["y"].tolist() == [0, 1, 2, 3, 0, 1, 2] and one["no"] is None
    assert torch.equal(one["table"], table) and torch.equal(one["mask"], mask)
    for missing in (0, 1):  # what only one of them has is not dropped
        unlike = [
            part | ({} if place == missing else {"no": torch.ones(len(part["y"]))}) for place, part in enumerate(parts)
        ]
        assert len(list(join_batches(unlike, 8))) == 2
    parts[1] = parts[1] | {"table": table + 1}
    assert len(list(join_batches(parts, 8))) == 2
    assert len(list(join_batches([part | {"table": torch.zeros(3)} for part in parts], 8))) == 2  # 3 may be samples
    for length, count in ((6, 2), (7, 2), (8, 1)):  # of seven samples, six and seven might be some
        alike = [part | {"table": torch.zeros(length)} for part in parts]
        assert len(list(join_batches(alike, 8))) == count
    longer = [(torch.zeros(n, 2), torch.zeros(129)) for n in (128, 2)]  # two that are left would make 130
    assert [len(x) for x, _ in join_batches(longer, 128)] == [128, 2]
    scalars = [(torch.zeros(2, 1), torch.tensor(value)) for value in (1.0, 1.0, 2.0)]
    assert [(len(x), float(c)) for x, c in join_batches(scalars, 8)] == [(4, 1.0), (2, 2.0)]


def column_batch(start: int, stop: int) -> dict:
    numbers = range(start, stop)
    return {
        "x": torch.tensor([[10.0 * i] for i in numbers]),
        "names": [f"n{i}" for i in numbers],
        "boxes": [{"corners": torch.full((stop - start, 4), float(i))} for i in numbers],  # as many as samples
        "ragged": tuple(torch.full((20 + i,), float(i)) for i in numbers),
        "pair": [torch.tensor([float(i) for i in numbers])] * (stop - start),  # as many tensors as samples
    }


def check_columns(batch: dict, numbers: list[int], width: int) -> None:
    assert batch["x"][:, 0].tolist() == [10.0 * i for i in numbers]
    assert batch["names"] == [f"n{i}" for i in numbers]
    assert [float(one["corners"].mean()) for one in batch["boxes"]] == numbers
    assert all(one["corners"].shape == (width, 4) for one in batch["boxes"]), "what belongs to a sample is not cut"
    assert [(len(one), float(one[0])) for one in batch["ragged"]] == [(20 + i, i) for i in numbers]
    assert isinstance(batch["ragged"], tuple)
    assert [one.tolist() for one in batch["pair"]] == [numbers] * width, "a container of tensors"


def test_lists_beside_tensors_are_cut_chosen_and_joined_with_the_samples():
    batch = column_batch(0, 5)
    check_columns(slice_batch(batch, 1, 4), [1, 2, 3], 5)
    check_columns(select_samples(batch, torch.tensor([4, 0, 2])), [4, 0, 2], 5)
    (joined,) = join_batches([column_batch(0, 3), column_batch(3, 6)], 8)
    check_columns(joined, [0, 1, 2, 3, 4, 5], 3)
    parts = split_batches([(torch.arange(5), ["a", "b", "c", "d", "e"])], 2)
    assert [part[1] for part in parts] == [["a"], ["b", "c"], ["d", "e"]]
    two = slice_batch([torch.arange(2), torch.arange(2) + 5], 0, 1)
    assert [part.tolist() for part in two] == [[0], [5]], "a pair of tensors with two samples is a pair"
