r"""Passes through the network in the place of products with G: along a direction, back from values, or row by row.

With f the function of a :class:`~swap_prune.fisher.capture.source.RowSource`, J its derivative with respect to the
selected weights at fixed values w of these::

    G d = J d       one forward pass that carries derivatives along d (forward-mode differentiation)
    G^T v = J^T v   one forward and one backward pass, of the values weighted by v
    rows of G       one pass of capture

Not every network can carry derivatives forwards. Where it cannot, ``J d`` is the derivative of ``(J^T u) . d`` with
respect to u (two backward passes); where that fails too, it comes from the rows. Which way holds is tried on one batch:
``v . (J J^T v)`` has to be ``|J^T v|^2``.

Place in the pipeline: beneath :mod:`~swap_prune.fisher.capture.matrix_free`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from swap_prune.fisher.capture.bound import Bound, add_gradient, functional_call
from swap_prune.fisher.capture.hooks import without_gradient
from swap_prune.fisher.capture.row_buffer import RowStream
from swap_prune.fisher.capture.rows import Backend, Passed, pass_rows
from swap_prune.fisher.capture.source import RowSource, write_batch_gradient
from swap_prune.fisher.storage import AT_ONCE, chunk_bytes
from swap_prune.losses import check_losses
from swap_prune.process_memory import pass_on_shortage
from swap_prune.samples.batches import batch_size, is_sliceable
from swap_prune.selection import Selection
from swap_prune.surgery.weights import temporary_weights

__all__ = ["NetworkPasses", "Way"]

Way = Literal["forward", "double backward", "rows"]


@dataclass(frozen=True)
class NetworkPasses:
    """Derivatives of a source's function at fixed weights, a batch at a time.

    The selected weights of the model may be others meanwhile; the rest of it must stay as it is. Whoever calls sets the
    source's mode around :meth:`along` and :meth:`back`.

    Attributes:
        model: The network.
        selection: The p weights.
        source: The function, and whether its batches make one row each.
        weights: Where derivatives are taken, (p,).
        way: How derivatives along a direction are found.
        backend: How capture makes rows.
        at_once: Samples that run through the network at once, at the most.
    """

    model: nn.Module
    selection: Selection
    source: RowSource
    weights: Tensor
    way: Way = "forward"
    backend: Backend = "auto"
    at_once: int = AT_ONCE

    def along(self, batch: Any, direction: Tensor) -> Tensor:
        """Return ``J d``, (m,), for d (p,); one value for a batch that makes one row."""
        if self.way == "rows":
            return self._along_rows(batch, direction)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels can be differentiated once, and backwards
            moved = (self._forwards if self.way == "forward" else self._twice_back)(batch, direction)
        moved = moved.detach().to(self.weights.dtype)
        return moved.sum(0, keepdim=True) / batch_size(batch) ** 0.5 if self.source.in_batches else moved

    def back(self, batch: Any, v: Tensor, total: Tensor) -> None:
        """Add ``J^T v`` to a total, (p,), for v (m,)."""
        with torch.enable_grad():
            values, leaves = self._bound().with_leaves(self.selection, batch, self.weights)
            if self.source.in_batches:
                v = (v / batch_size(batch) ** 0.5).expand(len(values))
            gradients = torch.autograd.grad(values, leaves, v.to(values), allow_unused=True)
        add_gradient(total, gradients, self.selection)

    def rows(
        self,
        batches: Sequence[Any],
        sizes: Sequence[int],
        see: Callable[[Tensor], object],
        advance: Callable[[int], None] = lambda _count: None,
    ) -> Passed | None:
        """Show all rows of some batches, a few at a time.

        Args:
            batches: Some of the source's batches.
            sizes: Rows of each of them.
            see: Called with rows (m, p), which it may overwrite and must not keep.
            advance: Called with the number of samples that were done.

        Returns:
            The values of the function, and how capture made the rows; None for batches that make one row each.

        Raises:
            ValueError: If a gradient or a value is not finite, or as for ``capture_gradients``.
        """
        model, selection, function = self.model, self.selection, self.source.function
        sink = RowStream(selection, self.weights.dtype, self.weights.device, see)
        if not self.source.in_batches:
            with temporary_weights(model, selection, self.weights):
                chunk = chunk_bytes(self.weights.device, self.at_once, lean=True)
                return pass_rows(model, selection, batches, sizes, function, sink, self.backend, chunk, advance)
        with self.source.mode(model):
            for batch in batches:
                write_batch_gradient(sink.room(1)[0], model, selection, batch, function, self.weights)
                sink.keep(1)
                advance(batch_size(batch))
        return None

    def count(self, batch: Any) -> int:
        """Return how many rows a batch makes."""
        if self.source.in_batches:
            return 1
        if is_sliceable(batch):
            return batch_size(batch)
        with self.source.mode(self.model), torch.no_grad():
            return len(check_losses(self.source.function(self.model, batch), None))

    def holds(self, batch: Any, count: int) -> bool:
        """Whether the way works on a batch of ``count`` rows, and agrees with the way back."""
        with self.source.mode(self.model):
            v = torch.ones(count, dtype=self.weights.dtype, device=self.weights.device)
            pulled = torch.zeros_like(self.weights)
            self.back(batch, v, pulled)
            try:
                found = self.along(batch, pulled).double()
            except Exception as refusal:  # a network may refuse in many ways
                pass_on_shortage(refusal)
                return False
        parameters = dict(self.model.named_parameters())
        eps = max(torch.finfo(parameters[name].dtype).eps for name in self.selection.names)
        error = (found.sum() - pulled.double().square().sum()).abs()
        return bool(error <= eps**0.5 * found.abs().sum())

    def _bound(self) -> Bound:
        return Bound(self.model, self.source.function)

    def _forwards(self, batch: Any, direction: Tensor) -> Tensor:
        """Carry derivatives through a forward pass (forward-mode differentiation), (m,)."""
        bound = self._bound()
        state = {name: without_gradient(t) for name, t in (*bound.named_parameters(), *bound.named_buffers())}
        values, moves = self.selection.split(self.weights), self.selection.split(direction)
        with _quiet(), forward_ad.dual_level():
            for name, move in moves.items():
                own = state[f"model.{name}"]
                dual = forward_ad.make_dual(values[name].to(own), move.to(own))  # type: ignore[no-untyped-call]
                state[f"model.{name}"] = dual
            out = functional_call(bound, state, (batch,))
            primal, tangent = forward_ad.unpack_dual(out)  # type: ignore[no-untyped-call]
            return torch.zeros_like(primal) if tangent is None else tangent

    def _twice_back(self, batch: Any, direction: Tensor) -> Tensor:
        """Differentiate ``(J^T u) . d`` by u, (m,)."""
        with torch.enable_grad():
            values, leaves = self._bound().with_leaves(self.selection, batch, self.weights)
            u = torch.ones_like(values, requires_grad=True)
            gradients = torch.autograd.grad(values, leaves, u, create_graph=True, allow_unused=True)
            moves = self.selection.split(direction).values()
            parts = [(g * move.to(g)).sum() for g, move in zip(gradients, moves, strict=True) if g is not None]
            if not parts:
                return torch.zeros_like(values)
            (moved,) = torch.autograd.grad(torch.stack(parts).sum(), u)
            return moved

    def _along_rows(self, batch: Any, direction: Tensor) -> Tensor:
        """Multiply the rows, (m,)."""
        parts: list[Tensor] = []
        self.rows([batch], [self.count(batch)], lambda rows: parts.append(rows @ direction))
        return torch.cat(parts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Do without a warning that torch gives of its own code when it first differentiates forwards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script`")  # a DeprecationWarning, from 2.14 a FutureWarning
        yield
