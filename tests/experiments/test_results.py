"""Results on disk: torn lines, two writers, other people's directories."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from swap_prune.experiments.results import RunResult, check_directory, open_results, read_results
from swap_prune.files import replacing

CONFIG = {"seeds": [0, 1], "model": "m"}


def record(number: int, **changes: object) -> RunResult:
    settings = {"model": "mlpnet", "data": "mnist", "samples": 100, "schedule": "cubic", "recalibrate_batchnorm": True}
    settings |= {"sparsity": 0.5, "stages": 1, "noise": "none"}
    fields: dict[str, object] = {"id": f"run{number}", "label": "lr", "seed": number, "settings": settings}
    return RunResult.model_validate(fields | {"accuracy": 90 + number / 3} | changes)


def write(directory: Path, *records: RunResult) -> bytes:
    with open_results(directory, CONFIG, resume=True) as results:
        for line in records:
            results.append(line)
    return (directory / "results.jsonl").read_bytes()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    records = [record(1, evidence=[{"loss": float("inf"), "gain": [0.1, float("nan")]}], notes=["über"]), record(2)]
    content = write(tmp_path / "out", *records)
    assert content.count(b"\n") == 2
    for line in content.splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second = read_results(tmp_path / "out")
    assert first.evidence == [{"loss": None, "gain": [0.1, None]}] and first.notes == ["über"]
    assert second == records[1]


def test_lines_are_put_in_the_order_of_the_runs(tmp_path: Path) -> None:
    write(tmp_path, record(2), record(1, error="x"), record(3), record(1))
    before = (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)
    with open_results(tmp_path, CONFIG, resume=True) as results:
        for _ in range(2):
            results.put_in_order(["run0", "run1", "run2", "run3"])
            assert [one.id for one in results.records] == ["run1", "run1", "run2", "run3"]
            expected = b"".join(before[number] for number in (1, 3, 0, 2))
            assert (tmp_path / "results.jsonl").read_bytes() == expected
        results.append(record(4))
    assert (tmp_path / "results.jsonl").read_bytes().startswith(expected)
    assert [one.id for one in read_results(tmp_path)][-1] == "run4"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json", "results.jsonl"]


@pytest.mark.long
def test_wherever_the_last_line_tears_the_others_stay(tmp_path: Path) -> None:
    content = write(tmp_path, record(1), record(2), record(3))
    two = content[: content.rindex(b"\n", 0, -1) + 1]
    for length in range(len(two), len(content)):
        (tmp_path / "results.jsonl").write_bytes(content[:length])
        assert [r.id for r in read_results(tmp_path)] == ["run1", "run2"]
        if length % 8 == 0:  # each is forced to the disk
            assert write(tmp_path) == two
            assert write(tmp_path, record(3)) == content


def test_a_last_line_whose_beginning_was_lost_is_cut(tmp_path: Path) -> None:
    content = write(tmp_path, record(1), record(2))
    one = content[: content.index(b"\n") + 1]
    (tmp_path / "results.jsonl").write_bytes(one + bytes(40) + content[len(one) + 40 :])
    assert write(tmp_path) == one


def test_a_damaged_line_in_the_middle_is_an_error_and_stays(tmp_path: Path) -> None:
    content = write(tmp_path, record(1), record(2), record(3)).replace(b'"run2"', b'"run2')
    (tmp_path / "results.jsonl").write_bytes(content)
    for use in (lambda: write(tmp_path), lambda: read_results(tmp_path)):
        with pytest.raises(ValueError, match="line 2, is not a result"):
            use()
    assert (tmp_path / "results.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{}", "line 2, is not a result .*settings.*Field required"),
        ('{"sparsity":1.0}', "line 2, is not a result"),
    ],
)
def test_a_line_without_its_settings_is_an_error_even_where_it_is_the_last(
    tmp_path: Path, settings: str, message: str
) -> None:
    content = write(tmp_path, record(1), record(2))
    start = content.rindex(b'"settings":') + len(b'"settings":')
    altered = content[:start] + settings.encode() + content[content.index(b"}", start) + 1 :]
    (tmp_path / "results.jsonl").write_bytes(altered)
    for use in (lambda: write(tmp_path), lambda: read_results(tmp_path)):
        with pytest.raises(ValueError, match=message):
            use()
    assert (tmp_path / "results.jsonl").read_bytes() == altered


def test_the_last_line_of_a_run_counts(tmp_path: Path) -> None:
    write(tmp_path, record(1, error="bad", accuracy=None), record(2), record(1))
    assert [(r.id, r.error) for r in read_results(tmp_path)] == [("run1", None), ("run2", None)]


def test_two_writers(tmp_path: Path) -> None:
    with open_results(tmp_path, CONFIG, resume=False) as results:
        with pytest.raises(ValueError, match="another process is writing"):
            write(tmp_path, record(1))
        results.append(record(2))
        assert [r.id for r in read_results(tmp_path)] == ["run2"]  # reading needs no lock
    assert write(tmp_path, record(3)).count(b"\n") == 2


def test_a_directory_is_not_taken_over(tmp_path: Path) -> None:
    write(tmp_path / "mine", record(1))
    (tmp_path / "yours").mkdir()
    (tmp_path / "yours" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for name, resume, message in (
        ("mine", False, "not empty; go on with --resume"),
        ("yours", False, "not empty"),
        ("yours", True, "holds no experiment to resume"),
        ("file", True, "not a directory"),
    ):
        with pytest.raises(ValueError, match=message), open_results(tmp_path / name, CONFIG, resume=resume):
            pass
        with pytest.raises(ValueError, match=message):
            check_directory(tmp_path / name, resume=resume)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_experiment_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path, record(1))
    with (
        pytest.raises(ValueError, match="another experiment: extra, seeds differ"),
        open_results(tmp_path, CONFIG | {"seeds": [0], "extra": 1}, resume=True),
    ):
        pass
    assert (tmp_path / "results.jsonl").read_bytes() == content
    (tmp_path / "config.json").write_text('{"seeds"')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        write(tmp_path)


def test_a_number_is_the_same_however_it_is_written_and_no_flag_is_a_number(tmp_path: Path) -> None:
    def opened(number: object) -> None:
        with open_results(tmp_path, {"model_options": {"a": [number]}}, resume=True):
            pass

    for number in (1, 1.0):
        opened(number)
    for number in (True, 1.5):
        with pytest.raises(ValueError, match="another experiment: model_options differ"):
            opened(number)


def test_a_start_that_was_cut_off_before_the_config(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json").write_text("{")
    with open_results(tmp_path, CONFIG, resume=False) as results:
        assert results.records == []
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results"):
        read_results(tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match="no finished run yet"):
        read_results(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "tables.md"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as scratch:
        scratch.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as scratch:
        scratch.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_two_replace_a_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("one")
        second.write_text("other")
        assert first.suffix == ".png", "which says what is drawn"
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("anew", [False, True])
def test_a_directory_that_was_replaced_takes_no_more_lines(anew: bool, tmp_path: Path) -> None:
    with open_results(tmp_path / "out", CONFIG, resume=False) as results:
        results.append(record(1))
        shutil.rmtree(tmp_path / "out")
        if anew:
            write(tmp_path / "out", record(3))
        with pytest.raises(ValueError, match="was deleted, moved or replaced while the experiment was running"):
            results.append(record(2))
    if anew:
        assert [line.id for line in read_results(tmp_path / "out")] == ["run3"]
    else:
        assert not (tmp_path / "out").exists()


def test_a_number_that_is_none_is_an_error(tmp_path: Path) -> None:
    content = write(tmp_path, record(1), record(2))
    (tmp_path / "results.jsonl").write_bytes(content.replace(b'"loss":null', b'"loss":NaN', 1))
    with pytest.raises(ValueError, match=r"line 1, is not a result \(loss: Input should be a finite number"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"peak_memory": 10**400},
        {"seconds": 1e308},
        {"accuracy": 1e308},
        {"layers": {"fc.weight": 7.0}},
        {"settings": {"targets": [1.5]}},
    ],
)
def test_numbers_that_nothing_measures_are_refused(changes: dict[str, object], tmp_path: Path) -> None:
    content = json.loads(write(tmp_path, record(1)))
    settings = content["settings"] | changes.get("settings", {})  # type: ignore[operator]
    (tmp_path / "results.jsonl").write_text(json.dumps(content | changes | {"settings": settings}) + "\n")
    with pytest.raises(ValueError, match="line 1, is not a result"):
        read_results(tmp_path)


@pytest.mark.parametrize("moment", ["config", "result"])
def test_a_full_disk_is_said_with_its_file(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    if moment == "config":
        monkeypatch.setattr(os, "fsync", full)
    words = r"results.jsonl cannot be written: No space left on device; what is there is whole, and --resume goes on"
    if moment == "config":
        words = r"output directory .* cannot be written: No space left on device$"
    said = pytest.raises(ValueError, match=words)
    with said, open_results(tmp_path, CONFIG, resume=True) as results:
        monkeypatch.setattr(os, "fsync", full)
        results.append(record(1))
