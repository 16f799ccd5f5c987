"""The commands ``swap-prune experiment`` and ``swap-prune report``."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from swap_prune.checks import counted, user_path
from swap_prune.console import print_json, say, show
from swap_prune.experiments.bench import Bench, prepare
from swap_prune.experiments.config import Experiment, read_experiment
from swap_prune.files import delete_abandoned
from swap_prune.network.device import usable_device
from swap_prune.options import AsJson, DataDir, Scratch

__all__ = ["experiment", "report"]


def experiment(
    file: Annotated[Path, typer.Argument(help="the experiment, a TOML file")],
    out: Annotated[Path, typer.Option(help="directory for the results")],
    resume: Annotated[bool, typer.Option("--resume", help="go on where the experiment in --out stopped")] = False,
    weights: Annotated[Path | None, typer.Option(help="checkpoint, instead of the one the file names")] = None,
    data_dir: DataDir = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    scratch: Scratch = None,
    keep_rows: Annotated[
        bool, typer.Option("--keep-rows", help='share G of first stages in --scratch, with storage = "mapped"')
    ] = False,
    jobs: Annotated[
        int,
        typer.Option("--jobs", "-j", min=1, help="runs side by side, each on one thread; 1: in turn, on all"),
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Do every run of a grid of methods, sparsities and seeds; can be interrupted at any time."""
    from swap_prune.experiments.results import check_directory  # file locks: not on every system
    from swap_prune.experiments.run import run_experiment

    if keep_rows and scratch is None:
        raise ValueError("--keep-rows needs a directory that stays: give --scratch DIR")
    file = user_path(file)
    grid = read_experiment(file)
    if keep_rows and not any(method.storage == "mapped" for method in grid.methods):
        raise ValueError('--keep-rows is for methods with storage = "mapped", and the experiment has none')
    if jobs > 1 and (keep_rows or device != "cpu"):
        raise ValueError(f"--jobs {jobs} is for runs on a CPU that share no rows: leave out --device and --keep-rows")
    if scratch is not None and not user_path(scratch).is_dir():
        raise ValueError(f"scratch directory {scratch} does not exist: make it, or name another")
    check_directory(out, resume=resume)
    try:
        again = partial(_prepared, grid, file.parent, weights, data_dir, device, scratch)
        bench = replace(again(), keep_rows=keep_rows)
        outcome = run_experiment(bench, out, resume=resume, say=say, jobs=jobs, again=again)
    except KeyboardInterrupt:
        options = {"--weights": weights, "--data-dir": data_dir, "--device": None if device == "cpu" else device}
        options |= {"--scratch": scratch}
        given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
        given += (["--keep-rows"] if keep_rows else []) + (["--jobs", str(jobs)] if jobs > 1 else [])
        command = ["swap-prune", "experiment", str(file), "--out", str(out), *given, "--resume"]
        raise InterruptedError(f"interrupted; finished runs are kept. Go on with: {shlex.join(command)}") from None
    result = {**asdict(outcome), "out": str(out)}
    if as_json:
        print_json(result)
    else:
        runs = counted(outcome.total, "run")
        show(f"{runs}: {outcome.done} done, {outcome.failed} failed, {outcome.skipped} were there")
        show(f"tables and plots: {shlex.join(['swap-prune', 'report', str(out)])}")
    if outcome.failed:
        failed = counted(outcome.failed, "run")
        say(f"{failed} failed; errors are in {out / 'results.jsonl'}, and --resume tries them again")
        raise typer.Exit(1)


def _prepared(
    grid: Experiment, folder: Path, weights: Path | None, data_dir: Path | None, device: str, scratch: Path | None
) -> Bench:
    return replace(prepare(grid, folder, weights, data_dir, usable_device(device)), scratch=scratch)


def report(
    directory: Annotated[Path, typer.Argument(help="what experiment wrote")],
    out: Annotated[Path | None, typer.Option(help="directory for tables and plots; default beside the results")] = None,
    reference: Annotated[
        str | None, typer.Option(help="label of the method to take differences from; default the first that ran")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show an experiment's results, finished or not, and write tables and plots of them."""
    from swap_prune.experiments.plots import write_plots  # matplotlib is slow to import
    from swap_prune.experiments.results import read_results
    from swap_prune.experiments.tables import as_markdown, summarise, write_tables

    directory = user_path(directory)
    results = read_results(directory)
    summary = summarise(results, reference)
    if not as_json:
        show(as_markdown(summary))
    target = directory if out is None else user_path(out)
    try:
        target.mkdir(parents=True, exist_ok=True)
        delete_abandoned(target)
        files = [*write_tables(summary, target), *write_plots(summary, target)]
    except OSError as error:
        raise ValueError(
            f"tables and plots cannot be written to {target} ({error.strerror or error}): name another by --out"
        ) from error
    if not as_json:
        show("written: " + ", ".join(map(str, files)))
        return
    content = {"reference": summary.reference, "notes": summary.notes, "rows": [asdict(row) for row in summary.cells]}
    print_json(content | {"files": [str(path) for path in files]})
