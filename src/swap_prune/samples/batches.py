"""Batches as data sets and loaders give them: tensors with samples in front, in tuples, lists, mappings, dataclasses.

Counted, cut, joined and moved, whatever they hold. What has no tensors in sight is one piece.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from swap_prune.process_memory import pass_on_shortage

__all__ = [
    "batch_size",
    "digest_whole",
    "in_own_containers",
    "is_single",
    "is_sliceable",
    "join_batches",
    "map_tensors",
    "replace_part",
    "select_samples",
    "slice_batch",
    "split_batches",
]

_LEAST = 8  # samples that are no batch by themselves


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Apply a function to every tensor of a batch (nested tuples, lists, mappings, dataclasses), the rest unchanged."""
    if isinstance(batch, Tensor):
        return function(batch)
    return _map_parts(lambda part: map_tensors(function, part), batch)


def _map_parts(function: Callable[..., Any], batch: Any, *others: Any) -> Any:
    """Apply a function to what a container holds, and others like it beside it; what is none stays as it is."""
    if isinstance(batch, PackedSequence):
        raise ValueError(
            "a batch holds a PackedSequence, whose samples cannot be told apart: give padded sequences and their "
            "lengths, and pack them in the model or in loss_fn"
        )
    if isinstance(batch, Mapping):
        return _like(batch, {key: function(value, *(other[key] for other in others)) for key, value in batch.items()})
    if isinstance(batch, list | tuple):
        made = map(function, batch, *others)
        return type(batch)(*made) if hasattr(batch, "_fields") else type(batch)(made)
    if _is_record(batch):
        fields = {
            name: function(part, *(getattr(other, name) for other in others)) for name, part in _parts_of(batch).items()
        }
        return _record_like(batch, fields)
    return batch


def replace_part(batch: Any, position: int, key: str, value: Tensor) -> Any:
    """Return a batch like the one given, with one part of it replaced.

    Args:
        batch: A tensor, which is replaced by the value, a sequence, or a mapping.
        position: Which part, in a sequence.
        key: Which part, in a mapping.
        value: The new part.
    """
    if isinstance(batch, Tensor):
        return value
    if isinstance(batch, Mapping):
        return _like(batch, {**batch, key: value})
    parts = [value if i == position else part for i, part in enumerate(batch)]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def digest_whole(batch: Any, digest: hashlib._Hash) -> None:
    """Add all that a batch holds to a digest.

    Raises:
        ValueError: If it holds what cannot be told from others of its kind by its content.
    """
    if isinstance(batch, Tensor):
        if batch.layout is not torch.strided or batch.is_nested or batch.is_quantized:
            raise ValueError(f"a batch holds a tensor of layout {batch.layout}, whose content cannot be compared")
        digest.update(f"{batch.dtype} {tuple(batch.shape)}".encode())
        digest.update(batch.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(batch, Mapping | list | tuple) or _is_record(batch):
        digest.update(type(batch).__qualname__.encode())
        values = batch if isinstance(batch, Mapping | list | tuple) else _parts_of(batch)
        for part in values.items() if isinstance(values, Mapping) else values:
            digest_whole(part, digest)
    elif batch is None or isinstance(batch, bool | int | float | str | bytes):
        digest.update(repr(batch).encode())
    else:
        raise ValueError(f"a batch holds {type(batch).__qualname__}, whose content cannot be compared")


def _is_record(batch: Any) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def _parts_of(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _record_like(record: Any, values: Mapping[str, Any]) -> Any:
    """Return a dataclass's copy with other fields; its constructor, which may do more, is not called."""
    made = copy.copy(record)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _like(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return values in a mapping of a batch's own class, which may have attributes for its keys; else as a dict."""
    if type(batch) is not dict:
        try:
            made = type(batch)(values)  # type: ignore[call-arg]
            if made.keys() == values.keys():
                return made
        except Exception:  # its constructor takes something else
            return values
    return values


def in_own_containers(batch: Any) -> Any:
    """Return a batch that a loss may take apart: the same tensors, in containers of its own."""
    return map_tensors(lambda t: t, batch)


def slice_batch(batch: Any, start: int, stop: int) -> Any:
    """Return samples ``start`` to ``stop`` of a batch."""
    return _map_samples(lambda t: t[start:stop], lambda column: column[start:stop], batch, batch_size(batch))


def select_samples(batch: Any, index: Tensor) -> Any:
    """Return the samples of a batch at some positions, (m,)."""
    places = index.tolist()
    return _map_samples(
        lambda t: t.index_select(0, index.to(t.device)),
        lambda column: type(column)(column[place] for place in places),
        batch,
        batch_size(batch),
    )


def _map_samples(
    tensors: Callable[[Tensor], Any], columns: Callable[[Any], Any], batch: Any, size: int, *, inside: bool = False
) -> Any:
    """Apply one function to the tensors of a batch that have its samples in front, another to lists of one a sample."""
    if isinstance(batch, Tensor):
        return tensors(batch) if _has_samples(batch, size) else batch
    if inside and _is_column(batch, size):
        return columns(batch)
    return _map_parts(lambda part: _map_samples(tensors, columns, part, size, inside=True), batch)


def _is_column(part: Any, size: int) -> bool:
    """Whether a part of a batch of so many samples is a list with one entry a sample: names, dicts, ragged tensors."""
    if not isinstance(part, list | tuple) or hasattr(part, "_fields") or len(part) != size:
        return False
    if all(isinstance(entry, Mapping | str | bytes | int | float) for entry in part):
        return True
    whole: list[Tensor] = []
    map_tensors(lambda t: whole.append(t) if _has_samples(t, size) else None, part)
    return not whole  # else it is a container, whose tensors have the samples in front


def _has_samples(tensor: Tensor, size: int) -> bool:
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"a batch holds a sparse tensor ({tensor.layout}), whose samples cannot be told apart: give a dense one, "
            "such as its to_dense()"
        )
    return tensor.ndim > 0 and tensor.shape[0] == size


def split_batches(batches: Iterable[Any], size: int) -> list[Any]:
    """Return batches of ``size`` samples at the most, each in equal parts but for one sample.

    A batch that cannot be sliced stays whole.
    """
    parts = []
    for batch in batches:
        if not is_sliceable(batch):
            parts.append(batch)
            continue
        whole = batch_size(batch)
        count = max(1, math.ceil(whole / size))
        parts += [slice_batch(batch, i * whole // count, (i + 1) * whole // count) for i in range(count)]
    return parts


def join_batches(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """Yield samples in their order, with batches joined up to ``size`` samples, where they are alike.

    A few samples that would be left alone join a batch that is full: BatchNorm's statistics of them say little. Batches
    that cannot be sliced, or whose samples differ in shape, stay as they are. One joined batch and one batch more are
    read ahead.
    """
    least = max(2, min(_LEAST, size // 2))
    full: list[Any] = []  # joined, and still to be yielded: a few samples may follow, or may be all that it holds
    for group in _groups(batches, size):
        few = min(_samples(full), _samples(group)) < least
        if full and few and _are_alike(full[-1], group[0]) and _fit(full + group, math.inf):
            full += group
            continue
        if full:
            yield _joined(full)
        full = group
    if full:
        yield _joined(full)


def _groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield runs of batches that are alike and have at most ``size`` samples together, or are one."""
    group: list[Any] = []
    for batch in batches:
        if group and not (_are_alike(group[-1], batch) and _fit([*group, batch], size)):
            yield group
            group = []
        group.append(batch)
    if group:
        yield group


def _samples(batches: Iterable[Any]) -> int:
    return sum(map(batch_size, batches))


def _fit(batches: list[Any], size: float) -> bool:
    """Whether batches that are alike have at most so many samples together, and can be told apart when they are one."""
    together = _samples(batches)
    return together <= size and together < _least_length(slice_batch(batches[0], 0, 0))


def _are_alike(first: Any, second: Any) -> bool:
    """Whether two batches can be one: the same structure, samples of the same shapes and dtypes, the rest the same."""
    return is_sliceable(first) and is_sliceable(second) and _match(first, second, batch_size(first), batch_size(second))


def _match(first: Any, second: Any, size: int, other: int, *, inside: bool = False) -> bool:
    """Whether parts of two batches, of so many samples, can be parts of one."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.dtype != second.dtype or first.ndim != second.ndim:
            return False
        if _has_samples(first, size) and _has_samples(second, other):
            return first.shape[1:] == second.shape[1:]
        return torch.equal(first, second)  # what all samples share
    if type(first) is not type(second):
        return False
    if inside and _is_column(first, size) and _is_column(second, other):
        return True
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(
            _match(one, second[key], size, other, inside=True) for key, one in first.items()
        )
    if isinstance(first, tuple | list):
        pairs = zip(first, second, strict=False)
        return len(first) == len(second) and all(_match(one, two, size, other, inside=True) for one, two in pairs)
    if _is_record(first):
        theirs = _parts_of(second)
        return all(_match(one, theirs[name], size, other, inside=True) for name, one in _parts_of(first).items())
    return first is None and second is None


def _joined(batches: list[Any]) -> Any:
    """Return batches that are alike as one; a single one is itself."""
    return batches[0] if len(batches) == 1 else _concatenated(batches, list(map(batch_size, batches)))


def _concatenated(parts: Sequence[Any], sizes: list[int], *, inside: bool = False) -> Any:
    """Return parts of batches of so many samples as one."""
    first = parts[0]
    if inside and all(map(_is_column, parts, sizes)):
        return type(first)(itertools.chain.from_iterable(parts))
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if all(map(_has_samples, parts, sizes)) else first
    return _map_parts(lambda *inner: _concatenated(inner, sizes, inside=True), *parts)


def batch_size(batch: Any) -> int:
    """Return the number of samples of a batch: the leading dimension of its first tensor.

    An object without tensors in sight counts as its ``len``, where that is not the number of its fields, or as one
    sample.
    """
    sizes: list[int] = []
    map_tensors(lambda t: sizes.append(t.shape[0]) if t.ndim else None, batch)
    if sizes:
        return sizes[0]
    return len(batch) if hasattr(batch, "__len__") and not _counts_fields(batch) else 1


def _counts_fields(batch: Any) -> bool:
    """Whether the length of an object is that of its fields, as of a mapping or a graph, and not of samples."""
    if isinstance(batch, Mapping):
        return True
    names = getattr(batch, "keys", None)
    if names is None:
        return False
    try:
        return len(list(names() if callable(names) else names)) == len(batch)
    except Exception as error:  # whatever the caller's object does
        pass_on_shortage(error)
        return False


def is_sliceable(batch: Any) -> bool:
    """Whether the samples of a batch can be told apart: its tensors have them in front, or are what all of them share.

    What they share has no dimension, or a first one of 1, or of more than the number of samples: a shorter one might be
    taken for the samples of a part of the batch.
    """
    shared = slice_batch(batch, 0, 0)
    return batch_size(shared) == 0 and _least_length(shared) > batch_size(batch)


def _least_length(shared: Any) -> float:
    """Return the least length above 1 of what is left of a batch without samples; infinity where there is none."""
    lengths: list[float] = [math.inf]
    map_tensors(lambda t: lengths.append(t.shape[0]) if t.ndim and t.shape[0] > 1 else None, shared)
    return min(lengths)


def is_single(batch: Any) -> bool:
    """Whether a batch is one sample, which has no variance; of one that cannot be sliced nobody knows."""
    return is_sliceable(batch) and batch_size(batch) == 1
