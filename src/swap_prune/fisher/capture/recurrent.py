"""Recurrent layers told in products, so that what goes into each weight and comes back from it can be seen.

torch computes all steps of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` in one call. Here the same steps run one by one,
one product with the inputs for all of them, and one with the state for each. The gradient of a sample is then the sum
over steps of outer products, as for the tokens of any Linear layer.

Source of the equations: the documentation of ``torch.nn.LSTM``, ``GRU`` and ``RNN``. Place in the pipeline: beneath
:mod:`~swap_prune.fisher.capture.watch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from swap_prune.fisher.capture.layers import Multiply, UnsupportedLayerError

__all__ = ["CELLS", "LAYERS", "Order", "run_cell", "run_layers"]

State = tuple[Tensor, ...]  # h, and c of an LSTM; (n, width) each
Step = Callable[[Tensor, Tensor, State], State]  # (product with the input, product with h, state) -> state
Order = tuple[Tensor | None, Tensor | None]  # of packed samples: what sorts them, and what puts them back


def _lstm(given: Tensor, kept: Tensor, state: State) -> State:
    write, keep, value, read = (given + kept).chunk(4, 1)
    cell = keep.sigmoid() * state[1] + write.sigmoid() * value.tanh()
    return read.sigmoid() * cell.tanh(), cell


def _gru(given: Tensor, kept: Tensor, state: State) -> State:
    (reset, update, value), (own_reset, own_update, own_value) = given.chunk(3, 1), kept.chunk(3, 1)
    new = (value + (reset + own_reset).sigmoid() * own_value).tanh()
    return (new + (update + own_update).sigmoid() * (state[0] - new),)


def _rnn(given: Tensor, kept: Tensor, _state: State, *, nonlinearity: str) -> State:
    total = given + kept
    return (total.tanh() if nonlinearity == "tanh" else total.relu(),)


LAYERS: dict[Any, Step] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: partial(_rnn, nonlinearity="tanh"),
    torch.rnn_relu: partial(_rnn, nonlinearity="relu"),
}
CELLS: dict[Any, Step] = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: _gru,
    torch.rnn_tanh_cell: partial(_rnn, nonlinearity="tanh"),
    torch.rnn_relu_cell: partial(_rnn, nonlinearity="relu"),
}


def run_cell(
    linear: Multiply,
    step: Step,
    x: Tensor,
    hx: Any,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Any:
    """Compute a function of ``CELLS``, a step of (n, width), by two products."""
    is_lstm = isinstance(hx, list | tuple)
    state = tuple(hx) if is_lstm else (hx,)
    new = step(linear(x, weight_ih, bias_ih), linear(state[0], weight_hh, bias_hh), state)
    return new if is_lstm else new[0]


class _Weights(NamedTuple):
    """Of one layer in one direction."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None  # of an LSTM's projection


class _Layers(NamedTuple):
    """What torch's functions are given beside inputs and states."""

    params: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool

    def weights(self) -> list[_Weights]:
        """Return those of each layer and direction."""
        count = len(self.params) // (self.num_layers * (1 + self.bidirectional))
        found = []
        for start in range(0, len(self.params), count):
            ih, hh, *rest = self.params[start : start + count]
            biases, others = rest[: 2 * self.has_biases], rest[2 * self.has_biases :]
            found.append(_Weights(ih, hh, *(biases or (None, None)), *(others or (None,))))
        return found


def run_layers(linear: Multiply, step: Step, order: Order | None, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute a function of ``LAYERS``.

    Args:
        linear: Makes its products.
        step: What it computes between them.
        order: Of packed samples, where it is known.
        arguments: Inputs, states, weights and settings; or packed inputs, their batch sizes and the rest.

    Returns:
        Outputs, and the last states.

    Raises:
        UnsupportedLayerError: If outputs of layers are dropped at random.
    """
    alive: Tensor | None = None
    packed = isinstance(arguments[3], list | tuple)
    layers = _Layers(*arguments[3:9]) if packed else _Layers(*arguments[2:8])
    if layers.train and layers.dropout > 0 and layers.num_layers > 1:
        raise UnsupportedLayerError("a recurrent layer drops outputs at random")
    x, hx = arguments[0], arguments[2 if packed else 1]
    state = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    if packed:
        sorts, unsorts = (None, None) if order is None else order
        x, lengths = pad_packed_sequence(PackedSequence(x, arguments[1], sorts, unsorts), batch_first=True)
        alive = (torch.arange(x.shape[1], device=x.device)[:, None] < lengths.to(x.device)).unsqueeze(2)
        out, state = _all_layers(linear, step, layers, x, alive, _in_order(state, unsorts))
        out, lengths = _in_order((out, lengths), sorts, 0)
        return pack_padded_sequence(out, lengths, batch_first=True).data, *_in_order(state, sorts)
    batch_first = arguments[8]
    out, state = _all_layers(linear, step, layers, x if batch_first else x.transpose(0, 1), alive, state)
    return out if batch_first else out.transpose(0, 1), *state


def _in_order(tensors: tuple[Tensor, ...], order: Tensor | None, axis: int = 1) -> tuple[Tensor, ...]:
    """Put samples in another order, along an axis."""
    if order is None:
        return tensors
    return tuple(one.index_select(axis, order.to(one.device)) for one in tensors)


def _all_layers(
    linear: Multiply, step: Step, layers: _Layers, x: Tensor, alive: Tensor | None, first: State
) -> tuple[Tensor, State]:
    """Run all layers and directions.

    Args:
        linear: Makes the products.
        step: What is between them.
        layers: Weights and settings.
        x: Inputs, (n, steps, width).
        alive: Which steps are a sample's own, (steps, n, 1), where they differ.
        first: States, (layers x directions, n, width) each.

    Returns:
        Outputs, (n, steps, width), and the last states.
    """
    last: list[State] = []
    outputs: list[Tensor] = []
    for place, weights in enumerate(layers.weights()):
        backwards = layers.bidirectional and place % 2 == 1
        out, state = _direction(linear, step, weights, x, alive, tuple(part[place] for part in first), backwards)
        outputs.append(out)
        last.append(state)
        if backwards or not layers.bidirectional:
            x, outputs = torch.cat(outputs, 2), []
    return x, tuple(map(torch.stack, zip(*last, strict=True)))


def _direction(
    linear: Multiply,
    step: Step,
    weights: _Weights,
    x: Tensor,
    alive: Tensor | None,
    state: State,
    backwards: bool,
) -> tuple[Tensor, State]:
    """Run the steps of one layer in one direction."""
    products = linear(x, weights.ih, weights.bias_ih).unbind(1)
    outputs: list[Tensor] = []
    times = range(len(products))
    for t in reversed(times) if backwards else times:
        new = step(products[t], linear(state[0], weights.hh, weights.bias_hh), state)
        if weights.hr is not None:
            new = (linear(new[0], weights.hr), *new[1:])
        if alive is not None:
            new = tuple(torch.where(alive[t], after, before) for after, before in zip(new, state, strict=True))
        state = new
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs, 1), state
