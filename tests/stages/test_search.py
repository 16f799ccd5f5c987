"""The number of stages, where it is to be found: raised as long as samples that no stage sees gain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import swap_prune
from swap_prune.sample_defence.record import SampleDefence
from swap_prune.schedule import sparsity_schedule
from swap_prune.stages import search as staging
from swap_prune.training.teaching import Taught
from tests.cases import ONE, but_long
from tests.tiny import batches, data, network

QUIET = {"method": "lr", "samples": 20, "stages": "auto", "progress": False, "sparsity": 0.8}


def net(normalised: bool = True) -> nn.Module:
    torch.manual_seed(3)
    return network(normalised)


def scripted(monkeypatch: pytest.MonkeyPatch, means: list[float]) -> list[dict[str, Tensor]]:
    """Let held-out losses be these; returns what the network was when each was asked for."""
    seen: list[dict[str, Tensor]] = []

    def loss(runner: staging.StageRunner, judged: object) -> float:
        seen.append({name: t.clone() for name, t in runner.model.state_dict().items()})
        return means[len(seen) - 1]

    monkeypatch.setattr(staging, "_loss", loss)
    return seen


@pytest.mark.parametrize(
    ("means", "chosen"),
    but_long([([2.0, 2.0], 1), ([2.0, 2.5], 1), ([2.0, 1.0, 1.0], 4), ([3.0, 2.0, 1.0], 16)], short=2),
)
def test_the_number_is_raised_as_long_as_held_out_samples_gain(
    monkeypatch: pytest.MonkeyPatch, means: list[float], chosen: int
) -> None:
    model = net()
    seen = scripted(monkeypatch, means)
    report = swap_prune.prune(model, data()[0], **QUIET)
    counts = [1, 4, 16][: len(means)]
    tried = report.stages[-1].evidence["stages_tried"]
    assert len(report.stages) == chosen and len(seen) == len(means)
    assert [one["stages"] for one in tried] == counts
    assert [one["held_out_loss"] for one in tried] == pytest.approx(means)
    kept = seen[counts.index(chosen)]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("stages", "means", "tried", "chosen"),
    but_long(
        [
            (5, [2.0, 1.0], ["5 exponential", "5 cubic"], 1),
            (5, [2.0, 2.0], ["5 exponential", "5 cubic"], 0),
            ("auto", [2.0, 2.5], ["1 exponential", "4 exponential"], 0),
            ("auto", [2.0, 1.0, 1.5, 0.5], ["1 exponential", "4 exponential", "16 exponential", "4 cubic"], 3),
            ("auto", [3.0, 2.0, 1.0, 1.5], ["1 exponential", "4 exponential", "16 exponential", "16 cubic"], 2),
        ],
        short=3,
    ),
)
def test_another_schedule_is_tried_for_the_best_number(
    monkeypatch: pytest.MonkeyPatch, stages: int | str, means: list[float], tried: list[str], chosen: int
) -> None:
    model = net()
    seen = scripted(monkeypatch, means)
    report = swap_prune.prune(model, data()[0], **QUIET | {"method": "obd", "stages": stages, "schedule": "auto"})
    found = report.stages[-1].evidence["stages_tried"]
    assert [f"{one['stages']} {one['schedule']}" for one in found] == tried
    assert [one["held_out_loss"] for one in found] == means and report.settings["schedule"] == "auto"
    assert all(torch.equal(tensor, seen[chosen][name]) for name, tensor in model.state_dict().items())
    count, schedule = tried[chosen].split()
    assert [stage.sparsity for stage in report.stages] == [*sparsity_schedule(0.8, int(count), schedule)]


@pytest.mark.long
def test_one_stage_has_one_schedule_and_the_first_to_be_tried_is_that_of_the_default() -> None:
    outcomes = []
    for schedule in ("auto", "exponential"):
        model = net()
        report = swap_prune.prune(model, data()[0], **QUIET | {"stages": 1, "schedule": schedule})
        outcomes.append(model.state_dict())
        assert "stages_tried" not in report.stages[0].evidence
    assert all(torch.equal(tensor, outcomes[1][name]) for name, tensor in outcomes[0].items())


@pytest.mark.usefixtures("nothing_held")
def test_a_plan_counts_what_the_schedules_need() -> None:
    """The cubic one keeps more weights in its first stage."""
    needs = {
        schedule: swap_prune.plan(net(), data()[0], 0.8, "lr", samples=20, stages=16, schedule=schedule).forecasts[0]
        for schedule in ("exponential", "cubic", "auto")
    }
    assert needs["exponential"].phases["solve"] < needs["cubic"].phases["solve"] < needs["auto"].phases["solve"]


def test_a_search_without_data_says_who_reads_them() -> None:
    with pytest.raises(ValueError, match="got None, and schedule='auto' reads it"):
        swap_prune.prune(net(False), None, 0.8, "magnitude", stages=3, schedule="auto")


@pytest.mark.long
def test_each_trial_starts_from_the_dense_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    dense = {name: t.clone() for name, t in model.state_dict().items()}
    scripted(monkeypatch, [2.0, 1.0, 1.5])
    started: list[bool] = []
    run_all = staging.StageRunner.run_all

    def watched(self: staging.StageRunner, *arguments: object) -> object:
        started.append(all(torch.equal(t, dense[name]) for name, t in self.model.state_dict().items()))
        return run_all(self, *arguments)

    monkeypatch.setattr(staging.StageRunner, "run_all", watched)
    swap_prune.prune(model, data()[0], **QUIET)
    assert started == [True, True, True]


class Watched(Dataset):
    """Remembers which samples were read, draw by draw."""

    def __init__(self) -> None:
        self.set = data()[0]
        self.read: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.set)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        self.read.append(indices)
        return [self.set[i] for i in indices]


@pytest.mark.long
def test_what_judges_is_seen_by_no_stage() -> None:
    watched = Watched()
    swap_prune.prune(net(normalised=False), watched, **QUIET)
    single = [draw for draw in watched.read if draw != [0]]  # that one is looked at for the forecast
    judged, *later = single
    assert len(judged) == 12  # a fifth
    assert not set(judged) & {i for draw in later for i in draw} and {i for draw in later for i in draw}


@pytest.mark.long
@pytest.mark.parametrize("apart", [False, True])
def test_what_judges_is_not_trained_on(apart: bool) -> None:
    """Also where training takes the same samples in another form."""
    watched, form = Watched(), Watched()
    settings = QUIET | {"finetune": swap_prune.FineTune(epochs=1), "recalibration_data": form if apart else None}
    swap_prune.prune(net(normalised=False), watched, **settings)
    judged, *later = [draw for draw in watched.read if draw != [0]]  # that one is looked at for the forecast
    trained = {i for draw in (form.read if apart else later) if draw != [0] for i in draw}
    assert len(judged) == 12 and trained == set(range(60)) - set(judged)


@pytest.mark.long
def test_what_judges_is_believed_as_far_as_the_run_believes_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3000, 8)
    labels = inputs[:, :4].argmax(1)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    trusts: list[Tensor | None] = []
    loss = staging._loss

    def watched(runner: staging.StageRunner, judged: list[Taught]) -> float:
        trusts.extend(one.trust for one in judged)
        return loss(runner, judged)

    monkeypatch.setattr(staging, "_loss", watched)
    settings = QUIET | {"method": ONE, "samples": 256, "noise": "labels:fraction=0.4"}
    swap_prune.prune(model, torch.utils.data.TensorDataset(inputs, labels), **settings)
    trust = torch.cat([one for one in trusts if one is not None])
    assert len(trusts) >= 2 and None not in trusts
    assert 0.3 < float(trust.mean()) < 0.65 and float(trust.min()) < 0.01


@pytest.mark.parametrize("method", but_long(["magnitude", "ewr"]))
def test_the_best_of_what_was_tried_is_kept_exactly_sparse(method: str) -> None:
    first, second = net(), net()
    settings = QUIET | {"method": method}
    report = swap_prune.prune(first, data()[0], **settings)
    again = swap_prune.prune(second, data()[0], **settings)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    tried = report.stages[-1].evidence["stages_tried"]
    assert tried == again.stages[-1].evidence["stages_tried"]
    losses = [one["held_out_loss"] for one in tried]
    taken = [one["stages"] for one in tried].index(len(report.stages))
    assert losses[: taken + 1] == sorted(losses[: taken + 1], reverse=True) and taken >= len(tried) - 2
    zeros = sum(int((m.weight == 0).sum()) for m in first if isinstance(m, nn.Linear))
    assert zeros == report.total - report.kept == 87  # 108 - floor(108 * 0.2)


@pytest.mark.long
def test_batches_do_as_well() -> None:
    report = swap_prune.prune(net(), batches()[0], **QUIET)
    assert report.stages[-1].evidence["stages_tried"][0]["stages"] == 1


def test_what_cannot_be_used_is_refused_and_nothing_changes() -> None:
    model = net()
    before = [t.clone() for t in model.state_dict().values()]
    with pytest.raises(ValueError, match="at least 1 or 'auto', got 'many'"):
        swap_prune.prune(model, data()[0], **QUIET | {"stages": "many"})
    few = torch.utils.data.TensorDataset(*data()[0][:4])
    with pytest.raises(ValueError, match="at least five samples are needed, got 4"):
        swap_prune.prune(model, few, **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_attacked_samples_that_judge_are_shifted_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, object]] = []
    restore = SampleDefence.restore

    def watched(
        self: SampleDefence, model: nn.Module, fitting: list, held_out: list, generator: torch.Generator
    ) -> object:
        found = restore(self, model, fitting, held_out, generator)
        seen.append((not held_out, found[2]))
        raise KeyboardInterrupt

    monkeypatch.setattr(SampleDefence, "restore", watched)
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(1800, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        labels = model(inputs).argmax(1)
    settings = QUIET | {"samples": 200, "noise": "adversarial:budget=0.5", "sparsity": 0.5}
    with pytest.raises(KeyboardInterrupt):
        swap_prune.prune(model, torch.utils.data.TensorDataset(inputs, labels), **settings)
    ((judges, evidence),) = seen
    assert judges and evidence is not None, "before any stage, and something was done"
