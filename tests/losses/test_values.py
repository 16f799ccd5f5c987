"""Squared error and binary cross-entropy: closed forms, the Hessian itself, and pruning by them."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional
from torch.utils.data import TensorDataset

from swap_prune import LR, METHODS, BinaryCrossEntropy, FineTune, SquaredError, prune
from swap_prune.fisher.capture.sketch import CurvatureSketch
from swap_prune.losses import CrossEntropy, GaussNewtonLoss
from swap_prune.losses.values import _ValueLoss
from swap_prune.selection import select_parameters
from tests.cases import but_long, normal

_OF_EACH_KIND, _KINDS = [SquaredError(), BinaryCrossEntropy(temperature=1.0)], ["squares", "binary"]
LOSSES = pytest.mark.parametrize("loss", _OF_EACH_KIND, ids=_KINDS)
LOSSES_BUT_LONG = pytest.mark.parametrize("loss", but_long(_OF_EACH_KIND), ids=_KINDS)


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def answers(*shape: int) -> Tensor:
    return (normal(*shape, seed=1) > 0).double()


def trained(loss: _ValueLoss) -> tuple[nn.Module, TensorDataset, tuple[Tensor, Tensor]]:
    """Return a network, its data and a batch of others: outputs are functions of the first four of eight inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 3))
    x = torch.randn(1200, 8)
    y = torch.tanh(x[:, :4] @ torch.randn(4, 6)) @ torch.randn(6, 3)
    if isinstance(loss, BinaryCrossEntropy):
        y = (y > 0).float()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        loss(model, (x[:1000], y[:1000])).mean().backward()
        optimiser.step()
    return model, TensorDataset(x[:1000], y[:1000]), (x[1000:], y[1000:])


@LOSSES
def test_they_know_their_curvature(loss: _ValueLoss) -> None:
    assert isinstance(loss, GaussNewtonLoss)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 4, 5)], ids=str)
def test_losses_are_those_of_torch(shape: tuple[int, ...]) -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    z, numbers, yes = normal(6, *shape), normal(6, *shape, seed=1), answers(6, *shape)
    for i, value in enumerate(SquaredError()(Same(), (z, numbers))):
        torch.testing.assert_close(value, functional.mse_loss(z[i], numbers[i]))
    for targets in (yes, yes.bool(), yes.long()):
        for i, value in enumerate(BinaryCrossEntropy()(Same(), (z, targets))):
            torch.testing.assert_close(value, functional.binary_cross_entropy_with_logits(z[i], yes[i]))


@LOSSES
def test_rows_over_all_signs_are_the_gauss_newton_matrix(loss: _ValueLoss) -> None:
    model = network()
    batch = (normal(1, 4), answers(1, 3))
    selection = select_parameters(model)
    w = selection.read(model)

    def outputs(flat: Tensor) -> Tensor:
        return functional_call(model, selection.split(flat), (batch[0],)).flatten()

    J = jacrev(outputs)(w).detach()
    H = jacrev(grad(lambda z: loss.losses(z.view(1, 3), batch).sum()))(outputs(w).detach())
    parameters = [dict(model.named_parameters())[name] for name in selection.names]
    rows = []
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        root = loss.curvature_root(loss.outputs(model, batch), batch, torch.tensor([signs], dtype=torch.float64))  # type: ignore[attr-defined]
        product = CurvatureSketch(loss)(model, (batch, root.detach())).sum()  # type: ignore[arg-type]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(product, parameters)]))
    G = torch.stack(rows)
    torch.testing.assert_close(G.T @ G / len(G), J.T @ H @ J, rtol=1e-8, atol=1e-12)
    assert float((J.T @ H @ J).abs().max()) > 1e-2


def test_a_temperature_lets_sure_answers_count() -> None:
    z, signs, batch = torch.full((1, 2), 12.0), torch.ones(1, 2), (None, torch.ones(1, 2))
    sharp = BinaryCrossEntropy(temperature=1.0).curvature_root(z, batch, signs)
    soft = BinaryCrossEntropy(temperature=4.0).curvature_root(z, batch, signs)
    q = torch.tensor(3.0).sigmoid()
    torch.testing.assert_close(soft, (q * (1 - q) / 2).sqrt().expand(1, 2))
    assert float(soft.mean()) > 10 * float(sharp.mean())


@LOSSES
def test_divergence_is_the_loss_less_its_least_value(loss: Any) -> None:
    """With the teacher's answers as targets; also where it is so sure that one of them is 0 to rounding."""
    z, teacher = 3 * normal(6, 3), 3 * normal(6, 3, seed=1)
    teacher[0, 0], z[1, 1] = 800.0, -800.0
    targets = teacher.sigmoid() if isinstance(loss, BinaryCrossEntropy) else teacher
    expected = loss.losses(z, (None, targets)) - loss.losses(teacher, (None, targets))
    torch.testing.assert_close(loss.divergence(z, (None, targets), teacher), expected, rtol=1e-9, atol=1e-9)
    assert float(loss.divergence(teacher, (None, targets), teacher).abs().max()) < 1e-12


@LOSSES_BUT_LONG
@pytest.mark.parametrize("fisher", but_long(["gauss-newton", "empirical"]))
def test_pruning_by_them_beats_magnitude(loss: _ValueLoss, fisher: str) -> None:
    dense, data, held_out = trained(loss)
    measured = {}
    for method in ("magnitude", METHODS["lr"](fisher=fisher)):
        model = copy.deepcopy(dense)
        report = prune(model, data, 0.6, method, loss_fn=loss, samples=200, progress=False)
        zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim == 2)
        assert zeros == report.total - report.kept == report.total - int(report.total * (1 - 0.6))
        measured[str(method)[:3]] = float(loss(model, held_out).mean().detach())
    assert measured["LR("] < 0.7 * measured["mag"]


@LOSSES
def test_they_fine_tune(loss: _ValueLoss) -> None:
    model, data, held_out = trained(loss)
    plain = copy.deepcopy(model)
    prune(plain, data, 0.8, "magnitude", loss_fn=loss, progress=False)
    tuning = FineTune(epochs=4, lr=0.3)
    report = prune(model, data, 0.8, "magnitude", loss_fn=loss, finetune=tuning, progress=False)
    assert float(loss(model, held_out).mean().detach()) < 0.6 * float(loss(plain, held_out).mean().detach())
    assert report.total - report.kept == sum(int((p == 0).sum()) for p in model.parameters() if p.ndim == 2)


@LOSSES
def test_every_kind_of_batch_gives_the_same(loss: _ValueLoss) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(1)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.body(left * right)  # type: ignore[no-any-return]

    left, right, targets = normal(6, 4), normal(6, 4, seed=2), answers(6, 1)
    model = Named()
    wanted = loss(model, ((left, right), targets))
    assert wanted.shape == (6,)
    for batch in (
        [[left, right], targets],
        ({"left": left, "right": right}, targets.squeeze(1)),
        {"left": left, "right": right, "labels": targets.float()},
    ):
        torch.testing.assert_close(loss(model, batch), wanted)
    torch.testing.assert_close(replace(loss, labels="y")(model, {"left": left, "right": right, "y": targets}), wanted)


@LOSSES
def test_targets_of_another_shape_are_refused_and_not_broadcast(loss: _ValueLoss) -> None:
    x, model = normal(6, 4), network()
    for targets in (answers(6), answers(6, 1), answers(3, 6), answers(6, 3, 2)):
        with pytest.raises(ValueError, match="needs a target for each output"):
            loss(model, (x, targets))
    for batch in (x, (x,), {"x": x}, (x, answers(6, 3), x)):
        with pytest.raises(ValueError, match="needs batches"):
            loss(model, batch)


def test_targets_that_are_no_answers_are_refused_before_any_work() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    for targets in (torch.full((40, 3), 2), -answers(40, 3), torch.full((40, 3), float("nan"))):
        with pytest.raises(ValueError, match=r"BinaryCrossEntropy needs targets in \[0, 1\]"):
            prune(model, [(normal(40, 4), targets)], 0.5, loss_fn=BinaryCrossEntropy(), progress=False)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="temperature"):
        BinaryCrossEntropy(temperature=0)


def test_the_default_loss_names_them() -> None:
    x = normal(40, 4)
    for targets, outputs, named in (
        (normal(40), 1, "SquaredError"),
        (normal(40, 3), 3, "SquaredError"),
        (answers(40, 3).long(), 3, "BinaryCrossEntropy"),
    ):
        with pytest.raises(ValueError, match=named):
            prune(network(outputs), [(x, targets)], 0.5, progress=False)


@pytest.mark.parametrize("value", but_long([float("nan"), float("inf")]))
def test_a_target_that_is_no_number_is_refused_wherever_it_is_drawn_to(value: float) -> None:
    """Of sixty samples twelve are held out, and the others are what G is of."""
    x, y = normal(60, 4), normal(60, 3, seed=1)
    for place in range(0, 60, 4):
        targets = y.index_put((torch.tensor(place), torch.tensor(1)), torch.tensor(value, dtype=torch.float64))
        model = network()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"loss is not finite|not finite on"):
            prune(model, TensorDataset(x, targets), 0.5, "lr", loss_fn=SquaredError(), samples=48, progress=False)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@LOSSES
@pytest.mark.parametrize("missing", [-1.0, float("nan")])
def test_targets_that_are_missing_do_not_count(loss: Any, missing: float) -> None:
    loss = replace(loss, ignore=missing)
    z, t, teacher, signs = normal(5, 4), answers(5, 4), normal(5, 4, seed=3), normal(5, 4, seed=4).sign()
    there = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    there[3] = False
    batch = (None, t.masked_fill(~there, missing))
    found = loss.losses(z, batch), loss.divergence(z, batch, teacher), loss.curvature_root(z, batch, signs)
    for i, counted in enumerate(there):
        one = slice(i, i + 1)
        own = (None, t[one, counted])
        if not bool(counted.any()):
            assert float(found[0][i]) == float(found[1][i]) == float(found[2][i].abs().max()) == 0
            continue
        torch.testing.assert_close(found[0][i], loss.losses(z[i : i + 1, counted], own)[0])
        torch.testing.assert_close(
            found[1][i], loss.divergence(z[i : i + 1, counted], own, teacher[i : i + 1, counted])[0]
        )
        root = loss.curvature_root(z[i : i + 1, counted], own, signs[i : i + 1, counted])[0]
        torch.testing.assert_close(found[2][i, counted], root)
        assert bool((found[2][i, ~counted] == 0).all())
    if isinstance(loss, BinaryCrossEntropy):
        loss.check_targets(batch)


@LOSSES_BUT_LONG
@pytest.mark.parametrize("fisher", but_long(["gauss-newton", "empirical"], short=["empirical"]))
def test_networks_are_pruned_on_the_targets_that_there_are(loss: Any, fisher: str) -> None:
    dense, data, held_out = trained(loss)
    x, y = data.tensors
    missing = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    measured = []
    for ignore, targets in (
        (-9999.0, y.masked_fill(missing, -9999.0)),
        (float("nan"), y.masked_fill(missing, torch.nan)),
    ):
        model, own = copy.deepcopy(dense), replace(loss, ignore=ignore)
        lr = METHODS["lr"](fisher=fisher)
        prune(model, TensorDataset(x, targets), 0.6, lr, loss_fn=own, samples=200, progress=False)
        measured.append(float(loss(model, held_out).mean().detach()))
    magnitude = copy.deepcopy(dense)
    prune(magnitude, data, 0.6, "magnitude", loss_fn=loss, progress=False)
    assert measured[0] == measured[1] < 0.8 * float(loss(magnitude, held_out).mean().detach())


@LOSSES
def test_what_the_outputs_are_can_be_said(loss: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": x, "out": self.body(x)}

    batch = (normal(40, 4), answers(40, 3))
    with pytest.raises(ValueError, match="give forward="):
        loss(Wrapped(), batch)
    own = replace(loss, forward=lambda model, x: model(x)["out"])
    torch.testing.assert_close(own(Wrapped(), batch), loss(network(), batch))
    report = prune(Wrapped(), [batch], 0.5, "lr", loss_fn=own, samples=32, progress=False)
    assert report.kept == report.total // 2


class Squeezed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).squeeze(1)


@LOSSES
@pytest.mark.parametrize("method", ["lr", "obd", "woodfisher", LR(fisher="empirical")])
@pytest.mark.parametrize("normalised", [False, True])
def test_one_output_without_a_dimension_is_pruned_as_one_with(loss: Any, method: Any, normalised: bool) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8) if normalised else nn.Identity(), nn.Tanh(), nn.Linear(8, 1)
    ).double()
    other, data = Squeezed(copy.deepcopy(body)), TensorDataset(normal(60, 4), answers(60))
    noise = "input:kind=gaussian,severity=1"
    for model in (body, other):
        prune(model, data, 0.5, method, loss_fn=loss, samples=40, noise=noise, progress=False)
    with torch.no_grad():
        assert torch.equal(body(data.tensors[0]).squeeze(1), other(data.tensors[0]))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [SquaredError(), BinaryCrossEntropy(), CrossEntropy()])
def test_as_many_outputs_as_float16_cannot_count(loss: Any, half: torch.dtype) -> None:
    """Images of 256 x 256: 65,536 positions a sample are infinity in float16, and their share is 0."""
    torch.manual_seed(0)
    classes = 3 if isinstance(loss, CrossEntropy) else 1
    model, images = nn.Conv2d(2, classes, 1).to(half), normal(2, 2, 256, 256, seed=1).to(half)
    targets = answers(2, 256, 256).long() if classes == 3 else answers(2, 1, 256, 256)
    exact = copy.deepcopy(model).double()
    assert loss(model, (images, targets)).dtype == torch.float32
    digits = 2 * torch.finfo(half).eps
    close = {"rtol": digits, "atol": digits, "check_dtype": False}
    torch.testing.assert_close(loss(model, (images, targets)), loss(exact, (images.double(), targets)), **close)
    z, t = (loss.outputs(*pair) for pair in ((model, (images, targets)), (exact, (images.double(), targets))))
    apart = torch.linspace(0, 1, z.numel()).view_as(z)
    divergences = (loss.divergence(o, (None, targets), o + apart.to(o)) for o in (z, t))
    torch.testing.assert_close(*divergences, rtol=0.02, atol=digits, check_dtype=False)
    signs = torch.ones_like(z)
    root, expected = (loss.curvature_root(o, (None, targets), signs.to(o)) for o in (z, t))
    torch.testing.assert_close(root.norm(), expected.norm(), **close)


@pytest.mark.parametrize(
    ("ignore", "targets", "counted"),
    [
        (-9999, torch.tensor([[-9999.0, -9998.0]]), 1),  # alike in float16, which the outputs are of
        (-9999, torch.tensor([[-9999.0, 2.0]]).half(), 1),
        (-9999.9, torch.tensor([[-9999.9, 2.0]]).double(), 1),  # which were float32
        (-9999.9, torch.tensor([[-9999.9, 2.0]], dtype=torch.float64), 1),
        (-1, torch.tensor([[255, 241]], dtype=torch.uint8), 2),
        (255, torch.tensor([[255, 241]], dtype=torch.uint8), 1),
        (-1, torch.tensor([[-1, 4]]), 1),
    ],
)
def test_targets_that_do_not_count_are_told_in_their_own_type(ignore: float, targets: Tensor, counted: int) -> None:
    loss = SquaredError(ignore=ignore)(nn.Identity(), (torch.zeros(1, 2).half(), targets))
    expected = targets.double()[0, -counted:].square().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@LOSSES
def test_outputs_under_the_name_of_logits_are_taken(loss: _ValueLoss) -> None:
    """As the models of transformers give them, for one number or several labels a sample."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, inputs: Tensor) -> Any:
            return SimpleNamespace(logits=self.inner(inputs))

    batch = (normal(20, 4), answers(20, 3))
    assert torch.equal(loss(Wrapped(), batch), loss(network(), batch))
    assert torch.equal(loss(lambda inputs: {"logits": network()(inputs)}, batch), loss(network(), batch))
