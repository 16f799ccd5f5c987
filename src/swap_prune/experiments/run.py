"""Run an experiment: every run of its grid once, whatever interrupts it.

Each run prunes a fresh copy of the dense network with ``swap_prune.prune``, as a user would, measures it, and adds a
line to ``results.jsonl``. Nothing passes from one run to the next, so a resumed experiment ends in the same bytes,
timings apart, as one that ran through. Where several runs go side by side, each in a process with one thread, lines are
written as runs end. When all are done they are put in the order of the grid.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from swap_prune.experiments.bench import Bench
from swap_prune.experiments.config import Run, plan_runs
from swap_prune.experiments.datasets import calibration_data, recalibration_data
from swap_prune.experiments.evaluate import Evaluation
from swap_prune.experiments.results import Results, RunResult, open_results, shortest
from swap_prune.experiments.side_by_side import side_by_side
from swap_prune.pipeline import prune
from swap_prune.process_memory import peak_memory, reset_peak_memory, return_free_memory, share_of_free_memory
from swap_prune.randomness import seeded
from swap_prune.report import PruningReport, versions
from swap_prune.surgery.batchnorm import batchnorm_layers

__all__ = ["Outcome", "run_experiment"]


@dataclass(frozen=True)
class Outcome:
    """How an experiment ended.

    Attributes:
        total: Runs of the grid.
        done: Runs that were done now, without failure.
        failed: Runs that failed, now or, where others were still to be done, before.
        skipped: Runs that were there already.
    """

    total: int
    done: int
    failed: int
    skipped: int


def run_experiment(
    bench: Bench,
    out: str | Path,
    *,
    resume: bool,
    say: Callable[[str], None],
    jobs: int = 1,
    again: Callable[[], Bench] | None = None,
) -> Outcome:
    """Do every run that is not done yet.

    Args:
        bench: What :func:`swap_prune.experiments.bench.prepare` returned.
        out: Directory of the results.
        resume: Whether it may hold results already. Once every run was tried, failed ones are tried again.
        say: Called with progress messages.
        jobs: Runs side by side, each in a process with one thread. By default runs follow each other in this process,
            with its threads.
        again: Prepares the same bench in another process; needed for several jobs.

    Raises:
        ValueError: If the dense network cannot be measured, or the directory cannot be used. A run that fails
            is recorded with its error, and the next one goes on.
        MemoryError: If a process of one of several jobs was ended from outside.
    """
    with seeded(0):
        dense_network = bench.dense()
        dense = bench.measure(dense_network)
    sha256 = bench.weights_sha256
    runs = plan_runs(bench.experiment, sha256)
    config = bench.experiment.model_dump(mode="json", exclude={"weights"})
    with open_results(out, config | {"weights_sha256": sha256, "device": str(bench.device)}, resume=resume) as results:
        _check_planned(results, runs)
        tried = {record.id for record in results.records}
        finished = {record.id for record in results.records if record.error is None}
        broken = [run for run in runs if run.id in tried - finished]
        missing = [run for run in runs if run.id not in tried] or broken  # as an uninterrupted experiment would
        waiting = len(broken) if missing is not broken else 0
        say(f"dense network: {dense.accuracy:.2f} %; {len(missing)} of {len(runs)} runs to do")
        failed, started = 0, time.perf_counter()
        with _records(bench, missing, dense_network, dense, jobs, again) as records:
            for number, record in enumerate(records, start=1):
                results.append(record)
                failed += record.error is not None
                left = (time.perf_counter() - started) / number * (len(missing) - number)
                say(f"[{number}/{len(missing)}] {_describe(record)}; {_duration(left)} left")
        results.put_in_order([run.id for run in runs])
    return Outcome(len(runs), len(missing) - failed, failed + waiting, len(runs) - len(missing) - waiting)


def _check_planned(results: Results, runs: Sequence[Run]) -> None:
    """Refuse results of runs that are not of the grid: its own would be done beside them, and count twice."""
    planned = {run.id for run in runs}
    strangers = [record for record in results.records if record.id not in planned]
    if strangers:
        raise ValueError(
            f"{results.path} holds {len(strangers)} results of runs that are not of this grid (the first: "
            f"{strangers[0].id}, {strangers[0].label}, seed {strangers[0].seed}), as another version of swap-prune "
            "writes them; resume with that version, or choose another directory"
        )


def _records(
    bench: Bench,
    runs: Sequence[Run],
    dense_network: nn.Module,
    dense: Evaluation,
    jobs: int,
    again: Callable[[], Bench] | None,
) -> AbstractContextManager[Iterator[RunResult]]:
    """Do some runs, and give their lines as they come."""
    if jobs == 1:
        return nullcontext(_record((bench, dense_network), run, dense) for run in runs)
    assert again is not None, "several jobs need it"
    memory = share_of_free_memory(max(1, min(jobs, len(runs))))
    share = partial(_shared, again, memory, bench.weights_sha256)
    return side_by_side(_record, [(run, dense) for run in runs], jobs, share)


def _shared(again: Callable[[], Bench], memory: int | None, sha256: str) -> tuple[Bench, nn.Module]:
    """Prepare what all runs of a process share: the bench, and the dense network that was measured."""
    bench = replace(again(), memory=memory)
    if bench.weights_sha256 != sha256:
        raise ValueError(
            "the dense network is not the same in each process: give it weights from a file (the key weights, or "
            "--weights), or let runs follow each other (--jobs 1)"
        )
    with seeded(0):
        return bench, bench.dense()


def _record(shared: tuple[Bench, nn.Module], run: Run, dense: Evaluation) -> RunResult:
    """Do a run from the bench and the dense network, and return its line; a failure is a line too."""
    line: dict[str, Any] = {"id": run.id, "label": run.method.label, "seed": run.seed, "settings": run.settings}
    line |= {"versions": versions(), "dense_accuracy": dense.accuracy}
    try:
        with seeded(run.seed):
            return RunResult(**line, **_figures(*shared, run))
    except (Exception, SystemExit) as error:  # out of memory, LAPACK, the user's data or model: others may do well
        return RunResult(**line, error=_reason(error))


def _reason(error: BaseException) -> str:
    """Return one line, which JSON can hold: no lone surrogates."""
    if isinstance(error, SystemExit):
        return f"the model or the data called sys.exit({error.code!r})"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.encode(errors="backslashreplace").decode()


def _figures(bench: Bench, dense_network: nn.Module, run: Run) -> dict[str, Any]:
    """Prune a copy of the dense network, and measure it."""
    start = bench.network if bench.experiment.recalibrate_batchnorm else dense_network  # else `prune` repairs it
    network = copy.deepcopy(start)
    return_free_memory()  # of earlier runs
    reset_peak_memory(bench.device)
    report = _prune(bench, network, run)
    peak = peak_memory(bench.device)
    measured = bench.measure(network)
    before: Evaluation | None = None
    if bench.experiment.evaluate_before_recalibration and batchnorm_layers(network):
        _copy_statistics(dense_network, network)
        before = bench.measure(network)
    return {
        "accuracy": measured.accuracy,
        "loss": measured.loss,
        "accuracy_before": before and before.accuracy,
        "loss_before": before and before.loss,
        "test_samples": measured.samples,
        "kept": report.kept,
        "total": report.total,
        "layers": {name: layer.sparsity for name, layer in report.layers.items()},
        "evidence": [stage.evidence for stage in report.stages],
        "notes": [*report.notes, *measured.notes],
        "converged": all(stage.converged for stage in report.stages),
        "seconds": report.seconds,
        "peak_memory": peak,
    }


def _prune(bench: Bench, network: nn.Module, run: Run) -> PruningReport:
    """Call ``prune`` as a user would."""
    experiment, images, noise = bench.experiment, bench.data(), run.settings["noise"]
    return prune(
        network,
        calibration_data(images, run.seed),
        run.settings["sparsity"],
        run.method.resolve(),
        targets=experiment.targets,
        ignore=experiment.ignore,
        samples=experiment.samples,
        stages=run.settings["stages"],
        schedule=experiment.schedule,
        min_keep=experiment.min_keep,
        pattern=experiment.pattern,
        recalibrate_batchnorm=experiment.recalibrate_batchnorm,
        recalibration_data=recalibration_data(images, run.seed),
        finetune=experiment.finetune,
        noise=noise,
        defence=run.method.defence,
        memory=experiment.memory or bench.memory,
        storage=run.method.storage,
        scratch=bench.scratch,
        keep_rows=bench.keep_rows and run.method.storage == "mapped" and noise == "none",
        seed=run.seed,
    )


def _copy_statistics(source: nn.Module, target: nn.Module) -> None:
    for own, other in zip(batchnorm_layers(target), batchnorm_layers(source), strict=True):
        for buffer, values in zip(own.buffers(), other.buffers(), strict=True):
            buffer.copy_(values)


def _describe(record: RunResult) -> str:
    sparsity, stages, noise = (record.settings[name] for name in ("sparsity", "stages", "noise"))
    text = f"{record.label}, sparsity {shortest(sparsity)}, stages {stages}, noise {noise}"
    if record.error is not None:
        return f"{text}, seed {record.seed}: failed: {record.error}"
    return f"{text}, seed {record.seed}: {record.accuracy:.2f} % in {record.seconds:.1f} s"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
