"""What an experiment hands on, and how its lines are kept."""

import os

import pytest
import torch

from swap_prune import FineTune, prune
from swap_prune.experiments import run as run_module
from swap_prune.experiments.results import read_results
from tests import tiny
from tests.experiments.test_results import record, write
from tests.experiments.test_run import start


@pytest.mark.long
def test_every_key_of_the_file_reaches_prune(tmp_path, monkeypatch):
    calls = []

    def watched(network, data, sparsity, method, **settings):
        calls.append((torch.initial_seed(), sparsity, method.name, settings))
        return prune(network, data, sparsity, method, **settings)

    other = tiny.data()[1]
    monkeypatch.setattr(run_module, "prune", watched)
    monkeypatch.setattr(run_module, "recalibration_data", lambda images, seed: other)
    options = {
        "targets": ["Linear", "3.bias"],
        "ignore": ["0"],
        "schedule": "linear",
        "stages": [2, 3],
        "sparsities": 0.5,
        "noise": ["none", "gradient:std=2"],
        "seeds": [1],
        "recalibrate_batchnorm": True,
        "samples": 30,
        "memory": "3GB",
        "min_keep": {"3": 0.25},
        "finetune": {"epochs": 1, "lr": 0.02},
        "methods": [
            {"name": "lr", "label": "bare", "defence": "none", "storage": "float32", "settings": {"first_order": 0.0}},
            {"name": "magnitude"},
        ],
    }
    assert start(tmp_path, tiny.experiment(**options)).failed == 0
    assert len(calls) == 8
    for seed, sparsity, name, settings in calls:
        assert (seed, settings["seed"], sparsity, settings["samples"]) == (1, 1, 0.5, 30)
        assert (settings["targets"], settings["ignore"], settings["schedule"]) == (
            ["Linear", "3.bias"],
            ["0"],
            "linear",
        )
        assert settings["recalibration_data"] is other and settings["recalibrate_batchnorm"] is True
        assert settings["defence"] == ("none" if name == "lr" else "auto")
        assert settings["storage"] == ("float32" if name == "lr" else "auto")
        assert settings["memory"] == "3GB"
        assert settings["min_keep"] == {"3": 0.25} and settings["finetune"] == FineTune(epochs=1, lr=0.02)
    grid = {(name, settings["stages"], settings["noise"]) for _, _, name, settings in calls}
    assert grid == {(n, s, z) for n in ("lr", "magnitude") for s in (2, 3) for z in ("none", "gradient:std=2")}
    for result in read_results(tmp_path):
        assert result.total == 12 * 3 + 3


def test_a_damaged_line_before_a_torn_one_is_an_error(tmp_path):
    """Only one line may be lost."""
    content = write(tmp_path, record(1), record(2), record(3))
    one = content[: content.index(b"\n") + 1]
    (tmp_path / "results.jsonl").write_bytes(one + b"damaged\n" + b'{"id": "run3')
    with pytest.raises(ValueError, match="line 2, is not a result"):
        write(tmp_path)


def test_every_line_is_forced_to_the_disk(tmp_path, monkeypatch):
    from swap_prune.experiments import results

    with results.open_results(tmp_path, {}, resume=False) as opened:
        forced = []
        monkeypatch.setattr(results.os, "fsync", lambda descriptor: forced.append(os.fstat(descriptor).st_size))
        for number in (1, 2):
            opened.append(record(number))
    assert len(forced) == 2 and 0 < forced[0] < forced[1] == (tmp_path / "results.jsonl").stat().st_size
