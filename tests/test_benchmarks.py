"""The benchmarks run, on small cases: the figures in docs/results.md come from them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_a_solve_is_counted_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = load("solver", monkeypatch).measure(20, 400)
    assert one["n"] == 20 and one["p"] == 400
    assert one["passes"] > 5 and one["seconds"] > 0


def test_a_capture_is_compared_with_a_plain_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    times = load("capture", monkeypatch).measure("mlpnet", 32)  # plain, per-sample rows, mini-batch rows
    assert len(times) == 3 and all(time > 0 for time in times)


def test_processes_that_share_g_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        one = load("sharded", monkeypatch).measure(20, 4)
    finally:
        dist.destroy_process_group()
    assert one["process"] == "0 of 1" and one["rows"] == 20 and one["peak_mb"] > 0


def test_the_search_for_the_largest_is_compared_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [load("top_k", monkeypatch).measure(300_000, 1000, searched) for searched in (False, True)]
    assert all(seconds > 0 for seconds, _ in times)
