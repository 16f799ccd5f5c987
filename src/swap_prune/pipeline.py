"""READ FIRST: the whole of pruning on one page.

    select -> (noise) -> capture -> (noise) -> defend -> regress -> apply -> (fine-tune) -> recalibrate, once a stage

Each stage draws fresh calibration samples, takes their gradients at the network's current weights, states a
:class:`PruningProblem`, lets the method solve it, and writes the answer to the network. The sparsity of the
stages follows a schedule that ends exactly at the target.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import Dataset

from swap_prune.artifact import count_layers, save_artifact
from swap_prune.calibration import CalibrationStream, peek
from swap_prune.device import usable_device
from swap_prune.distributed import is_first, local_count, process_count, team_of
from swap_prune.doubts import Doubts
from swap_prune.finetune import FineTune
from swap_prune.fisher.layers import UnsupportedLayerError
from swap_prune.fisher.low_rank_capture import numbers_of_a_row
from swap_prune.fisher.noise import NoiseChain, NoiseModel, parse_noise
from swap_prune.fisher.sketch import sketch_rows
from swap_prune.fisher.storage import Storage
from swap_prune.layout import suited_layout
from swap_prune.losses import GaussNewtonLoss, LossFn, cross_entropy
from swap_prune.memory import memory_limit, resident_memory
from swap_prune.methods import Method, resolve_method
from swap_prune.planning import MemoryPlan, Workload, check_storage, plan_memory, sample_bytes, scratch_directory
from swap_prune.progress import StageProgress
from swap_prune.randomness import forked_generator
from swap_prune.report import PruningReport, StageReport, versions
from swap_prune.schedule import keep_count, layer_floors, stage_schedules
from swap_prune.selection import DEFAULT_TARGETS, Selection, select_parameters
from swap_prune.stage import StageRunner
from swap_prune.staging import search_stages
from swap_prune.surgery import batchnorm_layers, repair_batchnorm, restored_on_error
from swap_prune.trials import Teacher

__all__ = ["plan", "prune"]


def prune(
    model: nn.Module,
    data: Any,
    sparsity: float = 0.9,
    method: str | Method = "ewr",
    *,
    loss_fn: LossFn | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    ignore: Sequence[str] = (),
    samples: int = 1024,
    stages: int | Literal["auto"] = 1,
    schedule: str = "exponential",
    min_keep: float = 0.0,
    recalibrate_batchnorm: bool = True,
    recalibration_data: Any = None,
    finetune: FineTune | None = None,
    noise: Any = None,
    defence: str | None = "auto",
    memory: str | int | None = None,
    storage: str = "auto",
    scratch: str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> PruningReport:
    """Prune a trained network in place, exactly to a sparsity, so that its loss hardly changes.

    Args:
        model: Any module. It is changed in place; if anything goes wrong it is left as it was.
        data: Calibration data: a Dataset, or an iterable of batches that ``loss_fn`` takes.
        sparsity: Fraction of the selected weights that becomes zero, in [0, 1):
            ``p - floor(p * (1 - sparsity))`` zeros.
        method: A name in ``swap_prune.METHODS``, or a config object such as ``swap_prune.EWR(epsilon=0.1)``.
        loss_fn: ``(model, batch) -> (n,)`` per-sample losses; by default the cross-entropy of batches
            ``(inputs, targets)``.
        targets: Class names, parameter or module names, or ``"re:..."``, of what is pruned.
        ignore: The same, for what is not.
        samples: Calibration samples a stage; all there are, if the data holds fewer. A method that chooses its
            settings by the loss on held-out samples draws up to 512 more, or a fifth of data that hold fewer.
        stages: Number of prune-and-recapture stages; ``"auto"`` tries one, four and sixteen, as long as the loss
            on up to 1,024 more samples, which no stage sees, falls.
        schedule: Sparsity over the stages: exponential, cubic, linear, constant or geometric.
        min_keep: Share of each layer's weights that is kept whatever they are worth, in [0, 1), rounded up. By default
            weights are compared over all layers, and a layer may be emptied; the report's notes say so.
        recalibrate_batchnorm: Estimate BatchNorm's running statistics anew after pruning (and before, when
            the stored ones do not fit the data at all).
        recalibration_data: Data for that, where it should differ from ``data`` (training augmentation).
        finetune: Train the network under its mask after each stage, as these settings say, on ``recalibration_data`` or
            ``data``, which must come to an end; all parameters change, pruned weights stay zero. The next stage takes
            fresh gradients.
        noise: Noise on data, weights or gradients, to measure how a method bears it: text such as
            ``"gradient:std=4,fraction=0.25"``, a noise model, or a list of these. It has its own random state.
        defence: ``"auto"`` looks for noise in the gradients, and where it finds some keeps the low-rank part that true
            gradients have; clean gradients are left alone. It scales rows down that stand out, and lets the network's
            own predictions stand for labels that they contradict too often, and shifts attacked inputs back. None or
            ``"none"`` does not look.
        memory: Budget of the whole process, such as ``"4GB"``, or bytes; by default nine tenths of what the machine has
            free. A run that would need more is refused before any work; see :func:`plan`.
        storage: How G is held: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"mapped"`` (a file), ``"matrix-free"``
            (not at all: products are passes through the network), ``"low-rank"`` (as outer products, an approximation),
            ``"sharded"`` (each process of the group of ``torch.distributed`` holds a part), or ``"auto"``: the last
            where there is a process group, and else the fastest that fits the memory and does not approximate.
        scratch: Directory of that file, which is deleted at the end; by default the system's for temporary files.
        seed: Seed of the run's own random state; the global one is neither read nor changed.
        device: Where to compute; the model is moved there. By default where it is.
        progress: Show progress on standard error.

    Returns:
        The report; ``report.save(directory)`` writes the pruned model.

    Raises:
        ValueError: If an argument, the data, the model or the loss cannot be used. The message says what
            was received and what to do.
    """
    started = time.perf_counter()
    solver, noise_model = resolve_method(method), parse_noise(noise)
    schedules = stage_schedules(sparsity, stages, schedule)
    if defence not in ("auto", "none", None):
        raise ValueError(f"defence must be 'auto', 'none' or None, got {defence!r}")
    if finetune is not None and not isinstance(finetune, FineTune):
        raise ValueError(f"finetune must be a swap_prune.FineTune or None, got {finetune!r}")
    _check_whole("samples", samples, 1)
    _check_whole("seed", seed, 0)
    if seed >= 2**63:
        raise ValueError(f"seed must be below 2**63, got {seed}")
    check_storage(storage)
    selection = select_parameters(model, targets, ignore)
    _check_finite(model, selection)
    sizes = {name: shape.numel() for name, shape in selection.shapes.items()}
    floors = layer_floors(min_keep, sizes, keep_count(selection.total, sparsity))
    loss = cross_entropy if loss_fn is None else loss_fn
    curvature = _curvature(solver, loss)
    normalised = recalibrate_batchnorm and bool(batchnorm_layers(model))
    held, notes = Storage(), []
    if solver.needs_gradients:
        load = _workload(model, data, selection, solver, loss, normalised, schedules[-1], samples, noise_model)
        memory_plan = plan_memory(load, memory_limit(memory, local_count()), _kind(storage), scratch)
        held = memory_plan.require().storage
        if held != memory_plan.forecasts[0].storage:
            notes.append(f"G is held in storage {memory_plan.require().name} ({memory_plan.why})")
    if device is not None:
        model.to(usable_device(device))
    place = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    layout = suited_layout(model, loss, peek(data, place))
    calibration = CalibrationStream(data, generator, place, layout)
    runner = StageRunner(
        model=model,
        selection=selection,
        solver=solver,
        noise=noise_model,
        noise_generator=forked_generator(seed, "noise"),
        seed=seed,
        loss_fn=loss,
        curvature=curvature,
        samples=samples,
        stages=sum(map(len, schedules)),
        generator=generator,
        calibration=calibration,
        recalibration=calibration
        if recalibration_data is None
        else CalibrationStream(recalibration_data, generator, place, layout),
        normalised=normalised,
        defended=defence == "auto",
        finetune=finetune,
        storage=held,
        floors=floors,
    )
    changing = selection if finetune is None else None  # fine-tuning changes every parameter
    with (
        torch.inference_mode(False),  # gradients are taken, in the precision of the weights, whatever is set around
        torch.autocast(place.type, enabled=False),
        _shared(held, place) as shared,
        scratch_directory(shared) as placed,
        restored_on_error(model, changing),
        StageProgress(progress and is_first()) as shown,
    ):
        if placed.team is not None:
            arguments = (schedules, solver, dict(selection.shapes), samples, seed, defence, finetune, normalised)
            placed.team.agree("settings", repr(arguments))
            placed.team.agree("weights", model.state_dict())
        runner = replace(runner, storage=placed)
        notes += repair_batchnorm(model, runner.recalibration, runner.loss_fn) if runner.normalised else []
        if solver.needs_held_out and isinstance(loss, GaussNewtonLoss):
            teacher = Teacher(model, changing, loss)
            runner = replace(runner, teacher=teacher, doubts=Doubts(teacher, loss) if runner.defended else None)
        records = search_stages(runner, schedules, shown) if stages == "auto" else runner.run_all(schedules[0], shown)
    settings = {
        "sparsity": sparsity,
        "method": {"name": solver.name, **asdict(solver)},  # type: ignore[call-overload]
        "targets": [targets] if isinstance(targets, str) else list(targets),
        "ignore": [ignore] if isinstance(ignore, str) else list(ignore),
        "samples": samples,
        "stages": stages,
        "schedule": schedule,
        "min_keep": min_keep,
        "recalibrate_batchnorm": recalibrate_batchnorm,
        "noise": noise_model.settings(),
        "defence": defence if defence is not None else "none",
        "device": str(place),
        "channels_last": layout is torch.channels_last,
        "memory": memory,
        "storage": {"asked": storage, "used": held.kind, "lean": held.lean} if solver.needs_gradients else None,
    } | ({} if finetune is None else {"finetune": asdict(finetune)})
    return _report(model, selection, solver.name, settings, seed, records, notes, started)


def plan(
    model: nn.Module,
    data: Any,
    sparsity: float = 0.9,
    method: str | Method = "ewr",
    *,
    loss_fn: LossFn | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    ignore: Sequence[str] = (),
    samples: int = 1024,
    stages: int | Literal["auto"] = 1,
    schedule: str = "exponential",
    recalibrate_batchnorm: bool = True,
    noise: Any = None,
    memory: str | int | None = None,
    storage: str = "auto",
    scratch: str | Path | None = None,
) -> MemoryPlan:
    """Say how much memory :func:`prune` with the same arguments would need, and how it would hold G.

    Nothing is pruned; one sample is run through the network, where the data let it be looked at.

    Raises:
        ValueError: If an argument cannot be used. That nothing fits is an answer here, not an error.
    """
    solver, noise_model = resolve_method(method), parse_noise(noise)
    schedules = stage_schedules(sparsity, stages, schedule)
    _check_whole("samples", samples, 1)
    selection = select_parameters(model, targets, ignore)
    loss, limit = cross_entropy if loss_fn is None else loss_fn, memory_limit(memory, local_count())
    check_storage(storage)
    if not solver.needs_gradients:
        return MemoryPlan(limit, (), None, f"{solver.name} takes no gradients: there is no G to hold")
    normalised = recalibrate_batchnorm and bool(batchnorm_layers(model))
    load = _workload(model, data, selection, solver, loss, normalised, schedules[-1], samples, noise_model)
    return plan_memory(load, limit, _kind(storage), scratch)


def _workload(
    model: nn.Module,
    data: Any,
    selection: Selection,
    solver: Method,
    loss: LossFn,
    normalised: bool,
    sparsities: Sequence[float],
    samples: int,
    noise: NoiseChain,
) -> Workload:
    """Count what the need of a run depends on."""
    drawn = min(samples, len(data)) if isinstance(data, Dataset) and hasattr(data, "__len__") else samples
    in_batches = normalised and _curvature(solver, loss) is not None
    sample = peek(data, next(model.parameters()).device)
    row_numbers, unsuited = 0, ""
    try:
        row_numbers = numbers_of_a_row(model, selection, joined=in_batches)
    except UnsupportedLayerError as error:
        unsuited = f"only the weights of Linear and Conv layers have rows of low rank: {error}"
    hooks = [(type(one).apply, type(one).apply_) for one in noise.models]
    return Workload(
        rows=max(1, sketch_rows(drawn, in_batches=in_batches)),
        samples=max(1, drawn),
        weights=selection.total,
        kept=keep_count(selection.total, sparsities[0]),
        method=solver.name,
        itemsize=selection.read(model).element_size(),
        kept_bytes=0 if sample is None else sample_bytes(model, loss, sample),
        mini_batches=in_batches,
        row_noise=any(hook != (NoiseModel.apply, NoiseModel.apply_) for hook in hooks),
        held=resident_memory(),
        processes=max(1, process_count()),
        row_numbers=row_numbers,
        unsuited=unsuited,
    )


def _kind(storage: str) -> str:
    """Return the storage to plan for: processes that run together share G, unless another one is asked for."""
    return "sharded" if storage == "auto" and process_count() > 0 else storage


@contextmanager
def _shared(storage: Storage, device: torch.device) -> Iterator[Storage]:
    """Give a storage that is shared out its processes, until the end of the run."""
    if storage.kind != "sharded":
        yield storage
        return
    with team_of(device) as team:
        yield replace(storage, team=team)


def _curvature(solver: Method, loss_fn: LossFn) -> GaussNewtonLoss | None:
    """Return the loss as one that knows its curvature, where it does and the method wants it.

    Raises:
        ValueError: If the method insists and the loss does not, or if it wants gradients that are zero.
    """
    wanted = getattr(solver, "fisher", "empirical")
    if wanted == "gauss-newton" and not isinstance(loss_fn, GaussNewtonLoss):
        raise ValueError(
            "fisher='gauss-newton' needs a loss that knows its curvature (swap_prune.losses.GaussNewtonLoss), got "
            f"{loss_fn!r}; use fisher='empirical'"
        )
    if wanted != "empirical" and isinstance(loss_fn, GaussNewtonLoss):
        return loss_fn
    if solver.needs_gradients and getattr(loss_fn, "stationary", False):
        raise ValueError(
            f"{solver.name} works on gradients of the loss here, and those of {type(loss_fn).__name__} are zero at the "
            "dense network; use a method on Gauss-Newton rows (ewr or lr with fisher='auto'), or one without gradients"
        )
    return None


def _report(
    model: nn.Module,
    selection: Selection,
    method: str,
    settings: dict[str, Any],
    seed: int,
    stages: list[StageReport],
    notes: list[str],
    started: float,
) -> PruningReport:
    """Count what is in the model now, and say what a reader should know."""
    layers = count_layers(model, selection.names)
    kept = sum(layer.kept for layer in layers.values())
    if kept != stages[-1].kept:
        notes.append(f"{stages[-1].kept - kept} of the weights kept were zero before pruning and still are")
    if 0 < stages[-1].samples < settings["samples"]:
        notes.append(f"{stages[-1].samples} samples a stage were used, fewer than the {settings['samples']} asked for")
    if "not_recalibrated" in stages[-1].evidence:
        notes.append(f"BatchNorm's statistics are the old ones: {stages[-1].evidence['not_recalibrated']}")
    emptied = [name for name, layer in layers.items() if layer.kept == 0]
    if emptied:
        notes.append(f"layers without a weight left: {', '.join(emptied)}")
    return PruningReport(
        method=method,
        sparsity=1 - kept / selection.total,
        kept=kept,
        total=selection.total,
        layers=layers,
        seconds=time.perf_counter() - started,
        settings=settings,
        seed=seed,
        stages=stages,
        versions=versions(),
        notes=notes,
    ).bind(partial(save_artifact, model))


def _check_finite(model: nn.Module, selection: Selection) -> None:
    """Refuse weights that no method can rank."""
    parameters = dict(model.named_parameters())
    bad = [name for name in selection.names if not bool(parameters[name].isfinite().all())]
    if bad:
        raise ValueError(f"weights to prune must be finite; {bad[0]!r} holds NaN or infinity: check the checkpoint")


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
