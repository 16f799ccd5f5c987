"""Low-rank rows as factors: products against the dense matrix that they stand for, and how good that matrix is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune.fisher.backends import low_rank as low_rank_module
from swap_prune.fisher.backends.blocked import BLOCK_BYTES
from swap_prune.fisher.backends.low_rank import LowRankFactor, OuterRows, PlainRows
from swap_prune.fisher.capture import layers as layers_module
from swap_prune.fisher.capture.hooks import UnsupportedLayerError
from swap_prune.fisher.capture.low_rank import capture_low_rank, numbers_of_a_row
from swap_prune.fisher.capture.outer_products import leading_outer_products
from swap_prune.fisher.capture.rows import Capture, capture_gradients
from swap_prune.fisher.capture.sketch import draw_sketch, sketch_curvature
from swap_prune.fisher.capture.source import RowSource
from swap_prune.losses import cross_entropy
from swap_prune.pipeline import prune
from swap_prune.selection import Selection, select_parameters
from tests.cases import generator, normal

N = 6


def factor(dtype: torch.dtype = torch.float64) -> LowRankFactor:
    """Rank 1 wide, rank 3 tall, two groups of rank 2, and a layer kept as it is: 35 + 24 + 24 + 5 columns."""
    shapes = {"wide": (1, 1, 5, 7), "tall": (1, 3, 6, 4), "grouped": (2, 2, 4, 3)}
    layers: dict[str, OuterRows | PlainRows] = {
        name: OuterRows(normal(g, N, r, out, seed=3 * i, dtype=dtype), normal(g, N, r, d, seed=3 * i + 1, dtype=dtype))
        for i, (name, (g, r, out, d)) in enumerate(shapes.items())
    }
    return LowRankFactor({**layers, "plain": PlainRows(normal(N, 5, seed=20, dtype=dtype))})


def multiplied_out(low: LowRankFactor) -> Tensor:
    """The dense matrix, row by row and product by product."""
    parts = []
    for layer in low.layers.values():
        if isinstance(layer, PlainRows):
            parts.append(layer.matrix)
            continue
        rows = torch.zeros(layer.shape[0], len(layer.left), layer.left.shape[3], layer.right.shape[3]).to(layer.left)
        for group, (left, right) in enumerate(zip(layer.left, layer.right, strict=True)):
            for i in range(len(left)):
                for u, v in zip(left[i], right[i], strict=True):
                    rows[i, group] += torch.outer(u, v)
        parts.append(rows.flatten(1))
    return torch.cat(parts, 1)


@pytest.fixture(params=[1, 2**26], ids=["small blocks", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank_module, "_BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("blocks")
def test_products() -> None:
    low = factor()
    G = multiplied_out(low)
    w, v = normal(88, seed=1), normal(N, seed=2)
    assert low.shape == G.shape == (N, 88)
    torch.testing.assert_close(low.matvec(w), G @ w)
    torch.testing.assert_close(low.rmatvec(v), G.T @ v)
    torch.testing.assert_close(low.diagonal(), G.square().mean(0))


def test_what_a_solver_asks_for_beside_products() -> None:
    low = factor()
    torch.testing.assert_close(low.row_span(1, 3), multiplied_out(low)[1:3])
    assert low.row_span(0, 99).shape == (N, 88)
    assert not low.iterative and low.column_limit == BLOCK_BYTES // (8 * N)


def test_columns_and_rows_in_the_order_asked_for() -> None:
    low = factor()
    G = multiplied_out(low)
    index = torch.tensor([70, 3, 87, 36, 3, 59, 82, 0])
    torch.testing.assert_close(low.columns(index), G[:, index])
    torch.testing.assert_close(low.columns(torch.arange(88)), G)
    assert low.columns(torch.tensor([], dtype=torch.long)).shape == (N, 0)
    some = low.rows(torch.tensor([4, 0, 4]))
    torch.testing.assert_close(multiplied_out(some), G[[4, 0, 4]])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("scale", ["random", "sparse", "constant", "constant by layer", "zero"])
def test_gram(scale: str) -> None:
    low = factor()
    G = multiplied_out(low)
    values = normal(88, seed=3).abs()
    if scale == "sparse":
        values[torch.rand(88, generator=generator(4)) < 0.7] = 0
    elif scale == "constant":
        values[:] = 1.5
    elif scale == "constant by layer":
        values[:35], values[35:59], values[59:] = 2.0, 0.0, 0.5
    elif scale == "zero":
        values[:] = 0
    torch.testing.assert_close(low.gram(values), G @ torch.diag(values) @ G.T)


def test_dtype_follows_the_factors() -> None:
    low = factor(torch.float32)
    index = torch.arange(3)
    results = [low.matvec(torch.ones(88)), low.rmatvec(torch.ones(N)), low.diagonal(), low.gram(torch.rand(88))]
    assert {result.dtype for result in [*results, low.columns(index)]} == {torch.float32}


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 4\) and \(1, 3, 1, 4\)"):
        OuterRows(torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 1, 4))
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        LowRankFactor({"a": PlainRows(torch.zeros(3, 2)), "b": PlainRows(torch.zeros(4, 2))})
    with pytest.raises(ValueError, match="at least one"):
        LowRankFactor({})


def best(matrices: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


# (T, out, d): M formed, M never formed, few tokens, tall
@pytest.mark.parametrize("shape", [(60, 8, 20), (12, 70, 90), (5, 9, 30), (40, 30, 12), (13, 90, 70)])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_rank_is_used_as_well_as_by_the_singular_value_decomposition(
    shape: tuple[int, int, int], rank: int
) -> None:
    tokens, out, width = shape
    d, a = normal(20, tokens, out, seed=1), normal(20, tokens, width, seed=2)
    fall = 0.8 ** torch.arange(tokens, dtype=torch.float64)
    m = (d * fall[:, None]).mT @ a
    u, v = leading_outer_products(d * fall[:, None], a, rank)
    assert u.shape == (20, rank, out) and v.shape == (20, rank, width)
    least = (m - best(m, rank)).square().sum((1, 2))
    assert bool(((m - u.mT @ v).square().sum((1, 2)) <= 1.01 * least).all())


def test_few_tokens_and_zeros_are_exact() -> None:
    d, a = normal(4, 2, 9, seed=1), normal(4, 2, 7, seed=2)
    u, v = leading_outer_products(d, a, 3)
    torch.testing.assert_close(u.mT @ v, d.mT @ a)
    u, v = leading_outer_products(torch.zeros(3, 30, 9), torch.ones(3, 30, 12), 2)
    assert not bool((u.mT @ v).any())


class Mixed(nn.Module):
    """Convolutions of every shape, Linear layers over one and several tokens, and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 24, 3, groups=2, stride=2)
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24, padding=1)
        self.tokens = nn.Linear(24, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(16, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.depthwise(torch.tanh(self.grouped(torch.tanh(self.conv(x))))))
        x = torch.tanh(self.tokens(x.flatten(2).mT))
        return self.head(torch.tanh(self.again(torch.tanh(self.tied(x).mean(1)))))


def build(make: Callable[[], nn.Module] = Mixed) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    return normal(n, 2, 9, 8, seed=1), torch.randint(9, (n,), generator=generator(2))


GROUPS = {"conv.weight": 1, "grouped.weight": 2, "tokens.weight": 1, "tied.weight": 1, "head.weight": 1}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_captured_rows_are_the_best_of_their_rank(rank: int) -> None:
    model = build()
    selection = select_parameters(model)
    dense = capture_gradients(model, selection, [batch()], cross_entropy, backend="loop")
    capture = capture_low_rank(model, selection, RowSource(cross_entropy, [batch()]), rank=rank)
    torch.testing.assert_close(capture.losses, dense.losses)
    rows = multiplied_out(capture.factor)
    assert rows.shape == (N, selection.total) and tuple(capture.factor.layers) == selection.names
    for name, place in selection.slices().items():
        got, full = rows[:, place], dense.factor.matrix[:, place]
        if name not in GROUPS or name == "head.weight":
            torch.testing.assert_close(got, full, rtol=1e-9, atol=1e-12)
            continue
        shape = N, GROUPS[name], selection.shapes[name][0] // GROUPS[name], -1
        least = (full.view(shape) - best(full.view(shape), rank)).square().sum()
        assert float((got - full).square().sum()) <= 1.01 * float(least) + 1e-20, name


class Normalised(nn.Module):
    """BatchNorm behind convolutions of every shape and a Linear layer over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 24, 3, groups=2, stride=2), nn.BatchNorm2d(24), nn.Tanh(),
            nn.Conv2d(24, 24, 3, groups=24, padding=1), nn.BatchNorm2d(24), nn.Flatten(2),
        )  # fmt: skip
        self.head = nn.Linear(24, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mT).mean(1)


def joined(model: nn.Module, **options: Any) -> tuple[Tensor, Capture, Selection]:
    """G of mini-batches captured in full, and as factors, from the same signs."""
    selection = select_parameters(model)
    dense = sketch_curvature(model, selection, [batch(40)], cross_entropy, generator(5), in_batches=True)
    source = draw_sketch(model, [batch(40)], cross_entropy, generator(5), in_batches=True)
    capture = capture_low_rank(model, selection, source, **options)
    torch.testing.assert_close(capture.losses, dense.losses)
    return dense.factor.row_span(0, 3), capture, selection


def test_rows_of_mini_batches_of_full_rank_are_exact() -> None:
    G, capture, _ = joined(build(Normalised), rank=1000)
    assert capture.factor.shape == G.shape
    torch.testing.assert_close(multiplied_out(capture.factor), G, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, None])
def test_rows_of_mini_batches_are_the_best_of_their_rank(rank: int | None) -> None:
    model = build(Normalised)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    G, capture, selection = joined(model, rank=rank)
    rows = multiplied_out(capture.factor)
    kept = 16 if rank is None else rank
    for name, groups in (("body.0.weight", 1), ("body.3.weight", 2), ("head.weight", 1), ("body.6.weight", 24)):
        place = selection.slices()[name]
        shape = 3, groups, selection.shapes[name][0] // groups, -1
        full, got = G[:, place].reshape(shape), rows[:, place].reshape(shape)
        least = (full - best(full, kept)).square().sum() if name != "body.6.weight" else torch.zeros(())
        assert float((got - full).square().sum()) <= 1.01 * float(least) + 1e-20, name
        if rank == 1 and groups < 24:
            assert float(least) > 1e-3 * float(full.square().sum()), "something is left out"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("together", [False, True])
def test_no_row_takes_more_numbers_than_predicted(together: bool) -> None:
    model = build(Normalised)
    selection = select_parameters(model)
    most = numbers_of_a_row(model, selection, in_batches=together)
    if together:
        _, capture, _ = joined(model)
    else:
        capture = capture_low_rank(model, selection, RowSource(cross_entropy, [batch()]))
    held = capture.factor.nbytes // (8 * capture.factor.shape[0])
    assert held <= most <= selection.total
    assert held == most or together, "every layer has as many positions as its rank"
    with pytest.raises(UnsupportedLayerError, match=r"'head.bias'"):
        numbers_of_a_row(model, select_parameters(model, ("head.bias",)), in_batches=together)


def test_a_weight_used_outside_its_layer_is_seen_in_mini_batches() -> None:
    class Outside(Normalised):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.head.weight.sum()

    with pytest.raises(ValueError, match=r"'head.weight'.*'matrix-free'"):
        joined(build(Outside))


def test_the_numbers_held_are_those_predicted() -> None:
    model = build()
    capture = capture_low_rank(model, select_parameters(model), RowSource(cross_entropy, [batch()]), rank=2)
    numbers = {
        "conv.weight": 2 * (12 + 18),
        "grouped.weight": 2 * 2 * (12 + 54),
        "depthwise.weight": 24 * 9,
        "tokens.weight": 2 * (24 + 16),
        "tied.weight": 2 * (16 + 16),
        "head.weight": 16 + 9,  # one token: rank 1, whatever is allowed
    }
    held = {name: sum(t.numel() for t in layer.tensors) // N for name, layer in capture.factor.layers.items()}
    assert held == numbers
    assert capture.factor.nbytes == 8 * N * sum(numbers.values())


def test_layers_of_several_precisions_have_factors_of_one() -> None:
    torch.manual_seed(0)

    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 9), nn.Linear(9, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.two(self.one(x).relu().double())
            return outputs

    model, batch = Wider(), (normal(20, 8, dtype=torch.float32), torch.arange(20) % 3)
    selection = select_parameters(model)
    factor = capture_low_rank(model, selection, RowSource(cross_entropy, [batch])).factor
    dense = capture_gradients(model, selection, [batch], cross_entropy).factor
    v = normal(20)
    assert factor.rmatvec(v).dtype == selection.dtype(model) == torch.float64
    torch.testing.assert_close(factor.rmatvec(v), dense.rmatvec(v), rtol=1e-5, atol=1e-6)
    prune(model, TensorDataset(*batch), 0.5, "lr", samples=16, storage="low-rank", progress=False)


def test_linear_networks_are_exact() -> None:
    model = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 10), nn.Tanh(), nn.Linear(10, 9)))
    selection = select_parameters(model)
    dense = capture_gradients(model, selection, [batch()], cross_entropy, backend="loop").factor
    low = capture_low_rank(model, selection, RowSource(cross_entropy, [batch()])).factor
    torch.testing.assert_close(multiplied_out(low), dense.matrix, rtol=1e-10, atol=1e-14)
    assert low.nbytes == 8 * N * (144 + 10 + 10 + 9)


def test_chunks_pieces_and_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    selection = select_parameters(model)
    whole = multiplied_out(capture_low_rank(model, selection, RowSource(cross_entropy, [batch()])).factor)
    inputs, labels = batch()
    monkeypatch.setattr("swap_prune.fisher.capture.rows._MAX_CHUNK", 4)
    monkeypatch.setattr(layers_module, "PIECE_BYTES", 1)
    counted: list[int] = []
    parts = [(inputs[:5], labels[:5]), (inputs[5:], labels[5:])]
    capture = capture_low_rank(model, selection, RowSource(cross_entropy, parts), advance=counted.append)
    assert (capture.chunk, counted) == (2, [1, 2, 2, 1])
    torch.testing.assert_close(multiplied_out(capture.factor), whole, rtol=1e-6, atol=1e-10)


def test_twice_the_same_bits() -> None:
    model = build().float()
    inputs, labels = batch()
    selection = select_parameters(model)
    first, second = (
        capture_low_rank(model, selection, RowSource(cross_entropy, [(inputs.float(), labels)])).factor
        for _ in range(2)
    )
    for a, b in zip(first.layers.values(), second.layers.values(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


def test_the_network_is_left_alone() -> None:
    model = build().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    capture_low_rank(model, select_parameters(model), RowSource(cross_entropy, [batch()]))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("rank", [0, True, 1.5])
def test_a_rank_that_makes_no_sense(rank: Any) -> None:
    model = build()
    with pytest.raises(ValueError, match=f"rank must be a whole number of at least 1, got {rank}"):
        capture_low_rank(model, select_parameters(model), RowSource(cross_entropy, [batch()]), rank=rank)


def test_what_it_cannot_do_is_said() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"'conv.bias'.*'matrix-free'"):
        capture_low_rank(model, select_parameters(model, ("conv.bias",)), RowSource(cross_entropy, [batch()]))
    with pytest.raises(ValueError, match="depends on the others in its batch"):
        source = RowSource(lambda net, part: cross_entropy(net, part).cumsum(0), [batch()])
        capture_low_rank(model, select_parameters(model), source)
    with pytest.raises(ValueError, match="at least one"):
        capture_low_rank(model, select_parameters(model), RowSource(cross_entropy, []))
    inputs, labels = batch()
    inputs[4] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        capture_low_rank(model, select_parameters(model), RowSource(cross_entropy, [(inputs, labels)]))
