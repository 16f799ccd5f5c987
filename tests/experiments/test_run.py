"""Running experiments: results as from the user's own calls, each run once whatever interrupts it."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from swap_prune import LR, FineTune, prune
from swap_prune.experiments import bench as bench_module
from swap_prune.experiments import run as run_module
from swap_prune.experiments.bench import Bench, prepare, seeded
from swap_prune.experiments.config import Experiment
from swap_prune.experiments.evaluate import evaluate
from swap_prune.experiments.results import RunResult, read_results
from swap_prune.experiments.run import Outcome, run_experiment
from swap_prune.experiments.tables import as_markdown, summarise
from tests import tiny

TIMINGS = {"seconds", "peak_memory"}


def bench(experiment: Experiment | None = None) -> Bench:
    return prepare(experiment or tiny.experiment(), Path(), None, None, torch.device("cpu"))


def start(out: Path, experiment: Experiment | None = None, *, resume: bool = True) -> Outcome:
    return run_experiment(bench(experiment), out, resume=resume, say=lambda _: None)


def without_timings(out: Path) -> list[str]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert all(line.keys() >= TIMINGS for line in lines)
    return [json.dumps({key: value for key, value in line.items() if key not in TIMINGS}) for line in lines]


@pytest.mark.long
def test_results_are_those_of_the_users_own_calls(tmp_path: Path) -> None:
    assert start(tmp_path / "out", resume=False) == Outcome(total=8, done=8, failed=0, skipped=0)
    results = read_results(tmp_path / "out")
    assert [r.seed for r in results] == [0] * 4 + [1] * 4
    train, test = tiny.data()
    for result in results:
        with seeded(0):
            network = tiny.network()
        method = LR(damping=1.0, first_order=0.0) if result.label == "lr" else "magnitude"
        sparsity = result.settings["sparsity"]
        report = prune(network, train, sparsity, method, samples=40, seed=result.seed, progress=False)
        measured = evaluate(network, test)
        assert (result.accuracy, result.loss, result.test_samples) == (measured.accuracy, measured.loss, 200)
        assert (result.kept, result.total, result.notes) == (report.kept, report.total, report.notes)
        assert result.layers == {name: layer.sparsity for name, layer in report.layers.items()}
        assert result.evidence == [stage.evidence for stage in report.stages]
        assert result.seconds is not None and result.peak_memory is not None and result.peak_memory > 10**7


@pytest.mark.long
def test_fine_tuning_is_that_of_the_users_own_calls(tmp_path: Path) -> None:
    experiment = tiny.experiment(finetune={"epochs": 2, "batch_size": 20}, sparsities=0.8, seeds=1, stages=2)
    start(tmp_path, experiment)
    for result in read_results(tmp_path):
        with seeded(0):
            network = tiny.network()
        settings = FineTune(epochs=2, batch_size=20)
        method = LR(damping=1.0, first_order=0.0) if result.label == "lr" else "magnitude"
        report = prune(network, tiny.data()[0], 0.8, method, samples=40, stages=2, seed=1, finetune=settings)
        assert result.settings["finetune"] == report.settings["finetune"]
        assert result.evidence == [stage.evidence for stage in report.stages]
        assert result.accuracy == evaluate(network, tiny.data()[1]).accuracy
    assert "fine-tuning epochs 2" in as_markdown(summarise(read_results(tmp_path)))


@pytest.mark.long
def test_a_finished_experiment_has_nothing_to_do(tmp_path: Path) -> None:
    start(tmp_path)
    content = (tmp_path / "results.jsonl").read_bytes()
    assert start(tmp_path) == Outcome(total=8, done=0, failed=0, skipped=8)
    assert (tmp_path / "results.jsonl").read_bytes() == content


def test_the_same_numbers_written_in_another_way_are_the_same_experiment(tmp_path: Path) -> None:
    def grid(number: float, flag: object) -> Experiment:
        methods = [{"name": "lr", "settings": {"damping": number, "first_order": 0.0}}]
        return tiny.experiment(methods=methods, model_options={"normalised": flag}, seeds=0)

    start(tmp_path, grid(1, True))
    assert start(tmp_path, grid(1.0, True)) == Outcome(total=2, done=0, failed=0, skipped=2)
    with pytest.raises(ValueError, match="another experiment: model_options differ"):
        start(tmp_path, grid(1, 1))


def test_what_is_said_tells_sparsities_apart(tmp_path: Path) -> None:
    said: list[str] = []
    near = bench(tiny.experiment(sparsities=[0.8, 0.8000001], seeds=0, methods=[{"name": "magnitude"}]))
    run_experiment(near, tmp_path, resume=False, say=said.append)
    assert "sparsity 0.8, stages" in said[1] and "sparsity 0.8000001, stages" in said[2]


@pytest.mark.long
def test_results_of_runs_that_are_not_planned_are_not_mixed_with_others(tmp_path: Path) -> None:
    start(tmp_path)
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    written = {**json.loads(lines[2]), "id": "0123456789abcdef"}
    other = "".join([*lines[:2], json.dumps(written) + "\n", *lines[3:]])
    (tmp_path / "results.jsonl").write_text(other)
    with pytest.raises(ValueError, match=r"results\.jsonl holds 1 results .*0123456789abcdef, magnitude.*version"):
        start(tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == other


@pytest.mark.long
@pytest.mark.parametrize("data", ["data", "batches", "shuffled"])
def test_wherever_it_is_cut_it_ends_in_the_same_bytes(tmp_path: Path, data: str) -> None:
    experiment = tiny.experiment(data=f"tests.tiny:{data}", noise=["none", "gradient:std=2"], seeds=0)
    start(tmp_path, experiment)
    whole, lines = (tmp_path / "results.jsonl").read_bytes(), without_timings(tmp_path)
    for length in range(0, len(whole), len(whole) // 7):
        (tmp_path / "results.jsonl").write_bytes(whole[:length])
        start(tmp_path, experiment)
        assert without_timings(tmp_path) == lines
        assert (tmp_path / "results.jsonl").read_bytes().startswith(whole[: whole.rfind(b"\n", 0, length) + 1])


def work(out: str) -> None:
    """What is killed."""
    start(Path(out), tiny.experiment(seeds=list(range(12))))


@pytest.mark.long
def test_side_by_side_they_end_in_the_same_bytes(tmp_path: Path) -> None:
    """In the order of the grid, whatever the order in which runs end, and after an interruption."""
    methods = [{"name": "lr", "settings": {"damping": 1.0, "first_order": 0.0}}, {"name": "magnitude"}]
    experiment = tiny.experiment(methods=methods, noise=["none", "gradient:std=2"])
    start(tmp_path / "one", experiment)
    said: list[str] = []
    shared = bench(experiment)
    outcome = run_experiment(
        shared, tmp_path / "two", resume=False, say=said.append, jobs=2, again=partial(bench, experiment)
    )
    assert without_timings(tmp_path / "two") == without_timings(tmp_path / "one")
    assert outcome.done == outcome.total == len(said) - 1
    lines = (tmp_path / "two" / "results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "two" / "results.jsonl").write_bytes(b"".join(lines[3:]))
    run_experiment(shared, tmp_path / "two", resume=True, say=said.append, jobs=2, again=partial(bench, experiment))
    assert without_timings(tmp_path / "two") == without_timings(tmp_path / "one")


def another_bench() -> Bench:
    made = bench()
    with torch.no_grad():
        next(made.network.parameters()).add_(1)
    return made


@pytest.mark.long
def test_side_by_side_every_process_has_the_same_dense_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the dense network is not the same in each process: give it weights"):
        run_experiment(bench(), tmp_path, resume=True, say=lambda _: None, jobs=2, again=another_bench)
    assert (tmp_path / "results.jsonl").read_bytes() == b""


@pytest.mark.long
def test_side_by_side_runs_share_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that nothing fits shows that it arrives; the experiment's own comes before it."""
    asked: list[int] = []

    def least(processes: int) -> int:
        asked.append(processes)
        return 1000

    monkeypatch.setattr(run_module, "share_of_free_memory", least)
    for experiment, failed in ((tiny.experiment(), True), (tiny.experiment(memory="8GB"), False)):
        out = tmp_path / str(failed)
        again = partial(bench, experiment)
        run_experiment(bench(experiment), out, resume=False, say=lambda _: None, jobs=2 if failed else 9, again=again)
        errors = [result.error for result in read_results(out) if result.label == "lr"]
        assert all(error is not None and "memory" in error for error in errors) if failed else errors == [None] * 4
    assert asked == [2, 8], "no more processes than runs"


@pytest.mark.long
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed_it_ends_in_the_same_bytes(tmp_path: Path, kills: int) -> None:
    moments = random.Random(kills)
    context = multiprocessing.get_context("forkserver")  # a process starts with everything imported
    context.set_forkserver_preload(["tests.tiny", "swap_prune.experiments.run", "torch._dynamo"])
    path = tmp_path / "killed" / "results.jsonl"

    def length() -> int:
        return path.stat().st_size if path.exists() else 0

    for _ in range(kills):
        process = context.Process(target=work, args=(str(path.parent),))
        before = length()
        process.start()
        deadline = time.monotonic() + 60
        while moments.random() < 0.8 and length() == before and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -9, "killed before it was done"
    process = context.Process(target=work, args=(str(path.parent),))
    process.start()
    process.join()
    assert process.exitcode == 0
    work(str(tmp_path / "whole"))
    assert without_timings(path.parent) == without_timings(tmp_path / "whole")
    assert (path.parent / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "config.json", "results.jsonl"]


@pytest.mark.long
def test_an_experiment_that_was_broken_off_after_a_failure_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **settings: object) -> object:
        if settings["seed"] == 0:
            raise RuntimeError("no luck")
        return prune(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "prune", fails)
    start(tmp_path / "whole")
    start(tmp_path / "cut")
    path = tmp_path / "cut" / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    assert start(tmp_path / "cut") == Outcome(total=8, done=3, failed=4, skipped=1)
    assert without_timings(tmp_path / "cut") == without_timings(tmp_path / "whole")


@pytest.mark.long
def test_a_failed_run_is_recorded_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **settings: object) -> object:
        if settings["seed"] == 1:
            raise RuntimeError("out of\nmemory")
        return prune(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "prune", fails)
    assert start(tmp_path) == Outcome(total=8, done=4, failed=4, skipped=0)
    failed = [r for r in read_results(tmp_path) if r.error is not None]
    assert [r.seed for r in failed] == [1] * 4 and failed[0].error == "out of memory"
    assert all(r.accuracy is None and r.kept is None and r.seconds is None for r in failed)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert {tuple(json.loads(line)) for line in lines} == {tuple(RunResult.model_fields)}  # all fields in every line
    monkeypatch.undo()
    assert start(tmp_path) == Outcome(total=8, done=4, failed=0, skipped=4)
    start(tmp_path / "whole")
    ids = {result.id: result.accuracy for result in read_results(tmp_path / "whole")}
    assert {result.id: result.accuracy for result in read_results(tmp_path)} == ids


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (SystemExit(0), "the model or the data called sys.exit(0)"),
        (RuntimeError("no file \udcff\n of this name"), "no file \\udcff of this name"),
        (KeyError(), "KeyError"),
    ],
    ids=["exit", "surrogate", "no text"],
)
def test_whatever_a_run_fails_by_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, text: str
) -> None:
    def fails(*arguments: object, **settings: object) -> object:
        if settings["seed"] == 0:
            raise raised
        return prune(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "prune", fails)
    assert start(tmp_path) == Outcome(total=8, done=4, failed=4, skipped=0)
    assert {r.error for r in read_results(tmp_path)} == {text, None}


def test_before_recalibration_is_the_dense_networks_statistics(tmp_path: Path) -> None:
    options = {"evaluate_before_recalibration": True, "seeds": 0, "methods": [{"name": "magnitude"}]}
    start(tmp_path / "with", tiny.experiment(**options))
    start(tmp_path / "never", tiny.experiment(**options | {"recalibrate_batchnorm": False}))
    for before, never in zip(read_results(tmp_path / "with"), read_results(tmp_path / "never"), strict=True):
        # magnitude keeps the same weights either way, and these statistics fit well enough not to be repaired
        assert (before.accuracy_before, before.loss_before) == (never.accuracy, never.loss)
        assert before.loss != before.loss_before
    start(tmp_path / "once", tiny.experiment(**options | {"data": "tests.tiny:batches"}))  # readable only once
    assert all(result.accuracy_before is not None for result in read_results(tmp_path / "once"))
    start(tmp_path / "without", tiny.experiment(**options | {"model_options": {"normalised": False}}))
    assert all(result.accuracy_before is None for result in read_results(tmp_path / "without"))


def test_statistics_that_fit_nothing_are_repaired_before_pruning_without_recalibration(tmp_path: Path) -> None:
    options = {"recalibrate_batchnorm": False, "sparsities": 0.0, "seeds": 0, "methods": [{"name": "magnitude"}]}
    own = bench(tiny.experiment(**options))
    normalisation = next(m for m in own.network.modules() if isinstance(m, nn.BatchNorm1d))
    normalisation.running_var *= 1e-8
    network = own.dense()
    repaired = next(m for m in network.modules() if isinstance(m, nn.BatchNorm1d))
    assert bool((repaired.running_var > 1e-4).all()) and bool((normalisation.running_var < 1e-4).all())
    run_experiment(own, tmp_path / "out", resume=False, say=lambda _: None)
    [result] = read_results(tmp_path / "out")
    assert result.accuracy == own.measure(network).accuracy != own.measure(own.network).accuracy


@pytest.mark.long
def test_a_part_of_the_test_images(tmp_path: Path) -> None:
    start(tmp_path / "part", tiny.experiment(test_images=50))
    start(tmp_path / "more", tiny.experiment(test_images=1000))
    part, more = (read_results(tmp_path / name) for name in ("part", "more"))
    assert {r.test_samples for r in part} == {50} and {r.test_samples for r in more} == {200}
    with pytest.raises(ValueError, match="test_images needs test data that is a Dataset"):
        start(tmp_path / "none", tiny.experiment(test_images=50, data="tests.tiny:batches"))
    assert not (tmp_path / "none").exists()


def test_a_part_of_the_test_images_is_drawn_and_read_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may be sorted by class."""
    own, seen, iterate = bench(tiny.experiment(test_images=50)), [], bench_module.iterate
    monkeypatch.setattr(
        bench_module, "iterate", lambda data, index: seen.append(index.tolist()) or iterate(data, index)
    )
    for _ in range(2):
        own.measure(own.network)
    first, again = seen
    assert first == again == sorted(set(first)) and first != list(range(50))


@pytest.mark.long
def test_weights_that_changed_are_another_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path)
    original = tiny.network
    monkeypatch.setattr(tiny, "network", lambda: original().apply(_louder))
    with pytest.raises(ValueError, match="weights_sha256"):
        start(tmp_path)


def _louder(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        module.bias.data += 1


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    start(tmp_path, tiny.experiment(seeds=3, data="tests.tiny:shuffled"))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_looked_for_beside_the_file_and_in_the_data_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny.network()
    for name in ("beside", "data", "environment"):
        (tmp_path / name).mkdir()
        torch.save({k: v + len(name) for k, v in network.state_dict().items()}, tmp_path / name / f"{name}.pt")
    monkeypatch.setenv("SWAP_PRUNE_DATA", str(tmp_path / "environment"))
    places = (tmp_path / "beside", None, tmp_path / "data", torch.device("cpu"))
    for name in ("beside", "data", "environment"):
        found = prepare(tiny.experiment(weights=f"{name}.pt"), *places).network.state_dict()
        assert torch.equal(found["0.weight"], network.state_dict()["0.weight"] + len(name))
    with pytest.raises(ValueError, match=r"nowhere\.pt was not found"):
        prepare(tiny.experiment(weights="nowhere.pt"), *places)
