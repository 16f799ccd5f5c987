"""One contract for every method, and the settings that are refused."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

import swap_prune
from swap_prune.fisher.factor import DenseFactor
from swap_prune.methods import CBS, CHITA, EWR, LR, OBD, Magnitude, SparseGPT, Wanda, WoodFisher, resolve_method
from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.selection import Selection
from tests.cases import AWKWARD, generator, normal, pruning_problem

VARIANTS = {
    **{name: config() for name, config in swap_prune.METHODS.items()},
    "lr identity metric": LR(metric="identity", ridge=1e-2),
    "lr without ridge": LR(ridge=0.0),
    "ewr paper": EWR(epsilon=0.5, anchor=1.0, gradient="paper"),
    "ewr exact": EWR(epsilon=0.5, anchor=1.0, debias=False, couplings=3),
    "ewr debiased": EWR(epsilon=0.1, anchor=0.3, debias=True, couplings=2),
    "ewr absolute epsilon": EWR(epsilon=1.0, anchor=0.5, epsilon_unit="absolute", metric="identity"),
    "ewr paper auto": EWR(gradient="paper"),
    "ewr small epsilon": EWR(epsilon=1e-8, anchor=1.0, gradient="paper", metric="identity"),
    "algorithm 1": EWR(solver="algorithm1", gradient="paper", epsilon=1.0, couplings=3),
    "algorithm 1 exact": EWR(solver="algorithm1", epsilon=1.0, metric="identity", ridge=1e-3),
    "magnitude by layer": Magnitude(scope="layer"),
    "obd undamped": OBD(damping=0.0),
    "woodfisher joint": WoodFisher(update="joint"),
    "woodfisher in blocks": WoodFisher(block=4),
    "woodfisher joint in blocks": WoodFisher(update="joint", block=3),
    "cbs few candidates": CBS(damping=1e-5, candidates=2, rounds=3),
    "chita one iteration": CHITA(iterations=1),
    "wanda by layer": Wanda(scope="layer"),
    "wanda global": Wanda(scope="global"),
    "sparsegpt in blocks": SparseGPT(block=2),
    "sparsegpt global": SparseGPT(scope="global"),
}
METHOD = pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS.keys())


def solve(method, problem, seed=0):
    return method.solve(problem, generator(seed))


def assert_contract(solution, problem):
    p = problem.reference.numel()
    assert isinstance(solution, PruningSolution)
    assert solution.weights.shape == solution.kept.shape == (p,)
    assert solution.weights.dtype == problem.reference.dtype and solution.kept.dtype == torch.bool
    assert int(solution.kept.sum()) == problem.keep
    assert bool((solution.weights[~solution.kept] == 0).all())
    assert bool(torch.isfinite(solution.weights).all())
    assert json.loads(json.dumps(solution.evidence, allow_nan=False)) == solution.evidence, "evidence is plain"


@METHOD
@pytest.mark.parametrize(("n", "p"), [(40, 15), (6, 60), (10, 10), (1, 7)])
def test_exactly_k_weights_at_any_shape(method, n, p):
    for keep in sorted({0, 1, p // 3, p // 2, p - 1, p}):
        problem = pruning_problem(n, p, keep, seed=keep)
        assert_contract(solve(method, problem), problem)


@METHOD
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_gradients(method, kind):
    for n, p, keep in [(24, 12, 5), (9, 30, 14)]:
        problem = pruning_problem(n, p, keep, seed=3, kind=kind)
        assert_contract(solve(method, problem), problem)


@METHOD
def test_weights_of_any_size(method):
    plain = pruning_problem(12, 20, 8, seed=4)
    for scale in (1e-6, 1e6):
        problem = replace(plain, reference=plain.reference * scale)
        assert_contract(solve(method, problem), problem)
    reference = plain.reference.clone()
    reference[3:] = 0  # fewer weights than are to be kept
    problem = replace(plain, reference=reference)
    assert_contract(solve(method, problem), problem)


@METHOD
def test_double_precision(method):
    problem = pruning_problem(12, 20, 8, seed=5, dtype=torch.float64)
    assert_contract(solve(method, problem), problem)


@METHOD
def test_same_seed_same_bits(method):
    problem = pruning_problem(30, 50, 20, seed=6)
    state = torch.get_rng_state()
    first, second = solve(method, problem, seed=7), solve(method, problem, seed=7)
    assert torch.equal(first.weights, second.weights) and torch.equal(first.kept, second.kept)
    assert first.evidence == second.evidence
    assert torch.equal(torch.get_rng_state(), state)


@METHOD
def test_keeping_everything_changes_nothing(method):
    problem = pruning_problem(9, 25, 25, seed=8)
    solution = solve(method, problem)
    assert torch.equal(solution.weights, problem.reference) and bool(solution.kept.all())
    assert solution.weights.data_ptr() != problem.reference.data_ptr()


@METHOD
def test_inputs_are_left_alone(method):
    problem = pruning_problem(20, 30, 12, seed=9)
    reference, matrix, settings = problem.reference.clone(), problem.factor.matrix.clone(), asdict(method)
    solve(method, problem)
    assert torch.equal(problem.reference, reference) and torch.equal(problem.factor.matrix, matrix)
    assert asdict(method) == settings


@pytest.mark.parametrize("name", [name for name in VARIANTS if VARIANTS[name].needs_gradients])
def test_a_method_that_needs_gradients_says_so(name):
    with pytest.raises(ValueError, match="gradients"):
        solve(VARIANTS[name], PruningProblem(torch.ones(4), 2))


@pytest.mark.parametrize("name", [name for name in VARIANTS if VARIANTS[name].needs_inputs])
def test_a_method_that_needs_inputs_says_so(name):
    with pytest.raises(ValueError, match="inputs of the layers"):
        solve(VARIANTS[name], PruningProblem(torch.ones(4), 2))


def test_magnitude_by_hand():
    solution = solve(Magnitude(), PruningProblem(torch.tensor([0.5, -3.0, 1.0, 0.0, 2.0]), 2))
    assert solution.weights.tolist() == [0.0, -3.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("metric", ["diagonal", "identity"])
@pytest.mark.parametrize(("n", "p", "keep"), [(40, 15, 6), (8, 40, 15)])
def test_ewr_without_freedom_is_lr(n, p, keep, metric, gradient):
    problem = pruning_problem(n, p, keep, seed=10)
    expected = solve(LR(metric=metric), problem)
    solution = solve(EWR(anchor=0, metric=metric, gradient=gradient), problem)
    assert torch.equal(solution.kept, expected.kept)
    torch.testing.assert_close(solution.weights, expected.weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ridge", [1e-6, 0.01])
def test_lr_beats_magnitude_on_its_own_objective(ridge):
    for seed in range(3):
        problem = pruning_problem(30, 40, 15, seed=seed, dtype=torch.float64)
        G, w_bar = problem.factor.matrix, problem.reference

        def objective(w, G=G, w_bar=w_bar):
            return float((G @ (w - w_bar)).square().sum() / 2 + 30 * ridge / 2 * (w - w_bar).square().sum())

        regressed = solve(LR(ridge=ridge, metric="identity"), problem).weights
        assert objective(regressed) < 0.5 * objective(solve(Magnitude(), problem).weights)


@pytest.mark.parametrize("method", [LR(), EWR(), LR(metric="identity"), EWR(metric="identity")])
@pytest.mark.parametrize("factor", [2.0**-10, 2.0**6])
def test_units_of_the_loss_do_not_matter(method, factor):
    """A loss in other units scales G; the automatic ridge and eps follow it."""
    problem = pruning_problem(30, 40, 15, seed=11, dtype=torch.float64)
    scaled = PruningProblem(problem.reference, 15, DenseFactor(problem.factor.matrix * factor))
    plain, other = solve(method, problem), solve(method, scaled)
    assert torch.equal(plain.kept, other.kept)
    torch.testing.assert_close(other.weights, plain.weights, rtol=1e-6, atol=1e-8)


def test_useless_weights_go_first():
    """Columns of zero cannot matter to the loss: the diagonal metric drops them however large the weights are."""
    G = normal(50, 12, seed=12, dtype=torch.float32)
    G[:, 6:] = 0
    reference = torch.cat([torch.ones(6), torch.full((6,), 1.5)])
    solution = solve(LR(damping=1e-3), PruningProblem(reference, 6, DenseFactor(G)))
    assert solution.kept.tolist() == [True] * 6 + [False] * 6
    torch.testing.assert_close(solution.weights[:6], reference[:6])


NAN, INF = math.nan, math.inf
SHARED = [
    ("ridge", -1.0),
    ("ridge", NAN),
    ("ridge", INF),
    ("ridge", "large"),
    ("ridge", True),
    ("metric", "euclidean"),
    ("damping", 0.0),
    ("damping", -1.0),
    ("damping", NAN),
    ("iterations", 0),
    ("iterations", 1.5),
    ("iterations", True),
]
OWN = [
    ("epsilon", 0.0),
    ("epsilon", -1.0),
    ("epsilon", NAN),
    ("epsilon", INF),
    ("epsilon", "small"),
    ("anchor", -0.1),
    ("anchor", 1.1),
    ("epsilon", 1e-310),
    ("anchor", NAN),
    ("anchor", "none"),
    ("epsilon_unit", "metres"),
    ("gradient", "approximate"),
    ("solver", "newton"),
    ("couplings", 0),
    ("couplings", 2.0),
]
BASELINES = [
    (Magnitude, "scope", "row"),
    *(
        (config, "damping", bad)
        for config in (OBD, WoodFisher, CBS, SparseGPT)
        for bad in (-1.0, NAN, INF, "auto", True)
    ),
    *((config, "damping", 0.0) for config in (WoodFisher, CBS, SparseGPT)),
    (WoodFisher, "update", "both"),
    *((WoodFisher, "block", bad) for bad in (0, 1.5, True, "whole")),
    *((CBS, name, bad) for name in ("candidates", "rounds") for bad in (0, 2.5, True)),
    *((CHITA, "ridge", bad) for bad in (0.0, NAN, "auto")),
    *((CHITA, "iterations", bad) for bad in (0, 2.5, True)),
    (Wanda, "scope", "column"),
    *((SparseGPT, "block", bad) for bad in (0, 1.5, True)),
    (SparseGPT, "scope", "row"),
]


@pytest.mark.parametrize(
    ("config", "setting", "value"), [(LR, *bad) for bad in SHARED] + [(EWR, *bad) for bad in SHARED + OWN] + BASELINES
)
def test_bad_settings_are_refused_by_name(config, setting, value):
    with pytest.raises(ValueError, match=setting):
        config(**{setting: value})


def test_methods_by_name():
    assert resolve_method("lr") == LR()
    assert resolve_method("ewr", {"epsilon": 0.3}) == EWR(epsilon=0.3)
    config = EWR(anchor=0.5)
    assert resolve_method(config) is config
    for name, config in swap_prune.METHODS.items():
        assert config.name == name and resolve_method(name) == config()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("sgd", None, "method must be one of .*'sgd'"),
        ("lr", {"epsilon": 1.0}, "epsilon"),
        ("lr", {"ridge": -1.0}, "ridge"),
        (LR(), {"ridge": 1.0}, "settings"),
        (LR, None, "config object"),
        (7, None, "7"),
    ],
)
def test_methods_that_are_none(method, settings, message):
    with pytest.raises(ValueError, match=message):
        resolve_method(method, settings)


def test_a_method_without_a_member_is_refused():
    class Incomplete:
        name = "incomplete"
        needs_gradients = needs_held_out = False

        def solve(self, problem, generator): ...

    with pytest.raises(ValueError, match="Incomplete has no needs_inputs"):
        resolve_method(Incomplete())


@pytest.mark.parametrize(
    ("reference", "keep", "others", "message"),
    [
        (torch.ones(2, 2), 1, {}, "reference"),
        (torch.ones(4), -1, {}, "keep"),
        (torch.ones(4), 5, {}, "keep"),
        (torch.ones(4), 2, {"factor": DenseFactor(torch.ones(3, 5))}, "5 columns for 4 weights"),
        (torch.ones(4), 2, {"selection": Selection({"a": torch.Size([5])})}, "selection has 5 .* 4 weights"),
    ],
)
def test_problems_that_are_none(reference, keep, others, message):
    with pytest.raises(ValueError, match=message):
        PruningProblem(reference, keep, **others)
