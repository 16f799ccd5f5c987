"""READ FIRST: what a call of ``prune`` does.

    select; then, once a stage (:mod:`swap_prune.stages.runner`):
    draw -> (noise) -> capture -> (noise) -> defend -> regress -> apply -> (fine-tune) -> recalibrate

Each stage draws fresh calibration samples, takes their gradients at the network's current weights, states a
:class:`PruningProblem`, lets the method solve it, and writes the answer to the network. The sparsity of the
stages follows a schedule that ends exactly at the target.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from swap_prune.artifact import check_dense
from swap_prune.checks import user_path
from swap_prune.distributed import is_first, local_count
from swap_prune.losses import LossFn
from swap_prune.meeting import all_or_none
from swap_prune.memory.planning import MemoryPlan
from swap_prune.memory.scratch import scratch_directory
from swap_prune.methods import Method, takes_gradients
from swap_prune.network.device import moved, usable_device
from swap_prune.network.layout import images_laid_out, takes_channels_last
from swap_prune.network.modes import isolated
from swap_prune.process_memory import memory_limit, shortage_named
from swap_prune.progress import StageProgress
from swap_prune.randomness import seeded
from swap_prune.report import PruningReport
from swap_prune.request import SAMPLES, calibrating, check_request
from swap_prune.samples.peek import peek
from swap_prune.samples.spill import Spill
from swap_prune.selection import DEFAULT_TARGETS
from swap_prune.stages.accounting import account
from swap_prune.stages.checkpoint import Checkpoint
from swap_prune.stages.identity import identity
from swap_prune.stages.kept_rows import check_keepable
from swap_prune.stages.oddities import no_number
from swap_prune.stages.search import search_stages
from swap_prune.stages.setup import (
    agree,
    checkpointed,
    planned,
    recorded_storage,
    settle_storage,
    shared_among,
    stage_runner,
    taught,
)
from swap_prune.surgery.batchnorm import repair_batchnorm
from swap_prune.surgery.snapshot import restored_on_error
from swap_prune.training.masks import note_pruned
from swap_prune.training.settings import FineTune

__all__ = ["plan", "prune"]


@shortage_named()
def prune(
    model: nn.Module,
    data: Any,
    sparsity: float = 0.9,
    method: str | Method = "ewr",
    *,
    loss_fn: LossFn | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    ignore: Sequence[str] = (),
    samples: int | Literal["auto"] = SAMPLES,
    stages: int | Literal["auto"] = 1,
    schedule: str = "exponential",
    min_keep: float | Mapping[str, float] = 0.0,
    pattern: str | None = None,
    recalibrate_batchnorm: bool = True,
    recalibration_data: Any = None,
    finetune: FineTune | None = None,
    noise: Any = None,
    defence: str | None = "auto",
    memory: str | int | None = None,
    storage: str = "auto",
    scratch: str | Path | None = None,
    keep_rows: bool = False,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> PruningReport:
    """Prune a trained network in place, exactly to a sparsity, so that its loss changes as little as it can.

    Args:
        model: Any module. It is changed in place; if anything goes wrong it is left as it was.
        data: Calibration data: a Dataset or a plain DataLoader over one, from which samples are drawn at random, or an
            iterable of batches that ``loss_fn`` takes, which is read in order. A DataLoader is plain if it gives every
            sample once in a pass, in order or shuffled, by no sampler or batching of its own. An IterableDataset gives
            single samples; one that gives batches is passed as ``DataLoader(data, batch_size=None)``. None for a method
            that uses no data, such as ``"magnitude"``, if nothing else does.
        sparsity: Fraction of the selected weights that becomes zero, in [0, 1):
            ``p - floor(p * (1 - sparsity))`` zeros.
        method: A name in ``swap_prune.METHODS``, or a config object such as ``swap_prune.EWR(epsilon=0.1)``.
        loss_fn: ``(model, batch) -> (n,)`` per-sample losses; by default the cross-entropy of batches
            ``(inputs, targets)``.
        targets: Class names, parameter or module names, or ``"re:..."``, of what is pruned: weights of two dimensions
            and more. A parameter of one dimension is selected by its exact name alone.
        ignore: The same, for what is not.
        samples: Calibration samples a stage; all there are, if the data holds fewer. ``"auto"``: 1,024, or as many as
            fit the memory where no storage holds G of so many. A method that chooses its settings by the loss on
            held-out samples draws up to 512 more; of data that hold fewer it takes a fifth, or what is left beside
            ``samples``, if that is more, and none where that is less than four.
        stages: Number of prune-and-recapture stages; ``"auto"`` tries one, four and sixteen, as long as the loss
            on up to 1,024 more samples falls; of a Dataset or a plain DataLoader no stage sees them.
        schedule: Sparsity over the stages: exponential, cubic, linear, constant or geometric; ``"auto"``: the better
            of the first two, by the same loss.
        min_keep: Share of each layer's weights that is kept whatever they are worth, in [0, 1], rounded up; or shares
            by pattern, as ``targets`` has them: ``{"fc": 0.2, "re:layer1.*": 0.05}``. By default weights compete over
            all layers, and a layer may be emptied; the report's notes say so.
        pattern: ``"N:M"``, such as ``"2:4"``: of M neighbours along a parameter's second dimension, its inputs, N stay
            at the most. A sparsity of ``1 - N / M`` fills all groups; at a higher one all layers compete.
        recalibrate_batchnorm: Estimate BatchNorm's running statistics anew after pruning (and before, when
            the stored ones do not fit the data at all).
        recalibration_data: Data for that, where it should differ from ``data`` (training augmentation).
        finetune: Train the network under its mask after each stage, as these settings say, on ``recalibration_data`` or
            ``data``, which has to come to an end if no ``steps_per_epoch`` is set; all parameters change, pruned
            weights stay zero. It learns from the network before pruning too (``FineTune.distillation``). The next stage
            takes fresh gradients.
        noise: Noise on data, weights or gradients, to measure how a method bears it: text such as
            ``"gradient:std=4,fraction=0.25"``, a noise model, or a list of these. It has its own random state.
        defence: ``"auto"`` looks for noise in the gradients, and where it finds some makes of each layer's what comes
            nearest to a second look at the same; clean gradients are left alone. It scales rows down that stand out,
            lets the network's own predictions stand for labels that they contradict too often, and shifts attacked
            inputs back; these two only with the default loss and a method that holds samples out: LR and EWR, where
            they have something to choose. None or ``"none"`` does not look; ``"gradients"``, ``"labels"`` and
            ``"inputs"``, or some of them joined with ``+``, look there alone. In place of ``"gradients"``, one thing
            for all layers: ``"low-rank"``, ``"winsorise"``, ``"clip"``, ``"trimmed-mean"`` or ``"median-of-means"``.
        memory: Budget of the process, such as ``"4GB"``, or bytes; by default what it holds already and nine tenths of
            what is free. On a GPU its own memory is meant. A run on gradients that would need more is refused before
            any work; see :func:`plan`.
        storage: How G is held: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"mapped"`` (a file), ``"matrix-free"``
            (not at all: products are passes through the network), ``"low-rank"`` (as outer products, an approximation),
            ``"sharded"`` (each process of the group of ``torch.distributed`` holds a part), or ``"auto"``: the last
            where there is a process group, and else the fastest that fits the memory and does not approximate.
        scratch: Directory of files that are gone at the end: that of G, and those of samples and activations where
            memory is short. By default the system's for temporary files.
        keep_rows: Leave G of the first stage in a file in ``scratch`` (storage ``"mapped"``), and take it from there
            where an earlier run left that of the same network and samples: other sparsities and methods then need not
            capture it again. The file stays there.
        checkpoint: Directory in which the network is kept after each stage. The same call, on the dense network and the
            same data, goes on after the last one that was finished, and ends in the same bytes. It stays there.
        seed: Seed of the run's own random state; the global one is neither read nor changed.
        device: Where to compute; the model is moved there. By default where it is.
        progress: Show progress: on standard error where that is a terminal, and in notebooks with ipywidgets.

    Returns:
        The report; ``report.save(directory)`` writes the pruned model.

    Raises:
        ValueError: If an argument, the data, the model or the loss cannot be used. The message says what
            was received and what to do.
        MemoryError: If there was less memory than the plan had counted on.
        ConnectionError: If another process of the group failed or is gone.
    """
    started = time.perf_counter()
    wanted = "mapped" if keep_rows and storage == "auto" else storage
    with all_or_none(wanted in ("auto", "sharded") and takes_gradients(method)) as meeting:
        request = check_request(
            model,
            sparsity=sparsity,
            method=method,
            loss_fn=loss_fn,
            targets=targets,
            ignore=ignore,
            samples=samples,
            stages=stages,
            schedule=schedule,
            min_keep=min_keep,
            pattern=pattern,
            recalibrate_batchnorm=recalibrate_batchnorm,
            finetune=finetune,
            noise=noise,
            defence=defence,
            storage=wanted,
            seed=seed,
        )
        if keep_rows:
            with suppress(OSError):  # which the plan will word
                check_keepable(request, scratch).mkdir(parents=True, exist_ok=True)
        place, data = _place(model, device), calibrating(data, recalibration_data, request)
        meeting.shared = request.storage == "sharded"
        request, held, notes = settle_storage(model, data, request, place, memory, scratch, checkpoint)
    held = replace(held, kept=user_path(scratch) if keep_rows and scratch is not None else None)
    recorded = recorded_storage(storage, held) if request.solver.needs_gradients else None
    spill = None if held.spilled == "nothing" else Spill(held.scratch, activations=held.spilled == "activations")
    runner = stage_runner(model, data, recalibration_data, request, place, held, spill)
    changing = request.selection if finetune is None else None  # fine-tuning changes every parameter
    backwards = request.solver.needs_gradients or finetune is not None
    kept: Checkpoint | None = None
    with (
        isolated(place),  # gradients are taken, in the precision of the weights, whatever is set around
        moved(model, None if device is None else place),
        shared_among(held, place) as shared,
        scratch_directory(shared) as placed,
        restored_on_error(model, changing) as before,
        seeded(request.seed, place),  # for a network that draws from it
        images_laid_out(model, laid := takes_channels_last(model, request.loss, first := peek(data, place), backwards)),
        nullcontext() if spill is None else spill.around(),
        StageProgress(progress and is_first()) as shown,
    ):
        agree(placed.team, model, request, recorded, checkpoint)
        if keep_rows:
            check_dense(model, "which keep_rows cannot name (leave keep_rows out)")
        if checkpoint is not None:
            check_dense(model, "which a checkpoint cannot keep (leave checkpoint out)")
            same = identity(model, request, data, recalibration_data, recorded, place)
            kept = Checkpoint(checkpoint, same, placed.team)
        notes += repair_batchnorm(model, runner.recalibration, request.loss) if request.recalibrates else []
        known = request.solver.needs_gradients or request.solver.needs_inputs  # samples are checked before they are run
        sound = known and not no_number(model, request.loss, first)
        runner = taught(replace(runner, storage=placed), changing, before)
        if kept is not None:
            runner = checkpointed(runner, kept, place)
        if len(request.courses) > 1:
            records = search_stages(runner, request.courses, shown)
        else:
            records = runner.run_all(request.courses[0], shown)
        notes += no_number(model, request.loss, first if sound else None)
        if finetune is None:
            before.restore_bystanders()
        if placed.team is not None:  # where one fails at the last moment, none is left pruned
            placed.team.wait()
        note_pruned(model, request.selection.names)
    budget = memory if memory is None or isinstance(memory, str) else int(memory)  # NumPy's are no JSON
    settings = request.settings | {"device": str(place), "channels_last": laid, "memory": budget}
    settings["storage"] = recorded
    if kept is not None:
        started -= kept.seconds
        if runner.calibration.is_altered or runner.recalibration.is_altered:
            notes.append(
                "the data gave other samples than before the interruption, so the result differs from "
                "that of a run without one"
            )
    return account(model, request, settings, records, notes, started)


def plan(
    model: nn.Module,
    data: Any,
    sparsity: float = 0.9,
    method: str | Method = "ewr",
    *,
    loss_fn: LossFn | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    ignore: Sequence[str] = (),
    samples: int | Literal["auto"] = SAMPLES,
    stages: int | Literal["auto"] = 1,
    schedule: str = "exponential",
    min_keep: float | Mapping[str, float] = 0.0,
    pattern: str | None = None,
    recalibrate_batchnorm: bool = True,
    recalibration_data: Any = None,
    finetune: FineTune | None = None,
    noise: Any = None,
    defence: str | None = "auto",
    memory: str | int | None = None,
    storage: str = "auto",
    scratch: str | Path | None = None,
    keep_rows: bool = False,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> MemoryPlan:
    """Say how much memory :func:`prune` with the same arguments would need, and how it would hold G.

    Nothing is pruned, moved or written; one sample is run through the network, where the data let it be looked at.
    ``device`` is where the run will take place; it has to be there. ``recalibration_data`` and ``progress`` make no
    difference, and are taken so that the arguments of ``prune`` fit.

    Raises:
        ValueError: If an argument, or the device, cannot be used. That nothing fits is an answer here, not an error.
    """
    request = check_request(
        model,
        sparsity=sparsity,
        method=method,
        loss_fn=loss_fn,
        targets=targets,
        ignore=ignore,
        samples=samples,
        stages=stages,
        schedule=schedule,
        min_keep=min_keep,
        pattern=pattern,
        recalibrate_batchnorm=recalibrate_batchnorm,
        finetune=finetune,
        noise=noise,
        defence=defence,
        storage="mapped" if keep_rows and storage == "auto" else storage,
        seed=seed,
    )
    place, data = _place(model, device), calibrating(data, (), request)
    limit = memory_limit(memory, local_count(), place)
    if not request.solver.needs_gradients:
        return MemoryPlan(limit, (), None, f"{request.solver.name} takes no gradients: there is no G to hold")
    if keep_rows and scratch is not None:  # prune would make it
        wanted = user_path(scratch).absolute()
        scratch = next(path for path in (wanted, *wanted.parents) if path.is_dir())
    return planned(model, data, request, place, limit, scratch, checkpoint)[1]


def _place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Return where a run takes place."""
    return next(model.parameters()).device if device is None else usable_device(device)
