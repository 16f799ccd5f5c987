"""What the network itself says of a candidate: its losses on held-out samples, and its slope.

The regression sees the network through G alone. Settings are chosen, and first-order steps taken, by asking the
network. A candidate's weights are written to the model. That is safe between the reading of the reference weights and
the writing of the solution. Where BatchNorm will be recalibrated, it works on the statistics of each batch: that is
what recalibration will make of the candidate, without a pass through the network to estimate it.

Where there is a teacher, both are those of a mean of the loss and of the divergence from it
(:mod:`swap_prune.training.teaching`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from swap_prune.distributed import PARTS, Team
from swap_prune.fisher.capture.bound import Bound, add_gradient, flat_gradient
from swap_prune.fisher.capture.rows import capture_gradients
from swap_prune.fisher.defence.gradients import GradientDefence
from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.storage import Storage
from swap_prune.losses import LossFn, errors_worded
from swap_prune.network.modes import batch_statistics, eval_mode
from swap_prune.samples.batches import batch_size, is_single
from swap_prune.selection import Selection
from swap_prune.surgery.weights import temporary_weights, write_weights
from swap_prune.training.teaching import Taught, output_slopes, sizes_of, taught_losses, taught_outputs

__all__ = ["Trials"]


@dataclass(frozen=True)
class Trials:
    """Candidates tried on the model.

    Attributes:
        model: The network; a candidate's weights stay in it.
        selection: Where the p weights lie.
        loss_fn: Per-sample loss.
        fitting: The samples that G was captured on, in batches that run backwards at once.
        held_out: Batches that were not.
        recalibrates: Whether BatchNorm will be recalibrated.
        disturb: What noise does to the weights (p,) that gradients are taken at.
        noisy: What it does to gradients, the rows of a factor.
        defence: What averages noisy gradients; None where there is no need.
        per_sample: Whether it takes those of single samples, or those of the batches.
        whole: The samples of ``fitting`` in larger batches, where those are small so that noise can be told in their
            gradients, and each has statistics of its own; else none.
        clip: What it does to gradients, in place, that are too large for their expected sizes; None: nothing.
        lean: Whether the gradients of batches are added up one by one, where memory is short, instead of being held
            together; then no noise acts on them.
        team: The processes that the batches are shared out to; None: all of them are this one's.
    """

    model: nn.Module
    selection: Selection
    loss_fn: LossFn
    fitting: Sequence[Taught]
    held_out: Sequence[Taught]
    recalibrates: bool
    disturb: Callable[[Tensor], Tensor]
    noisy: Callable[[DenseFactor], DenseFactor]
    defence: GradientDefence | None = None
    per_sample: bool = True
    whole: Sequence[Taught] = ()
    clip: Callable[..., object] | None = None
    lean: bool = False
    team: Team | None = None

    def losses(self, weights: Tensor, kept: Tensor) -> Tensor:
        """Return the losses of a candidate w (p,) on the held-out samples, (n_v,)."""
        write_weights(self.model, self.selection, weights, kept)
        own = range(len(self.held_out)) if self.team is None else self.team.owned(len(self.held_out))
        with self._mode(), torch.no_grad(), _candidate_named():
            found = [self._objective(self.model, self.held_out[number]) for number in own]
        if self.team is None:
            return torch.cat(found)
        return self.team.concatenate(found, _sizes(self.held_out), weights.new_empty(0))

    def blank(self) -> Tensor:
        """Return the losses of the network without any of the p weights on the held-out samples, (n_v,).

        They are infinite where it cannot be asked.
        """
        nothing = torch.zeros_like(self.selection.read(self.model))
        try:
            return self.losses(nothing, nothing.bool())
        except ValueError:
            if self.team is not None:  # the others would wait
                raise
            return nothing.new_full((sum(_sizes(self.held_out)),), math.inf)

    def slope(self, weights: Tensor, kept: Tensor) -> Tensor:
        """Return the mean gradient at a candidate w (p,) over the samples of G, (p,).

        Noise acts on the gradient of each batch; with a defence that takes those of samples, on that of each sample.
        """
        weights = weights.masked_fill(~kept, 0)
        if self.defence is None:
            return self._mean_of_batches(self.disturb(weights))
        gradients = self._of_samples if self.per_sample else self._of_batches
        again = gradients(self.disturb(weights)).mean(0) if self.defence.open else None  # with noise drawn anew
        return self.defence.mean(gradients(self.disturb(weights)), again)

    def whole_slope(self, weights: Tensor, kept: Tensor) -> Tensor:
        """Return the same over the larger batches, whose gradients are taken as they are, (p,)."""
        return replace(self, fitting=self.whole, defence=None, clip=None).slope(weights, kept)

    def _of_samples(self, weights: Tensor) -> Tensor:
        """Return the gradient of each sample at weights (p,), (n, p)."""
        with temporary_weights(self.model, self.selection, weights):
            storage = Storage(at_once=max(_sizes(self.fitting)))
            rows = capture_gradients(self.model, self.selection, self.fitting, self._objective, storage=storage).factor
            with eval_mode(self.model):
                sizes = None if self.clip is None else output_slopes(self.loss_fn, self.model, self.fitting)
        assert isinstance(rows, DenseFactor), "capture's default"
        rows = self.noisy(rows)
        if self.clip is not None:
            self.clip(rows, sizes)
        return rows.matrix

    def _of_batches(self, weights: Tensor) -> Tensor:
        """Return the gradient of the mean of each batch at weights (p,), from a backward pass each."""
        rows, norms = weights.new_empty(len(self.fitting), len(weights)), []
        with self._mode(), torch.enable_grad():
            for row, one in zip(rows, self.fitting, strict=True):
                gradients, at_outputs = self._gradients(one, weights)
                flat_gradient(row, gradients, self.selection)
                norms += [] if at_outputs is None else [torch.linalg.vector_norm(at_outputs)]
        factor = self.noisy(DenseFactor(rows))
        if self.clip is not None:
            sizes = sizes_of(torch.stack(norms)) if len(norms) == len(rows) else None
            if sizes is None:  # sampling noise falls with the size of a batch
                self.clip(factor, self._counts(weights).rsqrt(), gaps=False)
            else:
                self.clip(factor, sizes)
        return factor.matrix

    def _counts(self, weights: Tensor) -> Tensor:
        """Return the sizes of the batches, like weights."""
        return torch.tensor(_sizes(self.fitting), dtype=weights.dtype, device=weights.device)

    def _mean_of_batches(self, weights: Tensor) -> Tensor:
        """Average these over all samples, (p,)."""
        counts = self._counts(weights)
        shares = counts / counts.sum()
        return self._added_up(weights, shares) if self.lean else DenseFactor(self._of_batches(weights)).rmatvec(shares)

    def _added_up(self, weights: Tensor, shares: Tensor) -> Tensor:
        """Return that mean, (p,), with one vector for each part of the batches that this process adds up."""
        count = len(self.fitting)
        parts = 1 if self.team is None else min(PARTS, count)
        own = range(1) if self.team is None else self.team.owned(parts)
        totals, share_of = weights.new_zeros(len(own), len(weights)), shares.tolist()
        most = len(own) if self.team is None else -(-parts // self.team.size)
        with self._mode(), torch.enable_grad():
            for turn in range(most):
                part = own[turn] if turn < len(own) else parts  # nothing is left
                for number in range(part * count // parts, min(part + 1, parts) * count // parts):
                    gradients, _ = self._gradients(self.fitting[number], weights)
                    add_gradient(totals[turn], gradients, self.selection, share_of[number])
                    del gradients  # before the next ones are there
                if self.team is not None:
                    self.team.wait()
        return totals[0] if self.team is None else self.team.add_up(totals, parts)

    def _gradients(self, taught: Taught, weights: Tensor) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """Return the gradients of a batch's mean at weights (p,), one for each selected parameter, and at the outputs.

        To the size of the latter the former are about proportional; it is None where there is no teacher.
        """
        reached: list[Tensor] = []

        def objective(model: nn.Module, taught: Taught) -> Tensor:
            losses, outputs = taught_outputs(self.loss_fn, model, taught)
            reached.extend([] if outputs is None else [outputs])
            return losses

        with _candidate_named():
            losses, leaves = Bound(self.model, objective).with_leaves(self.selection, taught, weights)
            gradients = torch.autograd.grad(losses.mean(), [*leaves, *reached], allow_unused=True)
        return gradients[: len(leaves)], gradients[-1] if reached else None

    def _mode(self) -> AbstractContextManager[None]:
        """Return the mode in which the network is asked, always the same: one sample alone has no variance."""
        alone = any(is_single(one.batch) for one in (*self.fitting, *self.held_out))
        return batch_statistics(self.model) if self.recalibrates and not alone else eval_mode(self.model)

    def _objective(self, model: nn.Module, taught: Taught) -> Tensor:
        return taught_losses(self.loss_fn, model, taught)


def _candidate_named() -> AbstractContextManager[None]:
    """Run the caller's model and loss with weights that are tried."""
    return errors_worded(
        lambda reason: (
            f"the model or the loss failed with weights that pruning tried ({reason}); such a network may give any "
            "outputs: let both bear them, for instance by a clamp"
        )
    )


def _sizes(batches: Sequence[Taught]) -> list[int]:
    return [batch_size(one.batch) for one in batches]
