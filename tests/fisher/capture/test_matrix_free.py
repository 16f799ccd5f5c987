"""Products that pass through the network, against the dense matrix captured from the same samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swap_prune.fisher.capture import matrix_free
from swap_prune.fisher.capture.matrix_free import MatrixFreeFactor, capture_matrix_free
from swap_prune.fisher.capture.rows import capture_gradients
from swap_prune.fisher.capture.sketch import draw_sketch, sketch_curvature
from swap_prune.fisher.capture.source import RowSource
from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.storage import AT_ONCE
from swap_prune.losses import cross_entropy
from swap_prune.regression.objective import WeightedRidge
from swap_prune.selection import Selection, select_parameters
from tests.cases import but_long, generator, normal

N, CLASSES = 37, 4


class Attention(nn.Module):
    """Fused attention has no derivative along a direction, and no second one."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(6, 18), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(2, (3, 6)).movedim(2, 0).unsqueeze(2)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))


class Tied(nn.Module):
    """One weight is an embedding and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(9, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens)).mean(1)))


class BackwardOnly(torch.autograd.Function):
    """A square whose derivative is only known backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class BackwardOnce(BackwardOnly):
    """The same, once."""

    backward = staticmethod(once_differentiable(BackwardOnly.backward))


class WrongForwards(BackwardOnly):
    """The same with a derivative along a direction that is another function's."""

    @staticmethod
    def jvp(ctx: Any, move: Tensor) -> Tensor:
        return 3 * move


class StraightThrough(torch.autograd.Function):
    """Rounds, and says that it does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Applied(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def perceptron(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *(middle or (nn.Tanh(),)), nn.Linear(8, CLASSES))


def convolutions(normalised: bool = False) -> nn.Module:
    def scaled(count: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(count)] if normalised else []

    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), *scaled(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, groups=2, stride=2, padding=1), *scaled(8), nn.Tanh(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


IMAGES, VECTORS, SEQUENCES = (2, 8, 8), (6,), (5, 6)
# network, shape of a sample, way along a direction
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (perceptron, VECTORS, "forward"),
    "convolutions": (convolutions, IMAGES, "forward"),
    "normalised": (lambda: convolutions(True), IMAGES, "forward"),
    "attention": (Attention, SEQUENCES, "forward"),
    "backward only": (lambda: perceptron(Applied(BackwardOnly)), VECTORS, "double backward"),
    "backward once": (lambda: perceptron(Applied(BackwardOnce)), VECTORS, "rows"),
    "wrong forwards": (lambda: perceptron(Applied(WrongForwards)), VECTORS, "double backward"),
    "straight through": (lambda: perceptron(Applied(StraightThrough)), VECTORS, "double backward"),
}
ROWS = ("empirical", "sketch", "mini-batch")


def build(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def both(
    model: nn.Module,
    shape: tuple[int, ...],
    rows: str,
    targets: tuple[str, ...] = ("Linear", "Conv2d"),
    at_once: int = AT_ONCE,
) -> tuple[MatrixFreeFactor, Tensor, Selection]:
    """The factor, and G captured from the same samples and signs."""
    selection = select_parameters(model, tuple(t for t in targets if t != "Conv2d" or len(shape) == 3))
    x, y = normal(N, *shape, seed=1), torch.randint(CLASSES, (N,), generator=generator(2))
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    if rows == "empirical":
        dense = capture_gradients(model, selection, batches, cross_entropy)
        source = RowSource(cross_entropy, batches)
    else:
        joined = rows == "mini-batch"
        dense = sketch_curvature(model, selection, batches, cross_entropy, generator(3), in_batches=joined)
        source = draw_sketch(model, batches, cross_entropy, generator(3), in_batches=joined)
    free = capture_matrix_free(model, selection, source, at_once=at_once)
    torch.testing.assert_close(free.losses, dense.losses)
    assert isinstance(free.factor, MatrixFreeFactor) and isinstance(dense.factor, DenseFactor)
    return free.factor, dense.factor.matrix, selection


def assert_products(factor: Any, G: Tensor) -> None:
    n, p = G.shape
    w, v, scale = normal(p, seed=4), normal(n, seed=5), normal(p, seed=6).abs() * (torch.arange(p) % 3 != 1)
    index = torch.tensor([p - 1, 0, p // 2, 0])
    assert factor.shape == (n, p) and float(G.abs().max()) > 1e-6
    torch.testing.assert_close(factor.matvec(w), G @ w)
    torch.testing.assert_close(factor.rmatvec(v), G.T @ v)
    torch.testing.assert_close(factor.diagonal(), G.square().mean(0))
    torch.testing.assert_close(factor.columns(index), G[:, index])
    assert factor.columns(index[:0]).shape == (n, 0)
    torch.testing.assert_close(factor.gram(scale), (G * scale) @ G.T)
    torch.testing.assert_close(factor.row_span(1, 3), G[1:3])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_product(name: str, rows: str) -> None:
    make, shape, way = NETWORKS[name]
    factor, G, _ = both(build(make), shape, rows, at_once=7)  # several parts a batch
    assert factor.passes.way == way
    assert len(G) == (4 if rows == "mini-batch" else N)
    assert_products(factor, G)


@pytest.mark.parametrize("rows", ["empirical", "mini-batch"])
def test_columns_in_many_blocks(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_free, "column_limit", lambda n, itemsize, device: 1)
    factor, G, _ = both(build(perceptron), VECTORS, rows)
    factor.block_vectors = 1
    assert factor.column_limit == G.shape[1] // len(G)
    assert_products(factor, G)


@pytest.mark.parametrize("rows", ROWS)
def test_some_rows_in_any_order(rows: str) -> None:
    factor, G, _ = both(build(convolutions), IMAGES, rows)
    index = torch.tensor([len(G) - 1, 0, 2, 0, len(G) // 2])
    some = factor.rows(index)
    assert_products(some, G[index])
    again = torch.tensor([4, 1, 1])
    assert_products(some.rows(again), G[index[again]])


@pytest.mark.parametrize("rows", ROWS)
def test_g_stays_what_it_was_when_the_weights_change_and_products_leave_these(rows: str) -> None:
    """Candidates are written to the model while the regression is solved."""
    model = build(lambda: convolutions(True))
    factor, G, selection = both(model, IMAGES, rows)
    with torch.no_grad():
        for name in selection.names:
            parameter = dict(model.named_parameters())[name]
            parameter.mul_((normal(*parameter.shape, seed=7) > 0).to(parameter))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    assert_products(factor, G)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_tied_weight_and_parameters_of_any_kind() -> None:
    model = build(Tied)
    selection = select_parameters(model, ("Embedding", "mix.bias", "Linear"))
    tokens = torch.randint(9, (N, 5), generator=generator(1))
    batch = tokens, torch.randint(9, (N,), generator=generator(2))
    dense = capture_gradients(model, selection, [batch], cross_entropy).factor
    assert_products(capture_matrix_free(model, selection, RowSource(cross_entropy, [batch])).factor, dense.matrix)


def test_weights_that_the_losses_do_not_depend_on_have_zeros() -> None:
    model = build(lambda: nn.ModuleDict({"used": nn.Linear(6, CLASSES), "spare": nn.Linear(6, 3)}))
    selection = select_parameters(model)

    def loss(net: Any, batch: Any) -> Tensor:
        return cross_entropy.losses(net["used"](batch[0]), batch)

    batch = normal(N, 6, seed=1), torch.randint(CLASSES, (N,), generator=generator(2))
    factor = capture_matrix_free(model, selection, RowSource(loss, [batch])).factor
    assert not bool(factor.rmatvec(torch.ones(N, dtype=torch.float64))[24:].any())
    assert_products(factor, capture_gradients(model, selection, [batch], loss).factor.matrix)


def test_batches_that_cannot_be_split() -> None:
    class Opaque:
        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.x, self.y = x, y

    def loss(net: nn.Module, batch: Opaque) -> Tensor:
        return cross_entropy.losses(net(batch.x), (batch.x, batch.y))

    model = build(perceptron)
    selection = select_parameters(model)
    labels = torch.randint(CLASSES, (N,), generator=generator(2))
    batches = [Opaque(normal(3, 6, seed=1), labels[:3]), Opaque(normal(5, 6, seed=2), labels[:5])]
    G = capture_gradients(model, selection, batches, loss).factor.matrix
    factor = capture_matrix_free(model, selection, RowSource(loss, batches)).factor
    assert_products(factor, G)
    torch.testing.assert_close(factor.rows(torch.tensor([4, 1])).matvec(G[0]), G[[4, 1]] @ G[0])


@pytest.mark.parametrize("smoothed", but_long([False, True]))
def test_a_refit_by_iteration_is_that_of_the_gram_matrix(smoothed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    factor, G, _ = both(build(convolutions), IMAGES, "sketch")
    n, p = G.shape
    root = normal(n, n, seed=8)
    smoothing = root @ root.T / n if smoothed else None
    reference, metric = normal(p, seed=9), normal(p, seed=10).square() + 0.1
    dense = WeightedRidge(DenseFactor(G), G @ reference, reference, 1e-3, metric, smoothing)
    free = WeightedRidge(factor, factor.matvec(reference), reference, 1e-3, metric, smoothing)
    support = torch.arange(0, p, 2)
    expected = dense.refit(support)
    torch.testing.assert_close(free.refit(support).weights, expected.weights)
    monkeypatch.setattr(matrix_free, "_MOST_PASSES", 0)
    assert factor.iterative and free.refit(support).gram is None
    torch.testing.assert_close(free.refit(support).weights, expected.weights, rtol=1e-6, atol=1e-8)


def test_passes_are_counted_and_known_products_cost_none() -> None:
    factor, G, _ = both(build(perceptron), VECTORS, "empirical")
    before = factor.log.summary()
    assert (before["along"], before["back"], before["rows"]) == (0, 0, 1), "f was gathered on the way"
    vectors = [normal(G.shape[1], seed=i) for i in range(2 + matrix_free._REMEMBERED)]
    for w in vectors[:3]:
        factor.matvec(w).zero_()  # what a caller does with the answer is its own affair
    torch.testing.assert_close(factor.matvec(vectors[0].clone()), G @ vectors[0])
    factor.diagonal()
    assert factor.log.summary()["along"] == 3
    for w in vectors[3:]:
        factor.matvec(w)
    factor.matvec(vectors[2])
    assert factor.log.summary()["along"] == len(vectors)
    factor.matvec(vectors[0])  # forgotten
    factor.rmatvec(G[:, 0])
    factor.gram(torch.ones(G.shape[1], dtype=torch.float64))
    after = factor.log.summary()
    assert (after["along"], after["back"], after["rows"]) == (len(vectors) + 1, 1, 2) and after["seconds"] > 0


def test_what_it_cannot_take_is_said() -> None:
    model = build(perceptron)
    selection = select_parameters(model)
    batch = normal(N, 6, seed=1), torch.randint(CLASSES, (N,), generator=generator(2))

    def loss(net: nn.Module, pair: Any) -> Tensor:
        return (net(pair[0]).sum(1) * 0).sqrt()

    with pytest.raises(ValueError, match="gradient is not finite"):
        capture_matrix_free(model, selection, RowSource(loss, [batch]))
    batch[0][3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        capture_matrix_free(model, selection, RowSource(cross_entropy, [batch]))


def test_products_that_are_remembered_are_not_those_that_were_given_away() -> None:
    model = build(perceptron)
    batch = normal(N, 6, seed=1), torch.randint(CLASSES, (N,), generator=generator(2))
    factor = capture_matrix_free(model, select_parameters(model), RowSource(cross_entropy, [batch])).factor
    w = normal(factor.shape[1], seed=3)
    expected = factor.matvec(w).clone()
    for _ in range(2):
        factor.matvec(w).zero_()
    assert torch.equal(factor.matvec(w), expected)
