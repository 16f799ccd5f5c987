"""What was found out in a stage beside the method's own evidence, for the report.

Place in the pipeline: each part of a stage returns what it has found; together they go into the stage's report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from swap_prune.checks import some_of

__all__ = ["STAGES_TRIED", "StageFindings", "check_names"]

STAGES_TRIED = "stages_tried"  # what the search for their number adds


@dataclass(frozen=True)
class StageFindings:
    """Findings of a stage; None, or False, of what was not found. docs/files.md says what a reader makes of them.

    Attributes:
        inputs_shifted_back: By how much inputs were moved back, in their own unit, for they seemed to be attacked.
        rows_reused: Name of the file that an earlier run has left G in.
        few_classes: How many classes the labels are of, how many there are, and how many labels: data in order?
        nothing_held_out: Whether no sample was left to choose settings by, for a method that does.
        one_sample_rules: Share of one sample in what losses have above their median.
        gradients_are_zero: Whether all of them are.
        gradients_are_rounding: Whether they are no more than that in the first stage, though not zero.
        without_gradient: Layers whose gradients are all zero in the first stage, where others' are not.
        rows_of_samples_left: Why rows of single samples were not compared with those of mini-batches after all.
        rows_clipped: Share of the rows that were scaled down.
        rows_left_out: Share of the rows that were overwritten, as their rank shows.
        noise_seen: Share of noise in the energy of the gradients.
        noise_left: Why rows that should be cleaned are not.
        label_noise: Share of labels that seem wrong.
        passes: Passes through the network that products with G took, and which way they went.
        gradients_cleaned: What was done to the gradients of each layer.
        finetune_loss: Mean training loss of each epoch.
        zeros_elsewhere: Weights that were not selected, whose zeros fine-tuning has kept.
        not_recalibrated: Why BatchNorm kept its statistics.
    """

    inputs_shifted_back: float | None = None
    rows_reused: str | None = None
    few_classes: list[int] | None = None
    nothing_held_out: bool = False
    one_sample_rules: float | None = None
    gradients_are_zero: bool = False
    gradients_are_rounding: bool = False
    without_gradient: list[str] | None = None
    rows_of_samples_left: str | None = None
    rows_clipped: float | None = None
    rows_left_out: float | None = None
    noise_seen: float | None = None
    noise_left: str | None = None
    label_noise: float | None = None
    passes: Mapping[str, Any] | None = None
    gradients_cleaned: Mapping[str, Mapping[str, str]] | None = None
    finetune_loss: list[float] | None = None
    zeros_elsewhere: list[str] | None = None
    not_recalibrated: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what was found, by name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in named if value is not None and value is not False}


def check_names(evidence: Mapping[str, Any], method: str) -> None:
    """Refuse evidence of a method that would pass for what was found in its stage.

    Raises:
        ValueError: If a name is that of a finding.
    """
    own = [field.name for field in fields(StageFindings)] + [STAGES_TRIED]
    taken = [name for name in own if name in evidence]
    if taken:
        raise ValueError(
            f"the evidence of method {method!r} must have names of its own, got {some_of(taken)}: rename it"
        )
