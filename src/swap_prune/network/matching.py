r"""Which parameters of a network a pattern means, under all the names that they have.

Patterns are class names (``"Linear"``), parameter or module names (``"fc1.weight"``, ``"encoder"``) or regular
expressions (``"re:layer[12]\..*"``, matched against the whole parameter or module name). A module that is named, or
whose class is, stands for all that lies in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from swap_prune.checks import some_of
from swap_prune.network.device import check_module

__all__ = ["Candidate", "around", "as_patterns", "candidates_of", "is_prunable", "matches", "unmatched"]


@dataclass(frozen=True)
class Candidate:
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


def as_patterns(parameter: str, patterns: Sequence[str] | Iterable[str]) -> tuple[str, ...]:
    """Return patterns as a tuple; a text alone is one.

    Raises:
        ValueError: If they are none.
    """
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


def candidates_of(model: nn.Module) -> list[Candidate]:
    """Return the parameters of a network, each once.

    Raises:
        ValueError: If it is no network whose parameters can be pruned.
    """
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
        Candidate(
            name,
            parameter,
            tuple(aliases[id(parameter)]),
            tuple(owners[id(parameter)]),
            around(model, [owner for owner, _ in owners[id(parameter)]]),
        )
        for name, parameter in model.named_parameters()
    ]


def around(model: nn.Module, names: Iterable[str]) -> tuple[tuple[str, nn.Module], ...]:
    """Return modules, by their names, and all that they lie in."""
    found: dict[str, nn.Module] = {}
    for name in names:
        parts = name.split(".") if name else []
        found |= {path: model.get_submodule(path) for path in (".".join(parts[:i]) for i in range(len(parts) + 1))}
    return tuple(found.items())


def matches(pattern: str, candidate: Candidate) -> bool:
    """Whether a pattern means a parameter.

    Raises:
        ValueError: If it is a malformed regular expression.
    """
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


def is_prunable(pattern: str, candidate: Candidate) -> bool:
    """Whether a parameter is taken by a pattern that means it: one of a single dimension is only by its own name."""
    lazy = is_lazy(candidate.parameter)  # refused later, with a reason
    return pattern in candidate.aliases or lazy or candidate.parameter.ndim >= 2


def unmatched(parameter: str, pattern: str, model: nn.Module, flat: Sequence[str] = ()) -> str:
    """Say that a pattern of an argument means nothing; ``flat`` are parameters of one dimension that it does mean."""
    if flat:
        return (
            f"{parameter} pattern {pattern!r} matches no parameter of two dimensions: name others, such as {flat[0]!r}"
        )
    names = [name for name, _ in model.named_parameters()]
    holders = [(name, module) for name, module in model.named_modules() if [*module.parameters(recurse=False)]]
    classes = sorted({type(module).__name__ for _, module in holders})
    near = get_close_matches(pattern, [*classes, *names, *(name for name, _ in holders)], n=1)
    return (
        f"{parameter} pattern {pattern!r} matches no prunable parameter of {type(model).__name__}; "
        "use a class name, a module or parameter name, or 're:...'"
        f"{f'; did you mean {near[0]!r}?' if near else ''} (classes: {some_of(classes)}; parameters: {some_of(names)})"
    )
