"""The steps that held-out samples have chosen, taken once more with slopes over those samples as well.

Which candidate is the best, and how far each of its steps goes, is settled on samples that no slope sees. Once it is,
these samples have nothing more to say, and are as good to learn from as the others: there may be as many of them.

Place in the pipeline: what LR and EWR end with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from swap_prune.methods.descent import Steps, first_model, second_model
from swap_prune.methods.held_out import held_out_losses, mean_loss
from swap_prune.methods.pairing import RegressionSettings
from swap_prune.problem import PruningProblem
from swap_prune.regression.iht import SparseFit
from swap_prune.regression.natural_gradient import NaturalGradient
from swap_prune.regression.objective import WeightedRidge

__all__ = ["steps_again"]


def steps_again(
    settings: RegressionSettings, problem: PruningProblem, regression: WeightedRidge, fit: SparseFit, steps: Steps
) -> tuple[SparseFit, dict[str, Any]]:
    """Go the way of some steps again, in as many of the same lengths, with slopes over all samples of the stage.

    Held-out samples cannot tell whether that is better, for it learns from them. Only where even their loss is no lower
    than before, so that it went astray, is it left. What is as large as p is dropped as soon as it was used.

    Args:
        settings: Of the method.
        problem: The pruning problem.
        regression: The regression that was solved.
        fit: Its sparse solution.
        steps: Those taken from it.

    Returns:
        The fit with its weights moved, and for the report the lengths and whether they were gone anew, where held-out
        samples may be learned from and there was a step.
    """
    evidence = {"first_order": steps.lengths}
    if not settings.all_samples or problem.all_samples is None or problem.held_out is None or not steps.lengths:
        return steps.applied_to(fit), evidence
    wide, lengths, moved = problem.all_samples(), iter(steps.lengths), replace(fit, refit=None)
    for model, whole, count in _models(problem, regression, fit, steps.counts):
        slope = wide.whole_slope if whole else wide.slope
        assert slope is not None, "steps were taken with one"
        for length in islice(lengths, count):
            direction = model.direction(slope(moved.weights, moved.kept()))
            moved = replace(moved, weights=moved.weights + length * direction)
            del direction  # before the next one is there
        del model
    end = steps.applied_to(fit)
    before = steps.losses[-1] if steps.losses else mean_loss(held_out_losses(problem, end))
    better = mean_loss(held_out_losses(problem, moved)) < before
    return (moved if better else end), evidence | {"all_samples": better}


def _models(
    problem: PruningProblem, regression: WeightedRidge, fit: SparseFit, counts: tuple[int, ...]
) -> Iterator[tuple[NaturalGradient, bool, int]]:
    """Yield the models of steps, whether they go with whole slopes, and how many there were."""
    model = first_model(regression, fit)
    for part, count in enumerate(counts):
        if part == 1 and any(counts[1:]):
            second = second_model(problem, regression, fit.support)
            if second is not None:
                del model
                model = second()
            del second  # its metric is as large as p
        yield model, part > 1, count
