"""What a run is asked for, checked before any work. Nothing is changed here, and no data is used up.

Place in the pipeline: before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.loss import _Loss

from swap_prune.checks import checked_seed, whole_number
from swap_prune.defences import name_of, parse_defence
from swap_prune.distributed import process_count
from swap_prune.fisher.capture.sketch import MINI_BATCH, comparable
from swap_prune.fisher.noise import NoiseChain, parse_noise
from swap_prune.losses import GaussNewtonLoss, LossFn, cross_entropy
from swap_prune.memory.planning import check_storage
from swap_prune.methods import METHODS, Method, resolve_method
from swap_prune.network.device import check_network, check_values
from swap_prune.network.modes import check_no_inference
from swap_prune.regression.pattern import GroupPattern, parse_pattern
from swap_prune.samples.calibration import check_data
from swap_prune.schedule import Course, courses_of, keep_count
from swap_prune.selection import Selection, layer_floors, select_parameters
from swap_prune.surgery.batchnorm import batchnorm_layers
from swap_prune.training.settings import FineTune

__all__ = ["SAMPLES", "Request", "calibrating", "check_pattern", "check_request", "limits_of"]

SAMPLES = 1024  # calibration samples a stage


@dataclass(frozen=True)
class Request:
    """What is asked for, checked before any work.

    Attributes:
        solver: The method.
        noise: What disturbs samples, weights and gradients.
        courses: Sparsity after each stage; several of them where their number or the schedule is to be found.
        selection: Where the p weights lie.
        floors: How many weights of a layer are kept at the least, by its name.
        pattern: What groups of neighbouring weights are held to.
        loss: Per-sample loss.
        curvature: The same loss, where G is a sketch of its Gauss-Newton matrix; else None.
        recalibrates: Whether BatchNorm is recalibrated.
        defences: Where noise is looked for, gradients, labels, inputs; or what is done to gradients.
        finetune: How the network is trained after each stage; None: not at all.
        samples: Calibration samples a stage.
        fewer: Whether fewer of them are taken where so many do not fit the memory.
        seed: Of the run's random state.
        storage: The storage asked for; ``"auto"`` is ``"sharded"`` where there is a process group.
        settings: What the report says of all this, as plain types.
    """

    solver: Method
    noise: NoiseChain
    courses: Sequence[Course]
    selection: Selection
    floors: Mapping[str, int]
    pattern: GroupPattern | None
    loss: LossFn
    curvature: GaussNewtonLoss | None
    recalibrates: bool
    defences: frozenset[str]
    finetune: FineTune | None
    samples: int
    fewer: bool
    seed: int
    storage: str
    settings: dict[str, Any]

    def of(self, samples: int) -> Request:
        """Return the same of so many samples a stage."""
        return replace(self, samples=samples, settings=self.settings | {"samples": samples})

    @property
    def in_batches(self) -> bool:
        """Whether a mini-batch makes one row of G, with its own statistics."""
        asked = getattr(self.solver, "rows", "auto")
        return self.recalibrates and self.curvature is not None and asked != "samples"

    @property
    def mini_batch(self) -> int:
        """How many samples make one mini-batch, at the most; no more than a stage takes."""
        return min(whole_number("mini_batch", getattr(self.solver, "mini_batch", MINI_BATCH), 2), max(2, self.samples))

    @property
    def compares_rows(self) -> bool:
        """Whether the method may compare rows of mini-batches with those of single samples.

        Not among processes that share G: one of them might meet a sample alone that it cannot run.
        """
        few = comparable(self.samples, self.selection.total)
        return few and self.in_batches and getattr(self.solver, "compares_rows", False) and self.storage != "sharded"

    @property
    def clips(self) -> bool:
        """Whether gradients that stand out are scaled down."""
        return not self.defences.isdisjoint({"gradients", "clip"})

    @property
    def stages(self) -> int:
        """How many stages there will be, at the most."""
        own, counts = self.courses[0].schedule, [(one.schedule, len(one.sparsities)) for one in self.courses]
        others = [count for schedule, count in counts if schedule != own]
        return sum(count for schedule, count in counts if schedule == own) + max(others, default=0)


def check_request(
    model: nn.Module,
    *,
    sparsity: float,
    method: str | Method,
    loss_fn: LossFn | None,
    targets: Sequence[str],
    ignore: Sequence[str],
    samples: int | Literal["auto"],
    stages: int | Literal["auto"],
    schedule: str,
    min_keep: float | Mapping[str, float],
    pattern: str | None,
    recalibrate_batchnorm: bool,
    finetune: FineTune | None,
    noise: Any,
    defence: str | None,
    storage: str,
    seed: int,
) -> Request:
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
    courses = courses_of(sparsity, stages, schedule)
    defences = parse_defence(defence)
    if finetune is not None and not isinstance(finetune, FineTune):
        raise ValueError(f"finetune must be a swap_prune.FineTune or None, got {finetune!r}")
    if finetune is not None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("finetune= has nothing to train: no parameter of the model requires a gradient")
    loss = cross_entropy if loss_fn is None else loss_fn
    if finetune is not None:
        finetune.share_of_teacher(loss, known=True)
    count, seed = _samples_of(samples), checked_seed(seed)
    check_storage(storage)
    selection = select_parameters(model, targets, ignore)
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) > 1:
        raise ValueError(f"the model must lie on one device, got {', '.join(sorted(places))}: move it there first")
    check_network(model)
    check_no_inference(model)
    check_values(model)
    _check_finite(model, selection)
    check_pattern(solver, pattern)
    floors, grouped = limits_of(model, selection, keep_count(selection.total, sparsity), min_keep, pattern)
    return Request(
        solver=solver,
        noise=noise_model,
        courses=courses,
        selection=selection,
        floors=floors,
        pattern=grouped,
        loss=loss,
        curvature=_curvature(solver, loss),
        recalibrates=bool(recalibrate_batchnorm) and bool(batchnorm_layers(model)),
        defences=defences,
        finetune=finetune,
        samples=count,
        fewer=samples == "auto",
        seed=seed,
        storage="sharded" if storage == "auto" and process_count() > 0 else storage,
        settings={
            "sparsity": float(sparsity),
            "method": {"name": solver.name} | _plain(solver),
            "targets": [targets] if isinstance(targets, str) else list(targets),
            "ignore": [ignore] if isinstance(ignore, str) else list(ignore),
            "samples": count,
            "stages": stages if isinstance(stages, str) else int(stages),
            "schedule": schedule,
            "min_keep": _plain_shares(min_keep),
            "recalibrate_batchnorm": bool(recalibrate_batchnorm),
            "noise": noise_model.settings(),
            "defence": name_of(defences),
        }
        | ({} if pattern is None else {"pattern": pattern})
        | ({} if finetune is None else {"finetune": finetune.settings()}),
    )


def _samples_of(samples: int | str) -> int:
    """Return how many samples a stage takes at the most."""
    if isinstance(samples, str):
        if samples != "auto":
            raise ValueError(f"samples must be a whole number of at least 1 or 'auto', got {samples!r}")
        return SAMPLES
    return whole_number("samples", samples)


def check_pattern(solver: Method, pattern: str | None) -> None:
    """Refuse a pattern that a method takes no account of.

    Raises:
        ValueError: If it does not.
    """
    if pattern is not None and not getattr(solver, "keeps_patterns", True):
        others = ", ".join(name for name, kind in METHODS.items() if getattr(kind, "keeps_patterns", True))
        raise ValueError(f"method {solver.name!r} does not support pattern={pattern!r}: use one of {others}")


def limits_of(
    model: nn.Module, selection: Selection, keep: int, min_keep: float | Mapping[str, float], pattern: str | None
) -> tuple[dict[str, int], GroupPattern | None]:
    """Return how many weights of each layer are kept at the least, and what groups of neighbours are held to.

    Raises:
        ValueError: If they are none, or do not go with k or with each other.
    """
    floors = layer_floors(model, selection, min_keep, keep)
    if pattern is None:
        return floors, None
    grouped = parse_pattern(pattern, selection.shapes, keep)
    for name, least in floors.items():
        most = selection.shapes[name].numel() // grouped.size * grouped.most
        if least > most:
            raise ValueError(
                f"min_keep asks for {least} weights of {name!r}, and pattern {pattern} keeps {most} at the most"
            )
    return floors, grouped


def calibrating(data: Any, recalibration_data: Any, request: Request) -> Any:
    """Return the calibration data, for which None may stand where nothing is read of it.

    Raises:
        ValueError: If something is, or they are no data.
    """
    if recalibration_data is not None:
        check_data(recalibration_data, "recalibration_data")
    if data is not None:
        check_data(data)
        return data
    open_still = "stages" if request.settings["stages"] == "auto" else "schedule"
    users = {
        f"method {request.solver.name!r}": request.solver.needs_gradients or request.solver.needs_inputs,
        "recalibrate_batchnorm": request.recalibrates and recalibration_data is None,
        "finetune": request.finetune is not None and recalibration_data is None,
        f"{open_still}='auto'": len(request.courses) > 1,
    }
    reading = [user for user, reads in users.items() if reads]
    if reading:
        spare = "; recalibrate_batchnorm=False needs none" if reading == ["recalibrate_batchnorm"] else ""
        raise ValueError(
            f"data must be a Dataset or an iterable of batches, got None, and {reading[0]} reads it{spare}"
        )
    return ()


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
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in asdict(config).items()}
    for name, value in plain.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"setting {name!r} of method {config.name!r} must be a number, text, or a list or table of them, since "
                f"it goes to the report; got {value!r:.80}"
            ) from None
    return plain


def _plain_shares(min_keep: float | Mapping[str, float]) -> float | dict[str, float]:
    """Return shares as JSON can hold them."""
    if isinstance(min_keep, Mapping):
        return {pattern: float(share) for pattern, share in min_keep.items()}
    return float(min_keep)


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
