"""Fixtures of all tests."""

import pytest


@pytest.fixture
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let forecasts count what a run needs alone, for what the process holds by itself changes from call to call."""
    monkeypatch.setattr("swap_prune.stages.workload.held_memory", lambda place: 0)
