"""What the need of a run depends on, counted before any work on one sample, as the run itself would see it.

Place in the pipeline: before it, for :mod:`swap_prune.memory.planning`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from swap_prune.defences import MEANS
from swap_prune.distributed import process_count
from swap_prune.fisher.capture.footprint import SavedBytes, saved_bytes, trainable
from swap_prune.fisher.capture.layers import UnsupportedLayerError
from swap_prune.fisher.capture.low_rank import numbers_of_a_row
from swap_prune.fisher.capture.sketch import most_rows, sketch_draws, sketch_rows
from swap_prune.fisher.capture.watch import check_products
from swap_prune.fisher.noise import NoiseModel
from swap_prune.losses import CrossEntropy
from swap_prune.memory.forecast import Workload
from swap_prune.network.modes import eval_mode, isolated
from swap_prune.process_memory import held_memory, pass_on_shortage, return_free_memory
from swap_prune.randomness import seeded
from swap_prune.request import Request
from swap_prune.samples.batches import in_own_containers, map_tensors
from swap_prune.samples.numbered import NumberedSamples, known_length
from swap_prune.samples.peek import peek
from swap_prune.samples.shares import HELD_OUT, JUDGED, share_out_samples
from swap_prune.samples.spill import can_spill
from swap_prune.schedule import keep_count
from swap_prune.surgery.batchnorm import RECALIBRATION_SAMPLES
from swap_prune.surgery.snapshot import bystanders_given_back
from swap_prune.training.teaching import losses_beside_own

__all__ = ["count_workload"]

_T = TypeVar("_T")


def count_workload(model: nn.Module, data: Any, request: Request, place: torch.device) -> Workload:
    """Count what the need of a run depends on, on the device where it will take place."""
    own, noise, finetune = next(model.parameters()).device, request.noise, request.finetune
    with isolated(own), bystanders_given_back(model):
        sample = peek(data, own)
        need = _need_of(sample, model, request) | _count_row_numbers(sample, model, request)
    numbered = NumberedSamples.of(data)
    known = None if numbered is None else known_length(numbered.dataset)
    counts = partial(_count_samples, known, request)
    trained = [parameter.nbytes for parameter in model.parameters() if parameter.requires_grad]
    altered = any(type(one).corrupt != NoiseModel.corrupt for one in noise.models)  # into others, in memory
    chooses, doubting = request.solver.needs_held_out, not request.defences.isdisjoint({"labels", "inputs"})
    return Workload(
        **need,
        **counts(request.samples),
        counts=counts,
        weights=request.selection.total,
        kept=keep_count(request.selection.total, min(course.sparsities[0] for course in request.courses)),
        method=request.solver.name,
        itemsize=request.selection.dtype(model).itemsize,
        can_spill=can_spill(place) and not altered,
        doubted=chooses and doubting and isinstance(request.loss, CrossEntropy),
        trained=0 if finetune is None else finetune.batch_size,
        training=0 if finetune is None else (finetune.arrays + _temporaries(place)) * sum(trained),
        largest_parameter=max(trained, default=0),
        copies=0 if finetune is None else (4 if len(request.courses) > 1 else 2) * _bytes(model),
        in_batches=request.in_batches,
        row_noise=noise.acts_on_rows,
        slopes_held=chooses and not request.defences.isdisjoint(MEANS),
        held=held_memory(place) + (_bytes(model) if place != own else 0),
        device=place,
        processes=max(1, process_count()),
        columns=getattr(request.solver, "columns_at_once", lambda _p: None)(request.selection.total),
    )


def _temporaries(place: torch.device) -> int:
    """Return how many arrays of all parameters a step of torch's optimisers makes: a GPU's take them all at once."""
    return 2 if place.type == "cuda" else 0


def _count_samples(known: int | None, request: Request, samples: int) -> dict[str, Any]:
    """Return how many samples a stage will draw, and for what, where so many are asked for.

    Args:
        known: How many there are; None: nobody knows.
        request: What is asked for, but for the number of samples.
        samples: That.
    """
    size = sys.maxsize if known is None else known
    judged = min(JUDGED, size // 5) if len(request.courses) > 1 else 0
    held_out = min(samples, HELD_OUT) if request.solver.needs_held_out else 0
    drawn, spare = share_out_samples(size - judged, samples, held_out)
    weights = request.selection.total
    single = request.curvature is not None and (not request.in_batches or request.compares_rows)
    of_samples = max(
        sketch_rows(drawn, in_batches=False, draws=sketch_draws(drawn, weights) if single else 1),
        most_rows(weights) if single and known is None else 1,  # there may be few
    )
    of_batches = max(1, sketch_rows(drawn, in_batches=True, mini_batch=request.mini_batch))
    return {
        "rows": of_batches if request.in_batches else of_samples,
        "mini_batch": max(2, min(request.mini_batch, drawn)),
        "compared": of_samples if request.in_batches and single else 0,
        "samples": max(1, drawn),
        "spare": spare,
        "judged": judged,
        "recalibrated": min(RECALIBRATION_SAMPLES, size) if request.recalibrates else 0,
    }


def _count_row_numbers(sample: Any, model: nn.Module, request: Request) -> dict[str, Any]:
    """Return how many numbers a row of low rank takes, or why there are none."""
    selection = request.selection
    weights = {name: p for name, p in model.named_parameters() if name in selection.shapes}
    refused: list[UnsupportedLayerError] = []

    def run() -> None:
        try:
            with eval_mode(model), trainable(model):
                check_products(weights, lambda: request.loss(model, sample))
        except UnsupportedLayerError as error:
            refused.append(error)

    try:
        numbers = numbers_of_a_row(model, selection, in_batches=request.in_batches)
        if sample is not None:
            _measured(run, None, model)
        if refused:
            raise refused[0]
    except UnsupportedLayerError as error:
        return {"row_numbers": 0, "unsuited": f"rows of low rank are not to be had: {error}"}
    return {"row_numbers": numbers, "unsuited": ""}


def _need_of(sample: Any, model: nn.Module, request: Request) -> dict[str, Any]:
    """Return the bytes that one sample takes; 0 of what could not be found."""
    nothing = SavedBytes(0, 0)
    if sample is None:
        return dict.fromkeys(("kept_bytes", "largest_bytes", "unfused_bytes", "output_bytes", "sample_bytes"), 0)
    curvature, own_bytes = request.curvature, list[int]()
    teacher = curvature if request.solver.needs_held_out else None
    function = request.loss if teacher is None else partial(losses_beside_own, teacher)
    map_tensors(lambda t: own_bytes.append(t.nbytes), sample)

    def saved() -> SavedBytes:
        with eval_mode(model), trainable(model):  # the selected weights have slopes, whether or not they are frozen
            return saved_bytes(lambda: function(model, sample), (*model.parameters(), *model.buffers()))

    def unfused() -> int:
        with sdpa_kernel(SDPBackend.MATH):
            return saved().total

    def outputs() -> int:
        assert curvature is not None
        with eval_mode(model), torch.no_grad():
            return curvature.outputs(model, in_own_containers(sample)).nbytes

    kept = _measured(saved, nothing, model)
    found = {
        "kept_bytes": kept.total,
        "largest_bytes": kept.largest,
        "unfused_bytes": _measured(unfused, 0, model),
        "output_bytes": 0 if curvature is None else _measured(outputs, 0, model),
        "sample_bytes": sum(own_bytes),
    }
    return_free_memory()  # of the sample's passes
    return found


def _measured(measure: Callable[[], _T], default: _T, model: nn.Module) -> _T:
    """Return what a measurement finds, or a default where the sample cannot be run: the run itself will say why."""
    try:
        with seeded(0, next(model.parameters()).device):
            return measure()
    except Exception as error:  # whatever the caller's model or loss raises
        pass_on_shortage(error)
        return default


def _bytes(model: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers."""
    return sum(map(_held_by, (*model.parameters(), *model.buffers())))


def _held_by(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; of a sparse one those of its values, and of an index for each and dimension."""
    if tensor.layout == torch.strided:
        return tensor.nbytes
    return tensor._nnz() * (tensor.element_size() + 8 * tensor.ndim)
