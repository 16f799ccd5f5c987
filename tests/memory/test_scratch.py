"""What a killed process leaves of G, and what a later run makes of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import swap_prune
from swap_prune.fisher.mapped import MappedFactor
from swap_prune.fisher.storage import Storage
from swap_prune.memory.scratch import scratch_directory

pytest.importorskip("fcntl")


def pruned(scratch: Path, wait_for: str = "") -> dict[str, Tensor]:
    """Prune with G in a file; stop for ever once there is a file of some name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = TensorDataset(torch.randn(120, 8), torch.randint(3, (120,)))

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        if wait_for and any(scratch.rglob(wait_for)):
            print("reached", flush=True)
            time.sleep(600)
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    swap_prune.prune(
        model, data, 0.8, "lr", loss_fn=loss, samples=80, storage="mapped", scratch=scratch, progress=False
    )
    return model.state_dict()


@pytest.mark.parametrize(("moment", "finished"), [("*.partial", False), ("*.fisher", True)], ids=["capture", "solve"])
def test_what_a_killed_run_leaves_is_deleted_by_the_next(tmp_path: Path, moment: str, finished: bool) -> None:
    (tmp_path / "killed").mkdir()
    (tmp_path / "quiet").mkdir()
    code = f"from tests.memory.test_scratch import pruned, Path; pruned(Path({str(tmp_path / 'killed')!r}), {moment!r})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "reached\n"
            with scratch_directory(Storage("mapped", scratch=tmp_path / "killed")):
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


def test_a_directory_without_a_lock_is_nobodys_to_delete(tmp_path: Path) -> None:
    (tmp_path / "swap-prune-notes").mkdir()
    (tmp_path / "swap-prune-report.txt").write_text("kept")
    with scratch_directory(Storage("mapped", scratch=tmp_path)) as placed:
        assert placed.scratch is not None and placed.scratch.parent == tmp_path and placed.scratch.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["swap-prune-notes", "swap-prune-report.txt"]
