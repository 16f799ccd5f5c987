r"""Which parameters are pruned, and the one vector ``w`` (p,) that stands for them.

What a run settles first. Patterns are class names (``"Linear"``), parameter or module names (``"fc1.weight"``,
``"encoder"``) or regular expressions (``"re:layer[12]\..*"``, matched against the whole parameter or module name). A
module that is named, or whose class is, stands for all that lies in it. A parameter that several modules share is
selected once, and its pruning acts wherever it is used.
"""

from __future__ import annotations

import math
import re
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
from swap_prune.network.device import check_module

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


@dataclass(frozen=True)
class _Candidate:
    """One parameter under every name that it has."""

    name: str
    parameter: nn.Parameter
    aliases: tuple[str, ...]
    owners: tuple[tuple[str, nn.Module], ...]  # modules that hold it directly: (module name, module)
    around: tuple[tuple[str, nn.Module], ...]  # those, and all that these lie in

    @property
    def is_looked_up(self) -> bool:
        """Whether it is an embedding's: rows are taken from it, and it is not multiplied with."""
        return isinstance(self.owners[0][1], nn.Embedding | nn.EmbeddingBag)


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
    targets, ignore = _as_patterns("targets", targets), _as_patterns("ignore", ignore)
    candidates = _collect(model)
    may_miss = DEFAULT_TARGETS if set(DEFAULT_TARGETS) <= set(targets) else ()
    chosen: set[str] = set()
    for pattern in targets:
        hits = {c.name for c in candidates if _matches(pattern, c) and _prunable(pattern, c)}
        if not hits and pattern not in may_miss:
            flat = sorted(c.name for c in candidates if _matches(pattern, c))
            raise ValueError(_unmatched("targets", pattern, model, flat))
        chosen |= hits
    for pattern in ignore:
        hits = {c.name for c in candidates if _matches(pattern, c)}
        if not hits:
            raise ValueError(_unmatched("ignore", pattern, model))
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


def _unnamed(model: nn.Module, names: Collection[str], ignore: Sequence[str]) -> Iterator[_Candidate]:
    """Yield weights of two dimensions and more that are neither named nor ignored."""
    for candidate in _collect(model):
        parameter = candidate.parameter
        weight = (
            not is_lazy(parameter)
            and parameter.is_floating_point()
            and parameter.ndim >= 2
            and candidate.name not in names
        )
        if weight and not any(_matches(pattern, candidate) for pattern in ignore):
            yield candidate


def _check_real(candidate: _Candidate) -> None:
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
        selected = [candidate for candidate in _collect(model) if candidate.name in sizes]
        shares = dict.fromkeys(sizes, Fraction(0))
        for pattern, share in zip(_as_patterns("min_keep", min_keep), min_keep.values(), strict=True):
            hits = [candidate.name for candidate in selected if _matches(pattern, candidate)]
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
    model: nn.Module, candidates: Sequence[_Candidate], targets: Sequence[str], ignore: Sequence[str]
) -> None:
    """Refuse modules whose weight is computed from other parameters: zeros in those are none in it, or too few.

    Raises:
        ValueError: If one is selected by a class or by its own name.
    """
    for name, module in model.named_modules():
        for tensor, (parts, remedy) in computed_tensors(module).items():
            sources = [candidate for candidate in candidates if any(p is candidate.parameter for p in parts)]
            own = _Candidate(name, nn.Parameter(), (), ((name, module),), _around(model, [name]))
            taken = any(_matches(pattern, own) for pattern in targets)
            left = all(any(_matches(pattern, source) for pattern in ignore) for source in sources)
            left = left or any(_matches(pattern, own) for pattern in ignore)
            if taken and not left and getattr(module, tensor).ndim > 1:
                raise ValueError(
                    f"{tensor!r} of {name or 'the model'!r} is computed from other parameters (weight norm, spectral "
                    "norm, a pruning mask or another parametrisation), and zeros in these are not its own: fold it in "
                    f"by {remedy}, or leave it out by ignore={[name] if name else [source.name for source in sources]}"
                )


def _as_patterns(parameter: str, patterns: Sequence[str] | Iterable[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        return (patterns,)
    if not isinstance(patterns, Iterable):
        raise ValueError(f"{parameter} must be a string or a sequence of strings, got {patterns!r}")
    result = tuple(patterns)
    for pattern in result:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"{parameter} must hold non-empty strings, got {pattern!r}")
    if parameter == "targets" and not result:
        raise ValueError("targets must name at least one class, module or parameter, got an empty sequence")
    return result


def _collect(model: nn.Module) -> list[_Candidate]:
    check_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a scripted or traced model cannot be pruned: prune the one that it was made of before")
    shared_out = [name for name, parameter in model.named_parameters() if type(parameter.data).__name__ == "DTensor"]
    if shared_out:
        raise ValueError(
            f"parameter {shared_out[0]!r} is a DTensor, of which each process holds a part (fully_shard): prune the "
            "network before it is shared out"
        )
    aliases: dict[int, list[str]] = {}
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(f"{module_name}.{name}" if module_name else name)
            owners.setdefault(id(parameter), []).append((module_name, module))
    return [
        _Candidate(
            name,
            parameter,
            tuple(aliases[id(parameter)]),
            tuple(owners[id(parameter)]),
            _around(model, [owner for owner, _ in owners[id(parameter)]]),
        )
        for name, parameter in model.named_parameters()
    ]


def _around(model: nn.Module, names: Iterable[str]) -> tuple[tuple[str, nn.Module], ...]:
    """Return modules, by their names, and all that they lie in."""
    found: dict[str, nn.Module] = {}
    for name in names:
        parts = name.split(".") if name else []
        found |= {path: model.get_submodule(path) for path in (".".join(parts[:i]) for i in range(len(parts) + 1))}
    return tuple(found.items())


def _matches(pattern: str, candidate: _Candidate) -> bool:
    modules = {name for name, _ in candidate.around if name}
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
        return any(expression.fullmatch(name) for name in (*candidate.aliases, *modules))
    if pattern in candidate.aliases or pattern in modules:
        return True
    return any(
        pattern in {c.__name__ for c in type(module).__mro__[:-1]} - {"Module"} for _, module in candidate.around
    )


def _prunable(pattern: str, candidate: _Candidate) -> bool:
    lazy = is_lazy(candidate.parameter)  # refused later, with a reason
    return pattern in candidate.aliases or lazy or candidate.parameter.ndim >= 2


def _unmatched(parameter: str, pattern: str, model: nn.Module, flat: Sequence[str] = ()) -> str:
    if flat:
        return (
            f"{parameter} pattern {pattern!r} matches no parameter of two dimensions: name others, such as {flat[0]!r}"
        )
    names = [name for name, _ in model.named_parameters()]
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return (
        f"{parameter} pattern {pattern!r} matches no prunable parameter of {type(model).__name__}; "
        f"use a class name, a module or parameter name, or 're:...' (parameters: {shown})"
    )
