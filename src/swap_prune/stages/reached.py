"""Does the network find its weights where its modules have them? Else their gradients would be zero.

Gradients are taken of stand-ins for the selected weights, which take the place of the modules' attributes
(:mod:`swap_prune.fisher.capture.bound`). A forward pass that keeps a list of parameters of its own, or a wrapper that
works on one flat copy of them, does not see these; what is written into the weights it sees.

Place in the pipeline: before the first capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from swap_prune.fisher.capture.bound import Bound
from swap_prune.losses import LossFn
from swap_prune.network.modes import eval_mode
from swap_prune.process_memory import pass_on_shortage
from swap_prune.randomness import forked_generator, uniform
from swap_prune.samples.batches import in_own_containers, is_sliceable, slice_batch
from swap_prune.selection import Selection
from swap_prune.surgery.weights import temporary_weights

__all__ = ["check_reached"]

_FEW = 2  # samples
_LEAST = 0.5  # of a weight is left, and up to all of it: each another share, for a network may not see that all shrink
_SHARE = 1e-3  # of the change in the losses: more than it is no rounding,
_ROUNDING = 1e-5  # but for that of losses that hardly change


def check_reached(model: nn.Module, selection: Selection, loss_fn: LossFn, batches: Sequence[Any]) -> None:
    """Compare the losses with other weights standing in, and with the same ones written to the network.

    A network that is random, or fails with such weights, is not judged.

    Args:
        model: The network; it has its own weights afterwards.
        selection: The p weights.
        loss_fn: Per-sample loss.
        batches: Calibration batches on the model's device.

    Raises:
        ValueError: If the network does not see all that stands in.
    """
    few = next((slice_batch(batch, 0, _FEW) for batch in batches if is_sliceable(batch)), None)
    if few is None:
        return
    own, bound = selection.read(model), Bound(model, loss_fn)
    shares = uniform(own.shape, forked_generator(0, "reached"))
    other = own * shares.mul_(1 - _LEAST).add_(_LEAST).to(own)
    try:
        with eval_mode(model), torch.no_grad():
            before, again = (bound.with_leaves(selection, few, own)[0].double() for _ in range(2))
            standing_in = bound.with_leaves(selection, few, other)[0].double()
            with temporary_weights(model, selection, other):
                written = loss_fn(model, in_own_containers(few)).double()
    except Exception as error:  # whatever the caller's model or loss raises: it is said where they are used
        pass_on_shortage(error)
        return
    if not torch.equal(before, again) or not bool((standing_in + written).isfinite().all()):
        return
    change, difference = float((written - before).abs().max()), float((written - standing_in).abs().max())
    if difference > max(_SHARE * change, _ROUNDING * float(before.abs().max())):
        raise ValueError(
            "the network does not read all selected weights from the modules that have them, so that their gradients "
            "would be zero: let forward() use module.weight in place of a list of its own; prune a network before it "
            "is wrapped, as by FSDP; or leave such weights out with ignore="
        )
