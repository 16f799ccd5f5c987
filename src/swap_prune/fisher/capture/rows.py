"""Per-sample gradients: row i of G is the gradient of sample i's loss at the current weights.

The network runs in eval mode (dropout off, BatchNorm with its running
statistics), so that samples do not see each other. Three back ends give the same rows within rounding:

- ``hooks``: one forward pass of a chunk and one backward pass to the outputs of the selected layers
  (:mod:`swap_prune.fisher.capture.hooks`), for weights that are used in products alone
  (:mod:`swap_prune.fisher.capture.watch`). The rows of largest loss are checked against backward passes of their
  own, until two that are not zero have been.
- ``vmap``: ``torch.func.vmap(grad(loss))`` over a chunk, for all other parameters, beside no recurrent layer.
- ``loop``: one backward pass a sample, for networks, losses or batches that neither can take.

A chunk is sized from a measurement of what one sample keeps for its backward pass. Bytes are measured and not seconds,
since a chunk chosen by the clock would make two runs of one seed differ in their last bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from swap_prune.checks import first_line
from swap_prune.fisher.capture.bound import Bound, dense, functional_call
from swap_prune.fisher.capture.footprint import saved_bytes
from swap_prune.fisher.capture.hooks import OutputGradients, check_against, without_gradient
from swap_prune.fisher.capture.layers import UnsupportedLayerError, piece_bytes
from swap_prune.fisher.capture.row_buffer import RowSink
from swap_prune.fisher.capture.shared_rows import SharedStore
from swap_prune.fisher.capture.stores import open_store
from swap_prune.fisher.factor import FisherFactor
from swap_prune.fisher.storage import CHUNK_BYTES, Storage
from swap_prune.losses import LossFn, check_calibration, check_independence, check_losses, describe, least_precise
from swap_prune.network.modes import eval_mode
from swap_prune.process_memory import pass_on_shortage
from swap_prune.samples.batches import batch_size, is_sliceable, map_tensors, slice_batch
from swap_prune.selection import Selection

__all__ = ["Backend", "Capture", "Passed", "capture_gradients", "pass_rows"]

Backend = Literal["auto", "hooks", "vmap", "loop"]

_MAX_CHUNK = 256
_UNCOUNTED_CHUNK = 8  # samples, where what one keeps cannot be counted
_CHECKED = 2  # gradients, zeros apart, with backward passes of their own; one cannot show a loss that mixes samples
_CHECKED_OF_MANY = 8  # the same where a layer sees several items of a sample, which may not lie side by side


@dataclass(frozen=True)
class Capture:
    """Gradients of one set of calibration samples.

    Attributes:
        factor: G, (n, p); dense, unless another storage was asked for.
        losses: Loss of each sample; as many as there were samples.
        backend: How the rows were made: ``hooks``, ``vmap``, ``loop`` or ``mini-batch``.
        chunk: Samples a chunk.
        sizes: What the norms of the rows should be proportional to, (n,), where that is known.
    """

    factor: FisherFactor
    losses: Tensor
    backend: str
    chunk: int
    sizes: Tensor | None = None


@dataclass(frozen=True)
class Passed:
    """What is known once all rows were handed over.

    Attributes:
        losses: Loss of each sample.
        backend: How the rows were made.
        chunk: Samples a chunk.
    """

    losses: Tensor
    backend: Backend
    chunk: int


def capture_gradients(
    model: nn.Module,
    selection: Selection,
    batches: Sequence[Any],
    loss_fn: LossFn,
    *,
    backend: Backend = "auto",
    storage: Storage | None = None,
    advance: Callable[[int], None] = lambda _count: None,
) -> Capture:
    """Compute G, (n, p), at the model's current weights.

    Args:
        model: The network; its weights, buffers and modes are as before when this returns.
        selection: The p weights that gradients are taken of.
        batches: Calibration batches on the model's device.
        loss_fn: ``(model, batch) -> (n,)`` losses.
        backend: ``hooks``, ``vmap``, ``loop``, or ``auto``: the first of them that the network allows.
        storage: How G is held; by default dense.
        advance: Called with the number of rows that were added, for progress.

    Returns:
        G and the losses.

    Raises:
        ValueError: If a loss is not finite or not per sample, a label is out of range, a gradient is not finite, or
            the back end that was asked for does not suit the network.
    """
    with eval_mode(model):
        sizes = check_calibration(model, loss_fn, batches)
        check_independence(model, loss_fn, batches)
    device = next(model.parameters()).device
    plan = Storage() if storage is None else storage
    store = open_store(plan, sum(sizes), selection, selection.dtype(model), device)
    passed = pass_rows(model, selection, batches, sizes, loss_fn, store, backend, plan.chunk_bytes(device), advance)
    return Capture(store.finish(), passed.losses, passed.backend, passed.chunk)


def pass_rows(
    model: nn.Module,
    selection: Selection,
    batches: Sequence[Any],
    sizes: Sequence[int],
    loss_fn: LossFn,
    sink: RowSink,
    backend: Backend = "auto",
    chunk_bytes: int = CHUNK_BYTES,
    advance: Callable[[int], None] = lambda _count: None,
) -> Passed:
    """Hand the rows of G over as they come; :func:`capture_gradients` without the checks before and the store behind.

    Args:
        model: The network.
        selection: The p weights.
        batches: Calibration batches, checked.
        sizes: Rows of each of them.
        loss_fn: ``(model, batch) -> (n,)`` losses.
        sink: What takes the rows.
        backend: How they are made.
        chunk_bytes: Bytes of one chunk of samples, their gradients included.
        advance: Called with the number of rows.

    Raises:
        ValueError: As for :func:`capture_gradients`.
    """
    shared = sink if isinstance(sink, SharedStore) else None
    losses = torch.zeros(sum(sizes), dtype=selection.dtype(model), device=next(model.parameters()).device)
    own_losses = losses if shared is None else torch.zeros_like(losses)
    start = 0
    with eval_mode(model):
        capturer = _Capturer(Bound(model, loss_fn), selection, backend, chunk_bytes)
        for batch, size in zip(batches, sizes, strict=True):
            for part in capturer.chunks(batch):
                if shared is not None and start > 0 and is_sliceable(part):
                    count = shared.in_turn(batch_size(part), partial(capturer.fill, part, losses=own_losses[start:]))
                else:
                    if shared is not None:  # its room holds rows of chunks that were taken in turns
                        shared.end_round()
                    room = sink.room(batch_size(part) if is_sliceable(part) else size)
                    count = capturer.fill(part, room, losses[start:])
                    sink.keep(count)
                start += count
                advance(count)
    if shared is not None:
        losses += shared.team.overlay(own_losses)
    losses = losses[:start]
    check_losses(losses, None)
    return Passed(losses, capturer.backend, capturer.chunk)


class _Capturer:
    """One back end, chosen on the first chunk, with the functional state that its calls share."""

    def __init__(self, module: Bound, selection: Selection, backend: Backend, chunk_bytes: int) -> None:
        self._module = module
        self._selection = selection
        parameters = {name: without_gradient(p) for name, p in module.named_parameters()}
        buffers = {name: without_gradient(b) for name, b in module.named_buffers()}
        names = {f"model.{name}" for name in selection.names}
        self._weights = {name: p for name, p in parameters.items() if name in names}
        self._rest = {**{name: p for name, p in parameters.items() if name not in names}, **buffers}
        self._fallback = backend == "auto"
        self.backend: Backend = "hooks" if backend == "auto" else backend
        self.chunk = 0
        self._chunk_bytes = chunk_bytes
        self._checked = {True: 0, False: 0}  # in chunks of several samples, which could be mixed up, and of one
        if self.backend == "hooks":
            self._hooks = OutputGradients(module.model, selection, module.function)

    def _without_hooks(self) -> Backend:
        """Return the back end after hooks: vmap forms a recurrent layer's gradients at every step anew."""
        return "loop" if any(isinstance(module, nn.RNNBase) for module in self._module.modules()) else "vmap"

    def chunks(self, batch: Any) -> Iterator[Any]:
        """Split a batch in chunks of the size found by measurement."""
        if not is_sliceable(batch):
            self.backend, self.chunk = "loop", max(self.chunk, 1)
            yield batch
            return
        batch = map_tensors(without_gradient, batch)
        if self.chunk == 0:
            self.chunk = self._measure_chunk(slice_batch(batch, 0, 1))
        size = batch_size(batch)
        for start in range(0, size, self.chunk):
            yield slice_batch(batch, start, min(start + self.chunk, size))

    def fill(self, batch: Any, rows: Tensor, losses: Tensor) -> int:
        """Write the gradients and losses of a chunk to the first rows; return how many there were."""
        try:
            while self.backend != "loop":
                fill = self._fill_hooks if self.backend == "hooks" else self._fill_vmap
                try:
                    return fill(batch, rows, losses)
                except Exception as error:  # a network may refuse in many ways
                    pass_on_shortage(error)
                    if isinstance(error, ValueError):
                        raise
                    if not self._fallback and isinstance(error, UnsupportedLayerError):
                        raise ValueError(f"backend 'hooks' does not suit the network: {error}; use 'auto'") from error
                    if not self._fallback:
                        raise
                    self.backend = self._without_hooks() if self.backend == "hooks" else "loop"
            if not is_sliceable(batch):
                return self._fill_loop(batch, rows, losses)
            size = batch_size(batch)  # one sample at a time: a backward pass costs what its whole batch costs
            for i in range(size):
                self._fill_loop(slice_batch(batch, i, i + 1), rows[i:], losses[i:])
            return size
        except ValueError:
            raise
        except Exception as error:  # whatever the caller's model or loss raises
            pass_on_shortage(error)
            reason = first_line(error, typed=True)
            raise ValueError(f"the gradient failed on a calibration batch {describe(batch)}: {reason}") from error

    def _fill_hooks(self, batch: Any, rows: Tensor, losses: Tensor) -> int:
        size = batch_size(batch)
        values = self._hooks.fill_rows(batch, rows)
        losses[:size] = values
        if self._checked[size > 1] < _CHECKED or self._hooks.changed:
            count = min(size, _CHECKED_OF_MANY if self._hooks.flattened else _CHECKED)
            chosen = losses[:size].topk(count).indices  # those of no loss may have no gradient either
            found = rows[chosen], losses[chosen]
            singles, expected = map(torch.empty_like, found)
            for i, place in enumerate(chosen.tolist()):
                self._fill_loop(slice_batch(batch, place, place + 1), singles[i:], expected[i:])
            check_against(found, (singles, expected), self._selection, least_precise(self._weights.values()))
            self._checked[size > 1] += int(singles.any(1).sum())
        return size

    def _fill_vmap(self, batch: Any, rows: Tensor, losses: Tensor) -> int:
        size = batch_size(batch)
        parts: list[Tensor] = []
        map_tensors(lambda t: parts.append(t) if t.ndim and t.shape[0] == size else None, batch)

        def sample_loss(weights: dict[str, Tensor], *sample: Tensor) -> Tensor:
            supply = iter(sample)
            one = map_tensors(lambda t: next(supply).unsqueeze(0) if t.ndim and t.shape[0] == size else t, batch)
            state = {**self._rest, **weights}
            return functional_call(self._module, state, (one,)).squeeze(0)  # type: ignore[no-any-return]

        per_sample = vmap(grad_and_value(sample_loss), in_dims=(None, *([0] * len(parts))))
        with warnings.catch_warnings():  # torch asks to be told of operations that it takes sample by sample
            warnings.filterwarnings("ignore", message="There is a performance drop")
            gradients, values = per_sample(self._weights, *parts)
        for name, place in self._selection.slices().items():
            rows[:size, place] = gradients[f"model.{name}"].reshape(size, -1)
        losses[:size] = values.detach()
        return size

    @torch.enable_grad()
    def _fill_loop(self, batch: Any, rows: Tensor, losses: Tensor) -> int:
        weights = {name: w.clone().requires_grad_() for name, w in self._weights.items()}
        values = functional_call(self._module, {**self._rest, **weights}, (batch,))
        check_dependence(check_losses(values, None))
        if len(values) > len(rows):
            raise ValueError(f"loss_fn returned {len(values)} losses for {len(rows)} samples")
        places = self._selection.slices()
        for i, value in enumerate(values):
            gradients = torch.autograd.grad(
                value, list(weights.values()), retain_graph=i + 1 < len(values), allow_unused=True
            )
            for name, gradient in zip(weights, gradients, strict=True):
                place = places[name.removeprefix("model.")]
                rows[i, place] = 0 if gradient is None else dense(gradient).to(rows.dtype)
        losses[: len(values)] = values.detach()
        return len(values)

    def _measure_chunk(self, sample: Any) -> int:
        """Count the bytes that one sample keeps for its backward pass, and fit a chunk to the budget."""
        weights = {name: w.detach().requires_grad_() for name, w in self._weights.items()}
        state = {**self._rest, **weights}

        def run() -> None:
            check_dependence(functional_call(self._module, state, (sample,)))

        try:
            kept = saved_bytes(run, state.values()).total
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):  # torch.func inside the network knows none: nothing is counted
                raise
            return _UNCOUNTED_CHUNK
        own = next(iter(self._weights.values()))
        gradient, place = own.element_size() * self._selection.total, own.device
        budget = self._chunk_bytes - (piece_bytes(place) if self.backend == "hooks" else 0)
        return max(1, min(_MAX_CHUNK, budget // (kept + gradient)))


def check_dependence(losses: Tensor) -> None:
    """Check that losses, computed where gradients are, can be differentiated.

    Raises:
        ValueError: If they depend on none of the selected weights.
    """
    if not losses.requires_grad:
        raise ValueError(
            "the loss does not depend on the selected weights: check that neither the model nor loss_fn detaches them, "
            "or works under torch.no_grad()"
        )
