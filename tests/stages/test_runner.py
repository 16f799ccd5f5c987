"""What one stage hands to the method and to the next stage."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import swap_prune
from swap_prune import LR, FineTune, SquaredError, load_pruned, prune
from swap_prune.fisher.defence.gradients import GradientDefence, layers_of
from swap_prune.fisher.defence.outliers import clip_rows_
from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.noise import NoiseModel
from swap_prune.losses import cross_entropy
from swap_prune.methods import Magnitude
from swap_prune.selection import select_parameters
from swap_prune.stages import runner as runner_module
from swap_prune.stages import search as staging
from swap_prune.training.teaching import Teacher
from tests.cases import ONE, generator
from tests.fisher.defence.test_gradients import perceptron
from tests.stages.test_search import QUIET, net, scripted
from tests.stages.test_trials import batches, network, trials_on, untaught
from tests.test_pipeline import small_data, small_network
from tests.tiny import data


@dataclass(frozen=True)
class Asking:
    """Remembers its problems, and prunes by magnitude."""

    name: ClassVar[str] = "asking"
    needs_gradients: ClassVar[bool] = True
    needs_held_out: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = False
    fisher: ClassVar[str] = "auto"
    problems: ClassVar[list] = []

    def solve(self, problem, generator):
        self.problems.append(problem)
        return Magnitude().solve(problem, generator)


def asking():
    """Return a method that remembers problems of its own; fields of it would be copied to the report."""
    return type("Own", (Asking,), {"problems": []})()


LOUD = "gradient:std=2,fraction=0.25"
POISON = "poison:fraction=0.1,strength=100"


@pytest.mark.parametrize("noise", [None, LOUD])
@pytest.mark.parametrize("defence", ["auto", None])
def test_a_method_asks_through_the_defence(noise, defence):
    model, _, batch = perceptron()
    method = asking()
    prune(model, TensorDataset(*batch), 0.7, method, samples=25, noise=noise, defence=defence, progress=False)
    (problem,) = method.problems
    trials = problem.slope.__self__
    assert (trials.clip is clip_rows_) == (defence == "auto")
    assert (trials.defence is not None) == (defence == "auto" and noise is not None)
    assert all(one.teacher is not None for one in [*trials.fitting, *trials.held_out]) and trials.held_out
    assert problem.blank is not None and not trials.lean
    own = asking()
    prune(
        model, TensorDataset(*batch), 0.7, own, samples=25, loss_fn=lambda net, b: cross_entropy(net, b), progress=False
    )
    assert own.problems[0].blank is None and own.problems[0].held_out is not None


def test_what_one_stage_chooses_by_no_stage_fits():
    method = asking()
    prune(small_network(), small_data(60), 0.5, method, samples=25, stages=3, progress=False)
    trials = [problem.slope.__self__ for problem in method.problems]
    fitted = {image.numpy().tobytes() for one in trials for taught in one.fitting for image in taught.batch[0]}
    apart = {image.numpy().tobytes() for one in trials for taught in one.held_out for image in taught.batch[0]}
    assert len(trials) == 3 and fitted and apart and not fitted & apart


def sure_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def own_labels(size=600):
    inputs = torch.randn(size, 8, generator=generator(2))
    with torch.no_grad():
        return TensorDataset(inputs, sure_network()(inputs).argmax(1))


@pytest.mark.parametrize(
    ("noise", "seen"),
    [
        ("labels:fraction=0.5", "label_noise"),
        pytest.param("adversarial:budget=0.5", "inputs_shifted_back", marks=pytest.mark.long),
        (None, None),
    ],
)
def test_the_first_samples_held_out_judge_all_stages_where_something_was_seen(noise, seen):
    method = asking()
    report = prune(sure_network(), own_labels(1800), 0.5, method, samples=300, stages=3, noise=noise, progress=False)
    assert all(seen is None or seen in stage.evidence for stage in report.stages)
    trials = [problem.slope.__self__ for problem in method.problems]
    judges = [[tensor for one in trial.held_out for tensor in one.batch] for trial in trials]
    assert len(judges) == 3 and all(map(torch.equal, judges[1], judges[2])) == (seen is not None)
    assert all(map(torch.equal, judges[0], judges[1])) == (seen is not None)
    fitted = [trial.fitting[0].batch[0] for trial in trials]
    assert not torch.equal(fitted[0], fitted[1]) and not torch.equal(fitted[1], fitted[2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w, k: (w, k.logical_or(torch.arange(len(k)) < 30)), r"kept \d+ weights; problem.keep is"),
        (lambda w, k: (w, torch.zeros_like(k)), "kept 0 weights; problem.keep is"),
        (lambda w, k: (w[:-1], k), "a boolean and a number of each of 192 weights are needed"),
        (
            lambda w, k: (w, k.float()),
            r"torch.float32, and weights \(192,\): a boolean and a number",
        ),
        (lambda w, k: (w / 0, k), "weights that are not finite numbers"),
    ],
)
def test_what_a_method_may_not_return_is_refused_and_the_network_stays(change, words):
    class Wrong(Asking):
        def solve(self, problem, generator):
            solution = super().solve(problem, generator)
            weights, kept = change(solution.weights, solution.kept)
            return replace(solution, weights=weights, kept=kept)

    model = sure_network()
    with pytest.raises(ValueError, match=f"method 'asking' .*{words}"):
        prune(model, own_labels(), 0.5, Wrong(), samples=50, progress=False)
    assert all(map(torch.equal, model.state_dict().values(), sure_network().state_dict().values()))


@pytest.mark.parametrize(
    ("finetune", "starts"),
    [
        (None, [0, 30, 60]),
        (FineTune(epochs=1), [0, 30, 60]),  # a pass over all ends where it began
        (FineTune(epochs=2, steps_per_epoch=3, batch_size=10), [0, 90, 80]),
    ],
)
@pytest.mark.parametrize("size", [100, 40])
def test_what_is_left_in_a_batch_comes_next(finetune, starts, size):
    """Of data that are read in order, whether stages or fine-tuning have left it."""
    numbered = small_data(100).tensors[0].clone()
    numbered[:, 0, 0, 0] = torch.arange(100)
    data = [(part, torch.zeros(len(part), dtype=torch.long)) for part in numbered.split(size)]
    method = type("Own", (Asking,), {"problems": [], "needs_held_out": False})()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    prune(model, data, 0.5, method, samples=30, stages=3, finetune=finetune, progress=False)
    trials = [problem.slope.__self__ for problem in method.problems]
    seen = [[int(x[0, 0, 0]) for one in trial.fitting for x in one.batch[0]] for trial in trials]
    assert seen == [[(start + number) % 100 for number in range(30)] for start in starts]


def test_a_sample_that_stays_alone_does_not_change_how_the_others_are_run():
    """One of another size cannot join them; BatchNorm stays on the statistics of batches, as for the rows of G."""
    torch.manual_seed(0)
    pooled = nn.AdaptiveAvgPool2d(2)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), pooled, nn.Flatten(), nn.Linear(16, 3))
    odd = torch.randn(1, 1, 9, 9)
    batches = [*([torch.randn(8, 1, 8, 8)] * 6), odd, *([torch.randn(8, 1, 8, 8)] * 6), odd]
    data = [(part, torch.zeros(len(part), dtype=torch.long)) for part in batches]
    method = asking()
    prune(model, data, 0.5, method, samples=49, progress=False)
    (trials,) = (problem.slope.__self__ for problem in method.problems)
    sizes = {len(one.batch[0]) for one in (*trials.fitting, *trials.held_out)}
    assert 1 not in sizes and sizes
    with trials._mode():
        assert model[1].training
    alone = asking()
    singles = [(torch.randn(1, 1, side, side), torch.zeros(1, dtype=torch.long)) for side in range(6, 15)]
    prune(model, singles, 0.5, alone, samples=6, progress=False)
    with alone.problems[0].slope.__self__._mode():
        assert not model[1].training


def test_no_more_is_held_out_than_is_fitted():
    method = asking()
    prune(small_network(), small_data(200), 0.5, method, samples=20, progress=False)
    trials = method.problems[0].slope.__self__
    assert sum(len(one.batch[0]) for one in trials.held_out) == 20


def test_the_last_recalibration_reads_all_the_data():
    model = small_network()
    prune(model, small_data(256), 0.8, "magnitude", samples=20, progress=False)
    with torch.no_grad():
        expected = model[0](small_data(256).tensors[0]).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_stand_out_are_clipped_in_a_run():

    @dataclass(frozen=True)
    class Scaled(NoiseModel):
        def apply(self, factor, generator, layers=None):
            rows = factor.matrix.clone()
            rows[:3] *= 1e4
            return DenseFactor(rows)

        apply_ = apply

    model, _, batch = perceptron()
    method = asking()
    report = prune(model, TensorDataset(*batch), 0.7, method, samples=25, noise=Scaled(), progress=False)
    norms = method.problems[0].factor.matrix.norm(dim=1)
    assert report.stages[0].evidence["rows_clipped"] == pytest.approx(3 / len(norms))
    assert float(norms.max()) < 20 * float(norms.median())


def test_rows_of_samples_that_the_network_is_unsure_of_are_not_clipped():
    """Most have a tiny curvature, and a few do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(4 * torch.eye(3, 4))
    x = torch.zeros(100, 4)
    x[:, 0] = 12.0
    x[:8, 1] = 12.0
    x += 0.01 * torch.randn(100, 4, generator=generator(1))
    report = prune(model, TensorDataset(x, torch.zeros(100).long()), 0.5, asking(), samples=80, progress=False)
    assert "rows_clipped" not in report.stages[0].evidence


def test_gradients_that_slopes_are_averaged_over_are_clipped_for_their_size():
    model, fitting = network(False), batches(4, 16)
    selection = select_parameters(model, ("Linear",), ())
    w = selection.read(model)
    kept = torch.ones_like(w, dtype=torch.bool)
    plain = trials_on(model, selection, untaught(fitting), False).slope(w, kept)
    seen, gaps = [], []

    def clip(factor, sizes, **options):
        seen.append(sizes)
        gaps.append(options.get("gaps", True))
        factor.matrix.mul_(2)

    slope = trials_on(model, selection, untaught(fitting), False, clip=clip).slope(w, kept)
    torch.testing.assert_close(slope, 2 * plain)
    torch.testing.assert_close(seen.pop(), torch.tensor([0.5, 0.25], dtype=w.dtype))
    assert gaps == [False], "nothing tells the sizes"

    taught = Teacher(model, selection, cross_entropy).teach(fitting)
    slope = trials_on(model, selection, taught, False, clip=clip).slope(w, kept)
    torch.testing.assert_close(slope, 2 * 0.25 * plain)
    with torch.no_grad():
        outputs = torch.cat([model(x) for x, _ in fitting]).softmax(1)
    outputs[range(20), torch.cat([y for _, y in fitting])] -= 1
    of_means = [0.25 * part.norm() / len(part) for part in (outputs[:4], outputs[4:])]
    torch.testing.assert_close(seen[0], torch.stack(of_means))
    assert gaps == [False, True]

    plainly = GradientDefence(layers_of(selection, ()))
    slope = trials_on(model, selection, untaught(fitting), False, clip=clip, defence=plainly).slope(w, kept)
    torch.testing.assert_close(slope, 2 * plain)
    torch.testing.assert_close(seen[1], outputs.norm(dim=1))


def test_label_gradients_of_unequal_sizes_that_were_scaled_are_clipped_for_every_method():
    """A network that is sure has gradients that differ by orders of magnitude, and poison that hides among them."""
    model = sure_network()
    clean, seen, told = (
        prune(copy.deepcopy(model), own_labels(), 0.8, method="obd", samples=200, progress=False, **options)
        for options in ({}, {"noise": POISON}, {"noise": POISON, "defence": None})
    )
    assert "rows_clipped" not in clean.stages[0].evidence
    assert seen.stages[0].evidence["rows_clipped"] == pytest.approx(0.1)
    assert "rows_clipped" not in told.stages[0].evidence


@pytest.mark.long
def test_poison_is_seen_among_few_rows_of_mini_batches_that_differ_by_orders_of_magnitude():
    model = sure_network()
    model.append(nn.BatchNorm1d(4))
    model[3].weight.data.fill_(40)
    labels = own_labels()
    model.train()(labels.tensors[0])
    labels = TensorDataset(labels.tensors[0], model.eval()(labels.tensors[0]).argmax(1))
    for noise, share in ((None, 0.0), (POISON, 0.1)):
        report = prune(copy.deepcopy(model), labels, 0.6, ONE, samples=320, stages=3, noise=noise, progress=False)
        seen = [stage.evidence.get("rows_clipped", 0.0) for stage in report.stages]
        assert seen == pytest.approx([share] * 3)


@pytest.mark.parametrize("kind", ["omniscient", "gaussian"])
def test_rows_that_an_attacker_wrote_count_for_nothing_whatever_their_size(kind):
    model, _, batch = perceptron()
    noise = f"poison:kind={kind},fraction=0.2,strength=2"
    reports, slopes = [], []
    for one in (None, noise):
        method = asking()
        reports.append(
            prune(copy.deepcopy(model), TensorDataset(*batch), 0.7, method, samples=40, noise=one, progress=False)
        )
        problem = method.problems[0]
        slopes.append(problem.slope(problem.reference, torch.ones_like(problem.reference, dtype=torch.bool)))
    found = reports[1].stages[0].evidence
    assert found["rows_left_out"] == pytest.approx(0.2, abs=0.03) and "gradients_cleaned" not in found
    assert not {"rows_left_out", "noise_seen"} & set(reports[0].stages[0].evidence)
    zero = (problem.factor.matrix == 0).all(1)
    assert float(zero.double().mean()) == pytest.approx(found["rows_left_out"])
    assert float((slopes[1] - slopes[0]).norm()) < 0.6 * float(slopes[0].norm()), "of four samples in five"


@pytest.mark.long
def test_poison_is_seen_beside_noise_on_gradients():
    method, model = asking(), sure_network()
    noise = ["gradient:std=4,fraction=0.25", POISON]
    prune(model, own_labels(), 0.5, method, samples=200, noise=noise, progress=False)
    problem = method.problems[0]
    slopes = torch.stack([problem.slope(problem.reference, torch.ones_like(problem.reference, dtype=bool))])
    honest = asking()
    prune(sure_network(), own_labels(), 0.5, honest, samples=200, noise=noise[:1], progress=False)
    other = honest.problems[0]
    expected = other.slope(other.reference, torch.ones_like(other.reference, dtype=bool))
    assert float(slopes[0].norm()) < 2 * float(expected.norm())


def test_a_slope_is_averaged_over_enough_parts_to_tell_poison_by():
    method = asking()
    prune(sure_network(), own_labels(), 0.5, method, samples=100, noise=POISON, progress=False)
    assert len(method.problems[0].slope.__self__.fitting) >= 16
    prune(sure_network(), own_labels(), 0.5, method, samples=100, progress=False)
    assert len(method.problems[1].slope.__self__.fitting) < 16


def test_one_weight_less_than_min_keep_asks_for_is_refused():
    class Careless(Asking):
        def solve(self, problem, generator):
            place, least = problem.floors[-1]
            kept = torch.zeros_like(problem.reference, dtype=torch.bool)
            kept[place][: least - self.short] = True
            rest = (~kept).nonzero().squeeze(1)
            kept[rest[rest < place.start][: problem.keep - int(kept.sum())]] = True
            return swap_prune.problem.PruningSolution(problem.reference * kept, kept)

    for short in (0, 1):
        Careless.short = short
        arguments = {"min_keep": {"2": 0.4}, "samples": 50, "progress": False}
        if short:
            with pytest.raises(ValueError, match="and min_keep asks for"):
                prune(sure_network(), own_labels(), 0.5, Careless(), **arguments)
        else:
            prune(sure_network(), own_labels(), 0.5, Careless(), **arguments)


def test_the_seed_decides_what_the_solver_and_fine_tuning_draw_in_each_stage(monkeypatch):
    drawn = []

    class Drawing(Asking):
        needs_held_out: ClassVar[bool] = False

        def solve(self, problem, generator):
            drawn.append(int(torch.randint(2**40, (), generator=generator)))
            return Magnitude().solve(problem, generator)

    own = runner_module.train

    def train(*given, **options):
        drawn.append(int(torch.randint(2**40, (), generator=given[5].clone_state())))
        return own(*given, **options)

    monkeypatch.setattr(runner_module, "train", train)
    for seed in (0, 0, 1):
        settings = FineTune(epochs=1, lr=0.01)
        prune(
            sure_network(),
            own_labels(),
            0.5,
            Drawing(),
            samples=50,
            stages=2,
            finetune=settings,
            seed=seed,
            progress=False,
        )
    first, again, other = drawn[:4], drawn[4:8], drawn[8:]
    assert first == again and len({*first, *other}) == 8


def test_layer_wise_methods_see_the_weights_that_analog_memory_has():
    def pruned(noise):
        model = sure_network()
        prune(model, own_labels(), 0.5, "wanda", samples=100, noise=noise, progress=False)
        return torch.cat([weight.flatten() != 0 for name, weight in model.named_parameters() if "weight" in name])

    assert not torch.equal(pruned("analog:stuck_off=0.3"), pruned(None))


def test_gradients_of_batches_are_added_up_where_memory_is_short(monkeypatch):
    model, fitting = network(False), batches(4, 16, 3)
    selection = select_parameters(model, ("Linear",), ())
    w = selection.read(model)
    kept = torch.ones_like(w, dtype=torch.bool)
    plain = trials_on(model, selection, untaught(fitting), False).slope(w, kept)

    def noisy(factor):
        raise AssertionError("the rows are not held together")

    lean = trials_on(model, selection, untaught(fitting), False, lean=True, noisy=noisy).slope(w, kept)
    torch.testing.assert_close(lean, plain)


@pytest.mark.long
def test_each_fine_tuned_trial_starts_from_the_dense_network_and_the_best_is_given_back(monkeypatch):
    """Biases are trained too."""
    model = net()
    dense = {name: t.clone() for name, t in model.state_dict().items()}
    seen = scripted(monkeypatch, [2.0, 1.0, 1.5])
    started = []
    run_all = staging.StageRunner.run_all

    def watched(self, *arguments):
        started.append(all(torch.equal(t, dense[name]) for name, t in self.model.state_dict().items()))
        return run_all(self, *arguments)

    monkeypatch.setattr(staging.StageRunner, "run_all", watched)
    swap_prune.prune(model, data()[0], **QUIET | {"finetune": FineTune(epochs=1, batch_size=20)})
    assert started == [True, True, True]
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in model.state_dict().items())


@pytest.mark.long
def test_the_number_of_stages_is_judged_as_everything_else(monkeypatch):
    """On noisy samples, with the dense network's opinion, in eval mode."""
    original = {x.numpy().tobytes() for x, _ in data()[0]}
    judged = []
    taught_losses = staging.taught_losses

    def watched(loss_fn, model, one):
        judged.append((one, any(m.training for m in model.modules())))
        return taught_losses(loss_fn, model, one)

    monkeypatch.setattr(staging, "taught_losses", watched)
    model = net().train()
    swap_prune.prune(model, data()[0], **QUIET | {"noise": "input"})
    assert judged and not any(training for _, training in judged) and model.training
    assert all(one.teacher is not None for one, _ in judged)
    assert not {x.numpy().tobytes() for one, _ in judged for x in one.batch[0]} & original


@pytest.mark.parametrize("fisher", ["auto", "empirical"])
def test_clean_runs_with_batchnorm_are_the_same_with_and_without_a_defence(fisher):
    """Rows of mini-batches have no rank 1, and that is not noise."""
    models = [small_network() for _ in range(2)]
    for model, defence in zip(models, ("auto", None), strict=False):
        report = prune(model, small_data(200), 0.7, LR(fisher=fisher), samples=128, defence=defence, progress=False)
        assert not {"noise_seen", "rows_clipped", "label_noise"} & set(report.stages[0].evidence)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=False))


def test_each_stage_draws_for_each_purpose_from_a_stream_of_its_own(monkeypatch):
    asked, own = [], runner_module.forked_generator
    monkeypatch.setattr(runner_module, "forked_generator", lambda *given: asked.append(given) or own(*given))
    settings = {"samples": 40, "stages": 2, "finetune": FineTune(epochs=1), "seed": 7, "progress": False}
    prune(small_network(), small_data(), 0.7, "lr", **settings)
    assert {seed for seed, _ in asked} == {7}
    assert len(asked) == len(set(asked)) >= 8


def test_only_the_last_recalibration_reads_more_than_a_stage(monkeypatch):
    read, own = [], runner_module.recalibrate_batchnorm

    def counted(model, batches, loss_fn):
        batches = list(batches)
        read.append(sum(len(one[1]) for one in batches))
        return own(model, batches, loss_fn)

    monkeypatch.setattr(runner_module, "recalibrate_batchnorm", counted)
    prune(small_network(), small_data(200), 0.8, "magnitude", samples=20, stages=3, progress=False)
    assert read == [20, 20, 200]


def test_samples_that_judge_are_held_out_anew_once_the_data_have_come_round():
    """Read again, the first ones may have been fitted."""
    data = list(zip(*(part.split(100) for part in own_labels(600).tensors), strict=True))
    method = asking()
    prune(sure_network(), data, 0.5, method, samples=200, stages=3, noise="labels:fraction=0.5", progress=False)
    judges = [problem.slope.__self__.held_out[0].batch[0] for problem in method.problems]
    assert len(judges) == 3 and not torch.equal(judges[0], judges[1])


@dataclass(frozen=True)
class Careless(Asking):
    """Returns what it is told to."""

    made: str = "none"

    def solve(self, problem, generator):
        solution = Magnitude().solve(problem, generator)
        return {
            "none": None,
            "pair": (solution.weights, solution.kept),
            "half": replace(solution, weights=solution.weights.bfloat16()),
            "tensor": replace(solution, evidence={"a": torch.ones(2)}),
            "number": replace(solution, evidence={1: 2}),
            "infinite": replace(solution, evidence={"a": float("inf")}),
            "taken": replace(solution, evidence={"a": 1, "label_noise": "low", "stages_tried": 3}),
            "sound": replace(solution, evidence={"a": [1, {"b": 2.5}], "c": None}),
        }[self.made]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ("none", "must return a PruningSolution, got a NoneType"),
        ("pair", "must return a PruningSolution, got a tuple"),
        ("half", "returned weights of torch.bfloat16: they must be torch.float32"),
        ("tensor", r"the evidence of method 'asking' must be finite numbers, .* got {'a': tensor"),
        ("number", "the evidence of method 'asking' must be finite numbers, .* by name"),
        ("infinite", "the evidence of method 'asking' must be finite numbers"),
        ("taken", "'asking' must have names of its own, got label_noise, stages_tried: rename it"),
    ],
)
def test_what_a_method_may_not_return_is_said_in_a_line(made, words, tmp_path):
    model = small_network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        prune(model, small_data(40), 0.5, Careless(made), samples=20, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    prune(model, small_data(40), 0.5, Careless("sound"), samples=20, progress=False).save(tmp_path / "saved")


def test_settings_of_a_method_can_be_told():
    with pytest.raises(ValueError, match=r"setting 'made' of method 'asking' must be a number, text, .* got <function"):
        prune(small_network(), small_data(40), 0.5, Careless(generator), samples=20, progress=False)


class Faulty(NoiseModel):
    """Returns what it is told to."""

    def __init__(self, **made):
        self.made = made

    def corrupt(self, batches, generator, model, loss_fn):
        return self.made.get("batches", batches)

    def disturb(self, weights, generator, layers):
        return self.made["weights"](weights) if "weights" in self.made else weights

    def apply(self, factor, generator, layers=None):
        return self.made["factor"](factor) if "factor" in self.made else factor


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (Faulty(batches=None), "corrupt of Faulty must return a list of batches, got None"),
        (Faulty(batches=[]), r"corrupt of Faulty must return a list of batches, got \[\]"),
        (Faulty(batches=iter([1])), "corrupt of Faulty must return a list of batches, got <list_iterator"),
        (Faulty(weights=lambda weights: None), r"disturb of Faulty must return weights \(\d+,\), .* got a NoneType"),
        (Faulty(weights=lambda weights: weights[:5]), r"disturb of Faulty must return weights .* got \(5,\)"),
        (
            Faulty(weights=lambda weights: weights.double()),
            "disturb of Faulty must .* torch.float32, got .* torch.float64",
        ),
        (Faulty(factor=lambda factor: factor.matrix), "apply of Faulty must return a DenseFactor of .* got a Tensor"),
        (
            Faulty(factor=lambda factor: DenseFactor(factor.matrix[:5])),
            r"of rows \(20, \d+\), .* got \(5, ",
        ),
        (Faulty(factor=lambda factor: DenseFactor(factor.matrix.double())), "torch.float32, got .*, torch.float64"),
    ],
)
def test_what_a_noise_model_may_not_return_is_said_in_a_line(noise, words):
    with pytest.raises(ValueError, match=words):
        prune(small_network(), small_data(40), 0.5, "obd", samples=20, noise=noise, progress=False)


@pytest.mark.parametrize(
    ("method", "defence", "loss_fn", "note"),
    [
        ("magnitude", "gradients", None, "magnitude takes no gradients: defence gradients makes no difference"),
        ("obd", "labels", None, "obd holds no samples out: defence labels makes no difference"),
        ("obd", "inputs+labels", None, "obd holds no samples out: defence inputs and labels makes no difference"),
        ("lr", "labels", SquaredError(), "defence labels makes no difference: only the default loss knows of labels"),
        ("lr", "labels", None, None),
        ("obd", "gradients", None, None),
        ("obd", "auto", None, None),
        ("obd", None, None, None),
    ],
)
def test_defences_without_effect_are_noted_where_they_were_asked_for_by_name(method, defence, loss_fn, note):
    x, y = small_data().tensors
    data = TensorDataset(x, y if loss_fn is None else torch.nn.functional.one_hot(y, 3).float())
    report = prune(small_network(), data, 0.5, method, loss_fn=loss_fn, samples=30, defence=defence, progress=False)
    assert [one for one in report.notes if "makes no difference" in one] == ([] if note is None else [note])


def test_zeros_among_the_weights_kept_are_said():
    """They were there before, or the method made them: the mask alone does not tell."""

    class Halving(Asking):
        def solve(self, problem, generator):
            solution = Magnitude().solve(problem, generator)
            half = solution.kept.nonzero().squeeze(1)[::2]
            return replace(solution, weights=solution.weights.index_fill(0, half, 0.0))

    pruned = sure_network()
    prune(pruned, own_labels(), 0.75, "magnitude", progress=False)
    for model, method in ((pruned, Magnitude()), (sure_network(), Halving())):
        report = prune(model, own_labels(), 0.5, method, samples=50, progress=False)
        nonzero = sum(layer.kept for layer in report.layers.values())
        missing = report.total // 2 - nonzero
        assert report.kept == nonzero and abs(missing - report.total // 4) <= 1
        said = f"{missing} of the weights kept are zero, as before pruning or as the method left them"
        assert said in report.notes


class Remembers(nn.Module):
    """Gives a buffer that is None its values when it is called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 3))
        self.register_buffer("seen", None)

    def forward(self, inputs):
        self.seen = torch.zeros(3) if self.seen is None else self.seen
        return self.body(inputs) + self.seen


@pytest.mark.parametrize("method", ["lr", "wanda", "magnitude"])
def test_a_buffer_that_was_none_is_none_again(method, tmp_path):
    model = Remembers()
    prune(model, small_data(), 0.5, method, samples=40, progress=False).save(tmp_path / "out")
    assert model.seen is None and "seen" not in model.state_dict()
    load_pruned(Remembers(), tmp_path / "out")
    wrong = TensorDataset(small_data().tensors[0], small_data().tensors[1] + 7)
    with pytest.raises(ValueError, match="label"):
        prune(model, wrong, 0.7, "lr", samples=40, progress=False)
    assert model.seen is None
