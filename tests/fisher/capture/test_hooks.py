"""Rows from the outputs of layers: against one backward pass a sample for every kind of layer, and when it gives up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from swap_prune.fisher.capture import layers as layers_module
from swap_prune.fisher.capture import rows as capture_module
from swap_prune.fisher.capture.hooks import OutputGradients, check_against
from swap_prune.fisher.capture.layers import UnsupportedLayerError
from swap_prune.fisher.capture.low_rank import capture_low_rank
from swap_prune.fisher.capture.rows import Capture, capture_gradients
from swap_prune.fisher.capture.source import RowSource
from swap_prune.losses import cross_entropy
from swap_prune.samples.batches import slice_batch
from swap_prune.selection import Selection, select_parameters
from tests.cases import generator, normal

N = 5


def pooled(*layers: nn.Module) -> nn.Module:
    """Layers in a row; their outputs, averaged over positions, are the logits."""
    return Pooled(nn.Sequential(*layers))


class Pooled(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).flatten(2).mean(2)


def conv(kind: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    """The layer in question between two others, so that it is neither the first nor the last."""
    return lambda: pooled(kind(2, 4, 1), nn.Tanh(), kind(4, 8, bias=False, **options), nn.Tanh(), kind(8, 3, 1))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (conv(nn.Conv1d, kernel_size=3), (2, 9)),
    "conv1d strided": (conv(nn.Conv1d, kernel_size=4, stride=3, padding=2, dilation=2), (2, 13)),
    "conv2d": (conv(nn.Conv2d, kernel_size=3, padding=1), (2, 6, 7)),
    "conv2d oblong": (conv(nn.Conv2d, kernel_size=(2, 3), stride=(1, 2), padding=(2, 1), dilation=(3, 1)), (2, 9, 8)),
    "conv2d strided": (conv(nn.Conv2d, kernel_size=3, stride=2, padding=1), (2, 7, 8)),
    "conv2d dilated": (conv(nn.Conv2d, kernel_size=3, dilation=2, padding=2), (2, 6, 7)),
    "conv2d grouped": (conv(nn.Conv2d, kernel_size=3, groups=2, padding=1), (2, 6, 7)),
    "conv2d grouped, strided": (conv(nn.Conv2d, kernel_size=3, groups=2, stride=2), (2, 6, 7)),
    "depthwise": (conv(nn.Conv2d, kernel_size=3, groups=4, padding=1), (2, 6, 7)),
    "depthwise strided": (conv(nn.Conv2d, kernel_size=3, groups=4, stride=2), (2, 8, 7)),
    "depthwise circular": (
        conv(nn.Conv2d, kernel_size=3, groups=4, padding=1, padding_mode="circular", dilation=(1, 2)),
        (2, 8, 7),
    ),
    "depthwise 1d": (conv(nn.Conv1d, kernel_size=3, groups=4), (2, 8)),
    "pointwise": (conv(nn.Conv2d, kernel_size=1), (2, 6, 7)),
    "pointwise strided, padded": (conv(nn.Conv2d, kernel_size=1, stride=(2, 3), padding=1), (2, 6, 7)),
    "pointwise grouped": (conv(nn.Conv2d, kernel_size=1, groups=2), (2, 6, 7)),
    "same": (conv(nn.Conv2d, kernel_size=(4, 3), padding="same"), (2, 6, 7)),
    "valid": (conv(nn.Conv2d, kernel_size=3, padding="valid"), (2, 6, 7)),
    **{
        f"{mode} padding": (conv(nn.Conv2d, kernel_size=3, padding=(1, 2), padding_mode=mode), (2, 6, 7))
        for mode in ("circular", "reflect", "replicate")
    },
    "conv3d": (conv(nn.Conv3d, kernel_size=3, padding=1), (2, 4, 3, 5)),
    "conv3d mixed": (conv(nn.Conv3d, kernel_size=(2, 1, 3), stride=(2, 1, 2), groups=2), (2, 5, 3, 6)),
}


def labelled(*shape: int, n: int = N) -> tuple[Tensor, Tensor]:
    return normal(n, *shape, seed=1), torch.randint(3, (n,), generator=generator(2))


def build(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def captured(
    model: nn.Module, batch: Any, backend: Any = "auto", loss_fn: Any = cross_entropy, **options: Any
) -> Capture:
    return capture_gradients(model, select_parameters(model, **options), [batch], loss_fn, backend=backend)


def assert_same(
    model: nn.Module, batch: Any, loss_fn: Any = cross_entropy, backend: str = "hooks", **options: Any
) -> None:
    got = captured(model, batch, "auto", loss_fn, **options)
    expected = captured(model, batch, "loop", loss_fn, **options)
    assert got.backend == backend
    assert float(expected.factor.matrix.abs().max()) > 1e-6
    torch.testing.assert_close(got.factor.matrix, expected.factor.matrix, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.losses, expected.losses, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name: str) -> None:
    make, shape = LAYERS[name]
    assert_same(build(make), labelled(*shape))


@pytest.mark.parametrize(
    "name", ["conv2d", "conv2d strided", "conv2d grouped", "conv3d mixed", "same", "reflect padding"]
)
@pytest.mark.parametrize("limit", [1, 3000])
def test_inputs_too_large_to_cut_out_and_pieces(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one sample each, and the layers' own weight gradient where even one is too large."""
    monkeypatch.setattr(layers_module, "PIECE_BYTES", limit)
    make, shape = LAYERS[name]
    assert_same(build(make), labelled(*shape))


class Linears(nn.Module):
    """Over one token, over several in two axes, called twice and shared."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(4, 6)
        self.twice = nn.Linear(6, 6)
        self.shared = nn.Linear(6, 6, bias=False)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.shared.weight
        self.plain = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(torch.tanh(self.tokens(x))))))
        x = torch.tanh(self.shared(x).mean((1, 2)))
        return self.plain(torch.tanh(self.tied(x)))


class SideBySide(nn.Module):
    """Several items of a sample next to each other in the leading dimension, and a tied convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=2, dilation=2)
        self.second.weight = self.first.weight
        self.flat = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        items = x.flatten(0, 1)
        hidden = torch.tanh(self.first(items) * self.second(input=items))
        return self.flat(hidden.mean((2, 3))).view(len(x), -1, 3).sum(1)


def test_linear_layers() -> None:
    assert_same(build(Linears), labelled(2, 3, 4))


def test_several_items_a_sample_and_shared_weights() -> None:
    assert_same(build(SideBySide), labelled(3, 2, 5, 4))


def test_one_layer_held_under_two_names() -> None:
    def make() -> nn.Module:
        layer = nn.Linear(3, 3)
        return nn.Sequential(layer, nn.Tanh(), layer)

    assert_same(build(make), labelled(3))


def test_layers_that_work_in_place_after_the_first_and_the_others() -> None:
    def make() -> nn.Module:
        kinds = nn.ReLU(inplace=True), nn.LeakyReLU(inplace=True)
        return pooled(nn.Conv2d(2, 4, 3), kinds[0], nn.Conv2d(4, 4, 3), kinds[1], nn.Conv2d(4, 3, 1))

    assert_same(build(make), labelled(2, 7, 7))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def test_a_checkpointed_block() -> None:
    assert_same(build(Checkpointed), labelled(4))


def test_frozen_parameters_inference_tensors_and_inputs_with_a_gradient() -> None:
    model = build(LAYERS["conv2d"][0]).requires_grad_(False)
    inputs, labels = labelled(2, 6, 7)
    assert_same(model, (inputs.clone().requires_grad_(), labels))
    with torch.inference_mode():
        frozen = build(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))).requires_grad_(False)
        batch = labelled(4)
    rows = captured(frozen, batch, "hooks").factor.matrix
    free = build(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    torch.testing.assert_close(rows, captured(free, labelled(4), "loop").factor.matrix)


def test_a_network_in_half_precision() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))).bfloat16()
    inputs, labels = labelled(4)
    batch = inputs.bfloat16(), labels
    got = captured(model, batch, "hooks").factor.matrix
    torch.testing.assert_close(got, captured(model, batch, "loop").factor.matrix, rtol=0.05, atol=0.02)


class Functional(nn.Module):
    """The layer's weight is also used without the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(functional.linear(torch.tanh(self.fc(x)), self.fc.weight)))


class OneByOne(nn.Module):
    """Unbatched calls, each of another sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(one).mean(1) for one in x])


class TokensFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.transpose(0, 1)).square().mean(0)


class InputChanged(nn.Module):
    """Autograd lets it pass as long as no gradient of the weight is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        out = self.fc(x)
        x.mul_(2)
        return out


@pytest.mark.parametrize("tokens", [1, 3, N, 2 * N])
def test_samples_behind_tokens(tokens: int) -> None:
    assert_same(build(TokensFirst), labelled(tokens, 4))


def test_a_weight_that_is_used_without_its_layer_too() -> None:
    assert_same(build(Functional), labelled(4))


def test_a_network_that_is_left_to_vmap() -> None:
    model, batch = build(OneByOne), labelled(2, 6)
    assert_same(model, batch, backend="vmap")
    with pytest.raises(ValueError, match=r"'hooks' does not suit the network: .* leading dimension .*; use 'auto'"):
        captured(model, batch, "hooks")


def test_an_input_changed_in_place_is_noticed() -> None:
    model = build(InputChanged)
    hooks = OutputGradients(model, select_parameters(model), cross_entropy)
    with pytest.raises(UnsupportedLayerError, match="changed in place"):
        hooks.fill_rows(labelled(3), torch.empty(N, 9, dtype=torch.float64))


MIXING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "losses": lambda losses, logits: losses + 0.1 * logits.mean(),
    "gradients": lambda losses, logits: losses * (1 + (logits.square().mean() - logits.square().mean(1)).detach()),
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("sizes", [(N,), (1, N - 1)])
def test_a_loss_that_mixes_samples_is_noticed(name: str, sizes: tuple[int, ...]) -> None:
    """Before any gradient, also if the first batch, of one sample, cannot show it; and by what the hooks made."""

    def mixing(model: nn.Module, batch: Any) -> Tensor:
        return MIXING[name](cross_entropy(model, batch), model(batch[0]))

    model, batch = build(lambda: nn.Sequential(nn.Linear(4, 3))), labelled(4)
    parts = [slice_batch(batch, sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    selection = select_parameters(model)
    for backend in ("auto", "hooks", "vmap", "loop"):
        with pytest.raises(ValueError, match="depends on the others in its batch"):
            capture_gradients(model, selection, parts, mixing, backend=backend)
    hooks = OutputGradients(model, selection, mixing)
    rows, losses = torch.empty(N, 12, dtype=torch.float64), torch.empty(N, dtype=torch.float64)
    losses[:] = hooks.fill_rows(batch, rows)
    alone = capture_gradients(
        model, selection, [slice_batch(batch, i, i + 1) for i in range(N)], mixing, backend="loop"
    )
    with pytest.raises(UnsupportedLayerError, match="not those of single samples"):
        check_against((rows, losses), (alone.factor.matrix, alone.losses), selection, torch.float64)


def test_large_batches_are_run_about_once() -> None:
    """The checks before take a few samples of a batch, however many it has."""
    model, seen = build(lambda: nn.Sequential(nn.Linear(4, 3))), list[int]()
    model.register_forward_pre_hook(lambda _module, arguments: seen.append(len(arguments[0])))
    many = 1000
    batch = (torch.randn(many, 4, dtype=torch.float64), torch.arange(many) % 3)
    capture_gradients(model, select_parameters(model), [batch], cross_entropy)
    assert many <= sum(seen) < 1.1 * many


@pytest.mark.parametrize("target", ["fc.bias", "EmbeddingBag"])
def test_parameters_of_other_kinds_are_refused_by_name(target: str) -> None:
    class WithTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.table = nn.Linear(4, 3), nn.EmbeddingBag(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.table.weight[0]

    with pytest.raises(ValueError, match=r"backend 'hooks'.*'(fc.bias|table.weight)'.*use 'auto'"):
        captured(build(WithTable), labelled(4), "hooks", targets=("Linear", target))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.tanh())


@pytest.mark.parametrize(("kind", "inner"), [(Scaled, True), (Rounded, False)])
def test_a_subclass_that_computes_something_else(kind: type[nn.Module], inner: bool) -> None:
    model = build(lambda: nn.Sequential(kind(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    assert_same(model, labelled(4), backend="hooks" if inner else "vmap")


def test_what_the_losses_do_not_depend_on_has_gradient_zero() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.blocked = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            with torch.no_grad():
                shift = self.blocked(x)
            return self.used(x) + shift

    assert_same(build(Partly), labelled(4))
    rows = captured(build(Partly), labelled(4)).factor.matrix
    assert bool(rows[:, :12].any()) and not bool(rows[:, 12:].any())


@pytest.mark.parametrize("failing", ["forward", "backward"])
def test_a_failure_leaves_the_network_clean(failing: str) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(4, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            out = self.fc(x)
            if torch.is_grad_enabled() and failing == "forward":
                raise KeyError("forward")
            if out.requires_grad:
                out.register_hook(lambda _gradient: 1 / 0)
            return out

    model = build(Fails).train()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = OutputGradients(model, select_parameters(model), cross_entropy)
    with pytest.raises((KeyError, ZeroDivisionError)):
        hooks.fill_rows(labelled(4), torch.empty(N, 12, dtype=torch.float64))
    with pytest.raises((ValueError, KeyError), match=r"gradient failed|forward"):
        captured(model, labelled(4))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters()) and model.training
    assert all(isinstance(p, nn.Parameter) for p in model.fc.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.fc.bias.grad is None and bool((model.fc.weight.grad == 1).all())


def test_hooks_of_the_network_stay_and_see_what_they_saw() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    handle = model[0].register_forward_hook(lambda _layer, _inputs, output: 3 * output)
    assert_same(model, labelled(4))
    assert list(model[0]._forward_hooks) == [handle.id]


def test_chunks_of_other_sizes_give_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(LAYERS["conv2d"][0]), labelled(2, 6, 7, n=9)
    whole = captured(model, batch, "hooks")
    for most in (1, 2, 4):
        monkeypatch.setattr(capture_module, "_MAX_CHUNK", most)
        parts = captured(model, batch, "hooks")
        assert parts.chunk == most < whole.chunk
        torch.testing.assert_close(parts.factor.matrix, whole.factor.matrix, rtol=1e-10, atol=1e-14)


def test_twice_the_same_bits() -> None:
    model, batch = build(LAYERS["conv2d grouped"][0]).float(), labelled(2, 6, 7)
    batch = batch[0].float(), batch[1]
    first, second = captured(model, batch), captured(model, batch)
    assert first.backend == second.backend == "hooks"
    assert torch.equal(first.factor.matrix, second.factor.matrix) and torch.equal(first.losses, second.losses)


def test_the_check_tells_rounding_from_error() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    selection, losses = select_parameters(model), torch.ones(2)
    singles = torch.ones(2, 18)
    singles[:, 12:] *= 1e-9  # a layer whose gradients are nothing but rounding
    rows = singles * (1 + 1e-5)
    rows[:, 12:] = -1e-9
    check_against((rows, losses), (singles, losses), selection, torch.float32)
    rows[1, 3] += 0.1
    with pytest.raises(UnsupportedLayerError, match=r"'0.weight'"):
        check_against((rows, losses), (singles, losses), selection, torch.float32)
    with pytest.raises(UnsupportedLayerError):
        check_against((singles * torch.nan, losses), (singles, losses), selection, torch.float32)
    with pytest.raises(UnsupportedLayerError, match="losses"):
        check_against((singles, 1.1 * losses), (singles, losses), selection, torch.float32)


@pytest.mark.long
def test_no_compiler_is_loaded() -> None:
    """``vmap`` and ``torch.compiler`` import one, which takes longer than many a run."""
    code = (
        "import sys, torch; from torch import nn; from swap_prune import prune; "
        "m = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)); "
        "d = torch.utils.data.TensorDataset(torch.randn(40, 1, 4, 4), torch.arange(40) % 3); "
        "r = prune(m, d, sparsity=0.5, progress=False); print(r.method, 'torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["ewr", "False"]


def test_a_layer_of_small_gradients_is_checked_as_closely_as_one_of_large_ones() -> None:
    selection = Selection({"large": torch.Size([4]), "small": torch.Size([4])})
    expected = torch.tensor([[1.0] * 4 + [1e-4] * 4])
    found = expected.clone()
    found[:, 4:] *= 1.5
    losses = torch.ones(1)
    with pytest.raises(UnsupportedLayerError, match="'small'"):
        check_against((found, losses), (expected, losses), selection, torch.float32)


class Unpadded(nn.Module):
    """Only tokens that are there go through the layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.out = nn.Embedding(50, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        there = tokens != 0
        hidden = self.inner(self.embedding(tokens[there])).relu()
        padded = hidden.new_zeros(*tokens.shape, 6).masked_scatter(there.unsqueeze(-1), hidden)
        return self.out(padded.sum(1) / there.sum(1, keepdim=True))


class Routed(nn.Module):
    """Each token goes to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.out = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 6)
        chosen = (flat[:, 0] > 0).long()
        hidden = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            own = (chosen == number).nonzero().squeeze(1)
            if len(own):
                hidden = hidden.index_put((own,), expert(flat[own]).relu())
        return self.out(hidden.view(x.shape).mean(1))


def ragged(lengths: list[int]) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, 50, (len(lengths), 12))
    tokens[torch.arange(12) >= torch.tensor(lengths).unsqueeze(1)] = 0
    return tokens, torch.randint(3, (len(lengths),))


def routed(share: float) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 4, 6)
    x[..., 0] = torch.where(torch.rand(8, 4) < share, 1.0, -1.0)
    return x, torch.randint(3, (8,))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["lengths", "routes"])
def test_items_that_do_not_lie_sample_by_sample_are_noticed(kind: str, seed: int) -> None:
    """A first batch in which each sample has as many, and others whose items are a multiple of the samples."""
    torch.manual_seed(seed)
    if kind == "lengths":
        model = Unpadded().double().eval()
        batches = [ragged([12] * 8), ragged([12, 3, 9, 5, 12, 7, 4, 12]), ragged(torch.randint(3, 13, (8,)).tolist())]
    else:
        model = Routed().double().eval()
        parts = [routed(1.0), *(routed(0.5) for _ in range(3))]
        batches = [(x.double(), y) for x, y in parts]
    selection = select_parameters(model)
    found, expected = (
        capture_gradients(model, selection, batches, cross_entropy, backend=kind) for kind in ("auto", "loop")
    )
    torch.testing.assert_close(found.factor.matrix, expected.factor.matrix)
    source = RowSource(cross_entropy, batches)
    with pytest.raises(ValueError, match=r"low-rank rows do not suit the network: .*items of each sample"):
        capture_low_rank(model, selection, source, lambda _: None, 64)


def test_batches_of_other_lengths_stay_with_the_hooks() -> None:
    """Tokens are flattened, as many of each sample of a batch: they lie sample by sample."""

    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(x.reshape(-1, 6)).relu().view(len(x), -1, 6).mean(1))

    torch.manual_seed(0)
    model = Flattened().double().eval()
    batches = [(torch.randn(8, length, 6).double(), torch.randint(3, (8,))) for length in (5, 7, 5, 9)]
    selection = select_parameters(model)
    found, expected = (
        capture_gradients(model, selection, batches, cross_entropy, backend=kind) for kind in ("auto", "loop")
    )
    assert found.backend == "hooks"
    torch.testing.assert_close(found.factor.matrix, expected.factor.matrix)
    low_rank = capture_low_rank(model, selection, RowSource(cross_entropy, batches), lambda _: None, 64).factor
    w = torch.randn(selection.total, dtype=torch.float64)
    torch.testing.assert_close(low_rank.matvec(w), expected.factor.matrix @ w)  # layers too small for fewer numbers
