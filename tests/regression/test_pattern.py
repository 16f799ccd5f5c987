"""N:M patterns: the best sets against all of them, swaps that hold to one, and every method that does."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import LR, METHODS, FineTune, SparseGPT, Wanda, load_pruned, prune
from swap_prune.cli import app, run
from swap_prune.fisher.factor import DenseFactor
from swap_prune.methods.sparsegpt import prune_columns
from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.regression.iht import SparseFit, solve_sparse
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.pattern import GroupPattern, parse_pattern
from swap_prune.regression.swap import exchange_of, propose_swaps, swap_weights
from swap_prune.regression.top_k import top_k
from tests.cases import but_long, generator, normal, random_regression

SHAPES = (torch.Size((2, 4)), torch.Size((1, 4, 2)))


def members(pattern: GroupPattern) -> list[list[int]]:
    """Return the indices of each group, by the definition."""
    groups, start = [], 0
    for shape in pattern.shapes:
        index = torch.arange(start, start + shape.numel()).view(shape[0], shape[1], -1)
        for output in range(shape[0]):
            for first in range(0, shape[1], pattern.size):
                for spot in range(index.shape[2]):
                    groups.append(index[output, first : first + pattern.size, spot].tolist())
        start += shape.numel()
    return groups


def holds(pattern: GroupPattern, kept: Sequence[int] | Tensor, limit: int) -> bool:
    chosen = set(kept.tolist() if isinstance(kept, Tensor) else kept)
    return all(len(chosen & set(group)) <= limit for group in members(pattern))


def has_least(pattern: GroupPattern, kept: Sequence[int] | Tensor, least: int) -> bool:
    chosen = set(kept.tolist() if isinstance(kept, Tensor) else kept)
    return all(len(chosen & set(group)) >= least for group in members(pattern))


def fits(weight: Tensor, most: int, size: int) -> bool:
    """Whether of every ``size`` neighbours among the inputs ``most`` are not zero, at the most."""
    blocks = (weight != 0).reshape(len(weight), weight.shape[1] // size, size, -1)
    return int(blocks.sum(2).max()) <= most


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def images(count: int = 240) -> TensorDataset:
    x = torch.randn(count, 4, 6, 6, generator=generator(1))
    return TensorDataset(x, x.mean((2, 3)).argmax(1))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_the_best_set_is_that_of_all_sets(seed: int) -> None:
    pattern, p = GroupPattern(2, 4, SHAPES), 16
    scores = normal(p, seed=seed).abs()
    for keep in (0, 1, 3, 8):
        allowed = [c for c in itertools.combinations(range(p), keep) if holds(pattern, c, 2)]
        best = max(float(scores[list(c)].sum()) for c in allowed)
        found = top_k(scores, keep, (), pattern)
        assert len(found) == keep and holds(pattern, found, 2)
        assert float(scores[found].sum()) == pytest.approx(best, rel=1e-12)
    filled = replace(pattern, filled=True)
    for keep in (8, 10, 11):  # on the way each group keeps two of the end, and three at the most
        sets = itertools.combinations(range(p), keep)
        allowed = [c for c in sets if holds(pattern, c, filled.limit(keep)) and has_least(pattern, c, 2)]
        found = top_k(scores, keep, (), filled)
        best = max(float(scores[list(c)].sum()) for c in allowed)
        assert float(scores[found].sum()) == pytest.approx(best, rel=1e-12) and has_least(pattern, found, 2)
    floors = [(slice(8, 16), 4)]
    scores[8:] /= 1e3
    allowed = [c for c in itertools.combinations(range(p), 6) if holds(pattern, c, 2) and sum(i >= 8 for i in c) >= 4]
    found = top_k(scores, 6, floors, pattern)
    assert float(scores[found].sum()) == pytest.approx(max(float(scores[list(c)].sum()) for c in allowed), rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 5)]),
    dims=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3),
    share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_groups_are_what_the_definition_says(
    sizes: tuple[int, int], dims: list[tuple[int, int, int]], share: float, seed: int
) -> None:
    most, size = sizes
    pattern = GroupPattern(most, size, tuple(torch.Size((o, g * size, k)) for o, g, k in dims))
    groups = members(pattern)
    assert pattern.count == len(groups)
    p = size * len(groups)
    keep = round(share * p)
    scores = torch.randint(0, 4, (p,), generator=generator(seed)).double()  # with ties
    limit = max(most, -(-keep // len(groups)))
    assert pattern.limit(keep) == limit and pattern.is_full(keep) == (keep >= limit * len(groups) - 1)
    found = top_k(scores, keep, (), pattern)
    assert len(found) == keep == len(set(found.tolist())) and holds(pattern, found, limit)
    value, index = pattern.best(scores)
    number = pattern.group_of(torch.arange(p))
    room = pattern.room(found)
    spread = pattern.spread(room)
    for g, group in enumerate(groups):
        first = max(group, key=lambda i: (float(scores[i]), -i))
        assert float(value[g]) == float(scores[first]) and float(scores[index[g]]) == float(value[g])
        assert int(index[g]) in group and number[group].tolist() == [g] * size
        assert int(room[g]) == limit - len(set(group) & set(found.tolist())) == int(spread[group[0]])
        assert len(set(spread[group].tolist())) == 1


def grouped_regression(seed: int, shapes: tuple[torch.Size, ...], most: int = 2, size: int = 4) -> WeightedRidge:
    p = sum(shape.numel() for shape in shapes)
    problem = random_regression(10, p, generator(seed), ridge=0.05)
    return replace(problem, pattern=GroupPattern(most, size, shapes))


def fit_on(problem: WeightedRidge, support: Tensor) -> SparseFit:
    refit = problem.refit(support)
    return SparseFit(refit.weights, support, problem.value(refit.weights), 0, True, refit)


@pytest.mark.parametrize("seed", but_long(range(4)))
def test_swaps_within_groups_come_near_the_best_of_all_patterns(seed: int) -> None:
    """6^4 = 1,296 supports of 2:4 in 16 weights, each refitted."""
    problem = grouped_regression(seed, SHAPES)
    pairs = [list(itertools.combinations(group, 2)) for group in members(problem.pattern)]  # type: ignore[arg-type]
    values = []
    for chosen in itertools.product(*pairs):
        support = torch.tensor(sorted(itertools.chain(*chosen)))
        values.append(problem.value(problem.refit(support).weights))
    values.sort()
    fit = solve_sparse(problem, 8, swaps_follow=True)
    better = swap_weights(problem, fit, max_batches=50)
    assert holds(problem.pattern, better.support, 2) and len(better.support) == 8  # type: ignore[arg-type]
    assert better.value <= fit.value
    assert better.value <= values[len(values) // 50]  # among the best two in a hundred
    poor = fit_on(problem, top_k(-problem.reference.abs(), 8, (), problem.pattern))
    mended = swap_weights(problem, poor, max_batches=50)
    assert mended.swaps > 0 and mended.value < poor.value and holds(problem.pattern, mended.support, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [10, 60])
@pytest.mark.parametrize("keep", [30, 40, 50])
def test_proposals_hold_to_the_pattern_and_gain_what_refits_say(keep: int, n: int) -> None:
    """Groups with room (30 of 80 weights), full ones (40), and such on the way to that (50); n and k equations."""
    shapes = (torch.Size((5, 8)), torch.Size((2, 4, 5)))
    problem = random_regression(n, 80, generator(3), ridge=0.05)
    problem = replace(problem, pattern=(pattern := GroupPattern(2, 4, shapes, filled=keep >= 40)))
    support = top_k(torch.rand(80, generator=generator(5)), keep, (), pattern)
    fit = fit_on(problem, support)
    exchange = exchange_of(problem, support, fit.refit, problem.gradient(fit.weights))
    scale = n * (problem.factor.diagonal() + problem.ridge * problem.metric)
    swaps = propose_swaps(exchange, scale, 12)
    assert len(swaps.leaving) >= 4
    for count in range(1, len(swaps.leaving) + 1):
        changed = support.index_copy(0, swaps.leaving[:count], swaps.entering[:count])
        assert len(set(changed.tolist())) == keep and holds(pattern, changed, 2 if keep <= 40 else 3)
        assert keep < 40 or has_least(pattern, changed, 2)
    gains = exchange.enter(swaps.entering) - exchange.leave(swaps.leaving)
    assert bool((gains > 0).all())
    if keep == 40:
        assert torch.equal(pattern.group_of(support[swaps.leaving]), pattern.group_of(swaps.entering))
        assert torch.equal(gains, gains.sort(descending=True).values)


def test_a_group_that_is_full_takes_no_more_than_it_has_room_for() -> None:
    """All that would gain lies in two groups, of which one is full and one has room for one."""
    pattern = GroupPattern(2, 4, (torch.Size((3, 4)),))
    G = torch.eye(12, dtype=torch.float64)
    target = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 0, 1, 1, 0, 0], dtype=torch.float64)
    ones = torch.ones(12, dtype=torch.float64)
    problem = WeightedRidge(DenseFactor(G), target, torch.zeros_like(ones), 1e-6, ones, pattern=pattern)
    support = torch.tensor([0, 1, 6, 8])
    fit = fit_on(problem, support)
    exchange = exchange_of(problem, support, fit.refit, problem.gradient(fit.weights))
    swaps = propose_swaps(exchange, 12 * (problem.factor.diagonal() + problem.ridge), 5)
    assert swaps.entering.tolist() == [4] and support[swaps.leaving].tolist() == [8]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("cbs", "chita")])
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("2:4", 0.7), ("1:4", 0.75)])
def test_every_method_that_compares_weights_holds_to_it(name: str, pattern: str, sparsity: float) -> None:
    model = Small()
    report = prune(model, images(), sparsity, name, samples=60, pattern=pattern, progress=False)
    most, size = map(int, pattern.split(":"))
    weights = [model.first.weight, model.second.weight, model.head.weight]
    assert all(fits(weight, most, size) for weight in weights)
    assert sum(int((w == 0).sum()) for w in weights) == report.total - math.floor(report.total * (1 - sparsity))
    assert report.settings["pattern"] == pattern


@pytest.mark.parametrize(
    "method",
    [
        LR(floor=0.75, swaps=0),
        LR(metric="identity", iterations=5),
        SparseGPT(scope="global"),
        SparseGPT(block=1),
        Wanda(scope="layer"),
        Wanda(scope="global"),
    ],
    ids=str,
)
def test_so_does_every_way_to_choose(method: Any) -> None:
    model = Small()
    prune(model, images(), 0.6, method, samples=60, stages=2, pattern="2:4", progress=False)
    assert all(fits(layer.weight, 2, 4) for layer in (model.first, model.second, model.head))


def test_stages_on_the_way_are_held_to_what_they_leave_room_for() -> None:
    """After the first of two stages two thirds of what will go is gone: three of four may stay."""
    model, seen = Small(), []

    class Watched(LR):
        def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
            solution = super().solve(problem, generator)
            assert problem.pattern is not None
            kept = solution.kept.nonzero().squeeze(1)
            counts = problem.pattern.limit(len(kept)) - problem.pattern.room(kept)
            seen.append((len(kept), int(counts.min()), int(counts.max())))
            return solution

    report = prune(model, images(), 0.5, Watched(), samples=60, stages=2, pattern="2:4", progress=False)
    assert [limits[1:] for limits in seen] == [(2, 3), (2, 2)] and seen[1][0] == report.kept == report.total // 2
    assert not any("weights kept are zero" in note for note in report.notes)


def test_groups_are_filled_by_what_matters_most() -> None:
    """Magnitude keeps the two largest of each four, in the order of the inputs and at each place of the kernel."""
    model, dense = Small(), Small()
    prune(model, None, 0.5, "magnitude", pattern="2:4", progress=False)
    for layer, before in ((model.first, dense.first), (model.head, dense.head)):
        old = before.weight.detach().reshape(len(before.weight), -1, 4, before.weight[0, 0].numel())
        new = layer.weight.detach().reshape(old.shape)
        least = old.abs().sort(dim=2).values[:, :, 2:3]
        torch.testing.assert_close(new, torch.where(old.abs() >= least, old, 0.0))


@pytest.mark.long
def test_the_update_pays_within_a_pattern() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(1500, 16)
    y = (x @ torch.randn(16, 4)).argmax(1)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[:1000]), y[:1000]).backward()
        optimiser.step()
    loss = {}
    for method in ("magnitude", "wanda", "sparsegpt", "lr"):
        pruned = copy.deepcopy(model)
        data = TensorDataset(x[:1000], y[:1000])
        prune(pruned, data, 0.75, method, samples=300, pattern="1:4", progress=False)
        loss[method] = float(nn.functional.cross_entropy(pruned(x[1000:]), y[1000:]).detach())
    assert loss["lr"] < 0.8 * min(loss["magnitude"], loss["wanda"], loss["sparsegpt"])


def test_blocks_of_sparsegpt_hold_whole_groups() -> None:
    """With inputs that have nothing to do with each other the two largest of each four stay, unchanged."""
    W = normal(1, 3, 16)  # 8 inputs at two places of a kernel
    H = torch.eye(16, dtype=torch.float64)[None]
    pattern = GroupPattern(2, 4, ())
    for block in (1, 5, 128):
        pruned, kept = prune_columns(W, H, 24, block, None, (pattern, 2))
        grouped = W.view(3, 2, 4, 2)
        least = grouped.abs().sort(dim=2).values[:, :, 2:3]
        expected = (grouped.abs() >= least).view(1, 3, 16)
        assert torch.equal(kept, expected)
        torch.testing.assert_close(pruned, W.masked_fill(~expected, 0))


@pytest.mark.parametrize("name", ["cbs", "chita"])
def test_methods_that_do_not_hold_to_it_are_refused(name: str) -> None:
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"'{name}' does not support pattern='2:4'"):
        prune(model, images(), 0.5, name, samples=60, pattern="2:4", progress=False)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_a_method_of_the_users_keeps_is_looked_at() -> None:
    class Careless(LR):
        def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
            return super().solve(replace(problem, pattern=None), generator)

    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'lr' ignores pattern 2:4"):
        prune(model, images(), 0.5, Careless(), samples=60, pattern="2:4", progress=False)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"pattern": "4:2"}, "pattern must be 'N:M' with 0 < N < M, such as '2:4', got '4:2'"),
        ({"pattern": "2:4:8"}, "pattern must be 'N:M'"),
        ({"pattern": "0:4"}, "pattern must be 'N:M'"),
        ({"pattern": (2, 4)}, "pattern must be 'N:M'"),
        ({"pattern": "2:8"}, r"is a multiple of 8: add the others to ignore=, \['first.weight'\]"),
        ({"sparsity": 0.4}, r"pattern 2:4 keeps 192 of 384 weights at the most, .* 0.5 or more is needed"),
        ({"min_keep": 0.6, "sparsity": 0.5}, "min_keep=0.6 keeps at least"),
        ({"min_keep": {"head": 0.6}}, "min_keep asks for 20 weights of 'head.weight', and pattern 2:4 keeps 16"),
    ],
    ids=str,
)
def test_patterns_that_cannot_be_held_to_are_refused_before_any_work(changed: dict[str, Any], words: str) -> None:
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        prune(model, images(), **({"sparsity": 0.5, "pattern": "2:4", "progress": False} | changed))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="multiple of 2"):
        parse_pattern("1:2", {"bias": torch.Size((4,))}, 1)


def test_it_outlives_fine_tuning_and_files(tmp_path: Path) -> None:
    model = Small()
    tuning = FineTune(epochs=1, lr=0.01)
    report = prune(model, images(), 0.5, "lr", samples=60, pattern="2:4", finetune=tuning, progress=False)
    report.save(tmp_path / "out")
    again = Small()
    load_pruned(again, tmp_path / "out")
    for layer in (again.first, again.second, again.head):
        assert fits(layer.weight, 2, 4) and int((layer.weight != 0).sum()) == layer.weight.numel() // 2


@pytest.mark.long
def test_the_command_line_and_experiments_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        status = run(lambda: app(args=list(arguments), standalone_mode=False))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    (tmp_path / "ours.py").write_text(
        "from tests.regression.test_pattern import Small, images\n\n\ndef data():\n    return images(), images(60)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["--model", "ours:Small", "--data", "ours:data", "--sparsity", "0.5", "--samples", "60"]
    status, text, error = call("prune", *arguments, "--method", "lr", "--pattern", "2:4", "--out", "out", "--json")
    assert status == 0, error
    assert set(json.loads(text)["layers"].values()) == {16, 32, 144}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["pattern"] == "2:4"
    assert call("plan", *arguments, "--pattern", "2:4")[0] == 0
    for command in ("prune", "plan"):
        status, text, error = call(command, *arguments, "--pattern", "2:8")
        assert status == 2 and "multiple of 8" in error and text == ""
    grid = 'model = "ours:Small"\ndata = "ours:data"\nsparsities = [0.5]\nsamples = 60\npattern = "{}"\n'
    grid += '[[methods]]\nname = "magnitude"\n'
    (tmp_path / "grid.toml").write_text(grid.format("2:4"))
    assert call("experiment", "grid.toml", "--out", "runs")[0] == 0
    (line,) = (tmp_path / "runs" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["settings"]["pattern"] == "2:4" and set(json.loads(line)["layers"].values()) == {0.5}
    assert call("report", "runs")[0] == 0
    assert any("pattern 2:4" in table.read_text() for table in (tmp_path / "runs").rglob("*.md"))
    (tmp_path / "bad.toml").write_text(grid.format("2:8"))
    assert "multiple of 8" in call("experiment", "bad.toml", "--out", "bad")[2]
