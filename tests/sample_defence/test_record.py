"""What a run makes of labels and inputs that contradict each other."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from swap_prune.losses import CrossEntropy, cross_entropy
from swap_prune.sample_defence import record as module
from swap_prune.sample_defence.inputs import (
    _is_nearer,
    _lie_along_slopes,
    _likely_labels,
    _other_classes,
    labels_contradicted,
    shift_seen,
)
from swap_prune.sample_defence.labels import doubt_labels
from swap_prune.sample_defence.record import SampleDefence
from swap_prune.samples.calibration import CalibrationStream
from swap_prune.surgery import batchnorm
from swap_prune.surgery.batchnorm import recalibrate_batchnorm, repair_batchnorm
from swap_prune.training.teaching import Taught, Teacher
from tests.cases import generator
from tests.sample_defence.test_labels import CLASSES, drawn


def mixed(rate, n=2000, seed=0):
    logits, labels = drawn(n, seed)
    state = generator(1)
    wrong = torch.rand(n, generator=state) < rate
    return Taught((logits, torch.where(wrong, torch.randint(CLASSES, (n,), generator=state), labels)), logits)


def doubts():
    return SampleDefence(Teacher(nn.Linear(3, 2), None, cross_entropy), cross_entropy)


def test_a_doubt_is_remembered_and_holds_for_what_is_fitted_and_what_is_held_out():
    own = doubts()
    one, other, apart = mixed(0.0), mixed(0.0, seed=2), mixed(0.5, seed=2)
    assert own.weigh([one], [other]) == ([one], [other], None)
    fitting, held_out, first = own.weigh([mixed(0.5)], [apart])
    assert first == pytest.approx(0.5 * 4 / 5, abs=0.05), "one in five of those replaced at random is right again"
    assert all(taught.trust is not None for taught in [*fitting, *held_out])
    assert own.weigh([mixed(0.2)], [apart])[2] == own.weigh([mixed(0.0)], [apart])[2] == first
    assert own.weigh([mixed(0.8)], [apart])[2] > first


def test_what_was_seen_can_be_taken_over():
    own, other, apart = doubts(), doubts(), mixed(0.5, seed=2)
    other.recall(own.remembered())
    assert other._radius is None and other._labels is None
    own.weigh([mixed(0.5)], [apart])
    own._radius = 0.1
    other.recall(own.remembered())
    assert other._radius == 0.1 and other._labels == own._labels is not None
    assert all(map(torch.equal, other.judges[0], apart.batch)) and len(other.judges) == len(own.judges) == 1
    other.recall(doubts().remembered())
    assert other._radius is None and other._labels is None and other.judges is None


def test_inputs_are_shifted_back_in_both_parts_and_in_later_stages(monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    contradicted = iter([False, True, False])
    monkeypatch.setattr(module, "labels_contradicted", lambda *_: next(contradicted, False))
    asked = []
    monkeypatch.setattr(module, "shift_seen", lambda *_: asked.append(1) or 0.1)
    monkeypatch.setattr(module, "straight_shift", lambda *_: None)
    x = torch.randn(8, 4)
    fitting, apart = [(x, torch.arange(8) % 3)], [(x + 1, torch.arange(8) % 3)]
    own = doubts_of(model)
    assert own.restore(model, fitting, apart, generator()) == (fitting, apart, None)
    for _ in range(2):
        moved, other, radius = own.restore(model, fitting, apart, generator())
        assert radius == 0.1 and not torch.equal(moved[0][0], x) and not torch.equal(other[0][0], x + 1)
    assert len(asked) == 1


def test_labels_of_samples_held_out_are_asked_too_whether_they_are_contradicted(monkeypatch):
    model = nn.Linear(CLASSES, CLASSES)
    with torch.no_grad():
        model.weight.copy_(torch.eye(CLASSES)), model.bias.zero_()
    fitting, apart = mixed(0.12, 300).batch, mixed(0.12, 300, seed=2).batch
    assert [labels_contradicted(cross_entropy, [x], [(x, y)]) for x, y in (fitting, apart)] == [False, False]
    monkeypatch.setattr(module, "shift_seen", lambda *_: 0.1)
    assert doubts_of(model).restore(model, [fitting], [], generator())[2] is None
    assert doubts_of(model).restore(model, [fitting], [apart], generator())[2] is not None
    odd = (apart[0][:, :5].repeat(1, 2)[:, :CLASSES].reshape(300, 1, CLASSES), apart[1])
    other = doubts_of(model)
    other._look([fitting], [odd], generator())
    assert other._radius is None, "those of another shape are left out"


def test_labels_that_are_doubted_are_not_taken_for_those_of_attacked_inputs_later(monkeypatch):
    """A pruned network's attacks are weak on the dense one, and may then look so by chance."""
    own = doubts_of(nn.Linear(10, CLASSES))
    assert own.weigh([mixed(0.5)], [])[2] is not None
    monkeypatch.setattr(module, "labels_contradicted", lambda *_: True)
    monkeypatch.setattr(module, "shift_seen", lambda *_: pytest.fail("asked"))
    batch = torch.randn(8, 10), torch.arange(8)
    assert own.restore(nn.Linear(10, CLASSES), [batch], [], generator()) == ([batch], [], None)
    assert own.weigh([mixed(0.0)], [])[2] is not None


@pytest.mark.parametrize("seen", ["labels", "inputs"])
def test_what_was_held_out_when_something_was_first_seen_judges_from_then_on(seen, monkeypatch):
    own, model = doubts_of(nn.Linear(10, CLASSES)), nn.Linear(10, CLASSES)
    clean, apart = mixed(0.0), mixed(0.0, seed=2)
    own.weigh([clean], [apart])
    assert own.judges is None, "nothing was seen"
    if seen == "labels":
        own.weigh([mixed(0.5)], [])
        assert own.judges is None, "nothing is held out where the number of stages is judged"
        own.weigh([mixed(0.5)], [apart])
    else:
        monkeypatch.setattr(module, "labels_contradicted", lambda *_: True)
        monkeypatch.setattr(module, "shift_seen", lambda *_: 0.1)
        monkeypatch.setattr(module, "straight_shift", lambda *_: None)
        _, held_out, _ = own.restore(model, [clean.batch], [apart.batch], generator())
        assert not torch.equal(held_out[0][0], apart.batch[0])
        apart = Taught(held_out[0], apart.teacher)
        own.weigh([clean], [apart])
    (judge,) = own.judges
    assert judge is apart.batch
    fitting, held_out, _ = own.restore(model, [mixed(0.5).batch], own.judges, generator())
    assert held_out[0] is judge, "it is not shifted back again"
    own.weigh([Taught(fitting[0], clean.teacher)], [mixed(0.5, seed=3)])
    assert own.judges == [judge]


def test_labels_doubted_after_a_shift_was_seen_stay_doubted(monkeypatch):
    own = doubts_of(nn.Linear(10, CLASSES))
    monkeypatch.setattr(module, "labels_contradicted", lambda *_: True)
    monkeypatch.setattr(module, "shift_seen", lambda *_: 0.1)
    batch = torch.randn(8, 10), torch.arange(8)
    own.restore(nn.Linear(10, CLASSES), [batch], [], generator())
    rate = own.weigh([mixed(0.5)], [])[2]
    own.restore(nn.Linear(10, CLASSES), [batch], [], generator())
    assert own.weigh([mixed(0.0)], [])[2] == rate is not None


def test_shifted_batches_are_put_where_they_stay_and_few_samples_run_at_once(monkeypatch):
    sizes, kept = [], []

    class Counting(nn.Linear):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    def keep(batches):
        kept.append(list(batches))
        return kept[-1]

    model = Counting(4, 3)
    own = SampleDefence(Teacher(model, None, cross_entropy), cross_entropy, keep, 3)
    monkeypatch.setattr(module, "labels_contradicted", lambda *_: True)
    monkeypatch.setattr(module, "shift_seen", lambda *_: sizes.clear() or 0.1)
    batch = torch.randn(8, 4), torch.arange(8) % 3
    monkeypatch.setattr(module, "straight_shift", lambda *given: None if given[2] == 3 else 9)
    fitting, apart, _ = own.restore(model, [batch], [batch], generator())
    assert fitting is kept[0] and apart is kept[1] and max(sizes) == 3


def test_batches_without_single_labels_stay_as_they_are_in_later_stages(monkeypatch):
    own = doubts_of(nn.Linear(4, 3))
    monkeypatch.setattr(module, "labels_contradicted", lambda *_: True)
    monkeypatch.setattr(module, "shift_seen", lambda *_: 0.1)
    x, labels = torch.randn(8, 4), torch.arange(8) % 3
    own.restore(nn.Linear(4, 3), [(x, labels)], [], generator())
    mixed_up = [(x, nn.functional.one_hot(labels, 3).float())]
    held_out = [(x, labels)]
    assert own.restore(nn.Linear(4, 3), mixed_up, held_out, generator()) == (mixed_up, held_out, None)
    fitting, apart, _ = own.restore(nn.Linear(4, 3), held_out, mixed_up, generator())
    assert apart is mixed_up and not torch.equal(fitting[0][0], x)


def doubts_of(model):
    return SampleDefence(Teacher(model, None, cross_entropy), cross_entropy)


def test_little_evidence_and_low_rates_are_left_alone(monkeypatch):
    """Of a calibrated network: one that is as sure of all could as well be too sure of itself."""
    monkeypatch.setattr("swap_prune.sample_defence.labels.TEMPERATURES", (1.0,))

    def evidence(count):  # one label in ten is wrong, and each costs log(0.9/0.1 ...) of likelihood
        logits = torch.tensor([5.0, 0.0, 0.0]).expand(count, 3)
        labels = torch.zeros(count, dtype=torch.long)
        labels[: count // 10] = 1
        return doubt_labels(CrossEntropy(), [logits], [(logits, labels)])

    q = torch.tensor([5.0, 0.0, 0.0]).double().softmax(0)

    def ratio(count):
        wrong = count // 10
        return max(
            wrong * float(((1 - r) * q[1] + r / 3).log() - q[1].log())
            + (count - wrong) * float(((1 - r) * q[0] + r / 3).log() - q[0].log())
            for r in torch.arange(1, 100).double() / 100
        )

    few, many = (next(n for n in range(10, 2000, 10) if ratio(n) > least) for least in (4, 11))
    assert ratio(few) < 10 and evidence(few) is None
    assert ratio(many) < 30 and evidence(many) is not None
    assert doubt_labels(CrossEntropy(), [mixed(0.05, 20000).teacher], [mixed(0.05, 20000).batch]) is not None


def test_a_shift_must_lead_to_labels_and_to_them_more_than_to_others():

    def parts(reached, led, both, count=100):
        a, b = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        a[:reached] = True
        b[reached - both : reached - both + led] = True
        return a, b

    assert _is_nearer(*parts(60, 20, 20))
    assert not _is_nearer(*parts(45, 0, 0)), "too few are led to their label"
    assert not _is_nearer(*parts(60, 60, 60))
    assert _is_nearer(*parts(60, 40, 40)), "a gap of 0.2 with an error of 0.04"
    assert not _is_nearer(*parts(60, 48, 8)), "a gap of 0.12 with an error of 0.1"
    assert not _is_nearer(*parts(600, 550, 550, 1000)), "a gap of 0.05 is too small however sure"
    assert not _is_nearer(torch.tensor([True, True, False]), torch.tensor([True, False, False]))


def test_the_class_compared_with_is_neither_the_label_nor_the_prediction():
    outputs, labels = torch.randn(500, 4, generator=generator(1)), torch.randint(4, (500,), generator=generator(2))
    others = _other_classes(outputs, labels, generator(3))
    assert not bool((others == labels).any()) and not bool((others == outputs.argmax(1)).any())


@pytest.mark.parametrize("sureness", [1.0, 4.0])
def test_labels_of_a_network_that_is_too_sure_of_itself_are_like_the_likely_ones_that_are_drawn(sureness):
    logits, labels = drawn(20_000, 3)
    likely = _likely_labels(sureness * logits, labels, generator(3))
    q = logits.log_softmax(1)
    gap = (q.gather(1, labels.unsqueeze(1)) - q.gather(1, likely.unsqueeze(1))).squeeze(1)
    error = float(gap.std()) / len(gap) ** 0.5
    assert abs(float(gap.mean())) < 4 * error < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_inputs_lie_along_slopes_where_they_were_shifted_and_not_where_labels_are_wrong(seed):
    network = nn.Linear(50, 6)
    nn.init.normal_(network.weight, generator=generator(seed))
    x = torch.randn(400, 50, generator=generator(seed + 10))
    with torch.no_grad():
        honest = torch.multinomial((network(x) / 3).softmax(1), 1, generator=generator(seed + 20)).squeeze(1)
    random = torch.where(
        torch.rand(400, generator=generator(seed)) < 0.3, torch.randint(6, (400,), generator=generator(seed)), honest
    )
    variable = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(network(variable), honest), variable)
    told = [
        _lie_along_slopes(network, inputs, labels, generator(1), 64)
        for inputs, labels in (
            (x, honest),
            (x, random),
            (x + 0.3 * slope.sign(), honest),
            (x - 0.3 * slope.sign(), honest),
        )
    ]
    assert told == [False, False, True, False]
    assert not _lie_along_slopes(network, x[:1], honest[:1], generator(1), 64)


def test_evidence_is_that_of_all_samples_but_those_that_judge_all_stages():
    few, apart, own = mixed(0.5, 40), mixed(0.5, 40, seed=2), doubts()
    assert doubts().weigh([few], [])[2] is doubts().weigh([apart], [])[2] is None
    assert own.weigh([few], [apart])[2] is not None and own.judges == [apart.batch]
    own.weigh([mixed(0.0)], [mixed(1.0)])
    assert own._labels.rate < 0.7, "judges are old samples, which have been asked"


def test_statistics_that_fit_are_left_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    data = TensorDataset(torch.randn(256, 4), torch.arange(256) % 3)
    stream = CalibrationStream(data, generator())
    recalibrate_batchnorm(model, stream.draw(256), cross_entropy)
    model[1].running_mean += 0.05
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert repair_batchnorm(model, stream, cross_entropy) == []
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def sensitive(classes=6, size=2000):
    """A network that a small shift of all inputs leads to any class."""
    torch.manual_seed(0)
    model = nn.Linear(size, classes, bias=False)
    with torch.no_grad():
        model.weight.copy_(0.2 * torch.randn(classes, size))
    x = torch.randn(256, size)
    return model, x, model(x).argmax(1).detach()


def test_labels_as_far_as_any_other_class_are_no_attack():
    """Every label can be reached, and so can every other class."""
    model, x, labels = sensitive()
    wrong = torch.rand(256, generator=generator(1)) < 0.5
    labels = torch.where(wrong, torch.randint(6, (256,), generator=generator(2)), labels)
    assert shift_seen(model, cross_entropy, [(x, labels)], generator(4)) is None


def test_labels_that_fit_are_no_attack_though_some_are_wrong():
    model, x, labels = sensitive()
    second = model(x).topk(2).indices[:, 1]
    gap = model(x).topk(2).values.diff().abs().squeeze(1)
    near = gap.argsort()[:6]
    labels[near] = second[near]
    assert shift_seen(model, cross_entropy, [(x, labels)], generator(4)) is None


@pytest.mark.parametrize(("errors", "contradicted"), [(3.0, False), (7.0, True)])
def test_labels_must_be_less_likely_by_five_standard_errors(errors, contradicted):
    """Logits (l, 0) of one confidence; the share of wrong labels sets the mean."""
    n, q = 10_000, torch.tensor(0.9, dtype=torch.float64)
    wrong = round(n * (0.1 + errors * float((q * (1 - q) / n).sqrt())))
    logits = torch.stack([q.log(), (1 - q).log()]).expand(n, 2)
    labels = (torch.arange(n) < wrong).long()
    assert labels_contradicted(cross_entropy, [logits], [(torch.zeros(n, 3), labels)]) == contradicted


@pytest.mark.parametrize(("factor", "repaired"), [(1.4, False), (2.0, True)])
def test_statistics_are_given_up_where_they_make_the_loss_half_as_high_again(factor, repaired, monkeypatch):
    monkeypatch.setattr(batchnorm, "batchnorm_misfit", lambda *_: (2.0 * factor + 0.1, 2.0))
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    stream = CalibrationStream(TensorDataset(torch.randn(20, 4), torch.arange(20) % 3), generator())
    assert bool(repair_batchnorm(model, stream, cross_entropy)) == repaired
    assert (model[0].num_batches_tracked > 0) == repaired
