"""samples="auto": as many as fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import PruningReport, plan, prune
from swap_prune.stages.runner import StageRunner
from tests.cases import ONE as SKETCHED
from tests.cases import but_long
from tests.stages.test_checkpoint import interrupted_after

pytestmark = pytest.mark.usefixtures("nothing_held")

_COUNT = 2000
ONE = replace(SKETCHED, fisher="empirical")  # a row a sample, however many there are


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 5))


def samples_of_it(count: int = _COUNT) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 60, generator=generator), torch.randint(5, (count,), generator=generator))


def budget_for(samples: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Set a budget that about so many samples fit, and return it."""
    limit = int(plan(wide(), samples_of_it(), 0.9, ONE, samples=samples, storage="float16").forecasts[0].need / 0.95)
    for place in ("swap_prune.pipeline.memory_limit", "swap_prune.stages.setup.memory_limit"):
        monkeypatch.setattr(place, lambda *_: limit)
    return limit


def run(samples: Any, **changes: Any) -> tuple[PruningReport, dict[str, Tensor]]:
    model = wide()
    given = {"samples": samples, "storage": "float16", "progress": False} | changes
    report = prune(model, samples_of_it(), 0.9, ONE, **given)
    return report, model.state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.long
def test_as_many_are_taken_as_fit_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = budget_for(300, monkeypatch)
    refused = plan(wide(), samples_of_it(), 0.9, ONE, storage="float16")
    assert refused.chosen is None and refused.samples == 1024 and 250 < refused.fitting < 400
    planned = plan(wide(), samples_of_it(), 0.9, ONE, samples="auto", storage="float16")
    assert planned.samples == planned.to_dict()["samples"] == pytest.approx(refused.fitting, rel=0.05)
    assert planned.require().need <= limit
    report, _ = run("auto")
    taken = report.settings["samples"]
    assert taken == report.stages[0].samples == pytest.approx(planned.samples, rel=0.05)
    assert f"{taken} samples are taken in a stage, for more do not fit the memory" in report.notes
    with pytest.raises(ValueError, match=r"1024 samples of .* use samples="):
        run(1024)


def test_a_storage_that_holds_all_is_taken_rather_than_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    budget_for(300, monkeypatch)
    planned = plan(wide(), samples_of_it(), 0.9, ONE, samples="auto")
    assert planned.samples == 1024 and planned.require().name in ("mapped", "matrix-free")


@pytest.mark.parametrize("count", but_long([150, _COUNT]))
def test_where_all_fit_it_is_the_default(count: int) -> None:
    outcomes = []
    for samples in ("auto", 1024):
        model = wide()
        report = prune(model, samples_of_it(count), 0.9, ONE, samples=samples, progress=False)
        outcomes.append((report, model.state_dict()))
    (auto, weights), (default, own) = outcomes
    assert same(weights, own) and auto.settings == default.settings
    asked = [note for note in default.notes if "fewer than the 1024 asked for" in note]
    assert len(asked) == (count < 1024) and auto.notes == [note for note in default.notes if note not in asked]


def test_few_are_not_taken_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swap_prune.memory.planning._FEW", 1000)
    budget_for(300, monkeypatch)
    assert plan(wide(), samples_of_it(), 0.9, ONE, samples="auto", storage="float16").samples == 1024
    with pytest.raises(ValueError, match=r"use samples=\d+, which are few"):
        run("auto")


@pytest.mark.long
def test_a_run_goes_on_with_as_many_as_it_began_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever memory there is then."""
    budget_for(300, monkeypatch)
    interrupted_after(1, monkeypatch, lambda: run("auto", stages=3, checkpoint=tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    budget_for(400, monkeypatch)
    expected, weights = run("auto", stages=3, checkpoint=tmp_path / "again")
    assert 250 < expected.settings["samples"] < 380
    for place in ("swap_prune.pipeline.memory_limit", "swap_prune.stages.setup.memory_limit"):
        monkeypatch.setattr(place, lambda *_: None)
    planned = plan(wide(), samples_of_it(), 0.9, ONE, samples="auto", storage="float16", checkpoint=tmp_path / "run")
    assert planned.samples == expected.settings["samples"]
    report, own = run("auto", stages=3, checkpoint=tmp_path / "run")
    assert same(weights, own) and report.settings == expected.settings and report.notes == expected.notes
    with monkeypatch.context() as patch:
        patch.setattr(StageRunner, "run", lambda *_, **__: pytest.fail("all stages are there"))
        assert same(weights, run("auto", stages=3, checkpoint=tmp_path / "run")[1])
    tight = plan(wide(), samples_of_it(), 0.9, ONE, samples=150, storage="float16").forecasts[0].need
    monkeypatch.setattr("swap_prune.stages.setup.memory_limit", lambda *_: tight)
    with pytest.raises(ValueError, match=r"\d+ samples of \d+ weights do not fit .*; use samples=\d+"):
        run("auto", stages=3, checkpoint=tmp_path / "run")
    monkeypatch.setattr("swap_prune.stages.setup.memory_limit", lambda *_: None)
    with pytest.raises(ValueError, match=r"samples was \d+ and is 200; samples_open was true and is false\. Repeat"):
        run(200, stages=3, checkpoint=tmp_path / "run")


@pytest.mark.long
def test_a_run_of_a_number_is_not_gone_on_with_by_one_that_leaves_it_open(tmp_path: Path) -> None:
    interrupted_after(1, pytest.MonkeyPatch(), lambda: run(300, stages=3, checkpoint=tmp_path / "run"))
    with pytest.raises(
        ValueError, match=r"is of another run: samples was 300 and is 1024; samples_open was false and is true\."
    ):
        run("auto", stages=3, checkpoint=tmp_path / "run")


@pytest.mark.long
def test_before_a_stage_is_finished_there_is_nothing_to_go_on_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The memory that there is the second time decides."""
    budget_for(300, monkeypatch)
    interrupted_after(0, monkeypatch, lambda: run("auto", stages=2, checkpoint=tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    budget_for(500, monkeypatch)
    report, weights = run("auto", stages=2, checkpoint=tmp_path / "run")
    assert report.settings["samples"] > 400
    assert same(weights, run("auto", stages=2, checkpoint=tmp_path / "run")[1])


@pytest.mark.parametrize("samples", ["all", "", "64", 0, -1, 2.5, True, None])
def test_a_number_that_is_none(samples: Any) -> None:
    with pytest.raises(ValueError, match="samples must be"):
        run(samples)
