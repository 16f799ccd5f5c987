"""Can the calibration samples be believed? What the dense network has made of them, stage by stage.

Inputs may have been shifted against their labels (:mod:`swap_prune.sample_defence.inputs`), and labels may be wrong
(:mod:`swap_prune.sample_defence.labels`). The first is undone before gradients are taken. For the second, slopes and
choices believe labels only as far as the dense network bears them out.

Either is remembered for the rest of the run, where it was seen once, and so is how far inputs were shifted: an attacker
who reads the weights fits the inputs of a later stage to a pruned network, and soon no longer fools the dense one. For
the same reason the held-out samples of that first stage judge all later ones. Steps that follow an attack on the
network as it is now lower the loss on others of its kind, and nothing there says that the network is lost.

Place in the pipeline: a defence, around capture.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.defences import DEFENCES
from swap_prune.fisher.storage import AT_ONCE
from swap_prune.losses import GaussNewtonLoss, check_calibration
from swap_prune.network.modes import eval_mode
from swap_prune.sample_defence.inputs import (
    Network,
    can_be_asked,
    labels_contradicted,
    shift_back,
    shift_seen,
    straight_shift,
)
from swap_prune.sample_defence.labels import LabelDoubt, doubt_labels
from swap_prune.training.teaching import Taught, Teacher

__all__ = ["SampleDefence"]


class SampleDefence:
    """What has been seen of the samples of a run.

    Args:
        teacher: The dense network.
        loss_fn: Per-sample loss.
        keep: Makes a list of altered batches, each of which comes as it is put in its place.
        at_once: Samples that are shifted at once.
        defences: What is doubted: labels, inputs.

    Attributes:
        judges: Held-out batches of the stage in which something was first seen; None where nothing was.
    """

    def __init__(
        self,
        teacher: Teacher,
        loss_fn: GaussNewtonLoss,
        keep: Callable[[Iterable[Any]], list[Any]] = list,
        at_once: int = AT_ONCE,
        defences: Collection[str] = DEFENCES,
    ) -> None:
        self._teacher = teacher
        self._loss_fn = loss_fn
        self._keep, self._at_once = keep, at_once
        self._doubts_inputs, self._doubts_labels = "inputs" in defences, "labels" in defences
        self._radius: float | None = None  # by which inputs were seen to have been shifted
        self._labels: LabelDoubt | None = None
        self.judges: list[Any] | None = None

    def remembered(self) -> dict[str, Tensor]:
        """Return what has been seen, for :meth:`recall`."""
        seen = {} if self._radius is None else {"radius": torch.tensor(self._radius, dtype=torch.float64, device="cpu")}
        if self._labels is not None:
            seen["labels"] = torch.tensor(
                [self._labels.rate, self._labels.temperature], dtype=torch.float64, device="cpu"
            )
        for number, (inputs, targets) in enumerate(self.judges or ()):
            seen |= {f"judges {number} inputs": inputs, f"judges {number} targets": targets}
        return seen

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Take over what was seen before."""
        self._radius = float(state["radius"]) if "radius" in state else None
        self._labels = LabelDoubt(*state["labels"].tolist()) if "labels" in state else None
        count, place = sum(name.endswith(" targets") for name in state), self._teacher.device
        pairs = ((state[f"judges {i} inputs"], state[f"judges {i} targets"]) for i in range(count))
        placed = self._keep((inputs.to(place), targets.to(place)) for inputs, targets in pairs)
        self.judges = placed or None

    @property
    def looks(self) -> bool:
        """Whether anything is doubted."""
        return self._doubts_inputs or self._doubts_labels

    def restore(
        self, model: nn.Module, fitting: list[Any], held_out: list[Any], generator: torch.Generator
    ) -> tuple[list[Any], list[Any], float | None]:
        """Return batches with inputs shifted back, where they seem to have been shifted, and how far.

        Args:
            model: The network as the stages so far have left it.
            fitting: Batches that gradients will be taken of; they are asked.
            held_out: Others, asked too whether labels are contradicted; ``judges``, where there are any, which were
                shifted back already.
            generator: Draws the classes that labels are compared with.

        Raises:
            ValueError: If the loss cannot be used.
        """
        with eval_mode(model):
            check_calibration(model, self._loss_fn, [*fitting, *held_out])
        if self._radius is None and self._labels is None and self._doubts_inputs:
            self._look(fitting, held_out, generator)
        if self._radius is None or not can_be_asked(self._loss_fn, fitting):
            return fitting, held_out, None

        def network(inputs: Tensor) -> Tensor:
            return self._loss_fn.outputs(model, (inputs, None))

        with eval_mode(model):
            own = straight_shift(network, fitting, self._at_once)  # the first time, this is the dense network's
            if own is not None:
                return *self._both_back(network, fitting, held_out, own), own
        with self._teacher.asked() as dense:
            return *self._both_back(dense, fitting, held_out, self._radius), self._radius

    def _look(self, fitting: list[Any], held_out: list[Any], generator: torch.Generator) -> None:
        """Look for a shift where labels are contradicted, of those held out as well, and remember it."""
        asked = [*fitting, *held_out]
        asked = asked if can_be_asked(self._loss_fn, asked) else fitting
        if not labels_contradicted(self._loss_fn, self._teacher.outputs(asked), asked):
            return
        with self._teacher.asked() as dense:
            self._radius = shift_seen(dense, self._loss_fn, fitting, generator, self._at_once)

    def _both_back(
        self, network: Network, fitting: list[Any], held_out: list[Any], radius: float
    ) -> tuple[list[Any], list[Any]]:
        """Return both shifted back, but for samples that were already."""
        moved = self._back(network, fitting, radius)
        return moved, held_out if held_out is self.judges else self._back(network, held_out, radius)

    def _back(self, network: Network, batches: list[Any], radius: float) -> list[Any]:
        """Return batches shifted back; some may have no single labels to lead to."""
        if radius == 0 or not can_be_asked(self._loss_fn, batches):
            return batches
        return self._keep(shift_back(network, batches, radius, self._at_once))

    def _doubt(self, samples: Sequence[Taught]) -> LabelDoubt | None:
        """Compare labels with what the dense network predicts."""
        asked = [(one.teacher, one.batch) for one in samples if one.teacher is not None]
        return doubt_labels(self._loss_fn, [outputs for outputs, _ in asked], [batch for _, batch in asked])

    def weigh(
        self, fitting: Sequence[Taught], held_out: Sequence[Taught]
    ) -> tuple[list[Taught], list[Taught], float | None]:
        """Return batches whose labels have the trust that they deserve, and the share of labels that are wrong."""
        if self._doubts_labels:
            seen = self._doubt(
                fitting if self.judges is not None else (*fitting, *held_out)
            )  # judges were asked before
            if seen is not None and (self._labels is None or seen.rate > self._labels.rate):
                self._labels = seen
        doubt = self._labels
        if self.judges is None and held_out and not (doubt is None and self._radius is None):
            self.judges = [one.batch for one in held_out]
        if doubt is None:
            return list(fitting), list(held_out), None
        classes = max((one.teacher.shape[1] for one in (*fitting, *held_out) if one.teacher is not None), default=1)
        return self.trusted(fitting), self.trusted(held_out), doubt.wrong(classes)

    def trusted(self, batches: Sequence[Taught]) -> list[Taught]:
        """Return batches whose labels have the trust that they deserve by what has been seen."""
        doubt = self._labels
        if doubt is None:
            return list(batches)
        return [
            one if one.teacher is None else one._replace(trust=doubt.trust(one.teacher, one.batch[1]))
            for one in batches
        ]
