"""Which noise a run defends itself against: that of gradients, labels and inputs, together or each alone."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["DEFENCES", "FIXED_DEFENCES", "MEANS", "name_of", "parse_defence"]

DEFENCES = ("gradients", "labels", "inputs")
FIXED_DEFENCES = ("low-rank", "winsorise", "clip", "trimmed-mean", "median-of-means")  # in place of ``gradients``
MEANS = ("trimmed-mean", "median-of-means")  # of gradients that are held together


def parse_defence(defence: str | None) -> frozenset[str]:
    """Return the defences that are asked for.

    Args:
        defence: ``"auto"`` for all of ``DEFENCES``, None or ``"none"`` for none of them, or some, joined with ``+``.
            ``FIXED_DEFENCES`` do one thing to the gradients of all layers, where ``"gradients"`` looks and chooses.

    Raises:
        ValueError: If it is none of these.
    """
    if defence == "auto":
        return frozenset(DEFENCES)
    if defence is None or defence == "none":
        return frozenset()
    parts = defence.split("+") if isinstance(defence, str) else []
    if not parts or not set(parts) <= {*DEFENCES, *FIXED_DEFENCES}:
        raise ValueError(
            f"defence must be 'auto', 'none' or None, or some of {', '.join((*DEFENCES, *FIXED_DEFENCES))}, joined "
            f"with +, got {defence!r}"
        )
    if "gradients" in parts and not set(parts).isdisjoint(FIXED_DEFENCES):
        fixed = ", ".join(name for name in FIXED_DEFENCES if name in parts)
        raise ValueError(f"defence takes 'gradients', which chooses by itself, or {fixed}, not both, got {defence!r}")
    if set(MEANS) <= set(parts):
        raise ValueError(f"defence must have one of {' and '.join(MEANS)}, got {defence!r}")
    return frozenset(parts)


def name_of(defences: Collection[str]) -> str:
    """Return the one text that stands for some defences."""
    asked = [name for name in (*DEFENCES, *FIXED_DEFENCES) if name in defences]
    return "auto" if asked == list(DEFENCES) else "+".join(asked) or "none"
