"""The benchmarks run, on small cases: the figures in docs/results.md come from them."""

from __future__ import annotations

import ast
import importlib
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import swap_prune
from swap_prune.experiments.encoder import EncoderConfig, SentenceEncoder

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.mark.long
def test_a_solve_is_counted_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = load("solver", monkeypatch).measure(20, 400)
    assert one["n"] == 20 and one["p"] == 400
    assert one["passes"] > 5 and one["seconds"] > 0


def test_a_capture_is_compared_with_a_plain_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    module, kinds = load("capture", monkeypatch), set()
    for name in ("capture_gradients", "sketch_curvature"):
        function = getattr(module, name)

        def noted(*given: Any, function: Any = function, **options: Any) -> Any:
            kinds.add((function.__name__, options["storage"].kind))
            return function(*given, **options)

        monkeypatch.setattr(module, name, noted)
    times = module.measure("mlpnet", 32, storage="bfloat16")  # plain, per-sample rows, mini-batch rows
    assert len(times) == 3 and all(time > 0 for time in times)
    assert kinds == {("capture_gradients", "bfloat16"), ("sketch_curvature", "bfloat16")}


@pytest.mark.long
def test_what_choosing_costs_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("tuning", monkeypatch)
    options = Namespace(weights=None, samples=20)
    found = {way: module.measure(way, 0.9, options) for way in module.WAYS}
    assert all(10 < accuracy <= 100 and seconds > 0 for accuracy, seconds in found.values())
    assert found["one candidate"][1] < found["with a coupling: `ewr`"][1]


@pytest.mark.long
def test_processes_that_share_g_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        one = load("sharded", monkeypatch).measure(20, 4)
    finally:
        dist.destroy_process_group()
    assert one["process"] == "0 of 1" and one["rows"] == 20 and one["peak_mb"] > 0


@pytest.mark.long
def test_storages_are_compared_on_the_embedded_network(monkeypatch: pytest.MonkeyPatch) -> None:
    module, threads = load("storage", monkeypatch), torch.get_num_threads()
    try:
        runs = {storage: module.measure(storage, "embedded", 40) for storage in ("float32", "matrix-free")}
    finally:
        torch.set_num_threads(threads)
    assert runs["float32"]["kept"] == runs["matrix-free"]["kept"] and runs["float32"]["passes"] is None
    assert runs["matrix-free"]["passes"] > 0
    assert all(run["accuracy"] > 50 and run["peak_gb"] > 0 and run["forecast_gb"] > 0 for run in runs.values())


@pytest.mark.long
def test_a_plan_is_compared_with_pot(monkeypatch: pytest.MonkeyPatch) -> None:
    one = load("transport", monkeypatch).measure(20, 0.1, 0.5)
    assert one["seconds"] > 0 and one["pot_seconds"] > 0
    assert one["residual"] <= 1e-6 and one["pot_residual"] < 1e-4, "both solve the same problem"


@pytest.mark.long
def test_the_search_for_the_largest_is_compared_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [load("top_k", monkeypatch).measure(3_000_000, 1_000_000, searched) for searched in (False, True)]
    assert all(seconds > 0 for seconds, _ in found)
    if os.access("/proc/self/clear_refs", os.W_OK):  # only Linux forgets a peak
        assert all(8 <= grown < 200 for _, grown in found), "a million indices are 8 MB"


def test_functions_that_are_compared_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    timing, calls = load("timing", monkeypatch), list[str]()
    times = timing.best_times([lambda: calls.append("a"), lambda: calls.append("b")], 2)
    assert len(times) == 2 and "".join(calls) == "ab" + "abab"
    timing.best_times([lambda: calls.append("c")], 1, warm=True)
    assert calls[-2:] == ["b", "c"]


def test_only_what_leads_to_a_row_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))  # a second from one look to the next
    monkeypatch.setattr(load("timing", monkeypatch).time, "perf_counter", lambda: next(clock))
    rows = load("objective", monkeypatch).measure(20, 400)
    steps = {row["step"]: row for row in rows}
    seconds = [steps[step]["seconds"] for step in ("path", "thresholding", "swaps", "ewr: choice", "ewr: coupled")]
    assert seconds == [5, 5, 6, 7, 8], "the refit of the path's end is in both of the first"
    assert steps["largest weights"]["seconds"] == 4 and steps["refitted"]["seconds"] == 5
    assert steps["refitted"]["objective"] == 1 >= steps["path"]["objective"] >= steps["swaps"]["objective"]


def test_a_pruned_encoder_is_compared_with_its_dense_self(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EncoderConfig(20, 8, 1, 2, 12, 7)

    def make() -> SentenceEncoder:
        torch.manual_seed(0)
        return SentenceEncoder(config).eval()

    tokens = [torch.randint(1, 20, (12, 6), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]
    data = [swap_prune.SelfDistillation().label(make(), [batch]) for batch in batches]
    runs = {
        method: load("minilm", monkeypatch).measure(make, data, method, 0.5, 6, storage="float16")
        for method in ("wanda", "lr")
    }
    assert runs["wanda"]["samples"] == 12 and runs["lr"]["samples"] == 6
    assert all(0 < run["agreement"] < 1 and run["error"] > 0 for run in runs.values())
    json.dumps(runs)


DOCSTRING = '''
def parse(text):
    """Return the first number of a text, or None. It reads no further than the first word.

    >>> parse("12 men and some more words")
    12 is what this paragraph of code gives.

    Too short.
    """
'''


def test_sentences_are_those_of_prose(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(load("docstrings", monkeypatch)._sentences(ast.parse(DOCSTRING)))
    assert found == ["Return the first number of a text, or None.", "It reads no further than the first word."]


def test_text_to_judge_by_comes_from_other_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    docstrings = load("docstrings", monkeypatch)
    modules = {f"m{i}": [f"Sentence {j} of module m{i}.", *(["Said everywhere."] * 2)] for i in range(10) for j in (0,)}
    monkeypatch.setattr(docstrings, "_modules", lambda library: modules)
    first, second = docstrings.split_sentences(3, 5, 4)
    assert len(first) == 5 and len(second) == 4 and not set(first) & set(second)
    assert "Said everywhere." not in first + second
    assert docstrings.split_sentences(3, 5, 4) == (first, second)
    with pytest.raises(ValueError, match="give 5 sentences, 6 were asked for"):
        docstrings.split_sentences(3, 6, 1)


def test_solutions_are_compared_by_their_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("public_lr", monkeypatch)
    state = torch.Generator().manual_seed(0)
    matrix, w_bar = torch.randn(20, 60, generator=state), torch.randn(60, generator=state)
    values = {}
    for solve in (module.refit, module.ours):
        w = solve(matrix, w_bar, 12, 1e-2)
        assert int(w.count_nonzero()) == 12
        values[solve] = module.objective(matrix, w_bar, w, 1e-2)
        expected = ((matrix @ (w - w_bar)) ** 2).sum() / 2 + 20 * 1e-2 / 2 * ((w - w_bar) ** 2).sum()
        assert values[solve] == pytest.approx(float(expected), rel=1e-5)
    assert values[module.ours] < values[module.refit]
