"""Files that appear whole or not at all, and stay when the power goes."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest

from swap_prune import files


def test_a_file_is_forced_to_the_disk_before_it_takes_its_place_and_its_name_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        done.append("renamed")
        rename(source, target)

    monkeypatch.setattr(files, "force_to_disk", lambda path: done.append("folder" if path.is_dir() else "file"))
    monkeypatch.setattr(files.os, "replace", replace)
    for durable, expected in ((False, ["renamed"]), (True, ["file", "renamed", "folder"])):
        done.clear()
        with files.replacing(tmp_path / "a.txt", durable=durable) as scratch:
            scratch.write_text("x")
        assert done == expected


def test_files_of_processes_of_other_machines_are_not_abandoned(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = (f".{machine}-{gone.pid}-{'1f' * 16}.x" for machine in (platform.node(), "another-machine"))
    assert [files.is_abandoned(tmp_path / name) for name in names] == [True, False]


def test_files_of_a_directory_appear_in_their_order_or_none_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, moved, content = os.replace, list[str](), {"weights": b"1", "report": b"2"}

    def replace(source: Path, target: Path) -> None:
        moved.append(target.name)
        if len(moved) == 2:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(ValueError, match="No space left"):
        files.write_directory(tmp_path, content)
    assert moved == ["weights", "report"] and not list(tmp_path.iterdir())
    files.write_directory(tmp_path, content)  # nothing is in the way
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content


def test_what_a_writer_has_beside_its_file_goes_with_it(tmp_path: Path) -> None:
    """As of libraries that write to a temporary name themselves."""
    with files.replacing(tmp_path / "a.txt") as scratch:
        scratch.write_text("new")
        scratch.with_name(".tmpX").write_text("torn")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    gone, own = 2**22 + 1, os.getpid()  # no process has such a number
    for process in (gone, own):
        left = tmp_path / f".{platform.node()}-{process}-{'0' * 32}.b.txt"
        left.mkdir()
        (left / ".tmpX").write_text("torn")
    files.delete_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{platform.node()}-{own}-{'0' * 32}.b.txt", "a.txt"]


def test_what_came_into_a_directory_meanwhile_stays(tmp_path: Path) -> None:
    target = files.check_output_directory(tmp_path / "out")
    files.write_directory(target, {"report": b"1"})
    with pytest.raises(ValueError, match="is not empty"):
        files.write_directory(target, {"report": b"2"})
    assert [(path.name, path.read_bytes()) for path in target.iterdir()] == [("report", b"1")]
