"""What the network says of a candidate: slopes against finite differences, teachers against a copy of the network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from swap_prune.fisher.defence.gradients import GradientDefence, layers_of
from swap_prune.fisher.factor import DenseFactor
from swap_prune.losses import cross_entropy
from swap_prune.network.modes import batch_statistics
from swap_prune.selection import Selection, select_parameters
from swap_prune.stages.trials import Trials
from swap_prune.surgery.weights import write_weights
from swap_prune.training.teaching import Taught, Teacher
from tests.cases import generator


def network(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).double().eval()


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    state = generator(1)
    return [
        (torch.randn(n, 4, generator=state, dtype=torch.float64), torch.randint(3, (n,), generator=state))
        for n in sizes
    ]


def untaught(plain: list) -> list[Taught]:
    return list(map(Taught, plain))


def trials_on(model: nn.Module, selection: Selection, fitting: list, norm: bool, **changes: object) -> Trials:
    settings = {
        "loss_fn": cross_entropy,
        "held_out": untaught(batches(9)),
        "recalibrates": norm,
        "noisy": lambda factor: factor,
        "disturb": lambda weights: weights,
    }
    return Trials(model, selection, fitting=fitting, **(settings | changes))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_the_slope_is_the_derivative_of_the_mean_loss(norm: bool, with_teacher: bool) -> None:
    model, fitting = network(norm), batches(5, 8)
    selection = select_parameters(model, ("Linear",), ())
    dense = copy.deepcopy(model)
    teacher = Teacher(model, selection, cross_entropy)
    w = 0.7 * selection.read(model)
    taught = teacher.teach(fitting) if with_teacher else untaught(fitting)
    kept = torch.ones_like(w, dtype=torch.bool)

    def mean_loss(weights: Tensor) -> float:
        write_weights(model, selection, weights, kept)
        total = 0.0
        with batch_statistics(model) if norm else torch.no_grad(), torch.no_grad():
            for x, y in fitting:
                z = model(x)
                loss = functional.cross_entropy(z, y, reduction="sum")
                if with_teacher:
                    wanted, ours = dense(x).log_softmax(1), z.log_softmax(1)
                    loss = loss / 4 + 3 / 4 * functional.kl_div(ours, wanted, reduction="sum", log_target=True)
                total += float(loss)
        return total / 13

    slope = trials_on(model, selection, taught, norm).slope(w, kept)
    for j in (0, 7, 23, 30, 41):
        step = torch.zeros_like(w).index_fill(0, torch.tensor(j), 1e-5)
        assert float(slope[j]) == pytest.approx((mean_loss(w + step) - mean_loss(w - step)) / 2e-5, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("norm", [False, True])
def test_the_teacher_is_the_network_as_it_was(norm: bool) -> None:
    model, fitting = network(norm), batches(5, 8)
    selection = select_parameters(model, ("Linear",), ())
    expected = [model(x).detach() for x, _ in fitting]
    teacher = Teacher(model, selection, cross_entropy)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 2 or any(tensor is buffer for buffer in model.buffers()):
                tensor.mul_(2)
    state = copy.deepcopy(model.state_dict())
    for got, wanted in zip(teacher.outputs(fitting), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_noise_reaches_the_slope() -> None:
    model, fitting = network(False), batches(4, 12)
    selection = select_parameters(model, ("Linear",), ())
    w = selection.read(model)
    kept = torch.ones_like(w, dtype=torch.bool)
    clean = trials_on(model, selection, untaught(fitting), False)
    noisy = trials_on(model, selection, untaught(fitting), False, noisy=lambda factor: DenseFactor(factor.matrix + 1))
    torch.testing.assert_close(noisy.slope(w, kept), clean.slope(w, kept) + 1)


def test_with_a_defence_slopes_are_averaged_over_cleaned_rows_of_single_samples() -> None:
    model, fitting = network(False), batches(5, 8)
    selection = select_parameters(model, ("Linear",), ())
    taught = Teacher(model, selection, cross_entropy).teach(fitting)
    w = 0.7 * selection.read(model)
    kept = torch.ones_like(w, dtype=torch.bool)
    seen: list[torch.Tensor] = []
    defence = GradientDefence(layers_of(selection, ()), open={selection.names[0]})

    def noisy(factor: DenseFactor) -> DenseFactor:
        seen.append(factor.matrix)
        return DenseFactor(factor.matrix * len(seen))

    plain = trials_on(model, selection, taught, False).slope(w, kept)
    trials = trials_on(model, selection, taught, False, defence=defence, noisy=noisy)
    expected, own = 2 * plain, selection.slices()[selection.names[0]]
    expected[own] /= 2  # scaled to the second look
    torch.testing.assert_close(trials.slope(w, kept), expected)
    assert [rows.shape for rows in seen] == [(13, len(w))] * 2, "two looks at the first"
    torch.testing.assert_close(trials.slope(w, kept), 1.5 * expected)
    assert len(seen) == 3 and not defence.open


def test_disturbed_weights_are_where_the_slope_is_taken() -> None:
    model, fitting = network(False), batches(4, 12)
    selection = select_parameters(model, ("Linear",), ())
    w = selection.read(model)
    kept = torch.ones_like(w, dtype=torch.bool)
    elsewhere = trials_on(model, selection, untaught(fitting), False).slope(w + 0.1, kept)
    disturbed = trials_on(model, selection, untaught(fitting), False, disturb=lambda weights: weights + 0.1)
    torch.testing.assert_close(disturbed.slope(w, kept), elsewhere)
    assert torch.equal(selection.read(model), w)


def test_held_out_losses_are_those_of_the_candidate_on_its_own_statistics() -> None:
    """As after a recalibration on the held-out batch; the model's own statistics stay."""
    model, fitting = network(True), batches(40)
    selection = select_parameters(model, ("Linear",), ())
    w = 0.5 * selection.read(model)
    kept = torch.ones_like(w, dtype=torch.bool)
    statistics = model[1].running_mean.clone()
    losses = trials_on(model, selection, untaught(fitting), True).losses(w, kept)
    assert torch.equal(model[1].running_mean, statistics)
    other = network(True).train()
    write_weights(other, selection, w, kept)
    x, y = batches(9)[0]
    torch.testing.assert_close(losses, functional.cross_entropy(other(x), y, reduction="none").detach())


def test_a_held_out_sample_alone_is_judged_on_the_running_statistics() -> None:
    model, held_out = network(True), batches(4, 1)
    selection = select_parameters(model, ("Linear",), ())
    w = selection.read(model)
    kept = torch.ones_like(w, dtype=torch.bool)
    losses = trials_on(model, selection, untaught(batches(9)), True, held_out=untaught(held_out)).losses(w, kept)
    expected = torch.cat([cross_entropy(model, batch).detach() for batch in held_out])
    torch.testing.assert_close(losses, expected)


def test_held_out_losses_blend_labels_and_teacher_as_far_as_labels_are_trusted() -> None:
    model, held_out = network(False), batches(4, 3)
    selection = select_parameters(model, ("Linear",), ())
    dense = copy.deepcopy(model)
    trusts = [torch.linspace(0, 1, len(y), dtype=torch.float64) for _, y in held_out]
    plain = Teacher(model, selection, cross_entropy).teach(held_out)
    taught = [one._replace(trust=trust) for one, trust in zip(plain, trusts, strict=True)]
    w = 0.6 * selection.read(model)
    kept = torch.ones_like(w, dtype=torch.bool)
    losses = trials_on(model, selection, untaught(batches(9)), False, held_out=taught).losses(w, kept)
    write_weights(model, selection, w, kept)
    expected = []
    for (x, y), trust in zip(held_out, trusts, strict=True):
        wanted, ours = dense(x).softmax(1), model(x).log_softmax(1)
        divergence = (wanted * (wanted.log() - ours)).sum(1)
        expected.append(trust / 4 * functional.nll_loss(ours, y, reduction="none") + (1 - trust / 4) * divergence)
    torch.testing.assert_close(losses, torch.cat(expected).detach())


def test_batch_statistics_leave_the_running_ones() -> None:
    model = network(True)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    x = batches(10)[0][0]
    with batch_statistics(model):
        inside = model(x)
        assert model[1].training and not model[0].training
    model.train()
    torch.testing.assert_close(inside, model(x))
    model.load_state_dict(before)
    model.eval()
    with pytest.raises(RuntimeError, match="stop"), batch_statistics(model):
        model(x)
        raise RuntimeError("stop")
    assert not model[1].training and model[1].track_running_stats
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_teacher_of_everything_does_not_learn_with_the_network() -> None:
    model, fitting = network(norm=True), batches(5, 8)
    selection = select_parameters(model, ("Linear",), ())
    with torch.no_grad():
        before = [model(inputs) for inputs, _ in fitting]
    whole, part = Teacher(model, None, cross_entropy), Teacher(model, selection, cross_entropy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5
    assert all(torch.equal(a, b) for a, b in zip(whole.outputs(fitting), before, strict=True))
    assert not torch.allclose(part.outputs(fitting)[0], before[0]), "biases are the network's own"


def test_the_slope_is_taken_where_dropped_weights_are_zero() -> None:
    model, fitting = network(False), batches(4, 12)
    selection = select_parameters(model, ("Linear",), ())
    w = selection.read(model)
    kept = torch.arange(len(w)) % 2 == 0
    trials = trials_on(model, selection, untaught(fitting), False)
    torch.testing.assert_close(trials.slope(w, kept), trials.slope(w * kept, kept))
    assert not torch.allclose(trials.slope(w, kept), trials.slope(w, torch.ones_like(kept)))


@pytest.mark.parametrize(("fitting", "held_out", "training"), [((4, 1), (9,), False), ((4,), (9,), True)])
def test_one_sample_alone_in_any_batch_leaves_batchnorm_on_running_statistics(
    fitting: tuple[int, ...], held_out: tuple[int, ...], training: bool
) -> None:
    model = network(True)
    selection = select_parameters(model, ("Linear",), ())
    judges = untaught(batches(*held_out))
    trials = trials_on(model, selection, untaught(batches(*fitting)), True, held_out=judges)
    seen = []
    model[1].register_forward_hook(lambda layer, *_: seen.append(layer.training))
    w = selection.read(model)
    kept = torch.ones_like(w, dtype=torch.bool)
    trials.slope(w, kept)
    trials.losses(w, kept)
    assert seen and set(seen) == {training}
