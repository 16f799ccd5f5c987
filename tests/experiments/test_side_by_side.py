"""Calls in processes of their own: what they share, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from swap_prune.experiments import side_by_side as module
from swap_prune.experiments.side_by_side import side_by_side


def made() -> list[int]:
    print("printed")
    return []


def counted(shared: list[int], value: int) -> tuple[int, int, int, int]:
    shared.append(value)
    os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C sends to all
    return value, len(shared), os.getpid(), torch.get_num_threads()


def failing(shared: list[int], value: int) -> int:
    if value == 1:
        raise ValueError("one is refused")
    time.sleep(60)
    return value


def killed(shared: list[int], value: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return value


def sleeping(shared: list[int], seconds: float, folder: Path) -> None:
    file = folder / str(os.getpid())
    file.touch()
    try:
        time.sleep(seconds)
    finally:
        file.rename(file.with_suffix(".cleared"))


def stubborn(shared: list[int], folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    time.sleep(60)


def test_each_process_has_one_thread_and_what_its_calls_share(capfd: pytest.CaptureFixture[str]) -> None:
    with side_by_side(counted, [(value,) for value in range(5)], 2, made) as results:
        found = list(results)
    assert sorted(value for value, *_ in found) == [0, 1, 2, 3, 4]
    processes = {process for *_, process, _ in found}
    assert len(processes) <= 2 and os.getpid() not in processes
    for process in processes:
        calls = [count for _, count, one, _ in found if one == process]
        assert sorted(calls) == list(range(1, len(calls) + 1)), "what is shared is made once"
    assert {threads for *_, threads in found} == {1}
    assert multiprocessing.active_children() == []
    out, err = capfd.readouterr()
    assert out == "" and err == len(processes) * "printed\n", "results alone go to standard output"


@pytest.mark.long
def test_a_call_that_raises_ends_the_others() -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match="one is refused"), side_by_side(failing, [(0,), (1,)], 2, made) as results:
        list(results)
    assert multiprocessing.active_children() == [] and time.monotonic() - begun < 50


@pytest.mark.long
def test_a_process_that_is_gone_is_said() -> None:
    with (
        pytest.raises(MemoryError, match="one of 1 processes was ended from outside"),
        side_by_side(killed, [(0,)], 3, made) as results,
    ):
        list(results)
    assert multiprocessing.active_children() == []


@pytest.mark.long
def test_all_clear_up_and_end_with_the_block(tmp_path: Path) -> None:
    begun = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        side_by_side(sleeping, [(0.0, tmp_path), *[(60.0, tmp_path)] * 4], 2, made) as results,
    ):
        next(results)
        _wait_for(tmp_path, 2)
        raise KeyboardInterrupt
    assert multiprocessing.active_children() == [] and time.monotonic() - begun < 50
    assert {path.suffix for path in tmp_path.iterdir()} == {".cleared"}


@pytest.mark.long
def test_one_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swap_prune.experiments.side_by_side._GRACE", 0.2)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), side_by_side(stubborn, [(tmp_path,)], 1, made):
        _wait_for(tmp_path, 1)
        raise KeyboardInterrupt
    assert multiprocessing.active_children() == [] and time.monotonic() - begun < 50


@pytest.mark.long
def test_a_signal_while_they_end_comes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = module._end

    def interrupted(children: set[BaseProcess]) -> None:
        signal.raise_signal(signal.SIGINT)
        ending(children)

    monkeypatch.setattr(module, "_end", interrupted)
    with pytest.raises(KeyboardInterrupt), side_by_side(sleeping, [(60.0, tmp_path)], 1, made):
        _wait_for(tmp_path, 1)
        raise ValueError("why they end")
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.long
def test_all_end_with_the_process_that_began_them_whatever_ends_it(tmp_path: Path) -> None:
    script = f"""
        from pathlib import Path
        from swap_prune.experiments.side_by_side import side_by_side
        from tests.experiments.test_side_by_side import made, sleeping
        if __name__ == "__main__":
            with side_by_side(sleeping, [(60.0, Path({str(tmp_path)!r}))] * 2, 2, made) as results:
                list(results)
    """
    (tmp_path.parent / "parent.py").write_text(textwrap.dedent(script))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen([sys.executable, str(tmp_path.parent / "parent.py")], env=environment, cwd=root)
    _wait_for(tmp_path, 2)
    parent.kill()
    parent.wait()
    left, deadline = [int(path.name) for path in tmp_path.iterdir()], time.monotonic() + 20
    while (left := [process for process in left if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def _wait_for(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(folder.iterdir())) >= count


def _runs(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for someone to ask."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status != "Z"
