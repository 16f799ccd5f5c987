"""The bar of a long run: what it says in a terminal, and where there is one."""

from __future__ import annotations

import io
import re

import pytest
import rich.progress
from rich.console import Console

from swap_prune import FineTune, progress, prune
from swap_prune.progress import StageProgress
from tests.test_pipeline import small_data, small_network


class Shown(rich.progress.Progress):
    """A bar that is drawn at each change, and not ten times a second."""

    def __init__(self, *columns: rich.progress.ProgressColumn, **options: object) -> None:
        super().__init__(*columns, auto_refresh=False, **options)  # type: ignore[arg-type]

    def add_task(self, *arguments: object, **options: object) -> rich.progress.TaskID:
        task = super().add_task(*arguments, **options)  # type: ignore[arg-type]
        self.refresh()
        return task

    def advance(self, *arguments: object) -> None:
        super().advance(*arguments)  # type: ignore[arg-type]
        self.refresh()


def said_by(monkeypatch: pytest.MonkeyPatch, method: str, **options: object) -> str:
    """Return what pruning writes to a terminal, without colours."""
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=80)
    monkeypatch.setattr(progress, "Console", lambda **_: terminal)
    monkeypatch.setattr(progress, "Progress", Shown)
    prune(small_network(), small_data(), 0.7, method, samples=40, **options)  # type: ignore[arg-type]
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.getvalue())


def test_the_bar_counts_samples_then_what_is_tried_then_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = said_by(monkeypatch, "lr", stages=2, finetune=FineTune(epochs=1))
    parts = [
        r"stage 1/2: sparsity 0\.\d{4} \S+ 40/40 samples",
        r"stage 1/2: choosing weights \S+ \d+ tried",
        r"stage 1/2: fine-tuning \S+ 0/1 epochs",
        r"stage 2/2: sparsity 0\.7000 \S+ 40/40 samples \S+ 0:\d\d:\d\d left",
        r"stage 2/2: choosing weights \S+ \d+ tried",
    ]
    assert re.search(".*".join(parts), text, re.DOTALL)


def test_what_tries_no_networks_counts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("woodfisher", "magnitude"):
        text = said_by(monkeypatch, method)
        assert "stage 1/1: choosing weights" in text and "tried" not in text


@pytest.mark.parametrize(("widgets", "shown"), [(True, True), (False, False)])
def test_a_notebook_has_a_bar_where_it_can_show_one(
    widgets: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=io.StringIO(), force_jupyter=True))
    monkeypatch.setattr(progress, "find_spec", lambda name: object() if widgets and name == "ipywidgets" else None)
    assert StageProgress(True)._bar.disable is not shown
    assert StageProgress(False)._bar.disable


def test_what_is_left_is_told_by_the_stages_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = StageProgress(False)
    shown.expect(5)
    shown.stage(2, 0.1, 10)  # the first is in a checkpoint
    assert shown.seconds_left() is None
    now = 160.0
    shown.stage(3, 0.2, 10)
    assert shown.seconds_left() == 60 + 2 * 60
    now = 180.0
    assert shown.seconds_left() == 40 + 2 * 60
    now = 400.0
    assert shown.seconds_left() == 2 * 60, "it takes longer than the others"
    shown.stage(4, 0.3, 10)
    assert shown.seconds_left() == 150 + 150
    shown.expect(7)
    shown.stage(1, 0.1, 10)
    assert shown.seconds_left() is None, "other stages"
