"""What a module was called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["layer_input"]


def layer_input(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """Return what a layer was called with, by place or by name."""
    given: Tensor = arguments[0] if arguments else named["input"]
    return given
