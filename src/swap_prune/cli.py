"""The command line: ``swap-prune demo | prune | plan | eval | experiment | report``.

Results for people go to standard output as text, for programs (``--json``) as one JSON object and nothing else;
progress and messages go to standard error. Whatever a user can mend ends in one line and exit status 2.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.table import Table
from torch import nn

from swap_prune.artifact import check_dense, load_pruned, load_report
from swap_prune.checks import checked_seed, first_line
from swap_prune.console import (
    given_arguments,
    own_output,
    print_json,
    print_result,
    run,
    say,
    say_notes,
    show,
    show_plan,
    show_table,
)
from swap_prune.distributed import check_alone, is_first, launched, own_device
from swap_prune.experiments import commands
from swap_prune.experiments.bench import repair
from swap_prune.experiments.datasets import ImageData, calibration_data, load_dataset, recalibration_data
from swap_prune.experiments.evaluate import evaluate
from swap_prune.experiments.zoo import MODELS, build_model, named_method
from swap_prune.files import check_output_directory
from swap_prune.memory.planning import MemoryPlan
from swap_prune.network.device import check_values, usable_device
from swap_prune.options import (
    AsJson,
    CheckpointDir,
    Data,
    DataDir,
    Device,
    Ignore,
    KeepRows,
    Memory,
    MethodName,
    MinKeep,
    Model,
    Noise,
    Pattern,
    Recalibrate,
    Samples,
    Schedule,
    Scratch,
    Settings,
    Sparsity,
    Stages,
    StorageOption,
    Targets,
    Weights,
    Width,
    parse_count,
    parse_shares,
    with_options_of,
)
from swap_prune.pipeline import plan as plan_run
from swap_prune.pipeline import prune as prune_model
from swap_prune.randomness import seeded
from swap_prune.report import PruningReport
from swap_prune.request import SAMPLES
from swap_prune.selection import DEFAULT_TARGETS
from swap_prune.stages.checkpoint import has_stages
from swap_prune.training.settings import parse_finetune
from swap_prune.weights_file import load_weights

__all__ = ["app", "main"]

app = typer.Typer(
    name="swap-prune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(asked: bool) -> None:
    if asked:
        show(version("swap-prune"))
        raise typer.Exit


@app.callback()
def _any_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Prune trained networks by sparse entropic Wasserstein regression."""
    if context.invoked_subcommand not in (None, "prune", "plan"):
        check_alone(context.invoked_subcommand)


@app.command()
@own_output
def demo(
    out: Annotated[Path, typer.Option(help="new directory for the report")] = Path("demo-report"),
    seed: Annotated[int, typer.Option(help="seed of the run")] = 0,
    as_json: AsJson = False,
) -> None:
    """Prune an embedded MNIST network with magnitude, LR and EWR, clean and noisy, and write a report."""
    from swap_prune.experiments.demo import run_demo  # matplotlib is slow to import

    target = check_output_directory(out)
    rows = run_demo(target, seed, say)
    if as_json:
        print_json({"rows": rows, "report": str(target / "report.html")})
        return
    table = Table(title="MLPNet on MNIST, 95 % of the weights removed, no fine-tuning: test accuracy in %")
    for column in ("method", "clean gradients", "noisy gradients", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        noisy = "-" if row["noisy"] is None else f"{row['noisy']:.2f}"
        table.add_row(row["method"], f"{row['clean']:.2f}", noisy, f"{row['seconds']:.1f}")
    show_table(table)
    show(f"report: {target / 'report.html'}")


@app.command()
@own_output
def prune(
    model: Model,
    data: Data,
    weights: Weights = None,
    sparsity: Sparsity = 0.9,
    method: MethodName = "ewr",
    samples: Samples = str(SAMPLES),
    stages: Stages = "1",
    schedule: Schedule = "exponential",
    min_keep: MinKeep = None,
    pattern: Pattern = None,
    seed: Annotated[int, typer.Option(help="seed of the run")] = 0,
    out: Annotated[Path | None, typer.Option(help="new directory for the pruned model")] = None,
    targets: Targets = None,
    ignore: Ignore = None,
    noise: Noise = None,
    defence: Annotated[
        str,
        typer.Option(help="auto: hold against noise seen in gradients, labels and inputs; some: labels+inputs; none"),
    ] = "auto",
    recalibrate: Recalibrate = True,
    finetune: Annotated[
        str | None, typer.Option(help="train under the mask after each stage: epochs=2,lr=0.01; also optimizer, ...")
    ] = None,
    memory: Memory = None,
    storage: StorageOption = "auto",
    scratch: Scratch = None,
    keep_rows: KeepRows = False,
    checkpoint: CheckpointDir = None,
    settings: Settings = None,
    data_dir: DataDir = None,
    width: Width = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Prune a trained network, measure it on the test images, and save it.

    Several processes, started by torchrun --nproc-per-node N -m swap_prune prune ..., share the work.
    """
    with launched():
        seed, solver = checked_seed(seed), named_method(method, settings or [], model, data)
        training = None if finetune is None else parse_finetune(finetune)
        target = check_output_directory(out, checkpoint, scratch if keep_rows else None) if out is not None else None
        network, images = _load(model, weights, data, data_dir, width)
        if target is not None:
            check_dense(network, "which cannot be saved (leave --out out)")
        report = _go_on(
            checkpoint,
            network,
            calibration_data(images, seed),
            sparsity,
            solver,
            targets=targets or DEFAULT_TARGETS,
            ignore=ignore or (),
            samples=parse_count("samples", samples),
            stages=parse_count("stages", stages),
            schedule=schedule,
            min_keep=parse_shares(min_keep),
            pattern=pattern,
            recalibrate_batchnorm=recalibrate,
            recalibration_data=recalibration_data(images, seed),
            finetune=training,
            noise=noise,
            defence=defence,
            memory=memory,
            storage=storage,
            scratch=scratch,
            keep_rows=keep_rows,
            seed=seed,
            device=_device(device),
        )
    if not is_first():
        return
    if target is not None:
        report.save(target)
    notes = [*([] if weights is not None else [f"no --weights: the network is as {model} makes it"]), *report.notes]
    say_notes(notes)
    try:
        measured = evaluate(network, images.test)
    except ValueError as error:
        raise ValueError(
            f"{error} (the pruned network is in {target})" if target is not None else str(error)
        ) from error
    before, why_not = _measure_dense(network, (model, weights, data, data_dir, width), seed if recalibrate else None)
    say_notes([*measured.notes, *why_not])
    result = {
        "model": model,
        "data": data,
        "method": report.method,
        "accuracy": measured.accuracy,
        "dense_accuracy": before,
        "loss": measured.loss,
        "test_samples": measured.samples,
        "sparsity": report.sparsity,
        "kept": report.kept,
        "total": report.total,
        "seconds": report.seconds,
        "seed": report.seed,
        "stages": len(report.stages),
        "notes": [*notes, *measured.notes, *why_not],
        "layers": {name: layer.kept for name, layer in report.layers.items()},
    }
    if target is not None:
        result["out"] = str(target)
    print_result(result, as_json)


def _measure_dense(pruned: nn.Module, source: tuple[Any, ...], seed: int | None) -> tuple[float | None, list[str]]:
    """Return the accuracy of the network before pruning, loaded anew like its data, or say why there is none.

    Args:
        pruned: Where it lies, the other is measured.
        source: What :func:`_load` takes.
        seed: Of BatchNorm's statistics, repaired where they do not fit; None: they are left.
    """
    try:
        dense, images = _load(*source)
        dense.to(next(pruned.parameters()).device)
        if seed is not None:
            repair(dense, images, seed)
        return evaluate(dense, images.test).accuracy, []
    except Exception as error:  # of the caller's factory or data, the second time
        return None, [f"the dense network could not be measured: {first_line(error)}"]


def _go_on(checkpoint: Path | None, *arguments: Any, **options: Any) -> PruningReport:
    """Prune, and say how to go on after an interruption, where there is something to go on from."""
    try:
        return prune_model(*arguments, checkpoint=checkpoint, **options)
    except KeyboardInterrupt:
        if checkpoint is None or not has_stages(checkpoint):
            raise
        raise InterruptedError(
            f"interrupted; finished stages are kept in {checkpoint}, and the same command goes on after them"
        ) from None


_PASSED_ON = ("schedule", "pattern", "noise", "defence", "memory", "storage", "scratch", "keep_rows", "seed")


@app.command()
@own_output
@with_options_of(prune)
def plan(**given: Any) -> None:
    """Say how much memory prune would need with the same arguments, without running it. No weights are read.

    Started by torchrun, it says so of the first of the processes. Exit status 1 says that nothing fits.
    """
    with launched():
        forecast = _forecast(given)
    if is_first():
        print_json(forecast.to_dict()) if given["as_json"] else show_plan(forecast)
    if forecast.forecasts and forecast.chosen is None:
        raise typer.Exit(1)


def _forecast(given: dict[str, Any]) -> MemoryPlan:
    """Plan a run that the command line describes."""
    width = given["width"]
    with seeded(0):
        network, _ = build_model(given["model"], **({} if width is None else {"width": width}))
        images = load_dataset(given["data"], given["data_dir"])
    return plan_run(
        network,
        images.train,
        given["sparsity"],
        named_method(given["method"], given["settings"] or [], given["model"], given["data"]),
        targets=given["targets"] or DEFAULT_TARGETS,
        ignore=given["ignore"] or (),
        recalibrate_batchnorm=given["recalibrate"],
        samples=parse_count("samples", given["samples"]),
        stages=parse_count("stages", given["stages"]),
        min_keep=parse_shares(given["min_keep"]),
        finetune=None if given["finetune"] is None else parse_finetune(given["finetune"]),
        device=_device(given["device"]),
        **{name: given[name] for name in _PASSED_ON},
    )


@app.command("eval")
@own_output
def evaluate_model(
    model: Model,
    data: Data,
    weights: Weights = None,
    pruned: Annotated[Path | None, typer.Option(help="directory that prune wrote, instead of --weights")] = None,
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate/--no-recalibrate",
            help="re-estimate BatchNorm statistics of --weights that do not fit the data at all",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="seed of the recalibration")] = 0,
    data_dir: DataDir = None,
    width: Width = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a dense or pruned network on the test images."""
    if pruned is not None and weights is not None:
        raise ValueError("give either --weights or --pruned, not both")
    seed = checked_seed(seed)
    network, images = _load(model, weights, data, data_dir, width, pruned)
    place = _device(device) or torch.device("cpu")
    check_values(network)
    network.to(place)
    notes = repair(network, images, seed) if pruned is None and recalibrate else []
    say_notes(notes)
    measured = evaluate(network, images.test)
    say_notes(measured.notes)
    result: dict[str, Any] = {
        "model": model,
        "data": data,
        "accuracy": measured.accuracy,
        "loss": measured.loss,
        "test_samples": measured.samples,
        "notes": [*notes, *measured.notes],
    }
    if pruned is not None:
        report = load_report(pruned)
        result |= {
            "method": report.method,
            "sparsity": report.sparsity,
            "kept": report.kept,
            "total": report.total,
            "seed": report.seed,
        }
    print_result(result, as_json)


app.command()(own_output(commands.experiment))
app.command()(own_output(commands.report))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; every error that a user can mend is one line on standard error."""
    sys.exit(run(lambda: app(args=given_arguments(arguments), standalone_mode=False)))


def _load(
    model: str,
    weights: Path | None,
    data: str,
    data_dir: Path | None,
    width: float | None,
    pruned: Path | None = None,
) -> tuple[nn.Module, ImageData]:
    with seeded(0):  # a factory or a loader of the user's may draw
        network, entry = build_model(model, **({} if width is None else {"width": width}))
    if pruned is not None:
        load_pruned(network, pruned)
    elif weights is not None:
        load_weights(network, weights)
    elif model in MODELS:
        raise ValueError(f"model {model!r} of the zoo has no weights of its own: give --weights FILE")
    fits = entry is not None and entry.dataset == data
    mean, std = (entry.mean, entry.std) if entry is not None and fits else (None, None)
    with seeded(0):
        return network, load_dataset(data, data_dir, mean=mean, std=std)


def _device(name: str | None) -> torch.device | None:
    return None if name is None else usable_device(own_device(name))
