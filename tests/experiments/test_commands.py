"""The commands from outside: what is printed, exit statuses, and what is written."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swap_prune.cli import app, run
from swap_prune.experiments import demo
from swap_prune.experiments import run as run_module
from swap_prune.pipeline import prune
from tests import tiny

FILE = """
model = "tests.tiny:network"
data = "tests.tiny:data"
sparsities = [0.5, 0.8]
seeds = [0, 1]
samples = 40
[[methods]]
name = "magnitude"
[[methods]]
name = "lr"
settings = { damping = 1.0, first_order = 0.0 }
"""


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "grid.toml").write_text(FILE)
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> tuple[int, str, str]:
        status = run(lambda: app(args=list(arguments), standalone_mode=False))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return invoke


def test_experiment_and_report(call, tmp_path: Path) -> None:
    status, out, err = call("experiment", "grid.toml", "--out", "out", "--json")
    assert status == 0
    assert json.loads(out) == {"total": 8, "done": 8, "failed": 0, "skipped": 0, "out": "out"}
    assert err.count("\n") == 9 and "[8/8] lr, sparsity 0.8, stages 1, noise none, seed 1: " in err
    status, out, _ = call("report", "out", "--json")
    content = json.loads(out)
    assert status == 0 and content["reference"] == "magnitude" and len(content["rows"]) == 4
    assert {row["accuracy"]["runs"] for row in content["rows"]} == {2}
    assert all(Path(path).is_file() for path in content["files"]) and len(content["files"]) == 5
    status, out, _ = call("report", "out", "--reference", "lr")
    assert status == 0 and (tmp_path / "out" / "tables.md").read_text() in out and "less that of lr" in out


def test_resume_and_text_for_people(call) -> None:
    for done, there in ((8, 0), (0, 8)):
        status, out, _ = call("experiment", "grid.toml", "--out", "out", "--resume")
        assert status == 0
        assert out == f"8 runs: {done} done, 0 failed, {there} were there\ntables and plots: swap-prune report out\n"


@pytest.mark.long
def test_a_home_directory_is_found_wherever_it_is_named(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    for name in ("dd", "ee"):
        (home / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    torch.save(tiny.network().state_dict(), home / "dd" / "w.pt")
    (home / "grid.toml").write_text(FILE.replace("data =", 'weights = "w.pt"\ndata ='))
    status, _, _ = call("experiment", "~/grid.toml", "--out", "~/out", "--data-dir", "~/dd")
    assert status == 0 and (home / "out" / "results.jsonl").exists()
    monkeypatch.setenv("SWAP_PRUNE_DATA", "~/dd")
    assert call("experiment", "~/grid.toml", "--out", "~/out", "--data-dir", "~/ee", "--resume")[0] == 0
    status, out, _ = call("report", "~/out", "--json")
    assert status == 0 and str(home / "out" / "tables.md") in json.loads(out)["files"]


@pytest.mark.parametrize("options", [("--keep-rows", "--scratch", "."), ("--device", "cuda")])
def test_runs_side_by_side_share_no_rows_and_no_gpu(call, tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "grid.toml").write_text(FILE + 'storage = "mapped"\n')
    status, out, err = call("experiment", "grid.toml", "--out", "out", "--jobs", "2", *options)
    assert (status, out) == (2, "") and "--jobs 2 is for runs on a CPU that share no rows: leave out" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_jobs_run_side_by_side(call, tmp_path: Path) -> None:
    status, out, err = call("experiment", "grid.toml", "--out", "out", "--jobs", "2", "--json")
    assert status == 0 and json.loads(out) == {"total": 8, "done": 8, "failed": 0, "skipped": 0, "out": "out"}
    assert err.count("\n") == 9 and "[8/8] " in err


def test_interrupted(call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **settings: object) -> object:
        if settings["seed"] == 1:
            raise KeyboardInterrupt
        return prune(*arguments, **settings)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prune", interrupted)
        status, out, err = call("experiment", "grid.toml", "--out", "my out", "--data-dir", "d", "--json")
    assert (status, out) == (130, "")
    command = "swap-prune experiment grid.toml --out 'my out' --data-dir d --resume"
    assert err.endswith(f"interrupted; finished runs are kept. Go on with: {command}\n")
    assert "4 done, 0 failed, 4 were there" in call("experiment", "grid.toml", "--out", "my out", "--resume")[1]


def test_failed_runs_end_in_status_1(call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **settings: object) -> object:
        raise ValueError("no luck")

    monkeypatch.setattr(run_module, "prune", fails)
    status, out, err = call("experiment", "grid.toml", "--out", "out", "--json")
    assert status == 1 and json.loads(out)["failed"] == 8
    assert "seed 1: failed: no luck" in err and err.endswith("and --resume tries them again\n")
    status, out, _ = call("report", "out")
    assert status == 0 and "8 runs failed" in out


BAD = {
    "key": ("colour = 1\n" + FILE, (), "colour: unknown key"),
    "method": (FILE.replace('"lr"', '"sgd"'), (), "methods.1.name"),
    "model": (FILE.replace("tests.tiny:network", "vgg"), (), "vgg"),
    "zoo without weights": (FILE.replace("tests.tiny:network", "mlpnet"), (), "key weights"),
    "option of the model": (FILE.replace("data =", "model_options = { width = 2 }\ndata ="), (), "width"),
    "weights": (FILE, ("--weights", "none.pt"), "does not exist"),
    "weights in the file": (FILE.replace("data =", 'weights = "none.pt"\ndata ='), (), "was not found"),
    "weights of nobody": (FILE, ("--weights", "~nosuchuser/x.pt"), "home directory that is not known"),
    "weights of nobody in the file": (
        FILE.replace("data =", 'weights = "~nosuchuser/x.pt"\ndata ='),
        (),
        "home directory that is not known",
    ),
    "data directory of nobody": (
        FILE.replace("data =", 'weights = "x.pt"\ndata ='),
        ("--data-dir", "~nosuchuser/x"),
        "home directory that is not known",
    ),
    "more than tensors": (
        FILE.replace(":network", ":noting"),
        (),
        "more than dense tensors, which an experiment cannot",
    ),
    "a network that cannot be copied": (FILE.replace(":network", ":locked"), (), "it cannot be copied: TypeError"),
    "nested": ("model = " + 3000 * "[" + "\n" + FILE, (), "is not TOML"),
    "targets": (FILE.replace("data =", 'targets = ["fc9"]\ndata ='), (), "fc9"),
    "data": (FILE.replace("tests.tiny:data", "letters"), (), "letters"),
    "data that does not fit": (FILE.replace("tests.tiny:data", f"{demo.__name__}:embedded_data"), (), "shapes"),
    "device": (FILE, ("--device", "tpu9"), "tpu9"),
    "out of nobody": (FILE, ("--out", "~nosuchuser/x"), "home directory that is not known"),
    "optimizer": (FILE.replace("samples", 'finetune = { optimizer = ["sgd"] }\nsamples'), (), "optimizer of fine-tun"),
    "spec": (FILE.replace("samples", 'model_options = { spec = "a" }\nsamples'), (), "'spec'"),
    "out": (FILE, ("--out", "."), "not empty; go on with --resume"),
    "resume of something else": (FILE, ("--out", ".", "--resume"), "holds no experiment"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(call, tmp_path: Path, case: str) -> None:
    text, options, message = BAD[case]
    (tmp_path / "grid.toml").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call("experiment", "grid.toml", *(() if "--out" in options else ("--out", "out")), *options)
    assert (status, out) == (2, "")
    assert err.startswith("swap-prune: error: ") and err.count("\n") == 1 and message in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("experiment", "none.toml", "--out", "out"), "none.toml cannot be read"),
        (("experiment", "grid.toml"), "--out"),
        (("report", "nowhere"), "holds no results"),
        (("report", "."), "holds no results"),
        (("report", "~nosuchuser/x"), "home directory that is not known"),
    ],
)
def test_missing_files_are_one_line(call, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = call(*arguments)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "method", "words"),
    [
        ('pattern = "1:2"', 'name = "cbs"', "'cbs' does not support pattern='1:2': use one of .*magnitude"),
        ('targets = ["Linear", "0.bias"]', 'storage = "low-rank"', "storage 'low-rank' does not hold such weights"),
    ],
)
def test_what_a_method_cannot_do_is_refused_first(call, tmp_path: Path, setting: str, method: str, words: str) -> None:
    text = FILE.replace("[0.5, 0.8]", f"[0.5]\n{setting}").replace("{ damping = 1.0, first_order = 0.0 }", "{}")
    named = text.replace('name = "lr"', method if method.startswith("name") else f'name = "lr"\n{method}')
    (tmp_path / "grid.toml").write_text(named)
    status, out, err = call("experiment", "grid.toml", "--out", "out")
    assert (status, out) == (2, "") and re.search(words, err), err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_report_that_cannot_be_written_is_shown_all_the_same(call, tmp_path: Path) -> None:
    assert call("experiment", "grid.toml", "--out", "out")[0] == 0
    (tmp_path / "file").touch()
    status, out, err = call("report", "out", "--out", "file")
    assert status == 2 and "| lr |" in out and "cannot be written to file (" in err and "name another by --out" in err
    status, out, _ = call("report", "out", "--out", "elsewhere/tables", "--json")
    assert status == 0 and all(Path(path).parent == Path("elsewhere/tables") for path in json.loads(out)["files"])
    assert not (tmp_path / "out" / "tables.md").exists()


@pytest.mark.long
def test_what_a_killed_report_left_is_deleted_by_the_next(call, tmp_path: Path) -> None:
    assert call("experiment", "grid.toml", "--out", "out")[0] == 0
    left = tmp_path / "out" / f".{platform.node()}-{2**22 + 1}-{'0' * 32}.tables.md"
    left.mkdir()
    (left / "tables.md").write_text("torn")
    assert call("report", "out")[0] == 0 and not left.exists()


@pytest.mark.long
def test_rows_are_left_for_other_runs(call, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(FILE.replace('name = "lr"', 'name = "lr"\nstorage = "mapped"'))
    assert "does not exist" in call("experiment", "grid.toml", "--out", "out", "--scratch", "rows")[2]
    (tmp_path / "rows").mkdir()
    status, _, err = call("experiment", "grid.toml", "--out", "out", "--keep-rows")
    assert status == 2 and "give --scratch DIR" in err
    assert call("experiment", "grid.toml", "--out", "out", "--keep-rows", "--scratch", "rows")[0] == 0
    assert call("experiment", "grid.toml", "--out", "plain")[0] == 0
    kept, plain = (
        [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        for name in ("out", "plain")
    )
    reused = [bool(line["evidence"] and line["evidence"][0].pop("rows_reused", None)) for line in kept]
    assert sum(reused) == 2, "the second sparsity of each seed"
    for one, other in zip(kept, plain, strict=True):
        assert all(one[name] == other[name] for name in ("id", "accuracy", "loss", "kept", "layers", "evidence"))


@pytest.mark.long
def test_results_are_shown_whatever_letters_the_output_takes(call, tmp_path: Path) -> None:
    assert call("experiment", "grid.toml", "--out", "out")[0] == 0
    command = [sys.executable, "-m", "swap_prune", "report", "out"]
    environment = dict(os.environ, PYTHONIOENCODING="ascii")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "\\xb1" in done.stdout, done.stderr
