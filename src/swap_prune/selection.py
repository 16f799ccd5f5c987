"""Which parameters are pruned, and the one vector ``w`` (p,) that stands for them.

What a run settles first, by patterns (:mod:`swap_prune.network.matching`). A parameter that several modules share is
selected once, and its pruning acts wherever it is used.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

from swap_prune.checks import is_number
from swap_prune.network.aliasing import check_apart, computed_tensors
from swap_prune.network.matching import Candidate, around, as_patterns, candidates_of, is_prunable, matches, unmatched

__all__ = [
    "DEFAULT_TARGETS",
    "Layer",
    "Selection",
    "layer_floors",
    "select_parameters",
    "unnamed_weights",
    "unnamed_zeros",
]

DEFAULT_TARGETS = ("Linear", "Conv1d", "Conv2d", "Conv3d")
_PRUNED = 0.05  # of a weight: so many exact zeros are no accident


class Layer(NamedTuple):
    """Where one parameter lies in ``w``.

    Attributes:
        name: Name of the parameter.
        place: Its slice of the flat vector.
        shape: Its shape.
    """

    name: str
    place: slice
    shape: torch.Size

    @property
    def rows(self) -> int:
        """Number of outputs: rows of the parameter as a matrix (outputs, inputs of each)."""
        return self.shape[0] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class Selection:
    """Names and shapes of the selected parameters, and their places in the flat vector.

    Attributes:
        shapes: Parameter name (as in ``named_parameters``) to shape, in the model's order.
        groups: Name to the number of groups, of the weights of convolutions that have more than one: outputs, the first
            dimension, of different groups have inputs, the second, of their own.
    """

    shapes: Mapping[str, torch.Size]
    groups: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in flat order."""
        return tuple(self.shapes)

    @cached_property
    def total(self) -> int:
        """p, the number of selected weights."""
        return sum(shape.numel() for shape in self.shapes.values())

    def slices(self) -> dict[str, slice]:
        """Return each parameter's place in the flat vector."""
        return dict(self._places)

    @cached_property
    def _places(self) -> dict[str, slice]:
        ends = [0]
        for shape in self.shapes.values():
            ends.append(ends[-1] + shape.numel())
        return {name: slice(a, b) for name, (a, b) in zip(self.shapes, pairwise(ends), strict=True)}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate tensors by name to (p,), in at least float32."""
        parts = [tensors[name].detach().reshape(-1) for name in self.shapes]
        dtype = _precision(parts)
        return torch.cat([part.to(dtype) for part in parts])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """View a flat (p,) vector as tensors of the parameters' shapes."""
        places = self.slices()
        return {name: flat[places[name]].view(shape) for name, shape in self.shapes.items()}

    def read(self, model: nn.Module) -> Tensor:
        """Copy the selected weights of ``model`` to one vector (p,)."""
        return self.flatten(dict(model.named_parameters()))

    def dtype(self, model: nn.Module) -> torch.dtype:
        """Return that of such a vector."""
        parameters = dict(model.named_parameters())
        return _precision([parameters[name] for name in self.shapes])


def _precision(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype that holds all of them, float32 at the least."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def select_parameters(
    model: nn.Module, targets: Sequence[str] = DEFAULT_TARGETS, ignore: Sequence[str] = ()
) -> Selection:
    """Select the parameters to prune.

    A pattern takes weights (parameters with two dimensions or more); a parameter named in full, not by ``"re:..."``, is
    taken whatever its shape. ``ignore`` removes any parameter that it matches under any name.

    Args:
        model: Any module.
        targets: Class names, parameter names, module names, or ``"re:..."``.
        ignore: The same, for what to leave alone.

    Returns:
        The selection, with p >= 1.

    Raises:
        ValueError: If a pattern matches nothing (other than the default targets, where all of them are among
            ``targets``), a regular expression is malformed, a selected parameter is not yet initialised, or nothing is
            left to prune.
    """
    targets, ignore = as_patterns("targets", targets), as_patterns("ignore", ignore)
    candidates = candidates_of(model)
    may_miss = DEFAULT_TARGETS if set(DEFAULT_TARGETS) <= set(targets) else ()
    chosen: set[str] = set()
    for pattern in targets:
        hits = {c.name for c in candidates if matches(pattern, c) and is_prunable(pattern, c)}
        if not hits and pattern not in may_miss:
            flat = sorted(c.name for c in candidates if matches(pattern, c))
            raise ValueError(unmatched("targets", pattern, model, flat))
        chosen |= hits
    for pattern in ignore:
        hits = {c.name for c in candidates if matches(pattern, c)}
        if not hits:
            raise ValueError(unmatched("ignore", pattern, model))
        chosen -= hits
    _check_parametrized(model, candidates, targets, ignore)
    shapes: dict[str, torch.Size] = {}
    for candidate in candidates:
        if candidate.name not in chosen:
            continue
        _check_real(candidate)
        if candidate.parameter.is_floating_point() and candidate.parameter.numel() > 0:
            shapes[candidate.name] = candidate.parameter.shape
    if not shapes:
        raise ValueError(
            f"the model has nothing to prune: targets={list(targets)} less ignore={list(ignore)} "
            f"leaves no floating-point weight in {type(model).__name__}"
            + (" (an exported graph has lost its classes: prune before)" if isinstance(model, GraphModule) else "")
        )
    chosen_ones = {c.name: c.parameter for c in candidates if c.name in shapes}
    tensors = (*model.named_parameters(), *model.named_buffers())
    check_apart(chosen_ones, {n: t for n, t in tensors if n not in shapes and not is_lazy(t)})
    groups = {c.name: max((_groups_of(owner) for _, owner in c.owners), default=1) for c in candidates}
    return Selection(shapes, {name: groups[name] for name in shapes if groups[name] > 1})


def _groups_of(module: nn.Module) -> int:
    """Return the groups of a convolution whose weight has its outputs first, else 1."""
    return module.groups if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1


def unnamed_weights(model: nn.Module, selection: Selection, ignore: Sequence[str] = ()) -> dict[str, int]:
    """Count the weights of two dimensions and more that a selection leaves out though nobody asked for that.

    Embeddings, which are looked up and not multiplied with, do not count.

    Args:
        model: The model.
        selection: What is selected of it.
        ignore: Patterns of what was to be left alone.

    Returns:
        Class name of their modules to their number.
    """
    counts: dict[str, int] = {}
    for candidate in _unnamed(model, selection.shapes, ignore):
        if not candidate.is_looked_up:
            name = type(candidate.owners[0][1]).__name__
            counts[name] = counts.get(name, 0) + candidate.parameter.numel()
    return counts


def unnamed_zeros(model: nn.Module, names: Iterable[str], ignore: Sequence[str] = ()) -> list[str]:
    """Return the names of such weights that seem to have been pruned: a part of them is exactly zero, and not all.

    Of embeddings too, without the rows that are zero throughout, as those of padding are.

    Args:
        model: The model.
        names: Of the parameters that are selected.
        ignore: Patterns of what was to be left alone.
    """
    found = [one for one in _unnamed(model, set(names), ignore) if one.parameter.layout is torch.strided]
    zeros = {one.name: one.parameter.detach() == 0 for one in found}
    zeros |= {one.name: zeros[one.name][~zeros[one.name].all(1)] for one in found if one.is_looked_up}
    return [name for name, among in zeros.items() if among.numel() and _PRUNED <= among.double().mean() < 1]


def _unnamed(model: nn.Module, names: Collection[str], ignore: Sequence[str]) -> Iterator[Candidate]:
    """Yield weights of two dimensions and more that are neither named nor ignored."""
    for candidate in candidates_of(model):
        parameter = candidate.parameter
        weight = (
            not is_lazy(parameter)
            and parameter.is_floating_point()
            and parameter.ndim >= 2
            and candidate.name not in names
        )
        if weight and not any(matches(pattern, candidate) for pattern in ignore):
            yield candidate


def _check_real(candidate: Candidate) -> None:
    """Refuse a parameter that is not there yet, or is complex."""
    if is_lazy(candidate.parameter):
        raise ValueError(f"parameter {candidate.name!r} is not initialised: run the model once, then prune")
    if candidate.parameter.is_complex():
        raise ValueError(f"{candidate.name!r} is complex, and real weights are pruned: ignore= leaves it alone")


def layer_floors(
    model: nn.Module, selection: Selection, min_keep: float | Mapping[str, float], keep: int
) -> dict[str, int]:
    """Return how many weights each selected parameter keeps at the least, by name; nothing is said of those without.

    Args:
        model: The model.
        selection: What is selected of it.
        min_keep: Share of each parameter's weights, in [0, 1], rounded up to a whole weight; or patterns, as targets
            have them, to shares. Where several match, the largest share holds.
        keep: k, of all parameters together.

    Raises:
        ValueError: If a share is out of range, a pattern matches nothing that is selected, or k is not enough.
    """
    sizes = {name: shape.numel() for name, shape in selection.shapes.items()}
    if isinstance(min_keep, Mapping):
        selected = [candidate for candidate in candidates_of(model) if candidate.name in sizes]
        shares = dict.fromkeys(sizes, Fraction(0))
        for pattern, share in zip(as_patterns("min_keep", min_keep), min_keep.values(), strict=True):
            hits = [candidate.name for candidate in selected if matches(pattern, candidate)]
            if not hits:
                shown = ", ".join(list(sizes)[:6]) + (", ..." if len(sizes) > 6 else "")
                raise ValueError(f"min_keep pattern {pattern!r} matches nothing that is pruned ({shown})")
            shares |= {name: max(shares[name], _checked_share(share, pattern)) for name in hits}
    else:
        shares = dict.fromkeys(sizes, _checked_share(min_keep))
    floors = {name: math.ceil(shares[name] * size) for name, size in sizes.items()}
    if sum(floors.values()) > keep:
        raise ValueError(
            f"min_keep={min_keep} keeps at least {sum(floors.values())} of {selection.total} weights, but the sparsity "
            f"only {keep}; lower one of them"
        )
    return {name: least for name, least in floors.items() if least}


def _checked_share(share: Any, pattern: str = "") -> Fraction:
    if not is_number(share) or not 0 <= share <= 1:
        raise ValueError(f"min_keep must lie in [0, 1], got {share!r}{f' for {pattern!r}' if pattern else ''}")
    return Fraction(str(share))  # 0.07 of 100 weights are 7, and not the 8 that floating point would round up to


def _check_parametrized(
    model: nn.Module, candidates: Sequence[Candidate], targets: Sequence[str], ignore: Sequence[str]
) -> None:
    """Refuse modules whose weight is computed from other parameters: zeros in those are none in it, or too few.

    Raises:
        ValueError: If one is selected by a class or by its own name.
    """
    for name, module in model.named_modules():
        for tensor, (parts, remedy) in computed_tensors(module).items():
            sources = [candidate for candidate in candidates if any(p is candidate.parameter for p in parts)]
            own = Candidate(name, nn.Parameter(), (), ((name, module),), around(model, [name]))
            taken = any(matches(pattern, own) for pattern in targets)
            left = all(any(matches(pattern, source) for pattern in ignore) for source in sources)
            left = left or any(matches(pattern, own) for pattern in ignore)
            if taken and not left and getattr(module, tensor).ndim > 1:
                raise ValueError(
                    f"{tensor!r} of {name or 'the model'!r} is computed from other parameters (weight norm, spectral "
                    "norm, a pruning mask or another parametrisation), and zeros in these are not its own: fold it in "
                    f"by {remedy}, or leave it out by ignore={[name] if name else [source.name for source in sources]}"
                )
