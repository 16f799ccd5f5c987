"""The set-up of a run: how G is held, and what its stages are run with.

Place in the pipeline: between the request and the first stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from swap_prune.defences import DEFENCES
from swap_prune.distributed import Team, local_count, team_of
from swap_prune.fisher.capture.sketch import MINI_BATCH
from swap_prune.fisher.storage import AT_ONCE, Storage
from swap_prune.losses import CrossEntropy, GaussNewtonLoss
from swap_prune.memory.planning import MemoryPlan, plan_memory
from swap_prune.memory.scratch import delete_abandoned
from swap_prune.process_memory import memory_limit
from swap_prune.randomness import forked_generator
from swap_prune.request import SAMPLES, Request
from swap_prune.sample_defence.record import SampleDefence
from swap_prune.samples.calibration import CalibrationStream
from swap_prune.samples.spill import Spill
from swap_prune.selection import Selection
from swap_prune.stages.checkpoint import (
    Checkpoint,
    NetworkState,
    RandomStates,
    Remembering,
    kept_samples,
    kept_storage,
)
from swap_prune.stages.runner import StageRunner
from swap_prune.stages.workload import count_workload
from swap_prune.surgery.snapshot import Snapshot
from swap_prune.training.teaching import Teacher

__all__ = [
    "agree",
    "checkpointed",
    "planned",
    "recorded_storage",
    "settle_storage",
    "shared_among",
    "stage_runner",
    "taught",
]

_IN_FILES = {"samples": ("samples",), "activations": ("samples", "activations")}


def settle_storage(
    model: nn.Module,
    data: Any,
    request: Request,
    place: torch.device,
    memory: str | int | None,
    scratch: str | Path | None,
    checkpoint: str | Path | None,
) -> tuple[Request, Storage, list[str]]:
    """Choose how G is held, and of how many samples; and say what a reader should know of that."""
    limit, notes = memory_limit(memory, local_count(), place), _without_effect(request)
    if not request.solver.needs_gradients:
        return request, Storage(), notes
    delete_abandoned(scratch)  # it takes room that there might be
    request, chosen = planned(model, data, request, place, limit, scratch, checkpoint)
    held = chosen.require().storage
    if held != chosen.forecasts[0].storage:
        notes.append(f"G is held in storage {chosen.require().name} ({chosen.why})")
    if held.at_once < AT_ONCE:
        notes.append(f"{held.at_once} samples run at once, for more than that do not fit the memory")
    if held.spilled != "nothing":
        notes.append(f"{' and '.join(_IN_FILES[held.spilled])} lie in files, for they do not fit the memory")
    if request.fewer and request.samples < SAMPLES:
        notes.append(f"{request.samples} samples are taken in a stage, for more do not fit the memory")
    return request, held, notes


def planned(
    model: nn.Module,
    data: Any,
    request: Request,
    place: torch.device,
    limit: int | None,
    scratch: str | Path | None,
    checkpoint: str | Path | None,
) -> tuple[Request, MemoryPlan]:
    """Plan a run, of fewer samples where so many do not fit and the request leaves their number open.

    Storage and number are those of the stages that a checkpoint has, if any. Processes that share G would not all come
    to the same number.
    """
    earlier, before = (None, None) if checkpoint is None else (kept_storage(checkpoint), kept_samples(checkpoint))
    if request.fewer and before is not None:
        request = request.of(before)
    while True:  # what the process holds may have grown since a number was found
        found = plan_memory(count_workload(model, data, request, place), limit, request.storage, scratch, earlier)
        open_still = request.fewer and before is None and request.storage != "sharded"
        if not (open_still and 0 < found.fitting < request.samples):
            return request, found
        request = request.of(found.fitting)


def _without_effect(request: Request) -> list[str]:
    """Say which settings that were asked for by name make no difference."""
    solver, asked = request.solver, request.defences
    named = frozenset() if asked == frozenset(DEFENCES) else asked  # all of them are the default
    looks, notes = sorted(named & {"labels", "inputs"}), []
    if not solver.needs_gradients:
        storage = "storage= (or keep_rows=)" if request.storage == "mapped" else "storage="
        idle = [storage] if request.storage not in ("auto", "sharded") else []
        idle += ["noise on gradients"] if request.noise.acts_on_rows else []
        idle += [f"defence {name}" for name in sorted(named - {"labels", "inputs"})]
        verb = "makes" if len(idle) == 1 else "make"
        notes += [f"{solver.name} takes no gradients: {' and '.join(idle)} {verb} no difference"] if idle else []
    if not request.in_batches:
        notes += _without_batches(request)
    if looks and not solver.needs_held_out:
        notes.append(f"{solver.name} holds no samples out: defence {' and '.join(looks)} makes no difference")
    elif looks and not isinstance(request.loss, CrossEntropy):
        notes.append(f"defence {' and '.join(looks)} makes no difference: only the default loss knows of labels")
    return notes


def _without_batches(request: Request) -> list[str]:
    """Say which settings of mini-batches make no difference, where rows are those of samples."""
    size = getattr(request.solver, "mini_batch", MINI_BATCH)
    asked = ["rows='mini-batches'"] if getattr(request.solver, "rows", "auto") == "mini-batches" else []
    asked += [f"mini_batch={size}"] if size != MINI_BATCH else []
    if not asked:
        return []
    why = "no BatchNorm is recalibrated"
    if request.recalibrates:
        why = "the loss does not know its curvature" if request.curvature is None else "rows='samples' takes none"
    verb = "makes" if len(asked) == 1 else "make"
    return [f"{' and '.join(asked)} {verb} no difference: {why}, and rows are those of samples"]


def recorded_storage(asked: str, held: Storage) -> dict[str, Any]:
    """Return what the report says of a storage."""
    names = ("lean", "at_once", "roomy", "spilled", "compares_rows")
    return {"asked": asked, "used": held.kind} | {name: getattr(held, name) for name in names}


def agree(
    team: Team | None,
    model: nn.Module,
    request: Request,
    recorded: dict[str, Any] | None,
    checkpoint: str | Path | None,
) -> None:
    """Make sure that all processes that share G were asked for the same, of a network that does not wait for others.

    Raises:
        ValueError: If they were not.
    """
    if team is None:
        return
    if isinstance(model, DistributedDataParallel) and model.broadcast_buffers and team.size > 1 and [*model.buffers()]:
        raise ValueError(
            "DistributedDataParallel sends buffers around at each forward pass, of which processes that share G do not "
            "make as many: pass model.module, the network in it, or make it with broadcast_buffers=False"
        )
    compared = dict(request.settings, noise=None)  # that may hold any object
    asked = (compared, dict(request.selection.shapes), request.seed, checkpoint is not None)
    team.agree("settings", repr(asked))
    team.agree("weights", {**dict(model.named_buffers()), **model.state_dict()})
    team.agree("storage, found by the free memory of each (memory= gives a budget)", repr(recorded))


def stage_runner(
    model: nn.Module,
    data: Any,
    recalibration_data: Any,
    request: Request,
    place: torch.device,
    held: Storage,
    spill: Spill | None,
) -> StageRunner:
    """Return what runs the stages, without a teacher: that is made once BatchNorm's statistics are right."""
    generator = torch.Generator().manual_seed(request.seed)
    rows_of = request.mini_batch if request.in_batches else 1
    keep = None if spill is None else spill.keep
    size = rows_of * max(1, held.forwards // rows_of)  # of batches that mini-batches can be made of without a rest
    calibration = CalibrationStream(data, generator, place, size, keep)
    return StageRunner(
        model=model,
        request=request,
        noise_generator=forked_generator(request.seed, "noise"),
        calibration=calibration,
        recalibration=calibration.beside(recalibration_data, forked_generator(request.seed, "recalibration")),
        storage=held,
    )


def taught(runner: StageRunner, changing: Selection | None, before: Snapshot) -> StageRunner:
    """Give a runner the dense network to ask, where its method or fine-tuning does and the loss can compare outputs."""
    request, loss = runner.request, runner.request.loss
    asks, training = request.solver.needs_held_out, request.finetune
    distils = training is not None and training.share_of_teacher(loss, known=True) > 0
    if not isinstance(loss, GaussNewtonLoss) or not (asks or distils):
        return runner
    teacher = Teacher(runner.model, changing, loss, before)
    sample_defence = SampleDefence(teacher, loss, runner.calibration.kept, runner.storage.at_once, request.defences)
    return replace(
        runner,
        teacher=teacher if asks else None,
        trainer=teacher if distils else None,
        sample_defence=sample_defence if asks and sample_defence.looks else None,
    )


def checkpointed(runner: StageRunner, checkpoint: Checkpoint, place: torch.device) -> StageRunner:
    """Give a runner a checkpoint that keeps what changes from stage to stage."""
    parts: dict[str, Remembering] = {
        "network": NetworkState(runner.model),
        "calibration": runner.calibration,
    }
    if runner.recalibration is not runner.calibration:
        parts["recalibration"] = runner.recalibration
    if runner.sample_defence is not None:
        parts["sample_defence"] = runner.sample_defence
    parts["random"] = RandomStates(runner.noise_generator, place)  # last: reading samples again may draw
    return replace(runner, checkpoint=checkpoint.of(**parts))


@contextmanager
def shared_among(storage: Storage, device: torch.device) -> Iterator[Storage]:
    """Give a storage that is shared out its processes, until the end of the run."""
    if storage.kind != "sharded":
        yield storage
        return
    with team_of(device) as team:
        yield replace(storage, team=team)
