"""Tables and plots against figures worked out by hand."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import matplotlib.image
import pytest

from swap_prune.experiments.plots import write_plots
from swap_prune.experiments.results import RunResult
from swap_prune.experiments.tables import Cell, Estimate, as_csv, as_markdown, summarise, write_tables
from swap_prune.selection import DEFAULT_TARGETS

NOISE = "gradient:std=4"


def result(label: str, seed: int, accuracy: float | None, noise: str = "none", **changes: object) -> RunResult:
    settings = {"model": "mlpnet", "data": "mnist", "samples": 100, "schedule": "cubic", "recalibrate_batchnorm": True}
    settings |= {"sparsity": 0.9, "stages": 1, "noise": noise}
    settings |= {key: changes.pop(key) for key in ("sparsity", "stages") if key in changes}
    fields: dict[str, object] = {
        "id": f"{label} {seed} {settings}", "label": label, "seed": seed, "settings": settings, "accuracy": accuracy,
        "loss": 0.5, "dense_accuracy": 95.0, "test_samples": 10, "layers": {"a": 0.8, "b": 0.4 + seed / 10},
        "versions": {"torch": "2"}, "seconds": float(10**seed), "peak_memory": (seed + 1) * 10**6,
    }  # fmt: skip
    return RunResult.model_validate(fields | changes)


RESULTS = [
    result("lr", 0, 90.0),
    result("lr", 1, 92.0),
    result("lr", 2, 94.0),
    result("ewr", 0, 91.0),
    result("ewr", 1, 92.5),
    result("ewr", 2, 96.0),
    result("lr", 0, 85.0, NOISE),
    result("lr", 1, 88.0, NOISE),
    result("ewr", 0, 90.0, NOISE),
    result("ewr", 1, None, NOISE, error="out of memory", seconds=None, peak_memory=None, layers={}),
]


def cell(results: list[RunResult], label: str, noise: str = "none", reference: str | None = None) -> Cell:
    (found,) = (c for c in summarise(results, reference).cells if (c.label, c.noise) == (label, noise))
    return found


def test_what_is_pruned_is_said_where_it_is_not_the_default() -> None:
    plain = result("lr", 0, 90.0)
    default = {"targets": list(DEFAULT_TARGETS), "ignore": [], "min_keep": 0.0}
    for settings in ({}, default):
        (note, *_) = summarise([plain.model_copy(update={"settings": plain.settings | settings})]).notes
        assert "schedule cubic" in note and not any(name in note for name in default)
    own = {"targets": ["Linear"], "ignore": ["head"], "min_keep": {"fc": 0.1}}
    (note, *_) = summarise([plain.model_copy(update={"settings": plain.settings | own})]).notes
    assert "targets Linear, ignore head, min_keep fc: 0.1" in note


def test_means_and_standard_errors() -> None:
    own = cell(RESULTS, "lr")
    assert own.accuracy == Estimate(92.0, pytest.approx(2 / 3**0.5), 3)  # standard deviation 2
    assert own.difference is None and own.lost_to_noise is None
    assert own.layers == {"a": pytest.approx(0.8), "b": pytest.approx(0.5)}
    assert (own.seconds, own.peak_memory) == (10.0, 3 * 10**6)


def test_differences_are_paired_by_seed() -> None:
    gains = cell(RESULTS, "ewr").difference  # 1, 0.5, 2: variance 0.5833
    assert gains == Estimate(pytest.approx(3.5 / 3), pytest.approx((0.58333333 / 3) ** 0.5), 3)
    turned = cell(RESULTS, "lr", reference="ewr").difference
    assert turned == Estimate(pytest.approx(-3.5 / 3), pytest.approx((0.58333333 / 3) ** 0.5), 3)


def test_loss_to_noise_is_against_the_methods_own_clean_accuracy() -> None:
    assert cell(RESULTS, "lr", NOISE).lost_to_noise == Estimate(4.5, pytest.approx(0.5), 2)  # 5 and 4
    assert cell(RESULTS, "ewr", NOISE).lost_to_noise == Estimate(1.0, None, 1)
    assert cell(RESULTS[6:], "lr", NOISE).lost_to_noise is None  # nothing clean to compare with


def test_runs_that_failed_or_are_missing_are_left_out() -> None:
    noisy = cell(RESULTS, "ewr", NOISE)
    assert noisy.accuracy == Estimate(90.0, None, 1) and noisy.difference == Estimate(5.0, None, 1)
    without = cell(RESULTS[1:], "ewr")
    assert without.accuracy is not None and without.accuracy.runs == 3
    assert without.difference is not None and without.difference.runs == 2


def test_runs_of_other_points_do_not_mix() -> None:
    others = [result("lr", 0, 10.0, stages=5), result("lr", 0, 20.0, sparsity=0.5)]
    summary = summarise(RESULTS + others)
    found = {(c.sparsity, c.stages): c.accuracy for c in summary.cells if (c.label, c.noise) == ("lr", "none")}
    assert found[0.9, 5] == Estimate(10.0, None, 1) and found[0.5, 1] == Estimate(20.0, None, 1)
    assert found[0.9, 1] == cell(RESULTS, "lr").accuracy


def test_differences_are_from_the_first_method_that_has_not_failed() -> None:
    failed = {"error": "out of memory", "seconds": None, "peak_memory": None, "layers": {}}
    broken = [result("cbs", seed, None, **failed) for seed in range(2)]
    summary = summarise([*broken, *RESULTS])
    assert summary.reference == "lr" and summary.labels()[0] == "cbs"
    assert summarise(broken).reference == "cbs"
    once = result("lr", 0, None, **failed)
    assert summarise([once, *RESULTS[3:], *RESULTS[1:3]]).reference == "lr", "others of its runs have not"


def test_reference_must_be_there() -> None:
    assert summarise(RESULTS).reference == "lr"
    with pytest.raises(ValueError, match="reference must be one of lr, ewr, got 'obd'"):
        summarise(RESULTS, "obd")


def test_markdown() -> None:
    text = as_markdown(summarise(RESULTS))
    assert text.startswith("# mlpnet on mnist\n") and "Dense network: 95.00 %" in text
    assert "- 1 run failed and is left out; the first: ewr: out of memory" in text
    clean, noisy = text.split("## ")[1:]
    assert clean.startswith("1 stage, noise: none") and noisy.startswith("1 stage, noise: gradient:std=4")
    assert "| lr | 92.00 ± 1.15 |\n" in clean and "| ewr | 1.17 ± 0.44 |" in clean
    assert "| lr | 10.00 | 3 |" in clean  # median seconds, largest memory in MB
    assert "without noise" not in clean and "BatchNorm" not in clean
    assert "| lr | 4.50 ± 0.50 (2 runs) |" in noisy and "| ewr | 1.00 (1 runs) |" in noisy


def test_a_cell_over_fewer_seeds_is_marked_where_no_other_has_more() -> None:
    text = as_markdown(summarise([*RESULTS[:3], RESULTS[3], RESULTS[6], RESULTS[8]]))
    assert "| lr | 92.00 ± 1.15 |" in text and "| ewr | 1.00 (1 runs) |" in text
    assert "| lr | 85.00 (1 runs) |" in text and "| ewr | 5.00 (1 runs) |" in text


def test_sparsities_that_are_near_have_headings_of_their_own() -> None:
    text = as_markdown(summarise([result("lr", 0, 90.0, sparsity=s) for s in (0.0, 0.9, 0.9000001, 0.1234567)]))
    assert "| method | 0 | 0.1234567 | 0.9 | 0.9000001 |\n" in text


def test_before_recalibration_has_a_table_where_it_was_measured() -> None:
    text = as_markdown(summarise([result("lr", 0, 90.0, accuracy_before=70.0)]))
    assert "statistics, %:\n\n| method | 0.9 |\n|---|---|\n| lr | 70.00 |" in text


def test_losses_have_tables_where_they_were_measured() -> None:
    measured = [result("lr", seed, 90.0, loss=0.5 + seed / 10, loss_before=2.0) for seed in (0, 1)]
    text = as_markdown(summarise(measured))
    assert "Test loss:\n\n| method | 0.9 |\n|---|---|\n| lr | 0.550 ± 0.050 |" in text
    assert "Test loss with the dense network's BatchNorm statistics:" in text and "| lr | 2.000 ± 0.000 |" in text
    (row,) = csv.DictReader(io.StringIO(as_csv(summarise(measured))))
    assert (float(row["loss"]), float(row["loss_before"])) == (pytest.approx(0.55), 2.0)
    assert "Test loss" not in as_markdown(summarise([result("lr", 0, 90.0, loss=None)]))


def test_versions_that_differ_are_told() -> None:
    assert "Made with torch 2" in summarise(RESULTS).notes[-1]
    mixed = [*RESULTS, result("lr", 5, 90.0, versions={"torch": "3"})]
    assert "Made with different versions: torch 2; torch 3" in summarise(mixed).notes


def test_notes_that_differ_in_their_numbers_are_one() -> None:
    runs = [
        result("lr", seed, 90.0, notes=[f"loss 1.{seed}e-3, against 0.{seed}", "layer a is empty"])
        for seed in (0, 1, 2)
    ]
    others = [result(f"ewr {i}", 0, 90.0, notes=["loss 5, against 6"]) for i in (1, 2)]
    layers = [result("obd", i, 90.0, notes=[f"layers without a weight left: fc{i}.weight"]) for i in (1, 2)]
    notes = summarise([*runs, *others, *layers]).notes
    assert notes[-6:] == [
        "ewr 1: loss 5, against 6",
        "ewr 2: loss 5, against 6",
        "lr: layer a is empty (in 3 runs)",
        "lr: loss 1.0e-3, against 0.0 (in 3 runs)",
        "obd: layers without a weight left: fc1.weight",
        "obd: layers without a weight left: fc2.weight",
    ]


def test_csv_holds_the_same_figures() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(summarise(RESULTS)))))
    assert len(rows) == 4
    ewr = next(row for row in rows if (row["method"], row["noise"]) == ("ewr", "none"))
    assert (float(ewr["difference"]), ewr["difference_runs"]) == (pytest.approx(3.5 / 3), "3")
    lone = next(row for row in rows if (row["method"], row["noise"]) == ("ewr", NOISE))
    assert (lone["accuracy"], lone["accuracy_error"], lone["accuracy_before"]) == ("90.0", "", "")


@pytest.mark.long
def test_files_are_written_and_are_the_same_again(tmp_path: Path) -> None:
    results = [*RESULTS, result("lr", 0, 10.0, stages=5)]  # three panels on a grid of four

    def write() -> dict[str, bytes]:
        summary = summarise(results)
        paths = [*write_tables(summary, tmp_path), *write_plots(summary, tmp_path)]
        return {path.name: path.read_bytes() for path in paths}

    first = write()
    assert list(first) == ["tables.md", "tables.csv", "accuracy.png", "seconds.png", "layers.png"]
    assert write() == first
    for name in ("accuracy.png", "seconds.png", "layers.png"):
        pixels = matplotlib.image.imread(tmp_path / name)
        assert pixels.shape[0] > 500 and pixels.shape[1] > 800 and pixels.std() > 0.05
