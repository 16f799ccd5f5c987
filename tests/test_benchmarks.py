"""The benchmarks run, on small cases: the figures in docs/results.md come from them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

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
