"""Pruning methods, one file each: a frozen config whose ``solve`` maps a problem to a solution."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Protocol

import torch

from swap_prune.methods.cbs import CBS
from swap_prune.methods.chita import CHITA
from swap_prune.methods.ewr import EWR
from swap_prune.methods.lr import LR
from swap_prune.methods.magnitude import Magnitude
from swap_prune.methods.obd import OBD
from swap_prune.methods.sparsegpt import SparseGPT
from swap_prune.methods.wanda import Wanda
from swap_prune.methods.woodfisher import WoodFisher
from swap_prune.problem import PruningProblem, PruningSolution

__all__ = [
    "CBS",
    "CHITA",
    "EWR",
    "LR",
    "METHODS",
    "OBD",
    "Magnitude",
    "Method",
    "SparseGPT",
    "Wanda",
    "WoodFisher",
    "resolve_method",
    "takes_gradients",
]


class Method(Protocol):
    """What the pipeline asks of a method."""

    name: ClassVar[str]
    needs_gradients: ClassVar[bool]
    needs_inputs: ClassVar[bool]

    @property
    def needs_held_out(self) -> bool:
        """Whether it chooses by the loss on held-out samples."""
        ...

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Choose exactly k weights and their values."""
        ...


METHODS: dict[str, type[Method]] = {
    method.name: method for method in (EWR, LR, Magnitude, OBD, WoodFisher, CBS, CHITA, Wanda, SparseGPT)
}

_MEMBERS = ("name", "needs_gradients", "needs_inputs", "needs_held_out")


def resolve_method(method: str | Method, settings: dict[str, Any] | None = None) -> Method:
    """Return the config object of a method given by name or by itself.

    Args:
        method: A name in ``METHODS``, or a config object.
        settings: Fields of the config, for a method given by name.

    Raises:
        ValueError: If the name or a setting is not known, or a value is refused.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        known = {f.name for f in fields(METHODS[method])}  # type: ignore[arg-type]
        for name in settings or {}:
            if name not in known:
                has = ", ".join(sorted(known)) or "none"
                raise ValueError(f"method {method!r} has no setting {name!r}; it has: {has}")
        return METHODS[method](**(settings or {}))
    if settings:
        raise ValueError("settings go with a method given by name, got a config object as well")
    if isinstance(method, type) or not callable(getattr(method, "solve", None)):
        raise ValueError(
            f"method must be one of {', '.join(METHODS)} or a config object such as swap_prune.EWR(), got {method!r}"
        )
    missing = [member for member in _MEMBERS if not hasattr(method, member)]
    if missing:
        raise ValueError(f"method {type(method).__name__} has no {', '.join(missing)}; see swap_prune.methods.Method")
    if not is_dataclass(method):
        raise ValueError(f"method {type(method).__name__} must be a dataclass: the report states its fields")
    return method


def takes_gradients(method: Any) -> bool:
    """Whether what was asked for as a method takes gradients, as far as can be told before it is checked."""
    known = METHODS.get(method) if isinstance(method, str) else method
    return bool(getattr(known, "needs_gradients", True))
