"""The command line from outside: JSON alone on standard output, one line and status 2 for bad input."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from swap_prune import LR, METHODS, FineTune
from swap_prune.artifact import load_report
from swap_prune.cli import app, main, run
from swap_prune.experiments.datasets import ImageData
from swap_prune.experiments.demo import embedded_data, embedded_network
from swap_prune.experiments.images import AugmentedBatches, AugmentedImages, ImageTensors
from swap_prune.fisher.noise import NOISE_MODELS
from swap_prune.stages.runner import StageRunner
from tests import tiny
from tests.cases import but_long


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MNIST in its own layout, and a checkpoint, made of what the package embeds."""
    root = tmp_path_factory.mktemp("cli")
    folder = root / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, part, count in (("train", 0, 300), ("t10k", 1, 200)):
        images, labels = (t[:count] for t in embedded_data()[part].tensors)
        pixels = ((images * 0.3081 + 0.1307) * 255).round().to(torch.uint8).numpy()
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        label_header = struct.pack(">II", 2049, count)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(label_header + labels.numpy().astype(np.uint8).tobytes())
    safetensors.torch.save_file(embedded_network().state_dict(), root / "w.safetensors")
    return root


@pytest.fixture
def call(workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SWAP_PRUNE_DATA", str(workplace / "data"))
    monkeypatch.chdir(workplace)

    def invoke(*arguments: str) -> tuple[int, str, str]:
        status = run(lambda: app(args=list(arguments), standalone_mode=False))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return invoke


PRUNE = ("prune", "--model", "mlpnet", "--data", "mnist", "--weights", "w.safetensors")


@pytest.mark.parametrize("method", but_long(["magnitude", "lr", "ewr"], short=2))
def test_prune_prints_one_json_object_and_writes_what_eval_reads(call, method: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    status, text, _ = call(
        *PRUNE, "--method", method, "--sparsity", "0.9", "--samples", "100", "--seed", "3", "--out", out, "--json"
    )
    assert status == 0
    result = json.loads(text)
    assert {"accuracy", "loss", "sparsity", "kept", "total", "seconds", "method", "seed"} <= set(result)
    assert (result["method"], result["seed"], result["total"]) == (method, 3, 32360)
    assert result["kept"] == math.floor(32360 * (1 - 0.9))
    status, text, _ = call("eval", "--model", "mlpnet", "--data", "mnist", "--pruned", out, "--json")
    again = json.loads(text)
    assert status == 0
    assert (again["accuracy"], again["loss"], again["kept"]) == (result["accuracy"], result["loss"], result["kept"])
    status, text, _ = call("eval", *PRUNE[1:], "--json")
    assert status == 0 and json.loads(text)["accuracy"] == result["dense_accuracy"] > 93
    state = safetensors.torch.load_file(f"{out}/weights.safetensors")
    assert sum(int((value == 0).sum()) for value in state.values()) == 32360 - result["kept"]


@pytest.mark.long
def test_the_same_seed_writes_the_same_bytes(call, tmp_path: Path) -> None:
    for name in ("a", "b"):
        status, *_ = call(*PRUNE, "--method", "ewr", "--samples", "80", "--stages", "2", "--out", str(tmp_path / name))
        assert status == 0
    first, second = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.long
def test_text_for_people_and_settings_of_the_method(call) -> None:
    status, text, _ = call(
        *PRUNE, "--method", "ewr", "--samples", "60", "--set", "anchor=0.5", "--set", "epsilon=0.1",
        "--noise", "gradient:std=2,fraction=0.1", "--set", "gradient=paper", "--ignore", "fc3",
    )  # fmt: skip
    assert status == 0
    assert "accuracy" in text and "31880" not in text and "32160" in text


@pytest.mark.long
def test_an_interrupted_run_goes_on_after_its_last_stage(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*PRUNE, "--method", "obd", "--samples", "60", "--stages", "3", "--json")
    expected = json.loads(call(*arguments)[1])
    own, numbers = StageRunner.run, []

    def until_second(runner: StageRunner, *given: Any, **options: Any) -> Any:
        numbers.append(given[2])
        if numbers == [1, 2]:
            raise KeyboardInterrupt
        return own(runner, *given, **options)

    monkeypatch.setattr(StageRunner, "run", until_second)
    kept = ("--checkpoint", str(tmp_path / "run"))
    status, text, error = call(*arguments, *kept)
    assert (status, text) == (130, "") and f"finished stages are kept in {tmp_path / 'run'}, and the same" in error
    status, text, _ = call(*arguments, *kept)
    assert status == 0 and numbers == [1, 2, 2, 3]
    assert {**json.loads(text), "seconds": 0} == {**expected, "seconds": 0}
    status, text, error = call(*arguments, *kept, "--seed", "1")
    assert (status, text) == (2, "") and "is of another run: seed was 0 and is 1" in error
    numbers.clear()
    status, _, error = call(*arguments)
    assert status == 130 and "kept" not in error


@pytest.mark.long
def test_plan_forecasts_without_running_and_prune_does_what_it_says(call) -> None:
    arguments = ("--model", "mlpnet", "--data", "mnist", "--samples", "60", "--memory", "20GB")
    status, text, _ = call("plan", *arguments, "--json")
    planned = json.loads(text)
    assert status == 0 and planned["storage"] == "float32" and planned["limit"] == 20 * 10**9
    assert [one["storage"] for one in planned["forecasts"]][-3:] == ["mapped", "matrix-free", "low-rank"]
    phases = {"capture", "defend", "solve", "trials", "recalibrate"}
    assert all(set(one["phases"]) == phases for one in planned["forecasts"])
    whole = ("--weights", "none.pt", "--out", "nowhere", "--min-keep", "0.05", "--seed", "3", "--defence", "none")
    status, again, _ = call("plan", *arguments, *whole, "--json")
    assert status == 0 and json.loads(again)["storage"] == "float32"
    refusals = {
        "--min-keep 0.1": "min_keep=0.1 keeps at least",
        "--min-keep 0.1 --min-keep fc1=0.2": "--min-keep has one share for all layers, or one for each pattern",
        "--min-keep fc1": "--min-keep needs a share, or PATTERN=SHARE, each pattern once, got 'fc1'",
        "--min-keep fc1=0.2 --min-keep fc1=0.1": "--min-keep needs a share",
        "--min-keep =0.2": "--min-keep needs a share",
        "--min-keep re:fc[1,2]=0.2 --min-keep fc9=0.1": "min_keep pattern 'fc9' matches nothing that is pruned",
        "--seed -1": "seed must be",
        "--defence some": "defence must be",
        "--finetune epochs=0": "epochs of fine-tuning must be",
    }
    for options, message in refusals.items():
        status, text, error = call("plan", *arguments, *options.split(), "--json")
        assert (status, text) == (2, "") and message in error
    assert call("plan", *arguments, "--wights", "none.pt")[0] == 2
    status, text, _ = call("plan", *arguments, "--storage", "mapped")
    assert status == 0 and "taken" in text and "float16" not in text
    status, text, _ = call("plan", *arguments)
    assert status == 0 and "recalibrate" in text and "float32 (no copies)" in text, "in the 80 columns of a terminal"
    assert "low-rank: approximates G" in text
    for options in ("", "--json"):
        status, text, error = call("plan", *arguments, *("--memory", "1MB", *options.split()))
        assert (status, error) == (1, "") and "do not fit" in text
    status, _, error = call("plan", *arguments, "--storage", "paper")
    assert status == 2 and "storage must be one of" in error
    status, text, _ = call(*PRUNE, "--method", "lr", "--samples", "60", "--storage", "float16", "--json")
    assert status == 0 and json.loads(text)["kept"] == math.floor(32360 * (1 - 0.9))


@pytest.mark.long
def test_noise_repeated_and_joined(call, tmp_path: Path) -> None:
    joined = "labels:kind=pair,fraction=0.1+gradient:std=1"
    for name, noise in (("a", ["--noise", joined]), ("b", [v for s in joined.split("+") for v in ("--noise", s)])):
        status, *_ = call(*PRUNE, "--method", "obd", "--samples", "60", *noise, "--out", str(tmp_path / name))
        assert status == 0
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("a", "b"))
    assert [noise["model"] for noise in first["settings"]["noise"]] == ["LabelNoise", "GradientNoise"]
    assert first["settings"]["noise"] == second["settings"]["noise"]
    assert first["weights_sha256"] == second["weights_sha256"]


@pytest.mark.long
def test_the_number_of_stages_is_found(call) -> None:
    status, text, _ = call(*PRUNE, "--method", "obd", "--samples", "60", "--stages", "auto", "--json")
    assert status == 0 and json.loads(text)["stages"] in (1, 4, 16)
    status, text, _ = call("plan", *PRUNE[1:], "--samples", "60", "--stages", "auto", "--json")
    assert status == 0 and json.loads(text)["storage"] == "float32"


def test_the_number_of_samples_is_what_fits(call) -> None:
    status, text, _ = call("plan", *PRUNE[1:], "--samples", "auto", "--json")
    whole = json.loads(text)
    assert status == 0 and whole["samples"] == 240, "of 300 a fifth is held out"
    _, text, _ = call("plan", *PRUNE[1:], "--samples", "auto")
    assert "of 240 samples a stage" in " ".join(text.split())


@pytest.mark.long
def test_fine_tuning_after_each_stage(call, tmp_path: Path) -> None:
    gradual = (*PRUNE, "--method", "lr", "--sparsity", "0.97", "--samples", "60", "--stages", "2", "--json")
    _, text, _ = call(*gradual)
    out = str(tmp_path / "out")
    status, tuned, _ = call(*gradual, "--finetune", "epochs=3,lr=0.05,batch_size=30", "--out", out)
    assert status == 0
    plain, result = json.loads(text), json.loads(tuned)
    assert result["kept"] == plain["kept"] and result["loss"] < plain["loss"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["finetune"]["epochs"] == 3
    assert [len(stage["evidence"]["finetune_loss"]) for stage in report["stages"]] == [3, 3]


def test_eval_of_the_dense_network(call) -> None:
    status, text, _ = call("eval", "--model", "mlpnet", "--data", "mnist", "--weights", "w.safetensors", "--json")
    assert status == 0 and json.loads(text)["accuracy"] > 93


def test_a_network_without_values_is_refused(call, tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    text = (
        'model = "tests.tiny:valueless"\ndata = "tests.tiny:data"\nsparsities = 0.5\n[[methods]]\nname = "magnitude"\n'
    )
    file.write_text(text)
    own = ("--model", "tests.tiny:valueless", "--data", "tests.tiny:data")
    for arguments in (("eval", *own), ("experiment", str(file), "--out", str(tmp_path / "out"))):
        status, out, errors = call(*arguments)
        assert (status, out) == (2, "") and "meta device, which holds no values: load its weights" in errors
        assert len(errors.strip().splitlines()) == 1


def test_eval_of_a_network_without_parameters(call) -> None:
    status, text, _ = call("eval", "--model", "tests.tiny:fixed", "--data", "tests.tiny:data", "--json")
    assert status == 0 and json.loads(text)["accuracy"] == 100


def test_a_network_without_a_checkpoint_is_noted(call) -> None:
    own = ("--model", "tests.tiny:network", "--data", "tests.tiny:data", "--method", "magnitude", "--json")
    status, text, error = call("prune", *own)
    note = "no --weights: the network is as tests.tiny:network makes it"
    assert status == 0 and note in json.loads(text)["notes"] and f"note: {note}\n" in error


def test_help_and_no_arguments(call) -> None:
    for arguments in (("--help",), ("prune", "--help")):
        status, text, _ = call(*arguments)
        assert status == 0 and "Usage" in text


BAD = {
    "sparsity": ([*PRUNE, "--sparsity", "1.0"], "sparsity"),
    "sparsity text": ([*PRUNE, "--sparsity", "much"], "sparsity"),
    "method": ([*PRUNE, "--method", "sgd"], "method"),
    "model": (["prune", "--model", "vgg", "--data", "mnist"], "vgg"),
    "module": (["prune", "--model", "nowhere:net", "--data", "mnist"], "nowhere"),
    "data": (["prune", "--model", "mlpnet", "--weights", "w.safetensors", "--data", "letters"], "letters"),
    "pattern": ([*PRUNE, "--targets", "fc9"], "fc9"),
    "ignore": ([*PRUNE, "--ignore", "re:("], "regular expression"),
    "no weights": (["prune", "--model", "mlpnet", "--data", "mnist"], "--weights"),
    "missing weights": ([*PRUNE[:-1], "none.safetensors"], "does not exist"),
    "truncated weights": ([*PRUNE[:-1], "short.safetensors"], "damaged"),
    "pickle": ([*PRUNE[:-1], "evil.pt"], "pickle"),
    "keys": ([*PRUNE[:-1], "other.safetensors"], "keys"),
    "shapes": ([*PRUNE[:-1], "shapes.safetensors"], "shapes"),
    "out not empty": ([*PRUNE, "--out", "."], "not empty"),
    "weights of a new out": ([*PRUNE[:-1], "none.safetensors", "--out", "deep/er/x"], "does not exist"),
    "checkpoint in out": ([*PRUNE, "--out", "new", "--checkpoint", "new/ck"], "would hold new/ck, which the run fills"),
    "checkpoint is out": ([*PRUNE, "--out", "new", "--checkpoint", "new"], "would hold new, which the run fills"),
    "kept rows in out": (
        [*PRUNE, "--out", "new", "--scratch", "new/r", "--keep-rows"],
        "would hold new/r, which the run",
    ),
    "path of no text": ([*PRUNE, "--out", "new\udcff"], "a path that is not UTF-8"),
    "out not writable": ([*PRUNE, "--out", "w.safetensors/below"], "cannot be written"),
    "noise": ([*PRUNE, "--noise", "thunder"], "noise must be one of gradient"),
    "second noise": ([*PRUNE, "--noise", "gradient", "--noise", "input:kind=rain"], "gaussian, impulse"),
    "joined noise": ([*PRUNE, "--noise", "gradient+labels:part=1"], "classes, fraction, key, kind"),
    "noise value": ([*PRUNE, "--noise", "analog:levels=few"], "whole number"),
    "finetune": ([*PRUNE, "--finetune", "eras=2"], "no setting 'eras'"),
    "finetune value": ([*PRUNE, "--finetune", "epochs=2,lr=fast"], "lr of fine-tuning must be a number"),
    "setting": ([*PRUNE, "--method", "lr", "--set", "colour=1"], "colour"),
    "setting form": ([*PRUNE, "--set", "ridge"], "name=value"),
    "large ridge": ([*PRUNE, "--method", "lr", "--set", "ridge=1" + 400 * "0"], "ridge must be 'auto' or a number"),
    "large damping": ([*PRUNE, "--method", "obd", "--set", "damping=1" + 400 * "0"], "damping"),
    "setting value": ([*PRUNE, "--method", "lr", "--set", "ridge=-1"], "ridge"),
    "device without code": ([*PRUNE, "--device", "ipu"], "'ipu' cannot be used: this PyTorch has no code for it; use"),
    "device": ([*PRUNE, "--device", "tpu9"], "device"),
    "option": ([*PRUNE, "--colour", "red"], "colour"),
    "command": (["paint"], "paint"),
    "missing option": (["prune", "--model", "mlpnet"], "data"),
    "stages": ([*PRUNE, "--stages", "0"], "stages"),
    "far too many stages": ([*PRUNE, "--stages", "1000000000"], "stages must be 10000 at the most, got 1000000000"),
    "stages past counting": ([*PRUNE, "--stages", "1" + 400 * "0"], "stages must be below 2**63, got a number of 1329"),
    "epochs past counting": (
        [*PRUNE, "--finetune", "epochs=1" + 400 * "0"],
        "epochs of fine-tuning must be below 2**63",
    ),
    "memory past counting": ([*PRUNE, "--memory", 400 * "9" + "GB"], "memory must be bytes or an amount such as"),
    "deep setting": (
        [*PRUNE, "--method", "lr", "--set", "floor=" + 5000 * "["],
        "floor must be 'auto' or lie in [0, 1)",
    ),
    "stages text": ([*PRUNE, "--stages", "many"], "--stages needs a whole number or auto"),
    "samples text": ([*PRUNE, "--samples", "all"], "--samples needs a whole number or auto"),
    "no samples": ([*PRUNE, "--samples", "0"], "samples must be a whole number of at least 1, got 0"),
    "memory": ([*PRUNE, "--method", "lr", "--memory", "1MB"], "memory"),
    "both": (["eval", *PRUNE[1:], "--pruned", "x"], "not both"),
    "artifact of nobody": (["eval", *PRUNE[1:5], "--pruned", "~nosuchuser/x"], "home directory that is not known"),
    "large seed": ([*PRUNE, "--seed", str(2**70)], "seed must be below 2**63"),
    "seed of eval": (["eval", *PRUNE[1:], "--seed", "-1"], "seed must be a whole number of at least 0, got -1"),
    "large seed of eval": (["eval", *PRUNE[1:], "--seed", str(2**63)], "seed must be below 2**63"),
    "no artifact": (["eval", *PRUNE[1:5], "--pruned", "x"], "not a pruning artifact"),
    "data folder": ([*PRUNE, "--data-dir", "empty"], "mnist"),
    "demo out": (["demo", "--out", "."], "not empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    call, workplace: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    state = embedded_network().state_dict()
    (workplace / "short.safetensors").write_bytes((workplace / "w.safetensors").read_bytes()[:5000])
    (workplace / "evil.pt").write_bytes(pickle.dumps({"fc1.weight": Path("x")}))
    (workplace / "empty").mkdir(exist_ok=True)
    safetensors.torch.save_file({"a": torch.zeros(2)}, workplace / "other.safetensors")
    safetensors.torch.save_file({**state, "fc3.weight": torch.zeros(10, 21)}, workplace / "shapes.safetensors")
    before = sorted(str(path) for path in workplace.rglob("*"))
    arguments, message = BAD[case]
    status, out, err = call(*arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("swap-prune: error: ") and err.count("\n") == 1
    assert message in err and "Traceback" not in err
    assert sorted(str(path) for path in workplace.rglob("*")) == before


def test_an_error_says_where_it_comes_from_if_asked(call, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("prune", "--model", "tests.tiny:nothing", "--data", "tests.tiny:data")
    status, _, plain = call(*arguments)
    monkeypatch.setenv("SWAP_PRUNE_TRACEBACK", "1")
    again, _, traced = call(*arguments)
    assert status == again == 2
    assert plain.count("\n") == 1 and traced.startswith("Traceback") and traced.endswith(plain)


@pytest.mark.long
def test_an_end_that_is_asked_for_is_one_line_and_clears_up(workplace: Path, tmp_path: Path) -> None:
    """As torchrun asks the other processes, where one is lost."""
    command = [
        sys.executable,
        "-m",
        "swap_prune",
        "prune",
        "--model",
        "tests.chatty:endless",
        "--data",
        "tests.tiny:data",
    ]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with subprocess.Popen(
        [*command, "--storage", "mapped", "--scratch", str(scratch)], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "running" in line:
                break
        process.terminate()
        said = process.stderr.read()
    assert process.returncode == 143 and "swap-prune: error: ended by SIGTERM" in said and "Traceback" not in said
    assert not list(scratch.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_ends_a_command_in_words_unless_that_is_ignored(ignored: bool) -> None:
    code = (
        "import os, signal; from swap_prune import console; "
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'}); "  # as nohup does, or a terminal
        "raise SystemExit(console.run(lambda: os.kill(os.getpid(), signal.SIGHUP)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    words = "swap-prune: error: ended by SIGHUP; files that were written are complete\n"
    assert (ended.returncode, ended.stderr) == ((0, "") if ignored else (129, words))


@pytest.mark.parametrize("closed", [False, True])
def test_work_is_saved_where_nothing_can_be_said(
    closed: bool, call, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard error on a full disk, behind a reader that left, or closed: results are there all the same."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    named = ["prune", "--model", "tests.tiny:network", "--data", "tests.tiny:data", "--method", "magnitude", "--json"]
    monkeypatch.setattr(sys, "stderr", None if closed else Full())
    results = io.StringIO()
    monkeypatch.setattr(sys, "stdout", results)
    assert run(lambda: app([*named, "--out", str(tmp_path / "out")], standalone_mode=False)) == 0
    assert json.loads(results.getvalue())["notes"] and (tmp_path / "out" / "report.json").exists()
    there = results.getvalue()
    assert run(lambda: app([*named, "--sparsity", "2"], standalone_mode=False)) == 2
    assert results.getvalue() == there, "errors are no results"


@pytest.mark.long
def test_rows_are_kept_for_the_next_command(call, tmp_path: Path) -> None:
    named = ("--model", "tests.tiny:network", "--data", "tests.tiny:data", "--samples", "40", "--method", "lr")
    kept = (*named, "--scratch", str(tmp_path), "--keep-rows")
    assert call("prune", *kept)[0] == 0 and len(list(tmp_path.iterdir())) == 4  # of both kinds of rows
    assert call("prune", *kept, "--sparsity", "0.8", "--out", str(tmp_path / "pruned"))[0] == 0
    report = json.loads((tmp_path / "pruned" / "report.json").read_text(encoding="utf-8"))
    assert "rows_reused" in report["stages"][0]["evidence"]
    status, text, error = call("prune", *named, "--keep-rows")
    assert (status, text) == (2, "") and "keep_rows needs a directory" in error.splitlines()[-1]


def test_the_version(call) -> None:
    status, out, err = call("--version")
    assert (status, out.strip(), err) == (0, version("swap-prune"), "")


@pytest.mark.long
def test_a_model_and_a_loader_of_ones_own(
    call, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_for_cli.py").write_text(
        "import torch\n"
        "def net(): return torch.nn.Linear(6, 3)\n"
        "def data():\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    batch = (torch.randn(40, 6, generator=g), torch.randint(3, (40,), generator=g))\n"
        "    return [batch], [batch]\n"
        "def labels(): return [(torch.randn(4, 6), torch.tensor([0, 1, 2, 9]))], []\n"
        "def nothing(): return [], []\n"
        "class Failing(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 9\n"
        "    def __getitem__(self, i): return {}[i]\n"
        "def failing(): return data()[0], Failing()\n"
        "def ragged():\n"
        "    test = [(torch.zeros(6 + i), 0) for i in range(4)]\n"
        "    return data()[0], torch.utils.data.StackDataset(*zip(*test))\n"
        "def split():\n"
        "    whole = torch.utils.data.TensorDataset(*data()[0][0])\n"
        "    return torch.utils.data.random_split(whole, [20, 20])\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ("prune", "--model", "mine_for_cli:net", "--method", "lr", "--json", "--data")
    status, text, _ = call(*command, "mine_for_cli:data")
    assert status == 0 and json.loads(text)["kept"] == 1
    broken = {"labels": "labels out of range", "nothing": "empty"}
    broken |= {"failing": "the test data failed: KeyError: 0", "ragged": "the test data failed: RuntimeError: stack"}
    for loader, message in broken.items():
        status, text, err = call(*command, f"mine_for_cli:{loader}")
        assert (status, text) == (2, "") and message in err and "Traceback" not in err
    figures = [call(*command, "mine_for_cli:split")[1] for _ in range(3)]
    assert len({json.loads(text)["loss"] for text in figures}) == 1, "the seed decides what is split off"


@pytest.mark.long
def test_what_the_users_module_registers_has_a_name(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_registering.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from swap_prune import METHODS\n"
        "from swap_prune.fisher.noise import NOISE_MODELS, GradientNoise\n"
        "from swap_prune.methods import Magnitude\n"
        "METHODS['mine'] = type('Mine', (Magnitude,), {'name': 'mine'})\n"
        "@dataclass(frozen=True)\n"
        "class Loud(GradientNoise):\n"
        "    on: bool = False\n"
        "NOISE_MODELS['loud'] = Loud\n"
        "def net(): return torch.nn.Linear(6, 3)\n"
        "def data():\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    batch = (torch.randn(40, 6, generator=g), torch.randint(3, (40,), generator=g))\n"
        "    return [batch], [batch]\n"
    )
    monkeypatch.chdir(tmp_path)
    source = ("--model", "mine_registering:net", "--data", "mine_registering:data")
    try:
        status, text, _ = call("prune", *source, "--method", "mine", "--json")
        assert status == 0 and json.loads(text)["method"] == "mine"
        status, text, _ = call("prune", *source, "--method", "lr", "--noise", "loud:on=true", "--json")
        assert status == 0
        assert "must be true or false, got 'yes'" in call("prune", *source, "--noise", "loud:on=yes")[2]
        assert call("plan", *source, "--method", "mine")[0] == 0
        table = f"model = '{source[1]}'\ndata = '{source[3]}'\nnoise = ['none', 'loud:on=true']\nsparsities = 0.5\n"
        (tmp_path / "mine.toml").write_text(table + "[[methods]]\nname = 'mine'\n[[methods]]\nname = 'lr'\n")
        status, _, error = call("experiment", "mine.toml", "--out", "runs")
        assert status == 0, error
    finally:
        METHODS.pop("mine", None)
        NOISE_MODELS.pop("loud", None)


@pytest.mark.long
def test_demo_needs_nothing_and_writes_a_report(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swap_prune.experiments.demo.SAMPLES", 60)
    monkeypatch.setattr("swap_prune.experiments.demo.STAGES", 1)
    monkeypatch.delenv("SWAP_PRUNE_DATA")
    status, text, _ = call("demo", "--out", str(tmp_path / "new" / "report"), "--json")
    assert status == 0
    rows = {row["method"]: row for row in json.loads(text)["rows"]}
    assert set(rows) == {"dense", "magnitude", "lr", "ewr"}
    assert rows["dense"]["clean"] > 97 > rows["magnitude"]["clean"]
    assert rows["lr"]["noisy"] is not None and rows["magnitude"]["noisy"] is None
    report = tmp_path / "new" / "report"
    assert sorted(p.name for p in report.iterdir()) == ["picture.png", "report.html", "results.json"]
    assert (report / "picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_processes_of_torchrun_write_one_model_and_its_bits_do_not_depend_on_their_number(workplace: Path) -> None:
    def started(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "-m", "swap_prune"]
        environment = {**os.environ, "SWAP_PRUNE_DATA": str(workplace / "data"), "PYTHONWARNINGS": "ignore"}
        environment.pop("OMP_NUM_THREADS", None)
        return subprocess.run(
            [*command, *arguments], cwd=workplace, env=environment, capture_output=True, text=True, timeout=300
        )

    written = []
    for processes in (1, 2, 4):
        out = f"shared-{processes}"
        done = started(processes, *PRUNE, "--samples", "100", "--out", out, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["kept"] == 3235
        written.append((workplace / out / "weights.safetensors").read_bytes())
        assert json.loads((workplace / out / "report.json").read_text())["settings"]["storage"]["used"] == "sharded"
    assert written[0] == written[1] == written[2]
    failed = started(2, *PRUNE, "--sparsity", "2")
    assert failed.returncode != 0 and failed.stdout == ""
    assert failed.stderr.count("swap-prune: error: process") == 1 and "sparsity must lie in [0, 1)" in failed.stderr


def test_what_cannot_be_measured_is_saved_all_the_same(call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    named = ("--model", "tests.tiny:network", "--data", "tests.tiny:untestable")
    status, _, error = call("prune", *named, "--samples", "40", "--out", str(out))
    assert status == 2 and "the test data is empty" in error
    assert load_report(out).sparsity == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [(KeyboardInterrupt, 130, "interrupted"), (EOFError, 2, "a file ended too early")],
)
def test_interruptions_are_told(
    raised: type[BaseException], status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("swap_prune.cli.load_dataset", stopped)
    command = ["plan", "--model", "mlpnet", "--data", "mnist"]
    assert run(lambda: app(args=command, standalone_mode=False)) == status
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err


@pytest.mark.parametrize("command", but_long(["eval", "prune", "plan"], short=["eval", "plan"]))
def test_what_models_and_data_print_is_not_mixed_into_results(call, command: str) -> None:
    named = ("--model", "tests.chatty:network", "--data", "tests.chatty:data")
    status, text, error = call(command, *named, "--json", *(["--samples", "40"] if command != "eval" else []))
    assert status == 0 and json.loads(text)
    assert "building the network" in error and "forward" in error
    status, text, _ = call(command, *named)
    assert status == 0 and text and "forward" not in text and "item" not in text


def test_help_is_a_result(call) -> None:
    status, text, error = call("--help")
    assert status == 0 and text.startswith("Usage") and error == ""


@pytest.mark.parametrize("command", ["prune", "eval"])
def test_without_memory_it_is_one_line(call, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.py").write_text(
        "import torch\n"
        "class Large(torch.nn.Linear):\n"
        "    def forward(self, images):\n"
        "        torch.empty(2**50)\n"
        "        return super().forward(images.flatten(1))\n"
        "def network():\n"
        "    return Large(784, 10)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(torch.nn.Linear(784, 10).state_dict(), tmp_path / "w.pt")
    status, text, error = call(
        command, "--model", "large:network", "--data", "mnist", "--weights", str(tmp_path / "w.pt")
    )
    assert (status, text) == (2, "") and "allocate memory" in error and "Traceback" not in error
    assert error.splitlines()[-1].startswith("swap-prune: error: ")


def test_outputs_that_are_not_numbers_are_wrong_and_said(call) -> None:
    named = ("--model", "tests.chatty:mute", "--data", "tests.tiny:data", "--method", "magnitude")
    status, text, error = call("prune", *named, "--json")
    result = json.loads(text)
    assert status == 0 and result["accuracy"] == 0 and result["loss"] is None
    note = "the outputs of 200 of 200 test samples are not numbers"
    assert note in result["notes"][-1] and note in error
    assert "loss  not finite" in call("prune", *named)[1]


def test_test_data_that_are_readable_once_measure_both_networks(call) -> None:
    named = ("--model", "tests.tiny:network", "--data", "tests.tiny:batches")
    status, text, _ = call("prune", *named, "--method", "magnitude", "--json")
    result = json.loads(text)
    assert (status, result["test_samples"]) == (0, 200)
    assert result["dense_accuracy"] == json.loads(call("eval", *named, "--json")[1])["accuracy"] != result["accuracy"]


def test_noise_beyond_all_numbers_is_one_line(call) -> None:
    named = ("--model", "tests.tiny:network", "--data", "tests.tiny:data", "--samples", "40")
    status, text, error = call(
        "prune", *named, "--method", "lr", "--noise", "gradient:std=1e25", "--no-recalibrate", "--defence", "none"
    )
    assert (status, text) == (2, "") and "noise=" in error.splitlines()[-1]


@pytest.mark.parametrize("command", ["prune", "eval"])
def test_a_network_that_ends_the_process_has_not_succeeded(
    call, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaving_net.py").write_text(
        "import sys\n"
        "from torch import nn\n"
        "class Leaving(nn.Linear):\n"
        "    def forward(self, inputs): sys.exit(0)\n"
        "def network(): return Leaving(6, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    status, text, error = call(command, "--model", "leaving_net:network", "--data", "tests.tiny:data", "--json")
    assert (status, text) == (2, "") and error.count("\n") == 1
    assert "the model or the data called sys.exit(0); raise an error instead" in error


@pytest.mark.long
def test_a_reader_that_leaves_early_is_no_error() -> None:
    """As ``| head -1``."""
    code = "import sys; from swap_prune.console import own_output, run, show; from swap_prune.cli import app\n"
    code += "@app.command()\n@own_output\ndef talk() -> None:\n    for _ in range(20000): show('x' * 100)\n"
    code += "sys.exit(run(lambda: app(args=['talk'], standalone_mode=False)))"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as own:
        assert own.stdout is not None and own.stderr is not None
        assert own.stdout.readline() == "x" * 100 + "\n"
        own.stdout.close()
        error = own.stderr.read()
    assert (own.returncode, error) == (1, "")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What prune is called with; it is not run."""
    given: dict[str, Any] = {}

    def stopped(network: object, data: object, sparsity: object, method: object, **options: Any) -> None:
        given.update(options, data=data, sparsity=sparsity, method=method)
        raise ValueError("seen")

    monkeypatch.setattr("swap_prune.cli.prune_model", stopped)
    return given


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("--schedule cubic", "schedule", "cubic"),
        ("--defence labels", "defence", "labels"),
        ("--memory 3GB", "memory", "3GB"),
        ("--storage mapped", "storage", "mapped"),
        ("--scratch some/where", "scratch", Path("some/where")),
        ("--keep-rows", "keep_rows", True),
        ("--checkpoint some/where", "checkpoint", Path("some/where")),
        ("--samples 7", "samples", 7),
        ("--stages 3", "stages", 3),
        ("--seed 5", "seed", 5),
        ("--sparsity 0.25", "sparsity", 0.25),
        ("--min-keep fc1=0.1", "min_keep", {"fc1": 0.1}),
        ("--min-keep 0.1", "min_keep", 0.1),
        ("--finetune epochs=2,lr=0.5", "finetune", FineTune(epochs=2, lr=0.5)),
        ("--noise gradient:std=2", "noise", ["gradient:std=2"]),
        ("--no-recalibrate", "recalibrate_batchnorm", False),
        ("--targets fc1 --targets fc3", "targets", ["fc1", "fc3"]),
        ("--ignore fc2", "ignore", ["fc2"]),
        ("--device cpu", "device", torch.device("cpu")),
        ("--method lr --set ridge=0.5", "method", LR(ridge=0.5)),
    ],
)
def test_every_option_reaches_prune(call, asked: dict[str, Any], text: str, name: str, value: object) -> None:
    assert call(*PRUNE)[0] == 2
    assert asked.pop(name) != value, "else it is the default"
    call(*PRUNE, *text.split())
    assert asked[name] == value


def test_pruning_and_recalibration_see_augmented_images(call, asked: dict[str, Any], monkeypatch) -> None:
    images = ImageTensors(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setattr("swap_prune.cli.load_dataset", lambda *_, **__: ImageData("cifar10", 10, images, images))
    monkeypatch.setattr("swap_prune.cli.load_weights", lambda *_: None)
    call("prune", "--model", "resnet20", "--data", "cifar10", "--weights", "none")
    assert isinstance(asked["data"], AugmentedImages) and isinstance(asked["recalibration_data"], AugmentedBatches)


@pytest.mark.parametrize(("data", "mean"), [("imagenet", (0.5,) * 3), ("cifar10", None)])
def test_images_are_scaled_as_the_network_was_trained(call, monkeypatch, data: str, mean: object) -> None:
    """Where the data are those that it was trained on; else the data set knows best."""
    seen: dict[str, Any] = {}

    def stopped(*_: object, **named: object) -> None:
        seen.update(named)
        raise ValueError("seen")

    monkeypatch.setattr("swap_prune.cli.load_dataset", stopped)
    monkeypatch.setattr("swap_prune.cli.load_weights", lambda *_: None)
    call("eval", "--model", "mobilenetv1", "--data", data, "--weights", "none")
    assert seen == {"mean": mean, "std": mean}


def test_one_process_of_several_speaks_and_writes(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def magnitude(out: Path) -> tuple[int, str, str]:
        found: tuple[int, str, str] = call(*PRUNE, "--method", "magnitude", "--out", str(out), "--json")
        return found

    monkeypatch.setattr("swap_prune.cli.launched", nullcontext)  # the group of torchrun is joined, and left again
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert magnitude(tmp_path / "second") == (0, "", "") and not (tmp_path / "second").exists()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for rank, count in (("1", "2"), ("x", "y")):  # set by something else: there is no group, and this process is alone
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        status, text, _ = magnitude(tmp_path / rank)
        assert status == 0 and json.loads(text)["kept"] > 0 and (tmp_path / rank / "report.json").exists()


@pytest.mark.parametrize("command", ["demo", "eval", "experiment", "report"])
def test_what_processes_do_not_share_is_refused_where_there_are_several(
    command: str, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = {
        "eval": ["--model", "mlpnet", "--data", "mnist"],
        "experiment": ["x.toml", "--out", "y"],
        "report": ["z"],
    }
    for rank, said in (("0", f"swap-prune: error: {command} runs in one process, and torchrun started 2"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        status, text, error = call(command, *arguments.get(command, []))
        assert (status, text) == (2, "") and error.startswith(said) and bool(error) == bool(said)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "torchrun" not in call(command, *arguments.get(command, []), "--bad")[2]


def test_a_plan_knows_that_nothing_is_recalibrated(call, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def stopped(*_: object, **named: object) -> None:
        seen.update(named)
        raise ValueError("seen")

    monkeypatch.setattr("swap_prune.cli.plan_run", stopped)
    for option, value in (("--recalibrate", True), ("--no-recalibrate", False)):
        call("plan", *PRUNE[1:5], option)
        assert seen["recalibrate_batchnorm"] is value


def test_what_was_pruned_is_measured_as_it_is(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "out")
    assert call(*PRUNE, "--method", "magnitude", "--out", out)[0] == 0
    repaired: list[object] = []
    monkeypatch.setattr("swap_prune.cli.repair", lambda *given: repaired.append(given) or [])
    for options, count in (("--pruned", out), 0), (PRUNE[-2:], 1), ((*PRUNE[-2:], "--no-recalibrate"), 1):
        assert call("eval", *PRUNE[1:5], *options)[0] == 0
        assert len(repaired) == count


def test_a_network_that_cannot_be_saved_is_refused_before_it_is_pruned(call, tmp_path: Path) -> None:
    named = ("--model", "tests.tiny:noting", "--data", "tests.tiny:data", "--method", "magnitude")
    status, text, error = call("prune", *named, "--out", str(tmp_path / "out"))
    assert (status, text) == (2, "") and "which cannot be saved (leave --out out)" in error
    assert not (tmp_path / "out").exists()
    assert call("prune", *named)[0] == 0


@pytest.mark.parametrize("given", [("--out", ""), ("--out=",), ("",)])
def test_an_empty_argument_is_no_path(given: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prune", "--model", "tests.tiny:network", "--data", "tests.tiny:data", *given])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "is empty: is a shell variable not set?" in error
    assert ("--out" in error) == ("--out" in given[0])


def test_settings_without_effect_are_noted(call) -> None:
    named = ("--model", "tests.tiny:network", "--data", "tests.tiny:data", "--method", "magnitude", "--json")
    _, text, _ = call("prune", *named, "--storage", "float16", "--noise", "gradient:std=1")
    notes = json.loads(text)["notes"]
    assert "magnitude takes no gradients: storage= and noise on gradients make no difference" in notes
    assert not any("makes no difference" in note for note in json.loads(call("prune", *named)[1])["notes"])


def test_a_dense_network_that_cannot_be_measured_costs_no_result(call, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    own = tiny.data

    def once() -> Any:
        loads.append(1)
        if len(loads) > 1:
            raise RuntimeError("gone")
        return own()

    monkeypatch.setattr(tiny, "data", once)
    status, text, _ = call(
        "prune", "--model", "tests.tiny:network", "--data", "tests.tiny:data", "--method", "magnitude", "--json"
    )
    result = json.loads(text)
    assert status == 0 and result["dense_accuracy"] is None and result["accuracy"] >= 0
    assert any("the dense network could not be measured" in note and "gone" in note for note in result["notes"])
