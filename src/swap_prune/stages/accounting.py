"""The end of a run: what is in the network now, and what a reader should know of it.

Place in the pipeline: after the last stage.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from swap_prune.artifact import count_layers, not_dense, save_artifact
from swap_prune.checks import some_of
from swap_prune.defences import name_of
from swap_prune.network.calls import is_turned
from swap_prune.report import PruningReport, StageReport, versions
from swap_prune.request import Request
from swap_prune.selection import DEFAULT_TARGETS, unnamed_weights

__all__ = ["account"]

_FEW = 32  # samples, of which a fifth or as many more choose settings and the lengths of steps
_LEFT_ALONE = 0.1  # of the weights, in layers of other kinds than the default targets: more than that is said


def account(
    model: nn.Module,
    request: Request,
    settings: dict[str, Any],
    stages: list[StageReport],
    notes: list[str],
    started: float,
) -> PruningReport:
    """Return the report of a run: count what is in the model now, and say what a reader should know.

    Args:
        model: The pruned network.
        request: What was asked for.
        settings: Every setting that was used.
        stages: What the stages did, at least one.
        notes: What is to be said already; more is added.
        started: When the run began, by ``time.perf_counter``.
    """
    layers = count_layers(model, request.selection.names)
    kept = sum(layer.kept for layer in layers.values())
    if kept != stages[-1].kept:
        notes.append(
            f"{stages[-1].kept - kept} of the weights kept are zero, as before pruning or as the method left them"
        )
    notes += _of_samples(request, settings, stages) + _held_against(request, stages)
    notes += _of_layers(model, request, settings, [name for name, layer in layers.items() if layer.kept == 0])
    return PruningReport(
        method=request.solver.name,
        sparsity=1 - kept / request.selection.total,
        kept=kept,
        total=request.selection.total,
        layers=layers,
        seconds=time.perf_counter() - started,
        settings=settings,
        seed=request.seed,
        stages=stages,
        versions=versions(),
        notes=notes,
    ).bind(save_artifact, model)


def _of_samples(request: Request, settings: dict[str, Any], stages: list[StageReport]) -> list[str]:
    """Say what there is to know of the calibration samples, by the first and the last stage."""
    notes, first, last = list[str](), stages[0], stages[-1]
    if 0 < last.samples < settings["samples"] and not request.fewer:
        notes.append(f"samples used in a stage: {last.samples}, fewer than the {settings['samples']} asked for")
    if 0 < last.samples < _FEW and request.solver.needs_held_out:
        notes.append(f"{last.samples} calibration samples are too few to choose settings by: give some hundred")
    elif "nothing_held_out" in last.evidence:
        notes.append(
            "no sample was held out to choose settings by: a batch that cannot be cut is shared out as its len() says, "
            "and counts as one sample without; give such objects a __len__, or more of them, and what all samples "
            "share a first dimension of 1, such as mask[None]"
        )
    if "not_recalibrated" in last.evidence:
        notes.append(f"BatchNorm's statistics are the old ones: {last.evidence['not_recalibrated']}")
    if "zeros_elsewhere" in last.evidence:
        notes.append(
            f"zeros of {some_of(last.evidence['zeros_elsewhere'])}, which were not selected, stayed in fine-tuning "
            "as if pruned by an earlier call: ignore= trains them"
        )
    notes += _of_gradients(first, last)
    if "few_classes" in last.evidence:
        seen, classes, count = last.evidence["few_classes"]
        notes.append(
            f"the {count} calibration labels are of {seen} of {classes} classes: data that are read in order should be "
            "shuffled; a Dataset is drawn from at random"
        )
    if "one_sample_rules" in last.evidence:
        notes.append(
            f"one calibration sample has {round(100 * last.evidence['one_sample_rules'])} % of what the losses have "
            "above their median: check its target, for instance for a number that stands for a missing one"
        )
    return notes


def _of_gradients(first: StageReport, last: StageReport) -> list[str]:
    """Say what gradients there are none of."""
    if "gradients_are_zero" in last.evidence:
        return [
            "all gradients of the calibration samples are zero, so that they say nothing of any weight: check the "
            "labels and the loss; if it is zero with good reason, SelfDistillation goes by the outputs"
        ]
    if "gradients_are_rounding" in first.evidence:
        return [
            "gradients are no more than rounding at the dense network, as where targets are its own outputs, and say "
            "next to nothing of any weight: ewr and lr go by the outputs, with SelfDistillation or another loss that "
            "knows its curvature"
        ]
    if "without_gradient" in first.evidence:
        return [
            f"no gradient reaches {some_of(first.evidence['without_gradient'])}: behind torch.no_grad() or detach(), "
            "in a reversible block, or not used by the calibration samples? They say nothing of these weights: ignore= "
            "leaves them alone"
        ]
    return []


def _held_against(request: Request, stages: list[StageReport]) -> list[str]:
    """Say what the defence has made of labels and inputs: a user who knows better can do without."""

    def without(defence: str) -> str:
        return repr(name_of(request.defences - {defence}))

    notes, rate = [], stages[-1].evidence.get("label_noise")
    shifts = [stage.evidence["inputs_shifted_back"] for stage in stages if "inputs_shifted_back" in stage.evidence]
    if rate is not None:
        notes.append(
            f"{round(100 * rate)} % of the calibration labels seem wrong to the network, and were not believed: are "
            f"they numbered as its outputs are? If they are right, give defence={without('labels')}"
        )
    if shifts:
        notes.append(
            "calibration inputs seem to be attacked, or their labels numbered wrongly, and were moved back by up to "
            f"{max(shifts):.2g}: if they are clean, give defence={without('inputs')}"
        )
    return notes


def _of_layers(model: nn.Module, request: Request, settings: dict[str, Any], emptied: list[str]) -> list[str]:
    """Say which layers were left alone, were frozen, and have lost all."""
    notes = []
    if tuple(settings["targets"]) == DEFAULT_TARGETS:
        notes += _left_alone(request.selection.total, unnamed_weights(model, request.selection, settings["ignore"]))
    frozen = _frozen_among(model, request.selection.names)
    if frozen:
        notes.append(
            f"parameters that require no gradient were pruned too ({some_of(frozen)}): ignore= leaves them alone"
        )
    if odd := not_dense(model):
        notes.append(
            f"report.save cannot write this network, whose state_dict holds more than dense tensors ({some_of(odd)}): "
            "use torch.save(model.state_dict(), ...)"
        )
    if request.pattern is not None:
        notes += _along_others(model, request)
    if emptied:
        notes.append(f"layers without a weight left: {', '.join(emptied)}")
    return notes


def _along_others(model: nn.Module, request: Request) -> list[str]:
    """Say of which parameters the second dimension, along which a pattern runs, is or may not be that of the inputs."""
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in request.selection.names}
    shapes, notes = request.selection.shapes, list[str]()
    stacks = [name for name, owner in owners.items() if len(shapes[name]) == 3 and not isinstance(owner, _ConvNd)]
    turned = [name for name, owner in owners.items() if isinstance(owner, _ConvTransposeNd) or is_turned(owner)]
    if stacks:
        notes.append(
            f"pattern {request.pattern} runs along the second of three dimensions of {some_of(stacks)}: leave them out "
            "by ignore= if their inputs are another"
        )
    if turned:
        notes.append(
            f"pattern {request.pattern} runs along the outputs of {some_of(turned)}, their second dimension, and is of "
            "no use to sparse hardware there: leave them out by ignore="
        )
    return notes


def _left_alone(selected: int, others: Mapping[str, int]) -> list[str]:
    """Say that many weights were not pruned, by the kinds of their layers."""
    count = sum(others.values())
    if count < _LEFT_ALONE * (count + selected):
        return []
    share, kinds = round(100 * count / (count + selected)), ", ".join(others)
    return [f"{count} weights, {share} % of all, were left alone: targets does not name their layers ({kinds})"]


def _frozen_among(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return which of some parameters require no gradient, in a model of which others do."""
    parameters = dict(model.named_parameters())
    if not any(parameter.requires_grad for parameter in parameters.values()):
        return []  # a network that is only used
    return [name for name in names if not parameters[name].requires_grad]
