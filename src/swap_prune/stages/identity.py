"""The fingerprint of a run: all that its result depends on, so that it can go on where it was interrupted.

Place in the pipeline: what a checkpoint compares.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import json
import platform
import re
from dataclasses import fields, is_dataclass
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from swap_prune.artifact import weights_sha256
from swap_prune.report import versions
from swap_prune.request import Request
from swap_prune.samples.numbered import NumberedSamples, known_length
from swap_prune.stages.checkpoint import SAMPLES_OPEN

__all__ = ["described", "identity"]

_PLAIN = (bool, int, float, complex, str, bytes, type(...))
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def identity(
    model: nn.Module,
    request: Request,
    data: Any,
    recalibration_data: Any,
    storage: dict[str, Any] | None,
    place: torch.device,
) -> dict[str, Any]:
    """Return all that the result of a run depends on, as JSON has it; of data only what can be told without reading.

    Args:
        model: The network, not pruned yet.
        request: What is asked for.
        data: Calibration data.
        recalibration_data: Data for BatchNorm and fine-tuning, or None.
        storage: How G is held, as the report has it.
        place: Where it takes place.
    """
    own = {
        "seed": request.seed,
        "storage": storage,
        SAMPLES_OPEN: request.fewer,
        "loss": described(request.loss),
        "weights": weights_sha256(model),
        "data": _described_data(data),
        "recalibration_data": None if recalibration_data is None else _described_data(recalibration_data),
        "device": place.type,
        "versions": versions() | {"python": ".".join(platform.python_version_tuple()[:2])},  # digests of code change
    }
    text = json.dumps(request.settings | own, default=lambda odd: type(odd).__qualname__)
    plain: dict[str, Any] = json.loads(_ADDRESS.sub("", text))  # what Python prints of an object differs each time
    return plain


def _described_data(data: Any) -> str:
    """Say what samples there are: how many, where they have numbers."""
    numbered = NumberedSamples.of(data)
    if numbered is None:
        return type(data).__qualname__
    return f"{type(numbered.dataset).__qualname__} of {known_length(numbered.dataset)} samples"


def described(thing: Any, outer: tuple[Any, ...] = (), known: dict[int, str] | None = None) -> str:
    """Say what a loss is: its settings, or a digest of its code and of what that reads.

    Settings are those of dataclasses and of ``functools.partial``. Anything else that could change while a run goes on,
    such as a list, a tensor, or what an object remembers, counts by its type alone.

    Args:
        thing: The loss, or a part of it.
        outer: What it is a part of.
        known: Functions that were read already, by ``id``: those that call each other would be read ever again.
    """
    if thing is None or isinstance(thing, _PLAIN):
        return repr(thing)
    known = {} if known is None else known
    inner, kind = functools.partial(described, outer=(*outer, thing), known=known), type(thing).__qualname__
    if any(thing is one for one in outer):
        return kind
    if isinstance(thing, tuple | frozenset):
        parts = map(inner, thing)
        return f"({', '.join(parts if isinstance(thing, tuple) else sorted(parts))})"
    if isinstance(thing, functools.partial):
        given = [*map(inner, thing.args), *(f"{name}={inner(value)}" for name, value in thing.keywords.items())]
        return f"{inner(thing.func)}({', '.join(given)})"
    if isinstance(thing, MethodType):
        return f"{inner(thing.__func__)} of {inner(thing.__self__)}"
    if isinstance(thing, FunctionType):
        if id(thing) not in known:
            digest = hashlib.sha256(inner(_read_by(thing)).encode()).hexdigest()[:16]
            known[id(thing)] = f"{thing.__qualname__} {digest}"
        return known[id(thing)]
    if is_dataclass(thing) and not isinstance(thing, type):
        return f"{kind}({', '.join(f'{field.name}={inner(getattr(thing, field.name))}' for field in fields(thing))})"
    return str(getattr(thing, "__qualname__", kind))


def _read_by(function: FunctionType) -> tuple[Any, ...]:
    """Return what a function does, and the values that it reads beside its arguments and does not overwrite."""
    code, own = function.__code__, function.__globals__
    written = {step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_DEREF", "STORE_GLOBAL")}
    names = sorted(_names_in(code) - written)
    around = tuple((n, own[n]) for n in names if n in own and isinstance(own[n], (FunctionType, *_PLAIN)))
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    held = tuple((name, *_content(cell)) for name, cell in cells if name not in written)
    return _code(code), function.__defaults__, tuple(sorted((function.__kwdefaults__ or {}).items())), around, held


def _names_in(code: CodeType) -> set[str]:
    """Return the names that code has, those of the functions that are written in it included."""
    inner = (_names_in(one) for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(*inner)


def _content(cell: CellType) -> tuple[Any, ...]:
    """Return what a cell of a closure holds, if anything."""
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty
        return ()


def _code(code: CodeType) -> tuple[Any, ...]:
    """Return what code does, and not where it is written."""
    constants = tuple(_code(one) if isinstance(one, CodeType) else one for one in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants
