"""Recurrent layers told in Linear layers, so that what goes into each weight and comes back from it can be seen.

torch computes all steps of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` in one call. Here the same steps run one by one,
the product with the inputs by one Linear layer for all of them, that with the state by another for each. The gradient
of a sample is then the sum over steps of outer products, as for the tokens of any Linear layer.

Source of the equations: the documentation of ``torch.nn.LSTM``, ``GRU`` and ``RNN``. Place in the pipeline: beneath
:mod:`~swap_prune.fisher.capture.seen_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

__all__ = ["CELLS", "LAYERS", "cell_forward", "layer_forward"]

State = tuple[Tensor, ...]  # h, and c of an LSTM; (n, width) each
Linears = Mapping[str, nn.Module]  # by the name of the weight
Step = Callable[[Tensor, Tensor, State], State]  # (product with the input, product with h, state) -> state

LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


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


def _step_of(module: Any) -> Step:
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return _lstm
    return _gru if isinstance(module, nn.GRU | nn.GRUCell) else partial(_rnn, nonlinearity=module.nonlinearity)


def cell_forward(module: nn.RNNCellBase, linears: Linears) -> Callable[..., Any]:
    """Return what computes as a cell's own ``forward``, by Linear layers for ``weight_ih`` and ``weight_hh``."""
    step, is_lstm = _step_of(module), isinstance(module, nn.LSTMCell)

    def forward(input: Tensor, hx: Any = None) -> Any:  # torch's name
        x = _in_rows(input)
        given = linears["weight_ih"](x)
        if hx is None:
            zeros = given.new_zeros(len(x), module.hidden_size)
            hx = (zeros, zeros) if is_lstm else zeros
        state = tuple(map(_in_rows, hx if is_lstm else (hx,)))
        new = step(given, linears["weight_hh"](state[0]), state)
        new = new if input.ndim == 2 else tuple(part.squeeze(0) for part in new)
        return new if is_lstm else new[0]

    return forward


def _in_rows(x: Tensor) -> Tensor:
    """Return what a single sample without a dimension of its own has in one."""
    return x if x.ndim == 2 else x.unsqueeze(0)


def layer_forward(module: nn.RNNBase, linears: Linears) -> Callable[..., Any]:
    """Return what computes as a recurrent layer's own ``forward`` in eval mode, by Linear layers for its weights."""

    def forward(input: Any, hx: Any = None) -> Any:  # torch's name
        x, alive = _samples_first(input, batch_first=module.batch_first)
        batched = isinstance(input, PackedSequence) or input.ndim == 3
        given = None if hx is None else tuple(hx) if isinstance(module, nn.LSTM) else (hx,)
        if given is not None and not batched:
            given = tuple(part.unsqueeze(1) for part in given)
        out: Any
        out, state = _all_layers(module, linears, x, alive, given)
        if not batched:
            out, state = out.squeeze(0), tuple(part.squeeze(1) for part in state)
        elif isinstance(input, PackedSequence):
            out = _packed(out, input)
        elif not module.batch_first:
            out = out.transpose(0, 1)
        return out, state if isinstance(module, nn.LSTM) else state[0]

    return forward


def _samples_first(given: Any, *, batch_first: bool) -> tuple[Tensor, Tensor | None]:
    """Return inputs (n, steps, width), and which steps are a sample's own, (steps, n, 1), where they differ."""
    if isinstance(given, PackedSequence):
        x, lengths = pad_packed_sequence(given, batch_first=True)
        steps = torch.arange(x.shape[1], device=x.device)
        return x, (steps[:, None] < lengths.to(x.device)).unsqueeze(2)
    if given.ndim == 2:
        return given.unsqueeze(0), None
    return given if batch_first else given.transpose(0, 1), None


def _packed(out: Tensor, like: PackedSequence) -> PackedSequence:
    """Pack outputs (n, steps, width) in the order of the inputs."""
    lengths = pad_packed_sequence(like, batch_first=True)[1]
    if like.sorted_indices is not None:
        out, lengths = out[like.sorted_indices], lengths[like.sorted_indices.to(lengths.device)]
    data = pack_padded_sequence(out, lengths, batch_first=True).data
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)


def _all_layers(
    module: nn.RNNBase, linears: Linears, x: Tensor, alive: Tensor | None, given: State | None
) -> tuple[Tensor, State]:
    """Run all layers and directions; return (n, steps, width) and the last states, (layers x directions, n, width)."""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    last: list[State] = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in directions:
            first = None if given is None else tuple(part[len(last)] for part in given)
            out, state = _direction(module, linears, f"_l{layer}{direction}", x, alive, first)
            outputs.append(out)
            last.append(state)
        x = torch.cat(outputs, 2)
    return x, tuple(map(torch.stack, zip(*last, strict=True)))


def _direction(
    module: nn.RNNBase, linears: Linears, place: str, x: Tensor, alive: Tensor | None, state: State | None
) -> tuple[Tensor, State]:
    """Run the steps of one layer in one direction."""
    step, project = _step_of(module), linears.get(f"weight_hr{place}")
    products = linears[f"weight_ih{place}"](x).unbind(1)
    if state is None:
        widths = (module.proj_size or module.hidden_size, module.hidden_size)
        state = tuple(products[0].new_zeros(len(x), w) for w in widths[: 2 if isinstance(module, nn.LSTM) else 1])
    outputs: list[Tensor] = []
    times = range(len(products))
    backwards = place.endswith("_reverse")
    for t in reversed(times) if backwards else times:
        new = step(products[t], linears[f"weight_hh{place}"](state[0]), state)
        if project is not None:
            new = (project(new[0]), *new[1:])
        if alive is not None:
            new = tuple(torch.where(alive[t], after, before) for after, before in zip(new, state, strict=True))
        state = new
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs, 1), state
