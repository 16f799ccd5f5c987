"""What the method of a stage may ask the network: losses on held-out samples, and slopes over the others.

In the end over all of them, where no later stage asks those that were held out again.

Place in the pipeline: between the defence of a stage and its method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swap_prune.fisher.capture.sketch import without_singles
from swap_prune.fisher.defence.outliers import clip_rows_
from swap_prune.losses import GaussNewtonLoss
from swap_prune.problem import PruningProblem
from swap_prune.samples.batches import split_batches
from swap_prune.stages.defending import Defended
from swap_prune.stages.oddities import WatchedLosses
from swap_prune.stages.slope_batches import SlopeBatches
from swap_prune.stages.stage import Stage
from swap_prune.stages.trials import Trials
from swap_prune.training.teaching import Taught

__all__ = ["Asking"]


@dataclass(frozen=True)
class Asking:
    """What is asked in one stage.

    Attributes:
        stage: The runner.
        trials: What answers.
        watched: Its losses.
        held_out: The samples that are not fitted.
        batches: How slopes are batched.
        tell: Called for each network that is tried.
        label_noise: Share of labels that seem wrong, if that was found out.
    """

    stage: Stage
    trials: Trials
    watched: WatchedLosses
    held_out: list[Any]
    batches: SlopeBatches
    tell: Callable[[], None]
    label_noise: float | None

    @classmethod
    def of(
        cls,
        stage: Stage,
        fitting: list[Any],
        held_out: list[Any],
        defended: Defended,
        generator: torch.Generator,
        tell: Callable[[], None],
    ) -> Asking:
        """Return what is asked, with the noise of the run.

        Args:
            stage: The runner.
            fitting: The samples that G was captured on.
            held_out: Others.
            defended: G, and how its gradients were cleaned.
            generator: Random state of noise on slopes.
            tell: Called for each network that is tried.
        """
        request, storage = stage.request, stage.storage
        if storage.forwards < request.mini_batch:  # of which batches are made, for rows
            held_out = split_batches(held_out, storage.forwards)
        batches = SlopeBatches.of(stage.model, request, storage, fitting, defended)
        taught = stage.taught(batches.parts(fitting))
        judging, rate = stage.judges(without_singles(held_out) if request.recalibrates else held_out), None
        if stage.sample_defence is not None:
            taught, judging, rate = stage.sample_defence.weigh(taught, judging)
        defence = defended.defence
        trials = Trials(
            model=stage.model,
            selection=request.selection,
            loss_fn=request.loss,
            fitting=taught,
            held_out=judging,
            recalibrates=request.recalibrates,
            disturb=partial(stage.disturb, generator=generator),
            noisy=partial(stage.noisy, generator=generator),
            defence=defence if defence is not None and defence.cleans_slopes else None,
            per_sample=not batches.in_batches,
            whole=_trusted(stage, batches.whole(fitting)) if judging else (),
            clip=clip_rows_ if request.clips else None,
            lean=storage.kind != "float32",
            team=storage.team,
        )
        return cls(stage, trials, WatchedLosses(trials.losses, request.loss, tell), held_out, batches, tell, rate)

    def stated(self, problem: PruningProblem, *, learns: bool) -> PruningProblem:
        """Return a problem whose method may ask the network.

        Args:
            problem: The problem.
            learns: Whether it may learn from held-out samples in the end.
        """
        whole = self.trials.whole_slope if self.trials.whole else None
        problem = replace(problem, slope=self.trials.slope, whole_slope=whole)
        if not self.trials.held_out:
            return problem
        bears_any = isinstance(self.stage.request.loss, GaussNewtonLoss)  # it reads outputs, whatever they are
        problem = replace(problem, held_out=self.watched, blank=self.trials.blank if bears_any else None)
        return replace(problem, all_samples=partial(self._over_all, problem)) if learns else problem

    def _over_all(self, problem: PruningProblem) -> PruningProblem:
        """Return a problem with slopes over all samples; each counts as tried, since no loss is asked between them."""
        stage, trials, held_out = self.stage, self.trials, self.held_out
        fitting = [*trials.fitting, *_trusted(stage, self.batches.parts(held_out))]
        whole = [*trials.whole, *_trusted(stage, self.batches.large(held_out))] if trials.whole else []
        wide = replace(trials, fitting=fitting, whole=whole)

        def told(slope: Callable[[Tensor, Tensor], Tensor], weights: Tensor, kept: Tensor) -> Tensor:
            self.tell()
            return slope(weights, kept)

        whole_slope = partial(told, wide.whole_slope) if wide.whole else None
        return replace(problem, slope=partial(told, wide.slope), whole_slope=whole_slope)


def _trusted(stage: Stage, batches: list[Any]) -> list[Taught]:
    """Return batches with what is known of them, their labels with the trust that they deserve."""
    taught = stage.taught(batches)
    return taught if stage.sample_defence is None else stage.sample_defence.trusted(taught)
