"""Self-distillation: its curvature against the Hessian itself, and pruning by it."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import swap_prune
from swap_prune import SelfDistillation, prune
from swap_prune.fisher.capture.sketch import CurvatureSketch, sketch_curvature
from swap_prune.losses import GaussNewtonLoss
from swap_prune.selection import select_parameters
from tests.cases import but_long, generator, normal

UNIT = pytest.mark.parametrize("unit", [True, False])


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


class Named(nn.Module):
    """Takes its arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.body(left * right)


def test_it_is_a_loss_that_knows_its_curvature() -> None:
    assert isinstance(SelfDistillation(), GaussNewtonLoss)


def test_the_loss_is_one_minus_the_cosine() -> None:
    dense, pruned = network(), network()
    with torch.no_grad():
        pruned[0].weight.mul_(0.5)
    x, loss = normal(6, 4), SelfDistillation()
    (pair,) = loss.label(dense, [x])
    cosine = functional.cosine_similarity(dense(x), pruned(x), dim=1)
    torch.testing.assert_close(loss(pruned, pair), 1 - cosine)
    torch.testing.assert_close(loss.divergence(loss.outputs(pruned, pair), pair, pair[1]), 1 - cosine)
    (pair,) = SelfDistillation(unit=False).label(dense, [x])
    torch.testing.assert_close(pair[1], dense(x).detach())
    wanted = (pruned(x) - dense(x)).square().sum(1) / 2
    torch.testing.assert_close(SelfDistillation(unit=False)(pruned, pair), wanted)


@UNIT
def test_rows_over_all_signs_are_the_hessian_at_the_dense_network(unit: bool) -> None:
    """There the residual is zero, so that the Gauss-Newton matrix is the Hessian of the loss, all of it."""
    model, loss = network(), SelfDistillation(unit=unit)
    (pair,) = loss.label(model, [normal(1, 4)])
    selection = select_parameters(model)
    w = selection.read(model)

    def value(flat: Tensor) -> Tensor:
        weights = selection.split(flat)
        return loss.losses(loss.outputs(lambda x: functional_call(model, weights, (x,)), pair), pair).sum()  # type: ignore[arg-type]

    expected = jacrev(grad(value))(w).detach()
    parameters = [dict(model.named_parameters())[name] for name in selection.names]
    rows = []
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        root = loss.curvature_root(loss.outputs(model, pair), pair, torch.tensor([signs], dtype=torch.float64))
        product = CurvatureSketch(loss)(model, (pair, root.detach())).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(product, parameters)]))
    G = torch.stack(rows)
    torch.testing.assert_close(G.T @ G / len(G), expected, rtol=1e-6, atol=1e-9)
    assert float(expected.abs().max()) > 1e-2
    gradient = grad(value)(w).detach()
    assert float(gradient.abs().max()) < 1e-12


def test_captured_rows_are_not_zero_where_the_loss_is() -> None:
    model, loss = network(), SelfDistillation()
    pairs = loss.label(model, [normal(5, 4), normal(3, 4, seed=1)])
    capture = sketch_curvature(model, select_parameters(model), pairs, loss, generator(0), in_batches=False)
    assert capture.backend == "hooks" and float(capture.losses.abs().max()) < 1e-12
    assert bool((torch.linalg.vector_norm(capture.factor.matrix, dim=1) > 1e-2).all())


@pytest.mark.parametrize(
    "batches",
    [
        [normal(6, 4), normal(2, 4)],
        [(normal(6, 4),)],
        [{"left": normal(6, 4), "right": normal(6, 4, seed=1)}],
        DataLoader(TensorDataset(normal(7, 4)), batch_size=4),
    ],
    ids=["tensors", "tuples", "dicts", "loader"],
)
def test_every_kind_of_batch_is_labelled(batches: Any) -> None:
    model = Named() if isinstance(batches, list) and isinstance(batches[0], dict) else network()
    model.train()
    pairs = SelfDistillation().label(model, batches)
    assert model.training
    for (inputs, dense), batch in zip(pairs, batches, strict=True):
        first = next(iter(batch.values())) if isinstance(batch, dict) else batch
        assert type(inputs) is type(batch) and dense.shape == (len(first if torch.is_tensor(first) else first[0]), 3)
        torch.testing.assert_close(torch.linalg.vector_norm(dense, dim=1), torch.ones(len(dense), dtype=torch.float64))


def test_what_is_read_of_the_model_can_be_said() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": self.body(x)}

    loss = SelfDistillation(embed=lambda model, x: model(x)["hidden"])
    model = Wrapped()
    report = prune(model, loss.label(model, [normal(40, 4)]), 0.5, loss_fn=loss, samples=32, progress=False)
    assert report.kept == report.total - int(sum((p == 0).sum() for p in model.parameters() if p.ndim == 2))
    with pytest.raises(ValueError, match="one vector a sample, shape"):
        SelfDistillation().label(model, [normal(4, 4)])


@pytest.mark.parametrize("method", but_long(["lr", "ewr"]))
def test_pruning_takes_gauss_newton_rows_and_steps_that_held_out_samples_confirm(method: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 6))
    loss = SelfDistillation()
    calibration, unseen = (
        loss.label(dense, [normal(n, 8, seed=s, dtype=torch.float32)]) for n, s in ((300, 1), (200, 2))
    )
    losses = {}
    for name, config in (
        ("magnitude", "magnitude"),
        ("plain", swap_prune.LR(first_order=0)),
        ("default", method),
    ):
        model = copy.deepcopy(dense)
        report = prune(model, calibration, 0.5, config, loss_fn=loss, samples=200, progress=False)
        losses[name] = float(loss(model, unseen[0]).detach().mean())
    evidence = report.stages[0].evidence
    assert evidence["first_order"], "held-out samples gain from steps"
    assert report.stages[0].loss == pytest.approx(0, abs=1e-6), "the loss of the dense network"
    assert losses["default"] < losses["plain"] < losses["magnitude"]


@pytest.mark.parametrize("method", ["obd", "chita", "woodfisher", "cbs", swap_prune.LR(fisher="empirical")])
def test_methods_on_gradients_that_are_zero_are_refused(method: Any) -> None:
    model, loss = network(), SelfDistillation()
    pairs = loss.label(model, [normal(20, 4)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"those of SelfDistillation are zero at the dense network; use a"):
        prune(model, pairs, 0.5, method, loss_fn=loss, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_methods_without_gradients_take_it(method: str) -> None:
    model, loss = network(), SelfDistillation()
    report = prune(model, loss.label(model, [normal(20, 4)]), 0.6, method, loss_fn=loss, progress=False)
    assert report.kept == 14 and report.total == 35


def test_data_without_the_dense_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pairs \(what the model takes, outputs of the dense network\).*loss.label"):
        prune(network(), [normal(20, 4)], 0.5, loss_fn=SelfDistillation(), progress=False)


def test_a_model_that_is_called_in_another_way_is_refused_with_a_way_out() -> None:
    batches = [{"x": normal(4, 4)}]
    with pytest.raises(
        ValueError, match=r"the model failed on \{x: .*\}: TypeError: .*'x' \(a dict is passed .*; embed="
    ):
        SelfDistillation().label(network(), batches)
    by_key = SelfDistillation(embed=lambda model, inputs: model(inputs["x"]))
    assert by_key.label(network(), batches)[0][1].shape == (4, 3)


def test_distances_that_float16_cannot_hold() -> None:
    loss, far = SelfDistillation(unit=False), torch.full((2, 50), 300.0).half()
    found = loss(nn.Identity(), (far, torch.zeros(2, 50).half()))
    assert found.dtype == torch.float32 and found.tolist() == [50 * 300.0**2 / 2] * 2


def test_what_cannot_be_labelled_is_refused_in_words() -> None:
    loss, batch = SelfDistillation(), torch.randn(2, 4)
    for model, batches, message in (
        (None, [batch], "must be a torch.nn.Module, got a NoneType"),
        (nn.Linear(4, 3, device="meta"), [batch], "lies on the meta device"),
        (nn.Linear(4, 3), None, "batches must be an iterable of what the model takes, got a NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            loss.label(model, batches)  # type: ignore[arg-type]
    ((_, dense),) = loss.label(nn.Identity(), [batch])  # without a parameter
    torch.testing.assert_close(dense, functional.normalize(batch, dim=1))
