"""What a run is asked for, checked before any work, and what its need of memory depends on.

Place in the pipeline: before it. Nothing is changed here, and no data is used up.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.loss import _Loss

from swap_prune.checks import checked_seed, whole_number
from swap_prune.defences import parse_defence
from swap_prune.distributed import process_count
from swap_prune.fisher.footprint import SavedBytes
from swap_prune.fisher.layers import UnsupportedLayerError
from swap_prune.fisher.low_rank_capture import numbers_of_a_row
from swap_prune.fisher.noise import NoiseChain, NoiseModel, parse_noise
from swap_prune.fisher.sketch import sketch_rows
from swap_prune.losses import CrossEntropy, GaussNewtonLoss, LossFn, cross_entropy
from swap_prune.memory.planning import Workload, check_storage, output_bytes, row_bytes, sample_bytes
from swap_prune.memory.process import held_memory, return_free_memory
from swap_prune.methods import Method, resolve_method
from swap_prune.network.device import check_values
from swap_prune.network.modes import check_no_inference, uncompiled
from swap_prune.samples.batches import map_tensors
from swap_prune.samples.numbered import NumberedSamples, known_length
from swap_prune.samples.peek import peek
from swap_prune.samples.shares import HELD_OUT, JUDGED, share_out_samples
from swap_prune.samples.spill import can_spill
from swap_prune.schedule import keep_count, stage_schedules
from swap_prune.selection import Selection, layer_floors, select_parameters
from swap_prune.surgery import RECALIBRATION_SAMPLES, batchnorm_layers, bystanders_given_back
from swap_prune.training.finetune import FineTune
from swap_prune.training.teaching import losses_beside_own

__all__ = ["Run", "calibrating", "check_run", "workload"]


@dataclass(frozen=True)
class Run:
    """What is asked for, checked before any work.

    Attributes:
        solver: The method.
        noise: What disturbs samples, weights and gradients.
        schedules: Sparsity after each stage; several of them where their number is to be found.
        selection: Where the p weights lie.
        floors: How many weights of a layer are kept at the least, by its name.
        loss: Per-sample loss.
        curvature: The same loss, where G is a sketch of its Gauss-Newton matrix; else None.
        normalised: Whether BatchNorm is recalibrated.
        defences: Where noise is looked for: gradients, labels, inputs.
        finetune: How the network is trained after each stage; None: not at all.
        samples: Calibration samples a stage.
        seed: Of the run's random state.
        storage: The storage asked for; processes that run together share G, unless another one is.
        settings: What the report says of all this, as plain types.
    """

    solver: Method
    noise: NoiseChain
    schedules: Sequence[Sequence[float]]
    selection: Selection
    floors: Mapping[str, int]
    loss: LossFn
    curvature: GaussNewtonLoss | None
    normalised: bool
    defences: frozenset[str]
    finetune: FineTune | None
    samples: int
    seed: int
    storage: str
    settings: dict[str, Any]


def check_run(
    model: nn.Module,
    *,
    sparsity: float,
    method: str | Method,
    loss_fn: LossFn | None,
    targets: Sequence[str],
    ignore: Sequence[str],
    samples: int,
    stages: int | Literal["auto"],
    schedule: str,
    min_keep: float | Mapping[str, float],
    recalibrate_batchnorm: bool,
    finetune: FineTune | None,
    noise: Any,
    defence: str | None,
    storage: str,
    seed: int,
) -> Run:
    """Check the arguments of :func:`swap_prune.prune` against each other and the model.

    Raises:
        ValueError: If one cannot be used.
    """
    functional = getattr(loss_fn, "__module__", None) == "torch.nn.functional"
    if loss_fn is not None and (isinstance(loss_fn, _Loss) or functional or not callable(loss_fn)):
        raise ValueError(
            f"loss_fn must be a function (model, batch) -> losses (n,), got {loss_fn!r}; for a loss module or function "
            "L: lambda model, batch: L(model(batch[0]), batch[1]), with reduction='none'"
        )
    if recalibrate_batchnorm not in (True, False):
        raise ValueError(f"recalibrate_batchnorm must be True or False, got {recalibrate_batchnorm!r}")
    solver, noise_model = resolve_method(method), parse_noise(noise)
    schedules = stage_schedules(sparsity, stages, schedule)
    defences = parse_defence(defence)
    if finetune is not None and not isinstance(finetune, FineTune):
        raise ValueError(f"finetune must be a swap_prune.FineTune or None, got {finetune!r}")
    if finetune is not None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("finetune= has nothing to train: no parameter of the model requires a gradient")
    loss = cross_entropy if loss_fn is None else loss_fn
    if finetune is not None:
        finetune.share_of_teacher(loss, known=True)
    samples, seed = whole_number("samples", samples), checked_seed(seed)
    check_storage(storage)
    selection = select_parameters(model, targets, ignore)
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) > 1:
        raise ValueError(f"the model must lie on one device, got {', '.join(sorted(places))}: move it there first")
    check_no_inference(model)
    check_values(model)
    _check_finite(model, selection)
    return Run(
        solver=solver,
        noise=noise_model,
        schedules=schedules,
        selection=selection,
        floors=layer_floors(model, selection, min_keep, keep_count(selection.total, sparsity)),
        loss=loss,
        curvature=_curvature(solver, loss),
        normalised=bool(recalibrate_batchnorm) and bool(batchnorm_layers(model)),
        defences=defences,
        finetune=finetune,
        samples=samples,
        seed=seed,
        storage="sharded" if storage == "auto" and process_count() > 0 else storage,
        settings={
            "sparsity": float(sparsity),
            "method": {"name": solver.name} | _plain(solver),
            "targets": [targets] if isinstance(targets, str) else list(targets),
            "ignore": [ignore] if isinstance(ignore, str) else list(ignore),
            "samples": samples,
            "stages": stages if isinstance(stages, str) else int(stages),
            "schedule": schedule,
            "min_keep": _plain_shares(min_keep),
            "recalibrate_batchnorm": bool(recalibrate_batchnorm),
            "noise": noise_model.settings(),
            "defence": defence if defence is not None else "none",
        }
        | ({} if finetune is None else {"finetune": finetune.settings()}),
    )


def calibrating(data: Any, recalibration_data: Any, run: Run) -> Any:
    """Return the calibration data, for which None may stand where nothing is read of it.

    Raises:
        ValueError: If something is.
    """
    if data is not None:
        return data
    users = {
        f"method {run.solver.name!r}": run.solver.needs_gradients or run.solver.needs_inputs,
        "recalibrate_batchnorm": run.normalised and recalibration_data is None,
        "finetune": run.finetune is not None and recalibration_data is None,
        "stages='auto'": len(run.schedules) > 1,
    }
    reading = [user for user, reads in users.items() if reads]
    if reading:
        raise ValueError(f"data must be a Dataset or an iterable of batches, got None, and {reading[0]} reads it")
    return ()


def workload(model: nn.Module, data: Any, run: Run, place: torch.device) -> Workload:
    """Count what the need of a run depends on, on the device where it will take place."""
    numbered = NumberedSamples.of(data)
    known = None if numbered is None else known_length(numbered.dataset)
    size = sys.maxsize if known is None else known
    judged = min(JUDGED, size // 5) if len(run.schedules) > 1 else 0
    held_out = min(run.samples, HELD_OUT) if run.solver.needs_held_out else 0
    drawn, spare = share_out_samples(size - judged, run.samples, held_out)
    in_batches = run.normalised and run.curvature is not None
    own = next(model.parameters()).device
    sample = peek(data, own)
    with uncompiled(), bystanders_given_back(model):  # nothing need be compiled for one sample
        taught = run.curvature if run.solver.needs_held_out else None
        function = run.loss if taught is None else partial(losses_beside_own, taught)
        kept = SavedBytes(0, 0) if sample is None else sample_bytes(model, function, sample)
        row = 0 if sample is None or in_batches else row_bytes(model, run.selection, run.loss, sample)
        outputs = 0 if sample is None or run.curvature is None else output_bytes(model, run.curvature, sample)
    own_bytes: list[int] = []
    map_tensors(lambda t: own_bytes.append(t.nbytes), sample)
    row_numbers, unsuited = 0, ""
    try:
        row_numbers = numbers_of_a_row(model, run.selection, joined=in_batches)
    except UnsupportedLayerError as error:
        unsuited = f"only the weights of Linear and Conv layers have rows of low rank: {error}"
    return_free_memory()  # of the sample's passes
    trainable = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    altered = any(type(one).corrupt != NoiseModel.corrupt for one in run.noise.models)  # into others, in memory
    return Workload(
        rows=max(1, sketch_rows(drawn, in_batches=in_batches)),
        samples=max(1, drawn),
        weights=run.selection.total,
        kept=keep_count(run.selection.total, run.schedules[-1][0]),
        method=run.solver.name,
        itemsize=run.selection.dtype(model).itemsize,
        kept_bytes=kept.total,
        largest_bytes=kept.largest,
        row_bytes=row,
        sample_bytes=sum(own_bytes),
        can_spill=can_spill(place) and not altered,
        output_bytes=outputs,
        spare=spare,
        judged=judged,
        recalibrated=min(RECALIBRATION_SAMPLES, size) if run.normalised else 0,
        doubted=bool(run.defences - {"gradients"}) and run.solver.needs_held_out and isinstance(run.loss, CrossEntropy),
        trained=0 if run.finetune is None else run.finetune.batch_size,
        training=0 if run.finetune is None else run.finetune.arrays * trainable,
        largest_parameter=max((p.nbytes for p in model.parameters() if p.requires_grad), default=0),
        copies=0 if run.finetune is None else (4 if len(run.schedules) > 1 else 2) * _bytes(model),
        mini_batches=in_batches,
        row_noise=run.noise.acts_on_rows,
        held=held_memory(place) + (_bytes(model) if place != own else 0),
        device=place,
        processes=max(1, process_count()),
        columns=getattr(run.solver, "columns_at_once", lambda _p: None)(run.selection.total),
        row_numbers=row_numbers,
        unsuited=unsuited,
    )


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


def _plain(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, with Python's numbers in the place of NumPy's."""
    settings = asdict(config).items()
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in settings}


def _plain_shares(min_keep: float | Mapping[str, float]) -> float | dict[str, float]:
    """Return shares as JSON can hold them."""
    if isinstance(min_keep, Mapping):
        return {pattern: float(share) for pattern, share in min_keep.items()}
    return float(min_keep)


def _bytes(model: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers."""
    return sum(map(_held_by, (*model.parameters(), *model.buffers())))


def _held_by(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; of a sparse one those of its values, and of an index for each and dimension."""
    if tensor.layout == torch.strided:
        return tensor.nbytes
    return tensor._nnz() * (tensor.element_size() + 8 * tensor.ndim)


def _check_finite(model: nn.Module, selection: Selection) -> None:
    """Refuse weights that no method can rank."""
    parameters = dict(model.named_parameters())
    for name in selection.names:
        if torch.finfo(parameters[name].dtype).bits < 16:
            kind = str(parameters[name].dtype).removeprefix("torch.")
            raise ValueError(f"{name!r} is {kind}, which torch hardly computes in: prune before quantising to it")
    bad = [name for name in selection.names if not bool(parameters[name].isfinite().all())]
    if bad:
        raise ValueError(f"weights to prune must be finite; {bad[0]!r} holds NaN or infinity: check the checkpoint")
