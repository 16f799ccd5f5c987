"""What a module is called with, and which way round its weight lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["is_turned", "layer_input"]


def layer_input(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """Return what a layer was called with, by place or by name."""
    given: Tensor = arguments[0] if arguments else named["input"]
    return given


def is_turned(module: nn.Module) -> bool:
    """Whether a module is a ``Conv1D`` of transformers: a linear layer whose weight is (inputs, outputs)."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.ndim == 2
