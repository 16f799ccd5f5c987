"""Which noise a run defends itself against: that of gradients, labels and inputs, together or each alone."""

from __future__ import annotations

__all__ = ["DEFENCES", "parse_defence"]

DEFENCES = ("gradients", "labels", "inputs")


def parse_defence(defence: str | None) -> frozenset[str]:
    """Return the defences that are asked for.

    Args:
        defence: ``"auto"`` for all of ``DEFENCES``, None or ``"none"`` for none of them, or some, joined with ``+``.

    Raises:
        ValueError: If it is none of these.
    """
    if defence == "auto":
        return frozenset(DEFENCES)
    if defence is None or defence == "none":
        return frozenset()
    parts = defence.split("+") if isinstance(defence, str) else []
    if not parts or not set(parts) <= set(DEFENCES):
        raise ValueError(
            f"defence must be 'auto', 'none' or None, or some of {', '.join(DEFENCES)}, joined with +, got {defence!r}"
        )
    return frozenset(parts)
