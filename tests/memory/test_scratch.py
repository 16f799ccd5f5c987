"""What a killed process leaves of G, and what a later run makes of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import swap_prune
from swap_prune import plan, prune
from swap_prune.fisher.backends.mapped import MappedFactor
from swap_prune.fisher.storage import Storage
from swap_prune.memory import scratch
from swap_prune.memory.scratch import delete_abandoned, scratch_directory
from tests.test_pipeline import small_data, small_network


def pruned(place: Path, wait_for: str = "") -> dict[str, Tensor]:
    """Prune with G in a file; stop for ever once there is a file of some name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = TensorDataset(torch.randn(120, 8), torch.randint(3, (120,)))

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        if wait_for and any(place.rglob(wait_for)):
            print("reached", flush=True)
            time.sleep(600)
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    swap_prune.prune(model, data, 0.8, "lr", loss_fn=loss, samples=80, storage="mapped", scratch=place, progress=False)
    return model.state_dict()


def test_a_full_disk_is_one_line_when_the_lock_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("swap_prune.memory.scratch._mark", full)
    with pytest.raises(ValueError, match=r"scratch .* cannot be written to: No space left"):
        pruned(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize(("moment", "finished"), [("*.partial", False), ("*.fisher", True)], ids=["capture", "solve"])
def test_what_a_killed_run_leaves_is_deleted_by_the_next(tmp_path: Path, moment: str, finished: bool) -> None:
    (tmp_path / "killed").mkdir()
    (tmp_path / "quiet").mkdir()
    code = f"from tests.memory.test_scratch import pruned, Path; pruned(Path({str(tmp_path / 'killed')!r}), {moment!r})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "reached\n"
            delete_abandoned(tmp_path / "killed")
            left = list((tmp_path / "killed").rglob(moment))
            assert len(left) == 1, "of a process that lives: nobody else deletes it"
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL and left[0].exists()
    if not finished:
        with pytest.raises(ValueError, match="no finished file of G"):
            MappedFactor.open(left[0])
    after, quiet = pruned(tmp_path / "killed"), pruned(tmp_path / "quiet")
    assert not list((tmp_path / "killed").iterdir())
    assert all(torch.equal(after[name], quiet[name]) for name in quiet)


@pytest.mark.parametrize("text", [None, "", "swap-prune scratch\nanother-machine\n\n"])
def test_what_is_not_known_to_be_abandoned_is_nobodys_to_delete(text: str | None, tmp_path: Path) -> None:
    """No lock, somebody's own file of that name, the lock of a machine that shares the disk."""
    (tmp_path / "swap-prune-notes").mkdir()
    (tmp_path / "swap-prune-notes" / "lock").write_text("mine")
    if text is not None:
        (tmp_path / "swap-prune-notes.lock").write_text(text)
    (tmp_path / "swap-prune-linked.lock").symlink_to(tmp_path / "swap-prune-notes" / "lock")
    before = sorted(tmp_path.rglob("*"))
    delete_abandoned(tmp_path)
    with scratch_directory(Storage("mapped", scratch=tmp_path)) as placed:
        assert placed.scratch is not None and placed.scratch.parent == tmp_path and placed.scratch.is_dir()
        assert placed.scratch.with_suffix(".lock").read_bytes() == scratch._mark()
        delete_abandoned(tmp_path)
        assert placed.scratch.is_dir(), "a process's own is locked for itself as well"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lock_alone_and_a_directory_half_deleted_go_too(tmp_path: Path) -> None:
    (tmp_path / "swap-prune-a").mkdir()
    (tmp_path / "swap-prune-a" / "G.fisher").write_bytes(b"0")
    for name in ("a", "b"):
        (tmp_path / f"swap-prune-{name}.lock").write_bytes(scratch._mark())
    delete_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == []
    delete_abandoned(tmp_path / "nowhere")


def test_without_a_place_for_temporary_files_all_works_that_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    model, data = small_network(), small_data(40)
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert plan(model, data, 0.5, "obd").chosen is not None
    assert prune(model, data, 0.5, "obd", samples=20, progress=False).kept > 0


def test_a_lock_that_stays_does_not_undo_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".lock":
            raise OSError(5, "Input/output error")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        pruned(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    delete_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())
