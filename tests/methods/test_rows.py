"""Rows of mini-batches and of single samples are compared where steps from each of them end."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import EWR, LR, plan, prune
from swap_prune.fisher.factor import DenseFactor, FisherFactor
from swap_prune.fisher.noise import GradientNoise
from swap_prune.fisher.noise.base import Layers
from swap_prune.fisher.noise.rows import RowNoise
from swap_prune.problem import PruningProblem, PruningSolution
from tests.cases import ONE, but_long, trained


def unused() -> FisherFactor:
    raise AssertionError("asked for")


def problem_of(factor: Tensor, felt: Tensor, others: Callable[[], FisherFactor | None] | None) -> PruningProblem:
    """A problem whose loss is the quadratic form of some rows, whatever those of its G are."""
    reference = torch.randn(factor.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return PruningProblem(
        reference,
        keep=12,
        factor=DenseFactor(factor),
        held_out=lambda w, kept: (felt @ (w - reference)).square() / 2,
        slope=lambda w, kept: felt.T @ (felt @ (w - reference)) / len(felt),
        blank=lambda: (felt @ reference).square() / 2,
        rows_of_samples=others,
    )


def rows(seed: int, n: int) -> Tensor:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    scales = torch.logspace(-2, 1, 40, dtype=torch.float64)[order]
    return torch.randn(n, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scales


@pytest.mark.parametrize("method", [LR(), EWR()])
def test_those_are_taken_whose_steps_end_lower(method: LR | EWR) -> None:
    felt, other = rows(1, 64), rows(2, 64)
    for factor, samples, chosen in ((other[:6], felt, "samples"), (felt, other, "mini-batches")):
        problem = problem_of(factor, felt, lambda samples=samples: DenseFactor(samples))
        solution = method.solve(problem, torch.Generator().manual_seed(0))
        ends: dict[str, list[float]] = {"samples": [], "mini-batches": []}
        for one in solution.evidence["candidates"]:
            ends[one["rows"]].append(one.get("loss_after_steps", math.inf))  # none where it was left
        assert solution.evidence["rows"] == chosen == min(ends, key=lambda kind: min(ends[kind]))
        alone = replace(problem, factor=DenseFactor(samples if chosen == "samples" else factor), rows_of_samples=None)
        again = method.solve(alone, torch.Generator().manual_seed(0))
        assert torch.equal(again.weights, solution.weights) and "rows" not in again.evidence


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": 30},  # a mild stage: candidates are compared as they start
        {"held_out": None},
        {"slope": None},
    ],
)
def test_they_are_not_asked_for_where_candidates_take_no_steps(changes: dict[str, Any]) -> None:
    problem = replace(problem_of(rows(1, 64), rows(1, 64), unused), **changes)
    assert "rows" not in LR().solve(problem, torch.Generator()).evidence


def test_none_may_come() -> None:
    problem = problem_of(rows(1, 64), rows(1, 64), lambda: None)
    without = LR().solve(replace(problem, rows_of_samples=None), torch.Generator())
    solution = LR().solve(problem, torch.Generator())
    assert solution.evidence == without.evidence and torch.equal(solution.weights, without.weights)


def normalised(images: bool = False) -> tuple[nn.Module, TensorDataset]:
    """A trained network with BatchNorm, and calibration samples."""
    return copy.deepcopy(_normalised(images))


@functools.cache
def _normalised(images: bool) -> tuple[nn.Module, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(240, 16, generator=generator)
    labels = (inputs[:, :4] + 0.5 * inputs[:, 4:8]).argmax(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if images:
            inputs = inputs.view(-1, 1, 4, 4)
            layers = [nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4)]
        else:
            layers = [nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
        return trained(nn.Sequential(*layers), inputs, labels, 120), TensorDataset(inputs, labels)


@pytest.mark.parametrize("images", but_long([False, True]))
@pytest.mark.parametrize("storage", but_long(["float32", "float16", "mapped", "low-rank", "matrix-free"]))
def test_a_run_takes_both_in_any_storage_and_leaves_no_file(images: bool, storage: str, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        model, data = normalised(images)
        settings: dict[str, Any] = {"samples": 160, "storage": storage, "scratch": tmp_path, "progress": False}
        report = prune(model, data, 0.9, ONE, **settings)
        evidence = report.stages[0].evidence
        assert {one["rows"] for one in evidence["candidates"]} == {"mini-batches", "samples"}
        assert evidence["rows"] in ("mini-batches", "samples") and list(tmp_path.iterdir()) == []
        assert report.kept == sum(int(p.count_nonzero()) for p in model.parameters() if p.ndim > 1)
        json.dumps(dict(evidence))
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *found)), "the same seed, the same bits"


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"recalibrate_batchnorm": False}, marks=pytest.mark.long),  # rows are of single samples anyway
        {"method": LR(fisher="empirical")},
        {"method": LR(first_order=0)},
        {"sparsity": 0.4},
        # Seen in those of mini-batches.
        pytest.param({"noise": "gradient:std=4,fraction=0.25"}, marks=pytest.mark.long),
    ],
)
def test_a_run_takes_one_kind_where_there_is_nothing_to_compare(settings: dict[str, Any]) -> None:
    model, data = normalised()
    settings = {"sparsity": 0.9, "method": "lr", "samples": 160, "progress": False} | settings
    evidence = prune(model, data, **settings).stages[0].evidence
    assert "rows" not in evidence and all("rows" not in one for one in evidence["candidates"])


@pytest.mark.parametrize("method", but_long([LR(), EWR(), ONE], short=[ONE]))
@pytest.mark.parametrize("sparsity", but_long([0.9, 0.95]))
def test_the_kind_that_is_taken_can_be_asked_for(method: LR | EWR, sparsity: float) -> None:
    """What is asked for comes out as if the other had been compared and left."""

    def weights_and_evidence(rows: str) -> tuple[list[Tensor], dict[str, Any]]:
        model, data = normalised()
        report = prune(model, data, sparsity, replace(method, rows=rows), samples=160, progress=False)
        return [p.detach() for p in model.parameters()], dict(report.stages[0].evidence)

    weights, evidence = weights_and_evidence("auto")
    own, alone = weights_and_evidence(evidence["rows"])
    assert all(map(torch.equal, weights, own)) and "rows" not in alone
    if "candidates" in alone:
        assert alone["candidates"] == [
            {name: value for name, value in one.items() if name != "rows"}
            for one in evidence["candidates"]
            if one["rows"] == evidence["rows"]
        ]


@pytest.mark.long
def test_the_kind_of_rows_decides_about_memory_and_is_noted_where_it_cannot_be_had() -> None:
    model, data = normalised()
    needs = {
        rows: plan(model, data, 0.9, LR(rows=rows), samples=160).forecasts[0] for rows in ("mini-batches", "samples")
    }
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert needs["mini-batches"].gradients == 4 * 10 * weights, "of sixteen samples"
    assert needs["samples"].gradients == 4 * 6 * 160 * weights, "signs are drawn six times"
    said = "rows='mini-batches' makes no difference: {}, and rows are those of samples"
    report = prune(model, data, 0.9, LR(rows="mini-batches"), samples=60, recalibrate_batchnorm=False, progress=False)
    assert said.format("no BatchNorm is recalibrated") in report.notes
    plain: dict[str, Any] = {"loss_fn": lambda net, batch: (net(batch[0]).square()).mean(1)}
    report = prune(model, data, 0.9, LR(rows="mini-batches"), samples=60, progress=False, **plain)
    assert said.format("the loss does not know its curvature") in report.notes
    report = prune(model, data, 0.9, LR(rows="samples"), samples=60, recalibrate_batchnorm=False, progress=False)
    assert not any("rows=" in note for note in report.notes)
    report = prune(model, data, 0.9, LR(rows="samples", mini_batch=8), samples=60, progress=False)
    idle = "mini_batch=8 makes no difference: rows='samples' takes none, and rows are those of samples"
    assert [note for note in report.notes if "difference" in note] == [idle]
    both = EWR(rows="mini-batches", mini_batch=8)
    report = prune(model, data, 0.9, both, samples=60, recalibrate_batchnorm=False, progress=False)
    idle = "rows='mini-batches' and mini_batch=8 make no difference: no BatchNorm is recalibrated, "
    assert [note for note in report.notes if "difference" in note] == [idle + "and rows are those of samples"]


@pytest.mark.parametrize("storage", ["float32", "low-rank", "matrix-free", "mapped"])
@pytest.mark.parametrize(
    ("mini_batch", "count"),
    [pytest.param(2, 80, marks=pytest.mark.long), (16, 10), (40, 4), (np.int64(64), 3), (1000, 1)],
)
def test_the_size_of_a_mini_batch_decides_how_many_rows_there_are(
    mini_batch: int, count: int, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    real = LR.solve

    def solve(self: LR, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        seen.append(problem.fisher().shape)
        return real(self, problem, generator)

    monkeypatch.setattr(LR, "solve", solve)
    model, data = normalised()
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    method = replace(ONE, rows="mini-batches", mini_batch=mini_batch, steps=1)
    options: dict[str, Any] = {"samples": 160, "storage": storage, "progress": False}
    planned = plan(model, data, 0.9, method, **options).forecasts[0]
    report = prune(model, data, 0.9, method, **options)
    assert seen == [(count, weights)] and "rows" not in report.stages[0].evidence
    if storage == "float32":
        assert planned.gradients == 4 * count * weights
    assert not any("mini_batch" in note for note in report.notes)
    json.loads(json.dumps(report.to_dict()))


@pytest.mark.long
def test_under_noise_slopes_are_over_mini_batches_of_that_size() -> None:
    sizes: dict[int, list[int]] = {}
    for size in (8, 40):
        model, data = normalised(images=True)
        seen: list[int] = []
        model.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(len(inputs[0])))
        method = replace(ONE, rows="mini-batches", mini_batch=size)
        prune(model, data, 0.9, method, samples=160, noise="gradient:std=4,fraction=0.25", progress=False)
        sizes[size] = seen
    assert sizes[8].count(8) > 3 * 20 and sizes[8].count(40) == 0, "two looks, rows, and slopes"
    assert sizes[40].count(40) > 3 * 4 and sizes[40].count(8) == 0


@pytest.mark.long
@pytest.mark.usefixtures("nothing_held")
def test_a_mini_batch_is_no_larger_than_a_stage_for_the_forecast() -> None:
    """Nor are BatchNorm's statistics then estimated from more samples at once."""
    needs = []
    for size in (160, 10**6):
        model, data = normalised(images=True)
        seen: list[int] = []
        model.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(len(inputs[0])))
        method = replace(ONE, rows="mini-batches", mini_batch=size, steps=1)
        needs.append(plan(model, data, 0.9, method, samples=160).forecasts[0])
        prune(model, data, 0.9, method, samples=160, progress=False)
        assert max(seen) == 160
    assert needs[1].phases["capture"] < 1.1 * needs[0].phases["capture"], "a million would take gigabytes"
    model, data = normalised()
    report = prune(model, data, 0.9, LR(), samples=10, recalibrate_batchnorm=False, progress=False)
    assert not any("mini_batch" in note for note in report.notes)


@pytest.mark.parametrize("mini_batch", [1, 0, -16, 2.5, True, "auto", None])
def test_a_mini_batch_of_no_size(mini_batch: Any) -> None:
    for method in (LR, EWR):
        with pytest.raises(ValueError, match="mini_batch must be a whole number of at least 2, got"):
            method(mini_batch=mini_batch)


@pytest.mark.parametrize("rows", ["batches", None, 16])
def test_a_kind_of_rows_that_is_none(rows: Any) -> None:
    for method in (LR, EWR):
        with pytest.raises(ValueError, match="rows must be one of auto, mini-batches, samples, got"):
            method(rows=rows)
        with pytest.raises(ValueError, match="needs Gauss-Newton rows"):
            method(rows="mini-batches", fisher="empirical")


@pytest.mark.long
@pytest.mark.parametrize("settings", [{"rows": "samples"}, {"fisher": "empirical"}])
def test_noisy_slopes_of_samples_are_followed_by_those_of_batches(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which have the statistics that candidates are judged by."""
    offered: list[bool] = []
    real = LR.solve

    def solve(self: LR, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        offered.append(problem.whole_slope is not None)
        return real(self, problem, generator)

    monkeypatch.setattr(LR, "solve", solve)
    for noise, recalibrated in (("gradient:std=4,fraction=0.25", True), ("gradient:std=4", False), (None, True)):
        model, data = normalised(images=True)
        options: dict[str, Any] = {"samples": 160, "noise": noise, "recalibrate_batchnorm": recalibrated}
        prune(model, data, 0.9, replace(ONE, **settings), progress=False, **options)
    assert offered == [True, False, False]


class Late(RowNoise):
    """Noise that begins when it is told to."""

    begun = False

    def overwrite(self, rows: Tensor, generator: torch.Generator, layers: Layers | None) -> None:
        if self.begun:
            GradientNoise(std=4, fraction=0.25).overwrite(rows, generator, layers)


@pytest.mark.parametrize("begins", [False, True])
def test_those_of_samples_are_left_where_noise_is_seen_in_them(begins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of mini-batches had none."""
    offered: list[FisherFactor | None] = []
    real, noise = LR.solve, Late()

    def solve(self: LR, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        assert problem.rows_of_samples is not None
        noise.begun = begins
        offered.append(problem.rows_of_samples())
        noise.begun = False
        return real(self, replace(problem, rows_of_samples=None), generator)

    monkeypatch.setattr(LR, "solve", solve)
    model, data = normalised()
    prune(model, data, 0.9, "lr", samples=160, noise=noise, progress=False)
    assert [one is None for one in offered] == [begins]


@pytest.mark.usefixtures("nothing_held")
def test_a_plan_counts_both(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = normalised()
    needs = {
        name: {one.name: one.need for one in plan(model, data, 0.9, method, samples=160).forecasts}
        for name, method in (("compared", LR()), ("alone", LR(first_order=0)))
    }
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    drawn = 6 * 160  # signs are drawn six times
    assert needs["compared"]["float32"] >= needs["alone"]["float32"] + 4 * drawn * weights
    monkeypatch.setattr("swap_prune.fisher.capture.sketch._MOST_COMPARED", 160 * weights - 1)
    few = plan(model, data, 0.9, "lr", samples=160).forecasts[0].need
    assert few == needs["alone"]["float32"]
    assert "rows" not in prune(model, data, 0.9, "lr", samples=160, progress=False).stages[0].evidence


@pytest.mark.usefixtures("nothing_held")
def test_where_both_do_not_fit_one_kind_is_taken_rather_than_a_slower_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = normalised()
    both = plan(model, data, 0.9, "lr", samples=160, memory="8GB")
    assert both.require().storage.compares_rows
    limit = both.require().need - 2**20
    monkeypatch.setattr("swap_prune.pipeline.memory_limit", lambda *_: limit)
    alone = plan(model, data, 0.9, "lr", samples=160)
    assert alone.require().storage.kind == "float32" and not alone.require().storage.compares_rows
    assert alone.require().need <= limit
    monkeypatch.setattr("swap_prune.stages.setup.memory_limit", lambda *_: limit)
    report = prune(model, data, 0.9, "lr", samples=160, progress=False)
    assert "rows" not in report.stages[0].evidence and report.settings["storage"]["compares_rows"] is False


class Flattening(nn.Sequential):
    """Takes a sample alone for no batch."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = super().forward(inputs)
        return outputs.squeeze(0)


def test_what_does_not_take_samples_alone_has_rows_of_mini_batches() -> None:
    model, data = normalised()
    evidence = prune(Flattening(*model), data, 0.9, "lr", samples=160, progress=False).stages[0].evidence
    assert "rows" not in evidence and "held_out_loss" in evidence["candidates"][0]
    assert evidence["rows_of_samples_left"]


@pytest.mark.parametrize("samples", [160, 200])
def test_the_samples_asked_for_decide_in_plan_and_run(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer may come, of data whose length nobody knows."""
    model, data = normalised()
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    monkeypatch.setattr("swap_prune.fisher.capture.sketch._MOST_COMPARED", 160 * weights)
    batches = [tuple(part) for part in zip(*(tensor.split(20) for tensor in data.tensors), strict=True)]
    evidence = prune(model, batches[:9], 0.9, "lr", samples=samples, progress=False).stages[0].evidence
    assert ("rows" in evidence) == (samples == 160)
