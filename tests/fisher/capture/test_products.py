"""Rows from the outputs of products, whoever makes them, against one backward pass a sample."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from swap_prune import plan, prune
from swap_prune.fisher.capture import joined, layers, outer_products, recurrent
from swap_prune.fisher.capture.hooks import OutputGradients
from swap_prune.fisher.capture.layers import UnsupportedLayerError
from swap_prune.fisher.capture.low_rank import capture_low_rank
from swap_prune.fisher.capture.rows import capture_gradients
from swap_prune.fisher.capture.source import RowSource
from swap_prune.fisher.capture.watch import Watch
from swap_prune.losses import cross_entropy
from swap_prune.selection import Selection, select_parameters
from tests.cases import but_long, normal

N, STEPS, WIDTH = 5, 4, 6


class Head(nn.Module):
    """A Linear layer before the layer in question and one after it, so that it is neither the first nor the last."""

    def __init__(self, body: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.run = body, run
        self.before, self.after = nn.Linear(3, WIDTH), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.run(self.body, self.before(x).tanh()).flatten(1))


def outputs(body: nn.Module, x: Tensor) -> Tensor:
    return body(x)[0]


def everything(body: nn.Module, x: Tensor) -> Tensor:
    """Outputs and last states, for which both have a slope."""
    out, state = body(x)
    states = state if isinstance(state, tuple) else (state,)
    return torch.cat([out.flatten(1), *(part.transpose(0, 1).flatten(1) for part in states)], 1)


def steps_first(body: nn.Module, x: Tensor) -> Tensor:
    return body(x.transpose(0, 1))[0].transpose(0, 1)


def from_a_state(body: nn.Module, x: Tensor) -> Tensor:
    """Begin with states that depend on the inputs."""
    first = x[:, :2].transpose(0, 1).contiguous()
    return body(x, (first, first.sin()) if isinstance(body, nn.LSTM) else first)[0]


def of_unlike_lengths(body: nn.Module, x: Tensor) -> Tensor:
    """Pack sequences whose lengths go up and down, each told by its sample."""
    lengths = 1 + (x[:, 0, 0] * 1e3).long().remainder(STEPS)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, state = body(packed)
    assert isinstance(out, PackedSequence)
    states = state if isinstance(state, tuple) else (state,)
    padded = pad_packed_sequence(out, batch_first=True, total_length=STEPS)[0]
    return torch.cat([padded.flatten(1), *(part.transpose(0, 1).flatten(1) for part in states)], 1)


def from_a_list(body: nn.Module, x: Tensor) -> Tensor:
    """torch takes one for a tuple."""
    return body(x, [x[:, 0][None], x[:, 1][None]])[0]


def cell(body: nn.Module, x: Tensor) -> Tensor:
    state: Any = None
    out: list[Tensor] = []
    for step in x.unbind(1):
        state = body(step, state)
        out.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(out, 1)


def tied_layers() -> nn.Module:
    lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
    lstm.weight_ih_l1 = lstm.weight_ih_l0
    return lstm


RECURRENT: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "lstm": (lambda: nn.LSTM(WIDTH, 5, batch_first=True), everything),
    "gru": (lambda: nn.GRU(WIDTH, 5, batch_first=True), everything),
    "rnn": (lambda: nn.RNN(WIDTH, 5, batch_first=True), everything),
    "rnn, relu, no bias": (lambda: nn.RNN(WIDTH, 5, nonlinearity="relu", bias=False, batch_first=True), everything),
    "lstm of two layers, both ways": (lambda: nn.LSTM(WIDTH, 5, 2, batch_first=True, bidirectional=True), everything),
    "gru of two layers, both ways": (lambda: nn.GRU(WIDTH, 5, 2, batch_first=True, bidirectional=True), everything),
    "lstm projected": (lambda: nn.LSTM(WIDTH, 5, 2, batch_first=True, bidirectional=True, proj_size=3), everything),
    "lstm with dropout": (lambda: nn.LSTM(WIDTH, 5, 2, batch_first=True, dropout=0.5), everything),
    "lstm, steps first": (lambda: nn.LSTM(WIDTH, 5), steps_first),
    "gru, steps first": (lambda: nn.GRU(WIDTH, 5, bidirectional=True), steps_first),
    "lstm from a state": (lambda: nn.LSTM(WIDTH, WIDTH, 2, batch_first=True), from_a_state),
    "lstm from a list": (lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True), from_a_list),
    "lstm, tied layers": (tied_layers, everything),
    "gru from a state": (lambda: nn.GRU(WIDTH, WIDTH, 2, batch_first=True), from_a_state),
    "lstm packed": (lambda: nn.LSTM(WIDTH, 5, 2, batch_first=True, bidirectional=True), of_unlike_lengths),
    "gru packed": (lambda: nn.GRU(WIDTH, 5, bidirectional=True), of_unlike_lengths),
    "lstm cell": (lambda: nn.LSTMCell(WIDTH, 5), cell),
    "gru cell": (lambda: nn.GRUCell(WIDTH, 5, bias=False), cell),
    "rnn cell": (lambda: nn.RNNCell(WIDTH, 5, nonlinearity="relu"), cell),
}


def attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)


def to_itself(body: nn.Module, x: Tensor) -> Tensor:
    return body(x, x, x)[0]


def to_itself_tokens_first(body: nn.Module, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return body(x, x, x, need_weights=False)[0].transpose(0, 1)


def to_another(body: nn.Module, x: Tensor) -> Tensor:
    memory = x.sin()[:, 1:]
    out, shares = body(x, memory, memory, average_attn_weights=False)
    return torch.cat([out.flatten(1), shares.flatten(1)], 1)


def to_another_tokens_first(body: nn.Module, x: Tensor) -> Tensor:
    x, memory = x.transpose(0, 1), x.sin()[:, 1:].transpose(0, 1)
    return body(x, memory, memory.cos())[0].transpose(0, 1)


def masked(body: nn.Module, x: Tensor) -> Tensor:
    hidden = torch.zeros(len(x), STEPS, dtype=torch.bool)
    hidden[:, -1] = True
    later = torch.ones(STEPS, STEPS, dtype=torch.bool).triu(1)
    return body(x, x, x, key_padding_mask=hidden, attn_mask=later, is_causal=True)[0]


ATTENTION: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "self": (attention(), to_itself),
    "self, no bias": (attention(bias=False), to_itself),
    "self, tokens first": (lambda: nn.MultiheadAttention(WIDTH, 2), to_itself_tokens_first),
    "masked": (attention(), masked),
    "cross": (attention(), to_another),
    "cross, tokens first": (lambda: nn.MultiheadAttention(WIDTH, 2), to_another_tokens_first),
    "keys that are the queries": (attention(), lambda body, x: body(x, x, x.sin())[0]),
    "keys and values of more": (attention(add_bias_kv=True, add_zero_attn=True), to_itself),
    "own widths": (
        attention(kdim=4, vdim=3),
        lambda body, x: body(x, x[..., :4], x[..., :3])[0],
    ),
    "own widths, no bias": (
        attention(kdim=4, vdim=3, bias=False),
        lambda body, x: body(x, x[..., :4], x[..., :3])[0],
    ),
}


class Conv1D(nn.Module):
    """As in transformers: a Linear layer whose weight is (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def upsampled(body: nn.Module, x: Tensor) -> Tensor:
    """Give (n, 4, 6) as many dimensions as a transposed convolution takes."""
    dimensions = len(body.kernel_size)
    return body(x.unflatten(2, (6, 1, 1)[:dimensions]))


TURNED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3), upsampled),
    "conv1d strided": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, padding=2, output_padding=2), upsampled),
    "conv1d dilated": (lambda: nn.ConvTranspose1d(4, 6, 3, dilation=2, padding=1), upsampled),
    "conv1d grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2), upsampled),
    "conv1d, a channel a group": (lambda: nn.ConvTranspose1d(4, 4, 3, groups=4), upsampled),
    "conv1d of one place": (lambda: nn.ConvTranspose1d(4, 6, 1), upsampled),
    "conv2d": (lambda: nn.ConvTranspose2d(4, 6, 3, padding=1), upsampled),
    "conv2d oblong": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), (1, 2), (0, 1), (0, 1), dilation=(3, 1)), upsampled),
    "conv2d, a channel a group": (lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4), upsampled),
    "conv3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=(2, 1, 1)), upsampled),
    "transformers' Conv1D": (lambda: Conv1D(7, WIDTH), lambda body, x: body(x)),
}


class Tied(nn.Module):
    """Words that the head reads with the weight that they were looked up by."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, WIDTH, **options), nn.Linear(WIDTH, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        words = (x[..., 0] * 1e3).long().remainder(7)
        return self.head(self.embed(words).cumsum(1).tanh() + x)


WORDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "tied": (Tied, lambda body, x: body(x)),
    "tied, with padding": (lambda: Tied(padding_idx=2), lambda body, x: body(x)),
    "embedding": (lambda: nn.Embedding(7, 4), lambda body, x: body((x * 1e3).long().remainder(7))),
}


class LoudLSTM(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return super().forward(x * 2, hx)


class PackingLSTM(nn.LSTM):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        lengths = 1 + (x[:, 0, 0] * 1e3).long().remainder(STEPS)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, state = super().forward(packed)
        return pad_packed_sequence(out, batch_first=True, total_length=STEPS)[0], state


class LoudAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, 2 * x, x.sin())


class Adapted(nn.Linear):
    """With what was added to a Linear layer for fine-tuning."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 5)
        self.down, self.up = nn.Linear(WIDTH, 2), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.tanh()) + self.up(self.down(x))


class ScaledWords(nn.Embedding):
    def forward(self, words: Tensor) -> Tensor:
        return super().forward(words) * 4


class ScaledTied(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.embed = ScaledWords(7, WIDTH)
        self.head.weight = self.embed.weight


SUBCLASSES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "lstm": (lambda: LoudLSTM(WIDTH, 5, batch_first=True), everything),
    "lstm that packs": (lambda: PackingLSTM(WIDTH, 5, batch_first=True, bidirectional=True), everything),
    "attention": (lambda: LoudAttention(WIDTH, 2, batch_first=True), outputs),
    "adapted": (Adapted, lambda body, x: body(x)),
    "scaled words": (ScaledTied, lambda body, x: body(x)),
}


class Functional(nn.Module):
    """Uses the weight of a Linear layer by itself."""

    def __init__(self, use: Callable[[Tensor, nn.Linear], Tensor], square: bool = False) -> None:
        super().__init__()
        self.fc, self.use = nn.Linear(WIDTH, WIDTH if square else 5), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.fc)


class Weight(nn.Module):
    """Any weight, and what is done with it."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


def functional_case(use: Callable[[Tensor, nn.Linear], Tensor], *, square: bool = False) -> Any:
    return (lambda: Functional(use, square)), (lambda body, x: body(x))


def weight_case(shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]) -> Any:
    return (lambda: Weight(shape, use)), (lambda body, x: body(x))


class Standardised(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x.clamp(-2, 2), weight, bias)


class ReplacedForward(nn.LSTM):
    def __init__(self) -> None:
        super().__init__(WIDTH, 5, batch_first=True)
        self.forward = lambda x: nn.LSTM.forward(self, x * 2)  # type: ignore[method-assign]


def autoencoded(x: Tensor, fc: nn.Linear) -> Tensor:
    return (x @ fc.weight.T).tanh() @ fc.weight


def looked_up(x: Tensor, weight: Tensor) -> Tensor:
    return weight[(x * 1e3).long().remainder(7) - 3]


FUNCTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "linear": functional_case(lambda x, fc: nn.functional.linear(x, fc.weight, fc.bias)),
    "cast": functional_case(lambda x, fc: nn.functional.linear(x, fc.weight.to(x.dtype).contiguous().clone())),
    "@ T": functional_case(lambda x, fc: x @ fc.weight.T),
    "@ t": functional_case(lambda x, fc: torch.matmul(x, fc.weight.t())),
    "@ transpose": functional_case(lambda x, fc: x.matmul(fc.weight.transpose(-1, 0))),
    "@ permute": functional_case(lambda x, fc: x @ fc.weight.permute(1, 0)),
    "@ turned twice": functional_case(lambda x, fc: x @ fc.weight.mT.T.transpose(0, 1)),
    "@ not turned": functional_case(lambda x, fc: x @ fc.weight.transpose(0, -2), square=True),
    "linear of T": functional_case(lambda x, fc: nn.functional.linear(x, fc.weight.T), square=True),
    "both ways": functional_case(autoencoded),
    "mm": functional_case(lambda x, fc: torch.mm(x.flatten(0, 1), fc.weight.T).unflatten(0, x.shape[:2])),
    "addmm": functional_case(
        lambda x, fc: torch.addmm(fc.bias, x.flatten(0, 1), fc.weight.T, beta=2).view(-1, STEPS, 5)
    ),
    "its shape and values beside": functional_case(
        lambda x, fc: fc(x) * fc.weight.shape[0] * fc.weight.detach().norm() + torch.zeros_like(fc.weight).sum()
    ),
    "x in its type": functional_case(lambda x, fc: fc(x.to(fc.weight).type_as(fc.weight))),
    "nothing of it beside": functional_case(lambda x, fc: fc(x) + 0.0 * fc.weight.sum()),
    "its norm beside": functional_case(lambda x, fc: fc(x) * fc.weight.norm().item()),
    "in the type of x": functional_case(lambda x, fc: nn.functional.linear(x, fc.weight.type_as(x))),
    "its gradient": functional_case(lambda x, fc: fc(x) if fc.weight.grad is None else x),
    "its zeros": functional_case(lambda x, fc: fc(x) * (fc.weight != 0).sum()),
    "squeezed and back": weight_case(
        (STEPS, 1, 3), lambda x, w: torch.conv1d(x, w.squeeze(1).unsqueeze(1), groups=STEPS)
    ),
    "in another shape": weight_case((5, 3, 2), lambda x, w: nn.functional.linear(x, w.flatten(1))),
    "on the left": functional_case(lambda x, fc: (fc.weight @ x.mT).mT),
    "on the left, turned": functional_case(lambda x, fc: (fc.weight.T @ x.mT).mT, square=True),
    "taken": weight_case((7, 3), looked_up),
    "conv": weight_case((3, STEPS, 2), lambda x, w: nn.functional.conv1d(x, w, padding="same")),
    "conv valid": weight_case((2, 2, 2), lambda x, w: torch.conv1d(x, w, groups=2, padding="valid", dilation=(2,))),
    "conv of padded inputs": weight_case(
        (3, STEPS, 3), lambda x, w: nn.functional.conv1d(nn.functional.pad(x, (2, 0)), w, None, 2)
    ),
    "conv transposed": weight_case((STEPS, 3, 3), lambda x, w: nn.functional.conv_transpose1d(x, w, stride=2)),
    "conv in a circle": (lambda: nn.Conv1d(STEPS, 3, 3, padding=2, padding_mode="circular"), lambda body, x: body(x)),
    "conv of clamped inputs": (lambda: Standardised(STEPS, 3, 3), lambda body, x: body(x)),
    "another forward": (ReplacedForward, outputs),
}
CASES = {
    **FUNCTIONS,
    **RECURRENT,
    **ATTENTION,
    **TURNED,
    **WORDS,
    **{f"subclass: {name}": one for name, one in SUBCLASSES.items()},
}


def case(name: str) -> tuple[nn.Module, Selection, tuple[Tensor, Tensor]]:
    make, run = CASES[name]
    torch.manual_seed(0)
    model = Head(make(), run).eval().double()
    x = normal(N, STEPS, 3, seed=1)
    model(x)
    return model, select_parameters(model, ["re:.*weight.*"]), (x, torch.arange(N) % 3)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_single_backward_passes(name: str) -> None:
    model, selection, batch = case(name)
    singles = capture_gradients(model, selection, [batch], cross_entropy, backend="loop")
    found = capture_gradients(model, selection, [batch], cross_entropy)
    assert found.backend == "hooks" and len(selection.names) > 2
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.losses, singles.losses)
    assert (singles.factor.matrix.abs().amax(0) > 0).double().mean() > 0.5


@pytest.mark.parametrize("name", CASES)
def test_all_outer_products_are_the_rows(name: str) -> None:
    model, selection, batch = case(name)
    whole = capture_gradients(model, selection, [batch], cross_entropy, backend="loop").factor
    found = capture_low_rank(model, selection, RowSource(cross_entropy, [batch]), rank=64).factor
    w = normal(selection.total, seed=2)
    torch.testing.assert_close(found.gram(w.square()), whole.gram(w.square()), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.matvec(w), whole.matvec(w), rtol=1e-8, atol=1e-10)
    v = normal(N, seed=3)
    torch.testing.assert_close(found.rmatvec(v), whole.rmatvec(v), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_a_pass_leaves_the_model_as_it_was(name: str) -> None:
    model, selection, batch = case(name)
    before, own = model(batch[0]), {module: (type(module), dict(vars(module)).keys()) for module in model.modules()}
    OutputGradients(model, selection, cross_entropy).run(batch, lambda *_: None, N)
    assert all((type(module), vars(module).keys()) == seen for module, seen in own.items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(batch[0]), before) and torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", [*RECURRENT, *ATTENTION])
def test_what_is_told_in_products_computes_the_same(name: str) -> None:
    model, selection, (x, _) = case(name)
    expected, parameters = model(x), dict(model.named_parameters())
    seen: set[str] = set()
    with Watch({own: parameters[own] for own in selection.names}, lambda one, *_: seen.add(one.name)):
        torch.testing.assert_close(model(x), expected)
    assert seen == set(selection.names)


def penalised(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, batch) + model.body.fc.weight.square().sum()


def set_to(buffer: Tensor, weight: Tensor) -> Tensor:
    buffer[:] = weight
    return buffer


def set_to_zero(weight: Tensor) -> Tensor:
    weight[0] = 0
    return weight


REFUSED: dict[str, tuple[Callable[[Tensor, nn.Linear], Tensor], str]] = {
    "einsum": (lambda x, fc: torch.einsum("bti,oi->bto", x, fc.weight), "torch.functional.einsum"),
    "masked": (lambda x, fc: nn.functional.linear(x, fc.weight * (fc.weight > 0)), "torch.Tensor.mul"),
    "standardised": (lambda x, fc: nn.functional.linear(x, fc.weight / fc.weight.norm()), "torch.Tensor.norm"),
    "clone set": (lambda x, fc: nn.functional.linear(x, set_to_zero(fc.weight.clone())), "torch.Tensor.__setitem__"),
    "spectrum": (
        lambda x, fc: fc(x) + torch.view_as_real(torch.fft.rfft(fc.weight)).sum(),
        "torch.fft.rfft",
    ),
    "clone changed": (lambda x, fc: nn.functional.linear(x, fc.weight.clone().mul_(2)), "torch.Tensor.mul_"),
    "on the left of one": (lambda x, fc: torch.stack([fc.weight @ one for one in x[:, 0]]), "torch.Tensor.matmul"),
    "turned and joined": (lambda x, fc: nn.functional.linear(x, fc.weight.T.reshape(5, WIDTH)), "torch.Tensor.reshape"),
    "scaled": (
        lambda x, fc: torch.addmm(fc.bias, x.flatten(0, 1), fc.weight.T, alpha=2).unflatten(0, x.shape[:2]),
        "torch.addmm",
    ),
    "part": (lambda x, fc: nn.functional.linear(x, fc.weight[:3]), "torch.Tensor.__getitem__"),
    "with itself": (lambda x, fc: x @ (fc.weight.T @ fc.weight), "torch.Tensor.matmul"),
    "set in a buffer": (
        lambda x, fc: x @ set_to(torch.zeros(5, WIDTH, dtype=x.dtype), fc.weight).T,
        "torch.Tensor.__setitem__",
    ),
    "beside": (lambda x, fc: fc(x) + fc.weight.sum(), "torch.Tensor.sum"),
    "joined": (lambda x, fc: nn.functional.linear(x, torch.cat([fc.weight, fc.weight])), "torch.cat"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_uses_of_a_weight_are_seen_and_left_to_others(name: str) -> None:
    use, function = REFUSED[name]
    torch.manual_seed(0)
    model = Head(Functional(use), lambda body, x: body(x)).double()
    batch = normal(N, STEPS, 3, seed=1), torch.arange(N) % 3
    model(batch[0])
    selection = select_parameters(model)
    singles = capture_gradients(model, selection, [batch], cross_entropy, backend="loop")
    found = capture_gradients(model, selection, [batch], cross_entropy)
    assert found.backend in ("vmap", "loop")
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=f"'body.fc.weight' goes to {re.escape(function)}, which is no product"):
        capture_gradients(model, selection, [batch], cross_entropy, backend="hooks")


class Scaled(torch.autograd.Function):
    """A function that no watch sees into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 3 * x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return 3 * gradient @ weight, 3 * gradient.flatten(0, -2).T @ x.flatten(0, -2)


def in_a_thread(x: Tensor, fc: nn.Linear) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fc, 3 * x).result()


def past_modes(x: Tensor, fc: nn.Linear) -> Tensor:
    with torch._C.DisableTorchFunction():
        return fc(3 * x)


def attempted(x: Tensor, fc: nn.Linear) -> Tensor:
    try:
        return torch.einsum("bi,oi->bo", x, fc.weight)
    except RuntimeError:
        return x @ fc.weight.T.detach()


UNSEEN: dict[str, Callable[[Tensor, nn.Linear], Tensor]] = {
    "autograd function": lambda x, fc: Scaled.apply(x, fc.weight),
    "thread": in_a_thread,
    "past modes": past_modes,
    "spectrum": lambda x, fc: torch.fft.rfft(fc.weight).abs().sum() * x[:, :5],
    "complex": lambda x, fc: (x.to(torch.complex128) @ fc.weight.to(torch.complex128).T).real * 3,
    "buffer": lambda x, fc: x @ set_to(torch.zeros(5, WIDTH, dtype=x.dtype), fc.weight).T * 3,
    "attempted": attempted,
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_watch_sees_is_noticed_though_hardly_a_sample_goes_there(name: str) -> None:
    """Samples of small loss, which are not compared with backward passes of their own."""
    use = UNSEEN[name]

    class Rarely(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(WIDTH, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            rare = x[:, :1] > 1
            return self.head((self.fc(x) + rare * use(x, self.fc)).tanh())

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) * torch.where(batch[0][:, 0] > 1, 0.01, 1.0)

    torch.manual_seed(0)
    model, x = Rarely().double(), normal(12, WIDTH, seed=3).clamp(max=0.9)
    x[-1, 0] = 1.5
    batch, selection = (x, torch.arange(12) % 3), select_parameters(model)
    found, singles = (capture_gradients(model, selection, [batch], losses, backend=kind) for kind in ("auto", "loop"))
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-8, atol=1e-11)
    with pytest.raises(UnsupportedLayerError, match=r"'fc.weight' (goes to|is used where)"):
        OutputGradients(model, selection, losses).run(batch, lambda *_: None, 12)


def test_a_loss_that_a_weight_is_a_part_of_is_left_to_others() -> None:
    model, selection, batch = case("linear")
    found = capture_gradients(model, selection, [batch], penalised)
    assert found.backend == "vmap"
    singles = capture_gradients(model, selection, [batch], penalised, backend="loop")
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("lstm", "body.bias_hh_l0"),
        ("lstm cell", "body.bias_ih"),
        ("self", "body.in_proj_bias"),
        ("linear", "body.fc.bias"),
    ],
)
def test_biases_are_left_to_others(name: str, target: str) -> None:
    model, _, batch = case(name)
    selection = select_parameters(model, [target, "re:.*weight.*"])
    with pytest.raises(UnsupportedLayerError, match=f"'{target}' goes to torch"):
        OutputGradients(model, selection, cross_entropy).run(batch, lambda *_: None, N)


class Encoder(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.batch_first = nn.Linear(8, 3), batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x if self.batch_first else x.transpose(0, 1))
        return self.head(x.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("count", [4, 5, 8])
@pytest.mark.parametrize("targets", [("Linear",), ("Linear", "MultiheadAttention")])
def test_transformers_of_torch_with_samples_in_either_place(
    batch_first: bool, count: int, targets: tuple[str, ...]
) -> None:
    """4 tokens a sample: as many as samples, and fewer, so that no place can be told by its length."""
    torch.manual_seed(0)
    model = Encoder(batch_first=batch_first).eval().double()
    selection = select_parameters(model, targets)
    batch = torch.randn(count, 4, 8, dtype=torch.float64), torch.arange(count) % 3
    singles = capture_gradients(model, selection, [batch], cross_entropy, backend="loop")
    found = capture_gradients(model, selection, [batch], cross_entropy)
    assert found.backend == "hooks"
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)


class ByHand(nn.Module):
    """Sequences sorted by their lengths, packed or padded, and put back in their order."""

    def __init__(self, packs: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head, self.packs = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3), packs

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[..., 0] != 0).sum(1)
        order = lengths.argsort(descending=True, stable=True)
        last = self.body(self.packs(x[order], lengths[order]))[1][-1]
        return self.head(last[order.argsort()])


PACKS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sorted": lambda x, lengths: pack_padded_sequence(x, lengths, batch_first=True),
    "sorted again": lambda x, lengths: pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False),
    "padded": lambda x, lengths: x,
}


def sequences(*lengths: int) -> tuple[Tensor, Tensor]:
    x = 1 + torch.rand(len(lengths), 5, 3, dtype=torch.float64)
    for sample, length in zip(x, lengths, strict=True):
        sample[length:] = 0
    return x, torch.arange(len(lengths)) % 3


@pytest.mark.parametrize("packs", PACKS)
@pytest.mark.parametrize("lengths", [([5, 4, 3, 2], [2, 5, 3, 4]), ([5, 5, 5], [3, 5, 4]), ([3], [4], [2, 5, 3, 4])])
def test_samples_that_the_network_sorts_are_not_mixed_up(lengths: tuple[list[int], ...], packs: str) -> None:
    """The first chunk, whose rows are compared with others, is in order already."""
    torch.manual_seed(0)
    model, batches = ByHand(PACKS[packs]).double(), [sequences(*own) for own in lengths]
    selection = select_parameters(model, ["GRU", "Linear"])
    found, singles = (
        capture_gradients(model, selection, batches, cross_entropy, backend=kind) for kind in ("auto", "loop")
    )
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)
    assert found.backend == "loop"
    with pytest.raises(ValueError, match="puts samples in another order before a recurrent layer"):
        capture_low_rank(model, selection, RowSource(cross_entropy, batches))


def test_samples_that_come_sorted_stay_with_hooks() -> None:
    torch.manual_seed(0)
    model, batches = ByHand(PACKS["sorted"]).double(), [sequences(5, 4, 4, 2), sequences(4, 3, 1)]
    found = capture_gradients(model, select_parameters(model, ["GRU", "Linear"]), batches, cross_entropy)
    assert found.backend == "hooks"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_in_order(dtype: torch.dtype) -> None:
    """float16 does not reach as far as the weights of losses do otherwise."""
    torch.manual_seed(0)
    model, batch = ByHand(PACKS["padded"]).to(dtype), sequences(*[5] * 40)
    batch = batch[0].to(dtype), batch[1]
    selection = select_parameters(model, ["GRU", "Linear"])
    found, singles = (
        capture_gradients(model, selection, [batch], cross_entropy, backend=kind) for kind in ("auto", "loop")
    )
    assert found.backend == "hooks"
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=0.05, atol=0.01)


def test_what_is_changed_in_place_after_a_product_is_seen() -> None:
    """The output of a Linear layer of tokens is a view, on a CPU."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = nn.functional.relu_(self.first(x))
            out = self.second(hidden)
            out += hidden
            out[..., :2] *= 2
            return self.third(out).mean(1)

    torch.manual_seed(0)
    model, batch = InPlace().double(), (normal(N, STEPS, 3), torch.arange(N) % 3)
    found, singles = (
        capture_gradients(model, select_parameters(model), [batch], cross_entropy, backend=kind)
        for kind in ("auto", "loop")
    )
    assert found.backend == "hooks"
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)


class Missing(nn.Module):
    """One vector stands in for what is missing of any sample."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.embed, self.head = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5), nn.Linear(5, 3)
        self.register_buffer("query", normal(1, WIDTH, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        token = self.token(self.query)
        return self.head(torch.where((x[:, 0] < -0.8)[:, None], token[0], self.embed(x)).tanh())


@pytest.mark.parametrize("seed", range(3))
def test_samples_that_take_one_of_what_they_share_are_not_mixed_up(seed: int) -> None:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) * torch.where(batch[0][:, 0] < -0.8, 0.2, 1.0)

    torch.manual_seed(seed)
    model, batch = Missing().double(), (normal(24, WIDTH, seed=seed), torch.arange(24) % 3)
    selection = select_parameters(model)
    found, singles = (capture_gradients(model, selection, [batch], losses, backend=kind) for kind in ("auto", "loop"))
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)


class Latents(nn.Module):
    """Unpacks the shape of what a shared product gives."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.head = nn.Linear(WIDTH, 4), nn.Linear(4, 3)
        self.register_buffer("latents", normal(STEPS, WIDTH, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(self.latents)
        tokens, width = query.shape
        return self.head((x[:, :, None] * query.reshape(1, tokens, width)).tanh().sum(1))


def test_networks_that_do_not_bear_repeated_outputs_are_left_to_others() -> None:
    torch.manual_seed(0)
    model, batch = Latents().double(), (normal(N, STEPS), torch.arange(N) % 3)
    selection = select_parameters(model)
    found, singles = (
        capture_gradients(model, selection, [batch], cross_entropy, backend=kind) for kind in ("auto", "loop")
    )
    assert found.backend == "vmap"
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"low-rank rows do not suit the network: .*share the inputs of a layer"):
        capture_low_rank(model, selection, RowSource(cross_entropy, [batch]))


def test_layers_after_another_whose_inputs_are_shared() -> None:
    class Chained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(2, 4), nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
            self.register_buffer("hours", normal(1, STEPS, 2, seed=5))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.second(self.first(self.hours).tanh())).tanh().mean(1))

    torch.manual_seed(0)
    model, batch = Chained().double(), (normal(N, STEPS, WIDTH), torch.arange(N) % 3)
    found, singles = (
        capture_gradients(model, select_parameters(model), [batch], cross_entropy, backend=kind)
        for kind in ("auto", "loop")
    )
    assert found.backend == "hooks"
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [STEPS, N])
def test_inputs_that_are_shared_in_some_batches_alone(count: int) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(WIDTH, 4), nn.Linear(4, 3)
            self.register_buffer("shared", normal(STEPS, WIDTH, seed=5))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.fc(self.shared if bool(x[0, 0, 0] > 5) else x) + x[..., :4]).tanh().mean(1))

    torch.manual_seed(0)
    first, second = normal(count, STEPS, WIDTH), normal(count, STEPS, WIDTH, seed=2) + 9
    model, batches = Sometimes().double(), [(x, torch.arange(count) % 3) for x in (first, second)]
    found, singles = (
        capture_gradients(model, select_parameters(model), batches, cross_entropy, backend=kind)
        for kind in ("auto", "loop")
    )
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)


def test_low_rank_rows_of_a_weight_in_several_shapes_are_refused() -> None:
    def both(x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight.flatten(1)) + torch.conv1d(x.mT, weight).mT

    model = Head(Weight((4, WIDTH, 1), both), lambda body, x: body(x)).double()
    batch = normal(N, STEPS, 3, seed=1), torch.arange(N) % 3
    model(batch[0])
    selection = select_parameters(model, ["re:.*weight"])
    assert capture_gradients(model, selection, [batch], cross_entropy).backend == "hooks"
    with pytest.raises(ValueError, match=r"'body\.weight' is used in several shapes; use another storage"):
        capture_low_rank(model, selection, RowSource(cross_entropy, [batch]))


class Positions(nn.Module):
    """Words and their places, which all samples share."""

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(7, WIDTH), nn.Embedding(STEPS, WIDTH), nn.Linear(WIDTH, 3)
        self.times, self.ids = nn.Linear(2, WIDTH), places
        self.register_buffer("hours", torch.randn(1, STEPS, 2, dtype=torch.float64))

    def forward(self, words: Tensor) -> Tensor:
        return self.head((self.words(words) + self.places(self.ids) + self.times(self.hours)).tanh()).sum(1)


@pytest.mark.parametrize("count", [1, 2, N, STEPS])
@pytest.mark.parametrize("places", [torch.arange(STEPS), torch.arange(STEPS)[None]])
def test_inputs_that_all_samples_share(places: Tensor, count: int) -> None:
    torch.manual_seed(0)
    model = Positions(places).double()
    batch = torch.randint(7, (count, STEPS)), torch.arange(count) % 3
    selection = select_parameters(model, ["Embedding", "Linear"])
    found, singles = (
        capture_gradients(model, selection, [batch, batch], cross_entropy, backend=kind) for kind in ("auto", "loop")
    )
    assert found.backend == "hooks"
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)
    low, w = (
        capture_low_rank(model, selection, RowSource(cross_entropy, [batch, batch]), rank=64),
        normal(selection.total),
    )
    torch.testing.assert_close(low.factor.matvec(w), singles.factor.matvec(w), rtol=1e-8, atol=1e-10)


def test_a_weight_of_another_module_with_groups_of_its_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.groups = nn.Parameter(torch.randn(2, 3, 4)), None

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight.flatten(0, 1).T).cos()[:, :3]

    data = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.arange(40) % 3)
    options: dict[str, Any] = {"targets": ["weight"], "samples": 20, "storage": "low-rank"}
    assert plan(Own(), data, 0.5, **options).chosen is not None
    assert prune(Own(), data, 0.5, progress=False, **options).kept == 12


def test_a_plan_says_what_low_rank_rows_cannot_be_had_of() -> None:
    model = Functional(REFUSED["masked"][0])
    data = torch.utils.data.TensorDataset(torch.randn(40, WIDTH), torch.arange(40) % 3)
    (refused,) = plan(model, data, 0.5, samples=20, storage="low-rank").forecasts
    assert "'fc.weight' goes to torch.Tensor.mul" in refused.obstacle
    with pytest.raises(ValueError, match=r"'fc.weight' goes to torch.Tensor.mul"):
        prune(model, data, 0.5, samples=20, storage="low-rank", progress=False)


def test_vanishing_gradients_are_in_order() -> None:
    torch.manual_seed(0)
    model = Head(nn.RNN(WIDTH, 5, batch_first=True), lambda body, x: body(x)[1][-1])
    batch = torch.randn(70, 60, 3), torch.arange(70) % 3
    with torch.no_grad():
        model(batch[0])
        model.body.weight_hh_l0 *= 0.2
    found = capture_gradients(model, select_parameters(model, ["RNN"]), [batch], cross_entropy)
    assert found.backend == "hooks"


def test_words_are_held_as_numbers_as_long_as_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in the place of each word and zeros elsewhere take a piece of samples at a time, and rows need none of it."""
    model, selection, batch = case("embedding")
    made: list[tuple[int, ...]] = []
    whole = layers.whole_gradient

    def seen(layer: layers.Layer, *arguments: Any) -> Tensor:
        if isinstance(layer, layers.Lookup):
            made.append(tuple(whole(layer, *arguments).shape))
        return whole(layer, *arguments)

    monkeypatch.setattr(outer_products, "whole_gradient", seen)
    monkeypatch.setattr(layers, "whole_gradient", seen)
    monkeypatch.setattr(outer_products, "piece_bytes", lambda device: 1)
    capture_gradients(model, selection, [batch], cross_entropy)
    assert not made
    capture_low_rank(model, selection, RowSource(cross_entropy, [batch]), rank=2)
    assert made == N * [(1, STEPS * WIDTH, 7)]


def test_a_way_of_calling_that_is_not_known_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_arguments: Any) -> Any:
        raise ValueError("not this way")

    model, selection, batch = case("gru")
    monkeypatch.setattr(recurrent, "_all_layers", failing)
    assert capture_gradients(model, selection, [batch], cross_entropy).backend == "loop"
    with pytest.raises(ValueError, match=r"low-rank rows.*cannot be told in products: ValueError: not this way"):
        capture_low_rank(model, selection, RowSource(cross_entropy, [batch]))


def test_what_layers_that_come_back_hold_is_bounded_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves of a pair run through three layers: the first half's calls of the last ones wait for the second's."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers(x[:, 0]) * self.layers(x[:, 1]))

    torch.manual_seed(0)
    model = Siamese().double()
    selection, batch = select_parameters(model), (torch.randn(N, 2, 3).double(), torch.arange(N) % 3)
    call = 2 * N * 3 * 8
    monkeypatch.setattr(joined, "piece_bytes", lambda device: 2 * call)
    most = 0
    add = joined.JoinedCalls.add

    def counted(self: joined.JoinedCalls, *arguments: Any) -> None:
        nonlocal most
        add(self, *arguments)
        most = max(most, self._bytes)
        assert self._bytes == sum(held.bytes for held in self._held.values())

    monkeypatch.setattr(joined.JoinedCalls, "add", counted)
    found, singles = (
        capture_gradients(model, selection, [batch], cross_entropy, backend=kind) for kind in ("auto", "loop")
    )
    assert found.backend == "hooks" and 0 < most < 2 * call
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)


def test_steps_make_one_product_as_far_as_a_piece_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, selection, batch = case("lstm")
    tokens: list[int] = []

    def see(name: str, layer: layers.Layer, inputs: Tensor, gradient: Tensor) -> None:
        if name == "body.weight_hh_l0":
            tokens.append(inputs[0].numel() // 5)

    gradients = OutputGradients(model, selection, cross_entropy)
    gradients.run(batch, see, N)
    assert tokens == [STEPS]
    monkeypatch.setattr(joined, "piece_bytes", lambda device: 2 * N * 25 * 8)  # of two steps: 5 inputs, 20 outputs
    tokens.clear()
    gradients.run(batch, see, N)
    assert tokens == [2, 2]


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_whose_samples_touch_each_other_are_refused(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(7, 4, **options), nn.Flatten(), nn.Linear(8, 3))
    gradients = OutputGradients(model, select_parameters(model, ["Embedding"]), cross_entropy)
    with pytest.raises(UnsupportedLayerError, match=r"'0\.weight' goes to torch.nn.functional.embedding, which is no"):
        gradients.run((torch.ones(N, 2, dtype=torch.long), torch.arange(N) % 3), lambda *_: None, N)


def test_a_layer_that_does_more_on_some_data_is_looked_at_in_every_chunk() -> None:
    class Outliers(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            apart = nn.functional.linear(x.clamp(-2, 2), self.weight, self.bias)
            return torch.where((x.abs() > 2).any(1, keepdim=True), apart, super().forward(x))

    torch.manual_seed(0)
    model = nn.Sequential(Outliers(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    near, far = torch.rand(6, 3).double(), torch.full((2, 3), 3.0).double()
    batches = [(near, torch.arange(6) % 3), (far, torch.arange(2))]
    found, singles = (
        capture_gradients(model, select_parameters(model), batches, cross_entropy, backend=kind)
        for kind in ("auto", "loop")
    )
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix, rtol=1e-9, atol=1e-12)


def test_classes_that_keep_account_of_their_subclasses_see_none() -> None:
    known: list[str] = []

    class Registered(nn.Linear):
        def __init_subclass__(cls, *, tag: str, **named: Any) -> None:
            known.append(tag)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    torch.manual_seed(0)
    model = nn.Sequential(Registered(3, 4), nn.Linear(4, 3))
    batch = torch.randn(N, 3), torch.arange(N) % 3
    assert capture_gradients(model, select_parameters(model), [batch], cross_entropy).backend == "hooks"
    assert not known and type(model[0]) is Registered


def test_calls_that_the_losses_do_not_depend_on_keep_nothing_back() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(x)
            self.fc(out)
            return out

    torch.manual_seed(0)
    model, batch = Looped().double(), (torch.randn(N, 3).double(), torch.arange(N) % 3)
    found, singles = (
        capture_gradients(model, select_parameters(model), [batch], cross_entropy, backend=kind)
        for kind in ("auto", "loop")
    )
    assert found.backend == "hooks"
    torch.testing.assert_close(found.factor.matrix, singles.factor.matrix)


@pytest.mark.parametrize(
    "name", but_long(["lstm projected", "masked", "conv2d oblong"], short=["masked", "conv2d oblong"])
)
@pytest.mark.parametrize("storage", ["float32", "low-rank"])
def test_pruned_by_one_call(name: str, storage: str) -> None:
    model, selection, (x, y) = case(name)
    data = torch.utils.data.TensorDataset(torch.cat([x] * 8), torch.cat([y] * 8))
    report = prune(model, data, 0.5, targets=["re:.*weight.*"], storage=storage, progress=False)
    assert report.kept == selection.total - selection.total // 2
