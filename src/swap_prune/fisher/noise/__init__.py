"""Noise models: what makes gradients inaccurate, to measure how a method bears it. Off by default.

``parse_noise("input:kind=blur+gradient:std=4,fraction=0.25")`` makes a chain of models from text. The models:
noise on gradients (``rows``), on inputs and labels (``data``), in analog memory (``analog``), and adversaries
(``adversarial``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from swap_prune.fisher.noise.adversarial import AdversarialInputs, PoisonedRows
from swap_prune.fisher.noise.analog import AnalogMemory
from swap_prune.fisher.noise.base import NoiseChain, NoiseModel, RowsOnly
from swap_prune.fisher.noise.data import InputNoise, LabelNoise
from swap_prune.fisher.noise.rows import GradientNoise

__all__ = [
    "NOISE_MODELS",
    "AdversarialInputs",
    "AnalogMemory",
    "GradientNoise",
    "InputNoise",
    "LabelNoise",
    "NoiseChain",
    "NoiseModel",
    "PoisonedRows",
    "parse_noise",
]

NOISE_MODELS: dict[str, type[Any]] = {
    "gradient": GradientNoise,
    "input": InputNoise,
    "labels": LabelNoise,
    "analog": AnalogMemory,
    "adversarial": AdversarialInputs,
    "poison": PoisonedRows,
}

_JOIN = re.compile(r"\+(?![\d.])")  # a + before a digit belongs to a number such as 1e+3


def parse_noise(noise: Any) -> NoiseChain:
    """Make a chain of noise models.

    Args:
        noise: Text such as ``"gradient"`` or ``"gradient:std=4,fraction=0.25"``, several joined with ``+``; a noise
            model; any object with ``apply(factor, generator)``; a list of these; or None or ``"none"``.

    Returns:
        The chain, empty for None.

    Raises:
        ValueError: If the name, a setting or a value is not understood.
    """
    if noise is None or noise == "none":
        return NoiseChain()
    if isinstance(noise, str):
        return NoiseChain(tuple(_wrap(_parse_one(spec.strip())) for spec in _JOIN.split(noise)))
    if isinstance(noise, NoiseChain):
        return noise
    if isinstance(noise, Sequence):
        return NoiseChain(tuple(model for part in noise for model in parse_noise(part).models))
    if isinstance(noise, type) or not callable(getattr(noise, "apply", None)):
        raise ValueError(
            f"noise must be text ({', '.join(NOISE_MODELS)}), an object with apply(factor, generator), or a list of "
            f"these, got {noise!r}"
        )
    return NoiseChain((_wrap(noise),))


def _wrap(model: Any) -> NoiseModel:
    return model if isinstance(model, NoiseModel) else RowsOnly(model)


def _parse_one(spec: str) -> Any:
    name, _, rest = spec.partition(":")
    if name not in NOISE_MODELS:
        raise ValueError(f"noise must be one of {', '.join(NOISE_MODELS)}, got {name!r} in {spec!r}")
    known = {field.name: field for field in fields(NOISE_MODELS[name])}
    settings: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known:
            raise ValueError(f"noise {name!r} has no setting {key!r}; it has {', '.join(sorted(known))}")
        if key in settings:
            raise ValueError(f"noise {name!r} must have each setting once, got {key!r} twice in {spec!r}")
        settings[key] = _parse_value(known[key], value)
    missing = [key for key, field in known.items() if key not in settings and _default(field) is MISSING]
    if missing:
        raise ValueError(f"noise {name!r} needs {', '.join(missing)}, got {spec!r}")
    return NOISE_MODELS[name](**settings)


def _parse_value(field: Field[Any], text: str) -> Any:
    """Read a value as what the default is; without one, as a number."""
    default = _default(field)
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"noise setting {field.name!r} must be true or false, got {text!r}")
        return text.lower() == "true"
    whole = isinstance(default, int)
    try:
        return int(text) if whole else float(text)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"noise setting {field.name!r} must be {kind}, got {text!r}") from None


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
