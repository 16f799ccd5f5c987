"""Does the network find its weights where its modules have them? Else their gradients would be zero.

Gradients are taken of stand-ins for the selected weights, which take the place of the modules' attributes
(:mod:`swap_prune.fisher.capture.bound`). A forward pass that keeps a list of parameters of its own, or a wrapper that
works on one flat copy of them, does not see these; what is written into the weights it sees. A reentrant checkpoint and
a reversible block give their weights gradients only where their inputs have one, which these may not.

Place in the pipeline: before the first capture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.checks import some_of
from swap_prune.fisher.capture.bound import Bound, dense, functional_call
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
        ValueError: If the network does not see all that stands in, or gives it no gradients that training would have.
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
    del own, other, shares
    hidden = _hidden(model, selection, loss_fn, few)
    if hidden:
        raise ValueError(
            f"{some_of(map(repr, hidden))} would get gradients in training, and none where no weight before them is "
            "selected, as behind a reentrant checkpoint or in a reversible block: pass use_reentrant=False to "
            "torch.utils.checkpoint, or leave them out with ignore="
        )


def _hidden(model: nn.Module, selection: Selection, loss_fn: LossFn, few: Any) -> list[str]:
    """Return the selected parameters whose gradients are zero where the selected ones alone ask for some.

    A backward pass as in training is made only where there are such; not where it would reach tensors that are not the
    network's parameters, whose own gradients it would change.
    """
    try:
        with eval_mode(model), torch.enable_grad():
            losses, leaves = Bound(model, loss_fn).with_leaves(selection, few)
            known = {id(leaf) for leaf in (*leaves, *model.parameters())}
            others = any(id(leaf) not in known for leaf in _leaves_of(losses))
            gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    except Exception as error:  # said where gradients are taken
        pass_on_shortage(error)
        return []
    found = [gradient is not None and bool(dense(gradient).any()) for gradient in gradients]
    silent = [name for name, some in zip(selection.names, found, strict=True) if not some]
    if others or not silent:
        return []
    del losses, leaves, gradients
    trained = {
        f"model.{name}": p.detach().requires_grad_(p.requires_grad or name in silent)
        for name, p in model.named_parameters()
        if p.is_floating_point() or p.is_complex()
    }

    def forth_and_back(model: nn.Module, batch: Any) -> Tensor:
        losses = loss_fn(model, batch)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    try:
        with eval_mode(model), torch.enable_grad():
            functional_call(Bound(model, forth_and_back), trained, (few,))
    except Exception:  # it is only a look
        return []
    seen = {name: trained[f"model.{name}"].grad for name in silent}
    return [name for name, gradient in seen.items() if gradient is not None and bool(dense(gradient).any())]


def _leaves_of(losses: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a backward pass would give gradients."""
    nodes, seen = [losses.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [one for one, _ in node.next_functions]
