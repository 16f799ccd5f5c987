"""What a noise model is: three hooks along the way from calibration samples to the Fisher factor.

    samples --corrupt--> samples;  weights --disturb--> weights;  both --capture--> G --apply--> G

A model overrides the hooks that its physics needs; the others change nothing. Models compose in a
:class:`NoiseChain`: each hook passes from model to model, in the order given.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swap_prune.checks import is_finite, is_number
from swap_prune.fisher.factor import DenseFactor
from swap_prune.losses import LossFn

__all__ = ["Layers", "NoiseChain", "NoiseModel", "RowsOnly", "check_choice", "check_number"]

Layers = Mapping[str, slice]  # parameter name to its columns of G


class NoiseModel:
    """Base class; a noise model is a frozen dataclass whose fields are its settings.

    All random numbers come from ``generator`` (CPU), which is the noise's own: see ``randomness.py``.
    """

    def corrupt(self, batches: list[Any], generator: torch.Generator, model: nn.Module, loss_fn: LossFn) -> list[Any]:
        """Return the samples that the program gets to see; those given are left as they are.

        Args:
            batches: Calibration or held-out batches on the model's device, at least one.
            generator: Random state.
            model: The network at the stage's weights, for attacks; it must not be changed.
            loss_fn: Per-sample loss, ``(model, batch) -> (n,)``.
        """
        return batches

    def disturb(self, weights: Tensor, generator: torch.Generator, layers: Layers) -> Tensor:
        """Return the weights (p,) that gradients are taken at; those given are left as they are.

        The pipeline asks for the capture of a stage, and again for every slope.
        """
        return weights

    def apply(self, factor: DenseFactor, generator: torch.Generator, layers: Layers | None = None) -> DenseFactor:
        """Return the factor of the noisy rows; the one given is left as it is."""
        return factor

    def apply_(self, factor: DenseFactor, generator: torch.Generator, layers: Layers | None = None) -> DenseFactor:
        """Return the factor of the noisy rows; the caller gives up its own, whose memory may be used again.

        The pipeline calls this one, on G and on the gradients that a slope is the mean of. Override it where ``apply``
        can do without a second copy of them.
        """
        return self.apply(factor, generator, layers)

    def settings(self) -> Any:
        """Return what the report records: the class and its fields, as plain types."""
        return {"model": type(self).__name__, **_settings_of(self)}


class _RowModel(Protocol):
    def apply(self, factor: DenseFactor, generator: torch.Generator) -> DenseFactor: ...


@dataclass(frozen=True)
class RowsOnly(NoiseModel):
    """A user's object that has ``apply(factor, generator)`` and need not know this module.

    Attributes:
        wrapped: The object.
    """

    wrapped: _RowModel

    def apply(self, factor: DenseFactor, generator: torch.Generator, layers: Layers | None = None) -> DenseFactor:
        """Return what the object makes of the factor."""
        return self.wrapped.apply(factor, generator)

    def settings(self) -> Any:
        """Return the object's class and fields."""
        return {"model": type(self.wrapped).__name__, **_settings_of(self.wrapped)}


@dataclass(frozen=True)
class NoiseChain(NoiseModel):
    """Noise models one after the other; without any, no noise.

    Attributes:
        models: The models in order.
    """

    models: tuple[NoiseModel, ...] = ()

    @property
    def acts_on_rows(self) -> bool:
        """Whether a model changes the rows of G."""
        hooks = [(type(noise).apply, type(noise).apply_) for noise in self.models]
        return any(hook != (NoiseModel.apply, NoiseModel.apply_) for hook in hooks)

    def corrupt(self, batches: list[Any], generator: torch.Generator, model: nn.Module, loss_fn: LossFn) -> list[Any]:
        """Pass the samples from model to model; no samples stay no samples."""
        for noise in self.models if batches else ():
            batches = noise.corrupt(batches, generator, model, loss_fn)
            if not isinstance(batches, list) or not batches:
                raise ValueError(f"corrupt of {_name_of(noise)} must return a list of batches, got {batches!r:.60}")
        return batches

    def disturb(self, weights: Tensor, generator: torch.Generator, layers: Layers) -> Tensor:
        """Pass the weights from model to model."""
        for noise in self.models:
            found = noise.disturb(weights, generator, layers)
            _check_alike(f"disturb of {_name_of(noise)} must return weights", found, found, weights)
            weights = found
        return weights

    def apply(self, factor: DenseFactor, generator: torch.Generator, layers: Layers | None = None) -> DenseFactor:
        """Pass the factor from model to model."""
        for noise in self.models:
            factor = _checked(noise, noise.apply(factor, generator, layers), factor)
        return factor

    def apply_(self, factor: DenseFactor, generator: torch.Generator, layers: Layers | None = None) -> DenseFactor:
        """Pass the factor from model to model, in its own memory where they can."""
        for noise in self.models:
            factor = _checked(noise, noise.apply_(factor, generator, layers), factor)
        return factor

    def settings(self) -> Any:
        """Return None, the one model's settings, or a list of the models'."""
        recorded = [noise.settings() for noise in self.models]
        return recorded if len(recorded) > 1 else next(iter(recorded), None)


def _checked(noise: NoiseModel, found: Any, given: DenseFactor) -> DenseFactor:
    """Return the noisy factor.

    Raises:
        ValueError: If it is not as large as the one given, or of another dtype.
    """
    matrix = found.matrix if isinstance(found, DenseFactor) else None
    _check_alike(f"apply of {_name_of(noise)} must return a DenseFactor of rows", found, matrix, given.matrix)
    checked: DenseFactor = found
    return checked


def _check_alike(rule: str, found: object, tensor: object, given: Tensor) -> None:
    """Refuse what a model returns if its tensor is none, or not as large as the one given and of its dtype.

    Raises:
        ValueError: Which begins with the rule.
    """
    if isinstance(tensor, Tensor) and (tensor.shape, tensor.dtype) == (given.shape, given.dtype):
        return
    got = f"{tuple(tensor.shape)}, {tensor.dtype}" if isinstance(tensor, Tensor) else f"a {type(found).__name__}"
    raise ValueError(f"{rule} {tuple(given.shape)}, {given.dtype}, got {got}")


def _name_of(noise: NoiseModel) -> str:
    return type(noise.wrapped if isinstance(noise, RowsOnly) else noise).__name__


def check_number(setting: str, value: Any, least: float, most: float = math.inf, *, whole: bool = False) -> None:
    """Check one setting of a noise model.

    Raises:
        ValueError: If it is not a finite number (a whole one, where asked for) of at least ``least`` and at
            most ``most``.
    """
    fits = isinstance(value, numbers.Integral) if whole else True
    if not (is_finite(value) and fits and least <= value <= most):
        what = "a whole number" if whole else "a finite number"
        bounds = f"of at least {least:g}" if most == math.inf else f"in [{least:g}, {most:g}]"
        raise ValueError(f"noise setting {setting} must be {what} {bounds}, got {value!r}")


def check_choice(setting: str, value: object, choices: Collection[str]) -> None:
    """Check one setting of a noise model that is a word.

    Raises:
        ValueError: If it is none of the choices.
    """
    if value not in choices:
        raise ValueError(f"noise setting {setting} must be one of {', '.join(choices)}, got {value!r}")


def _settings_of(noise: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, or the attributes of another object, as plain types."""
    named = {f.name: getattr(noise, f.name) for f in fields(noise)} if is_dataclass(noise) else {}
    return {name: _plain(value) for name, value in (named | getattr(noise, "__dict__", {})).items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_number(value):  # NumPy's
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [_plain(part) for part in value]
    return repr(value)
