"""What makes a run this one and no other, so that it can go on where it was interrupted.

Place in the pipeline: what a checkpoint compares.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from dataclasses import fields, is_dataclass
from operator import itemgetter
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.artifact import tensor_digest, weights_sha256
from swap_prune.report import versions
from swap_prune.request import Run
from swap_prune.samples.numbered import NumberedSamples, known_length

__all__ = ["identity"]

_PLAIN = (bool, int, float, complex, str, bytes, type(...))
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def identity(
    model: nn.Module,
    run: Run,
    data: Any,
    recalibration_data: Any,
    storage: dict[str, Any] | None,
    place: torch.device,
) -> dict[str, Any]:
    """Return all that the result of a run depends on, as JSON has it; of data only what can be told without reading.

    Args:
        model: The network, not pruned yet.
        run: What is asked for.
        data: Calibration data.
        recalibration_data: Data for BatchNorm and fine-tuning, or None.
        storage: How G is held, as the report has it.
        place: Where it takes place.
    """
    own = {
        "seed": run.seed,
        "storage": storage,
        "loss": _described(run.loss),
        "weights": weights_sha256(model),
        "data": _described_data(data),
        "recalibration_data": None if recalibration_data is None else _described_data(recalibration_data),
        "device": place.type,
        "versions": {name: version for name, version in versions().items() if name != "python"},
    }
    text = json.dumps(run.settings | own, default=lambda odd: type(odd).__qualname__)
    plain: dict[str, Any] = json.loads(_ADDRESS.sub("", text))  # what Python prints of an object differs each time
    return plain


def _described_data(data: Any) -> str:
    """Say what samples there are: how many, where they have numbers."""
    numbered = NumberedSamples.of(data)
    if numbered is None:
        return type(data).__qualname__
    return f"{type(numbered.dataset).__qualname__} of {known_length(numbered.dataset)} samples"


def _described(thing: Any, outer: tuple[Any, ...] = ()) -> str:
    """Say what a loss is: its settings, or a digest of its code and of what that reads.

    What may change while a run goes on, such as a list, counts by its type alone.

    Args:
        thing: The loss, or a part of it.
        outer: What it is a part of.
    """
    if thing is None or isinstance(thing, _PLAIN):
        return repr(thing)
    if any(thing is one for one in outer) or isinstance(thing, type):
        return str(getattr(thing, "__qualname__", type(thing).__qualname__))
    inner = functools.partial(_described, outer=(*outer, thing))
    if isinstance(thing, tuple | frozenset):
        described = map(inner, thing)
        return f"({', '.join(described if isinstance(thing, tuple) else sorted(described))})"
    if isinstance(thing, Tensor) and thing.layout is torch.strided:
        return f"tensor {tensor_digest(thing, hashlib.sha256()).hexdigest()[:16]}"
    if isinstance(thing, functools.partial):
        parts = [*map(inner, thing.args), *(f"{name}={inner(value)}" for name, value in thing.keywords.items())]
        return f"{inner(thing.func)}({', '.join(parts)})"
    if isinstance(thing, MethodType):
        return f"{inner(thing.__func__)} of {inner(thing.__self__)}"
    if isinstance(thing, FunctionType):
        return f"{thing.__qualname__} {hashlib.sha256(inner(_read_by(thing)).encode()).hexdigest()[:16]}"
    names = [field.name for field in fields(thing)] if is_dataclass(thing) else sorted(getattr(thing, "__dict__", {}))
    settings = [f"{name}={inner(getattr(thing, name))}" for name in names]
    return f"{getattr(thing, '__qualname__', type(thing).__qualname__)}({', '.join(settings)})"


def _read_by(function: FunctionType) -> tuple[Any, ...]:
    """Return what a function does, and the values that it reads beside its arguments."""
    names = inspect.getclosurevars(function)
    own = {name: value for name, value in names.globals.items() if isinstance(value, (FunctionType, *_PLAIN))}
    keywords = function.__kwdefaults__ or {}
    values = [tuple(sorted(held.items(), key=itemgetter(0))) for held in (names.nonlocals, own, keywords)]
    return _code(function.__code__), function.__defaults__, *values


def _code(code: CodeType) -> tuple[Any, ...]:
    """Return what code does, and not where it is written."""
    constants = tuple(_code(one) if isinstance(one, CodeType) else one for one in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants
