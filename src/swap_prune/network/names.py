"""Names of a network's tensors, inside and outside of the wrappers that put something before them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

__all__ = ["renamed"]

_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_T = TypeVar("_T")


def renamed(held: Mapping[str, _T], names: Collection[str]) -> dict[str, _T]:
    """Return what is held by name, by the names that a network has, where one of the two was wrapped.

    Args:
        held: Anything, by names of tensors.
        names: Of the network's tensors.
    """
    if held.keys() & set(names):
        return dict(held)
    there, here = _wrapping(held.keys()), _wrapping(names)
    return {here + name.removeprefix(there): value for name, value in held.items()}


def _wrapping(names: Collection[str]) -> str:
    """Return what wrappers have put before all names."""
    prefix = ""
    while names:
        outer = [known for known in _WRAPPERS if all(name.startswith(prefix + known) for name in names)]
        if not outer:
            break
        prefix += outer[0]
    return prefix
