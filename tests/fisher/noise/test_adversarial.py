"""Attacks: inside their budget, higher in loss, and on a linear network the known answer."""

import pytest
import torch
from torch import nn

from swap_prune.fisher.noise import AdversarialInputs
from swap_prune.fisher.noise.adversarial import _direction, _project, _random_start
from swap_prune.losses import cross_entropy
from tests.cases import generator, normal

NORMS = {"linf": float("inf"), "l2": 2, "l1": 1}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.ReLU(), nn.Linear(16, 3))


def batches():
    inputs, labels = normal(44, 3, 4, seed=1, dtype=torch.float32), torch.arange(44) % 3
    return [(inputs[:20], labels[:20]), (inputs[20:], labels[20:])]


def run(noise, data=None, model=None, seed=0, loss_fn=cross_entropy):
    return noise.corrupt(data or batches(), generator(seed), model or network(), loss_fn)


def shifts(noisy, clean):
    return torch.cat([(a[0] - b[0]).flatten(1) for a, b in zip(noisy, clean, strict=True)])


def losses(model, data):
    with torch.no_grad():
        return torch.cat([cross_entropy(model.eval(), batch) for batch in data])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_inside_the_budget_and_higher_in_loss(attack, norm):
    clean, budget = batches(), 0.3
    before = [(x.clone(), y.clone()) for x, y in clean]
    noisy = run(AdversarialInputs(attack, norm, budget))
    sizes = torch.linalg.vector_norm(shifts(noisy, clean), ord=NORMS[norm], dim=1)
    assert float(sizes.max()) <= budget * (1 + 1e-5) and float(sizes.max()) > 0.9 * budget
    rise = losses(network(), noisy) - losses(network(), clean)
    assert bool((rise >= -1e-6).all()) and float(rise.mean()) > 0.02
    for batch, kept, changed in zip(clean, before, noisy, strict=True):
        assert torch.equal(batch[0], kept[0]) and torch.equal(changed[1], kept[1])


def test_pgd_beats_fgsm_and_a_random_shift_of_the_same_size():
    rises = {attack: losses(network(), run(AdversarialInputs(attack, budget=1.0))).mean() for attack in ("fgsm", "pgd")}
    random = [(x + normal(*x.shape, dtype=torch.float32).sign(), y) for x, y in batches()]
    assert rises["pgd"] >= rises["fgsm"] > losses(network(), random).mean() + 0.1


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_on_a_linear_loss_the_attack_is_optimal(attack):
    """For losses x . a the best shift has the gain budget * dual norm of a; 12 of 12 entries are few enough for l1."""
    a = normal(12, seed=2, dtype=torch.float32)
    data = [normal(5, 12, seed=3, dtype=torch.float32)]
    best = {"linf": a.abs().sum(), "l2": a.norm(), "l1": a.abs().max()}
    for norm, gain in best.items():
        noise = AdversarialInputs(attack, norm, 0.5, steps=60, step=0.1)
        (noisy,) = run(noise, data, nn.Linear(1, 1), loss_fn=lambda _, x: x @ a)
        torch.testing.assert_close((noisy - data[0]) @ a, (0.5 * gain).expand(5), rtol=1e-3, atol=1e-4)


def test_exactly_a_fraction_of_the_samples():
    clean = batches()
    changed = shifts(run(AdversarialInputs(fraction=0.25)), clean).any(1)
    assert int(changed.sum()) == 11
    assert not shifts(run(AdversarialInputs(budget=0.0)), clean).any()


def test_the_network_is_left_alone():
    model = network()
    model.train()
    model[1].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(AdversarialInputs(), model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_seed_repeats_and_another_does_not_and_batches_do_not_matter():
    noise, model, state = AdversarialInputs(steps=2, fraction=0.5), network(), torch.get_rng_state()
    first, again, other = (shifts(run(noise, model=model, seed=seed), batches()) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    inputs, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    ((whole, _),) = run(AdversarialInputs("fgsm"), [(inputs, labels)])
    torch.testing.assert_close((whole - inputs).flatten(1), shifts(run(AdversarialInputs("fgsm")), batches()))


@pytest.mark.parametrize("norm", NORMS)
def test_a_direction_has_length_one_and_leads_up(norm):
    gradient = normal(6, 3, 100, seed=5)
    direction = _direction(gradient, norm)
    lengths = torch.linalg.vector_norm(direction.flatten(1), ord=NORMS[norm], dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    assert bool(((direction * gradient).flatten(1).sum(1) > 0).all())
    assert not _direction(torch.zeros(2, 5), norm).any()


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_nearest_point_of_the_ball(norm):
    """Points inside stay; those outside land on the sphere, and no random point of the ball is nearer."""
    shift = normal(200, 7, seed=4) * torch.logspace(-2, 1, 200, dtype=torch.float64)[:, None]
    projected = _project(shift, norm, 1.0)
    sizes = torch.linalg.vector_norm(shift, ord=NORMS[norm], dim=1)
    inside = sizes <= 1
    torch.testing.assert_close(projected[inside], shift[inside])
    reached = torch.linalg.vector_norm(projected[~inside], ord=NORMS[norm], dim=1)
    torch.testing.assert_close(reached, torch.ones_like(reached))
    distance = (projected - shift).norm(dim=1)
    for seed in range(50):
        direction = projected + 0.1 * normal(200, 7, seed=seed + 10)
        other = direction / torch.linalg.vector_norm(direction, ord=NORMS[norm], dim=1, keepdim=True).clamp(min=1)
        assert bool(((other - shift).norm(dim=1) >= distance - 1e-12).all())


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_lie_in_the_ball_and_fill_it(norm):
    sizes = torch.linalg.vector_norm(_random_start(torch.zeros(500, 6), norm, 2.0, generator()), NORMS[norm], dim=1)
    assert 1.9 < float(sizes.max()) <= 2 * (1 + 1e-6)
    assert float(sizes.std()) > 0.2


BAD = {
    "tokens": ([(torch.zeros(3, 4).long(), torch.zeros(3).long())], cross_entropy, "floating-point"),
    "labels": ([(torch.zeros(3, 12), torch.tensor([0, 1, 7]))], cross_entropy, "labels out of range"),
    "not differentiable": ([torch.zeros(3, 12)], lambda model, x: x.detach().sum(1), "differentiable"),
    "not per input": ([torch.zeros(4, 12)], lambda model, x: x.view(-1, 24).sum(1), "one loss a"),
    "shape": ([(torch.zeros(3, 11), torch.zeros(3).long())], cross_entropy, "failed on a calibration batch"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_attacked(case):
    data, loss_fn, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        run(AdversarialInputs(), data, loss_fn=loss_fn)


def test_a_step_of_l1_moves_a_hundredth_of_the_entries():
    inputs, direction = torch.zeros(3, 1_000), normal(1_000, dtype=torch.float32)

    def loss_fn(model, batch):
        return batch[0] @ direction

    noise = AdversarialInputs("fgsm", "l1", 2.0)
    ((moved, _),) = noise.corrupt([(inputs, torch.zeros(3))], generator(0), torch.nn.Linear(1, 1), loss_fn)
    assert (moved != 0).sum(1).tolist() == [10] * 3
    torch.testing.assert_close(moved.abs().sum(1), torch.full((3,), 2.0))
    assert torch.equal(moved[0].nonzero().flatten(), direction.abs().topk(10).indices.sort().values)


def test_of_all_iterates_of_pgd_the_one_of_the_highest_loss_is_taken():
    """The loss of the input falls again behind its peak."""
    seen = []

    def loss_fn(model, batch):
        losses = (-(model(batch[0]) - 0.5).abs()).flatten(1).sum(1)
        seen.append(float(losses.detach()))
        return losses

    model = nn.Identity()
    model.register_parameter("w", nn.Parameter(torch.zeros(1)))
    noise = AdversarialInputs("pgd", budget=1.0, steps=6, step=0.37)
    ((moved, _),) = noise.corrupt([(torch.zeros(1, 1), torch.zeros(1))], generator(), model, loss_fn)
    assert len(seen) > 6 and seen[-1] < max(seen)
    assert float(-(moved - 0.5).abs()) == pytest.approx(max(seen))
