"""How many stages, and by which schedule? As held-out samples favour.

More stages cost time, and gain where much is removed: each starts from gradients of a network closer to the last one.
So their number is raised fourfold, each time from the dense network, as long as the loss on samples that no stage has
seen falls. Another schedule is tried for the best number alone.

Place in the pipeline: around the stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from swap_prune.methods.held_out import mean_loss
from swap_prune.network.modes import eval_mode
from swap_prune.progress import StageProgress
from swap_prune.randomness import forked_generator
from swap_prune.report import StageReport
from swap_prune.samples.shares import JUDGED
from swap_prune.schedule import Course
from swap_prune.stages.findings import STAGES_TRIED
from swap_prune.stages.runner import StageRunner
from swap_prune.surgery.snapshot import Snapshot
from swap_prune.training.teaching import Taught, taught_losses

__all__ = ["search_stages"]


class _Outcome(NamedTuple):
    """A network pruned on some course.

    Attributes:
        records: What the stages did.
        loss: Mean loss on samples that no stage has seen.
        network: What it has that the dense one has not.
    """

    records: list[StageReport]
    loss: float
    network: Snapshot


def search_stages(runner: StageRunner, courses: Sequence[Course], shown: StageProgress) -> list[StageReport]:
    """Prune on one course after another, as long as each is better than the last; keep the best.

    Args:
        runner: Runs the stages; its network is dense.
        courses: Those of one schedule, the shortest first, then those of others, of which the ones are tried that
            have as many stages as the best; all of them end at the target.
        shown: Progress.

    Returns:
        What the stages of the best course did; the last one's evidence has ``stages_tried``.
    """
    judged = _judges(runner)
    changing = None if runner.request.finetune is not None else runner.request.selection
    dense = Snapshot(runner.model, changing)
    best: _Outcome | None = None
    tried: list[dict[str, Any]] = []
    longer_gains, own = True, courses[0].schedule
    for course in courses:
        count = len(course.sparsities)
        if best is not None and not (longer_gains if course.schedule == own else count == len(best.records)):
            continue
        dense.restore()
        records = runner.run_all(course, shown)
        loss = _loss(runner, judged)
        tried.append({"stages": count, "schedule": course.schedule, "held_out_loss": loss})
        if best is None or loss < best.loss:
            best = _Outcome(records, loss, Snapshot(runner.model, changing))
        else:
            longer_gains = False
    assert best is not None, "there is at least one course"
    best.network.restore()
    *before, last = best.records
    return [*before, last.model_copy(update={"evidence": last.evidence | {STAGES_TRIED: tried}})]


def _judges(runner: StageRunner) -> list[Taught]:
    """Draw what all numbers of stages are judged by, believed as far as the run believes its samples."""
    batches = runner.corrupt(runner.calibration.hold_out(JUDGED))
    if runner.sample_defence is None:
        return runner.judges(batches)
    classes = forked_generator(runner.request.seed, "restoration of what judges")
    batches, _, _ = runner.sample_defence.restore(runner.model, batches, [], classes)
    judged, _, _ = runner.sample_defence.weigh(runner.judges(batches), [])
    return judged


def _loss(runner: StageRunner, judged: Sequence[Taught]) -> float:
    """Return the mean loss of the network as it is; processes that share G take that of the first."""
    with eval_mode(runner.model), torch.no_grad():
        losses = torch.cat([taught_losses(runner.request.loss, runner.model, one) for one in judged])
    if runner.storage.team is not None:
        runner.storage.team.take_from_first_([losses])
    return mean_loss(losses)
