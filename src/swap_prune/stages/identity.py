"""What makes a run this one and no other, so that it can go on where it was interrupted.

Place in the pipeline: what a checkpoint compares.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from swap_prune.artifact import weights_sha256
from swap_prune.report import versions
from swap_prune.request import Run
from swap_prune.samples.numbered import NumberedSamples, known_length

__all__ = ["identity"]

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


def _described(loss: Any) -> str:
    """Say which loss it is: its settings, or a digest of its code."""
    if isinstance(loss, functools.partial):
        parts = [*map(repr, loss.args), *(f"{name}={value!r}" for name, value in loss.keywords.items())]
        return f"{_described(loss.func)}({', '.join(parts)})"
    if isinstance(loss, FunctionType):
        code = loss.__code__.co_code + _ADDRESS.sub("", repr(loss.__code__.co_consts)).encode()
        return f"{loss.__qualname__} {hashlib.sha256(code).hexdigest()[:16]}"
    if is_dataclass(loss):
        settings = ", ".join(f"{field.name}={getattr(loss, field.name)!r}" for field in fields(loss))
        return f"{type(loss).__qualname__}({settings})"
    return str(getattr(loss, "__qualname__", type(loss).__qualname__))
