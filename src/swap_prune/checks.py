"""Checks of single arguments, in one wording."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = [
    "checked_seed",
    "counted",
    "first_line",
    "is_finite",
    "is_number",
    "positive_number",
    "some_of",
    "true_or_false",
    "user_path",
    "whole_number",
]


def is_number(value: object) -> bool:
    """Whether a value is a real number, of NumPy or not, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether a value is a real number that a float can hold."""
    try:
        return is_number(value) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # of a whole number
        return False


def positive_number(name: str, value: Any) -> None:
    """Check a number above 0.

    Args:
        name: What the number is, for the message.
        value: What was given.

    Raises:
        ValueError: If it is none.
    """
    if not (is_finite(value) and value > 0):
        raise ValueError(f"{name} must be a number above 0, got {value!r}")


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number, which NumPy's are as well.

    Args:
        name: What the number is, for the message.
        value: What was given.
        least: The smallest that is allowed.

    Raises:
        ValueError: If it is none, smaller, or as large as no machine counts.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if number >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got a number of {number.bit_length()} bits")
    return number


def true_or_false(name: str, value: Any) -> None:
    """Refuse what is neither.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def checked_seed(seed: Any) -> int:
    """Return a seed that torch's generators take.

    Raises:
        ValueError: If it is not a whole number in [0, 2**63).
    """
    return whole_number("seed", seed, 0)


def user_path(path: str | Path) -> Path:
    """Return a path with a leading ``~`` or ``~name`` replaced by that home directory.

    Raises:
        ValueError: If it is no path, or none in UTF-8, or there is no such home directory.
    """
    if not isinstance(path, str | Path) or path == "":
        raise ValueError(f"a path must be a pathlib.Path or a string that is not empty, got {path!r}")
    try:
        found = Path(path).expanduser()
        str(found).encode()
    except RuntimeError as error:
        raise ValueError(f"{path} names a home directory that is not known; write the path in full") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{str(path)!r} is a path that is not UTF-8: choose another") from error
    return found


def first_line(error: BaseException, *, typed: bool = False) -> str:
    """Return the first line of what an error says, or its type where it says nothing.

    Args:
        error: The error.
        typed: Whether its type comes first in any case.
    """
    text, name = str(error).strip(), type(error).__name__
    line = text.splitlines()[0] if text else name
    return f"{name}: {line}" if typed and text else line


def some_of(names: Iterable[str]) -> str:
    """Return the first three of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def counted(number: int, noun: str) -> str:
    """Return a number of things: ``1 run``, ``2 runs``."""
    return f"{number} {noun}{'s' * (number != 1)}"
