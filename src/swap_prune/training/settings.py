"""The settings of a fine-tuning, checked, and read from text.

Place in the pipeline: before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from swap_prune.checks import is_number, whole_number
from swap_prune.losses import GaussNewtonLoss, LossFn

__all__ = ["OPTIMIZERS", "SCHEDULES", "FineTune", "parse_finetune"]

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], FineTune], Optimizer]] = {
    "sgd": lambda p, s: torch.optim.SGD(p, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay),
    "adam": lambda p, s: torch.optim.Adam(p, lr=s.lr, betas=(s.momentum, 0.999), weight_decay=s.weight_decay),
    "adamw": lambda p, s: torch.optim.AdamW(p, lr=s.lr, betas=(s.momentum, 0.999), weight_decay=s.weight_decay),
}

SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the training that is done -> factor of lr
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}

_DISTILLATION = 0.9  # share of the dense network's outputs, where there are any

_LARGEST = torch.finfo(torch.float32).max  # a step computes in it

_WHOLE = ("epochs", "batch_size", "steps_per_epoch")
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("above 0", lambda value: value > 0),
    "momentum": ("in [0, 1)", lambda value: 0 <= value < 1),
    "weight_decay": ("of at least 0", lambda value: value >= 0),
    "distillation": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "temperature": ("above 0", lambda value: value > 0),
}


@dataclass(frozen=True)
class FineTune:
    """Settings of a fine-tuning; in gradual pruning, of the one after each stage.

    Attributes:
        epochs: Passes over the data, >= 1.
        optimizer: ``sgd``, ``adam`` or ``adamw``. Each stage begins with a fresh one.
        lr: Learning rate at the beginning, > 0.
        momentum: Of SGD; for Adam its first beta. In [0, 1).
        weight_decay: As torch's optimiser of that name has it, >= 0, on all parameters.
        schedule: How the learning rate falls to zero over the epochs, step by step: ``cosine``, ``linear``; or
            ``constant``. Over data of unknown length it falls from epoch to epoch.
        batch_size: Samples a step, >= 1. Batches that the data brings are split where they hold more.
        distillation: Share of the divergence from the dense network's outputs in the loss, in [0, 1]; the task has the
            rest. ``"auto"``: 0.9 where there is a dense network to ask and the loss compares outputs, as the default
            one does, and is not the distance from it itself; else 0.
        temperature: That outputs are divided by before they are compared, > 0. A higher one lets every class count.
        steps_per_epoch: Steps of an epoch, at the most; None: a whole pass. Data that are read in order go on in the
            next epoch where they stopped; they need not come to an end then.
    """

    epochs: int = 2
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    batch_size: int = 128
    distillation: float | Literal["auto"] = "auto"
    temperature: float = 4.0
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        for name in _WHOLE:
            if (name, getattr(self, name)) != ("steps_per_epoch", None):
                object.__setattr__(self, name, whole_number(f"{name} of fine-tuning", getattr(self, name)))
        for name, (words, holds) in _NUMBERS.items():
            value = getattr(self, name)
            if name == "distillation" and value == "auto":
                continue
            if not (is_number(value) and holds(value) and value < _LARGEST):
                choice = "'auto' or " * (name == "distillation")
                raise ValueError(f"{name} of fine-tuning must be {choice}a finite number {words}, got {value!r}")
            object.__setattr__(self, name, float(value))
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            chosen = getattr(self, name)
            if not (isinstance(chosen, str) and chosen in known):
                raise ValueError(f"{name} of fine-tuning must be one of {', '.join(known)}, got {chosen!r}")

    def settings(self) -> dict[str, Any]:
        """Return those that are set, as plain types."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def arrays(self) -> int:
        """Arrays of the size of the parameters that a training holds: gradients and the optimiser's state."""
        return 3 if self.optimizer != "sgd" else 1 + (self.momentum > 0)

    def share_of_teacher(self, loss_fn: LossFn, *, known: bool) -> float:
        """Return the share of the dense network's outputs in a loss.

        Args:
            loss_fn: Per-sample loss.
            known: Whether there is a dense network to ask.

        Raises:
            ValueError: If a share was asked for and cannot be had.
        """
        compares = isinstance(loss_fn, GaussNewtonLoss)
        if self.distillation == "auto":
            itself = getattr(loss_fn, "stationary", False)  # the loss is the distance from the dense network
            return _DISTILLATION if known and compares and not itself else 0.0
        if self.distillation > 0 and not known:
            raise ValueError(f"distillation={self.distillation:g} needs the dense network to learn from: pass teacher=")
        if self.distillation > 0 and not compares:
            raise ValueError(
                f"distillation={self.distillation:g} needs a loss that compares outputs "
                f"(swap_prune.losses.GaussNewtonLoss), got {loss_fn!r}; use distillation=0"
            )
        return float(self.distillation)


def parse_finetune(spec: str | Mapping[str, Any]) -> FineTune:
    """Make settings from text such as ``"epochs=2,lr=0.01"``, or from a table of them.

    Raises:
        ValueError: If a setting is not known or its value is refused.
    """
    known = {field.name: field.default for field in fields(FineTune)}
    table: dict[str, Any] = {}
    for name, value in spec.items() if isinstance(spec, Mapping) else map(_parse_item, spec.split(",")):
        if name not in known:
            raise ValueError(f"fine-tuning has no setting {name!r}; it has {', '.join(known)}")
        if name in table:
            raise ValueError(f"fine-tuning must have each setting once, got {name!r} twice in {spec!r}")
        number = isinstance(spec, str) and name in (*_NUMBERS, *_WHOLE) and value != known[name]
        table[name] = _parse_number(name, value, whole=name in _WHOLE) if number else value
    return FineTune(**table)


def _parse_item(item: str) -> tuple[str, str]:
    name, separator, value = (part.strip() for part in item.partition("="))
    if not (separator and name and value):
        raise ValueError(f"fine-tuning needs name=value, joined with commas, got {item!r}")
    return name, value


def _parse_number(name: str, text: str, *, whole: bool) -> int | float:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise ValueError(f"{name} of fine-tuning must be a {'whole ' * whole}number, got {text!r}") from None
