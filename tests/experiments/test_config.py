"""Experiment files: what is refused, with the key's path, and what a run's id depends on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from swap_prune.experiments.config import Experiment, plan_runs, read_experiment
from swap_prune.experiments.datasets import DATASETS
from swap_prune.experiments.zoo import build_model
from swap_prune.selection import select_parameters
from tests import tiny

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.toml"))
GOOD = """
model = "mlpnet"
data = "mnist"
sparsities = [0.5, 0.9]
[[methods]]
name = "lr"
[[methods]]
name = "ewr"
settings = { anchor = 0.5 }
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_project_are_valid(path: Path) -> None:
    experiment = read_experiment(path)
    model, entry = build_model(experiment.model, **experiment.model_options)
    assert entry is not None and experiment.data == entry.dataset and experiment.data in DATASETS
    assert experiment.weights is not None
    assert select_parameters(model, experiment.targets, experiment.ignore).total > 0
    assert len(plan_runs(experiment, "")) == len({run.id for run in plan_runs(experiment, "")})


def test_there_are_configs() -> None:
    assert {"mlpnet", "noise_mlpnet_levels", "resnet20", "resnet20_gradual", "mobilenetv1", "resnet50"} <= {
        path.stem for path in CONFIGS
    }


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "example.toml").write_text(example)
    assert len(plan_runs(read_experiment(tmp_path / "example.toml"), "")) == 72  # as the page says


BAD = {
    "unknown key": (GOOD.replace("data =", "colour = 1\ndata ="), "colour: unknown key"),
    "unknown key of a method": (GOOD + "colour = 1", "methods.1.colour: unknown key; the keys are name, label"),
    "unknown method": (GOOD.replace('"ewr"', '"sgd"'), "methods.1.name: must be one of ewr"),
    "unknown setting": (GOOD.replace("anchor", "anker"), "methods.1.settings: method 'ewr' has no setting 'anker'"),
    "bad setting": (GOOD.replace("anchor = 0.5", "anchor = 2"), "methods.1.settings: anchor must be"),
    "setting beyond floats": (GOOD.replace("anchor = 0.5", f"epsilon = 1{'0' * 400}"), "methods.1.settings: int too"),
    "setting of a wrong type": (GOOD.replace("anchor = 0.5", "iterations = [1]"), "methods.1.settings: "),
    "missing key": (GOOD.replace('model = "mlpnet"', ""), "model: this key is missing"),
    "no name": (GOOD.replace('name = "lr"', 'label = "x"'), "methods.0.name: this key is missing"),
    "no methods": (GOOD[: GOOD.index("[[")] + "methods = []", "methods: "),
    "equal labels": (GOOD.replace("ewr", "lr").replace("anchor", "ridge"), "labels must be distinct, got 'lr'"),
    "shared storage": (GOOD.replace('name = "lr"', 'name = "lr"\nstorage = "sharded"'), "methods.0.storage: must not"),
    "storage of nothing": (GOOD.replace('name = "lr"', 'name = "wanda"\nstorage = "float32"'), "wanda takes none"),
    "unknown storage": (GOOD.replace('name = "lr"', 'name = "lr"\nstorage = "shed"'), "methods.0.storage: "),
    "unknown defence": (GOOD.replace('name = "lr"', 'name = "lr"\ndefence = "wall"'), "methods.0.defence: "),
    "equal settings": (GOOD + '[[methods]]\nname = "lr"\nlabel = "again"', "under two labels"),
    "label": (
        GOOD + 'label = "a|b"',
        "methods.1.label: must be one line of text without | and control characters",
    ),
    "label with a return": (GOOD + 'label = "a\\rb"', "methods.1.label: must be one line"),
    "label that ends a line": (GOOD + 'label = "a\\r"', "methods.1.label: must be one line"),
    "blank label": (GOOD + 'label = " \\t"', "methods.1.label: must be one line"),
    "empty label": (GOOD + 'label = ""', "methods.1.label: must be one line"),
    "sparsity": (GOOD.replace("0.9]", "1.0]"), "sparsities.1: "),
    "sparsity nan": (GOOD.replace("0.9]", "nan]"), "sparsities.1: "),
    "sparsity twice": (GOOD.replace("0.9]", "0.5]"), "sparsities: must be distinct"),
    "no sparsity": (GOOD.replace("[0.5, 0.9]", "[]"), "sparsities: "),
    "stages": ("stages = [1, 0]\n" + GOOD, "stages.1: "),
    "stages twice": ('stages = ["auto", "auto"]\n' + GOOD, "stages: "),
    "stages as text": ('stages = "2"\n' + GOOD, "stages.0: "),
    "samples": ("samples = true\n" + GOOD, "samples: "),
    "seed": ("seeds = [-1]\n" + GOOD, "seeds.0: "),
    "schedule": ('schedule = "steep"\n' + GOOD, "schedule: must be one of exponential"),
    "min_keep": ("min_keep = 1.5\n" + GOOD, "min_keep: must be a share in [0, 1], or a table"),
    "min_keep of layers": ('min_keep = {fc = "x"}\n' + GOOD, "min_keep: must be a share in [0, 1], or a table"),
    "storage that holds no rows": (
        'noise = ["none", "poison:fraction=0.1"]\n' + GOOD.replace('name = "lr"', 'name = "lr"\nstorage = "low-rank"'),
        "storage 'low-rank' of 'lr' does not hold the rows that noise 'poison:fraction=0.1' acts on",
    ),
    "noise": ('noise = ["none", "thunder"]\n' + GOOD, "noise.1: noise must be one of"),
    "noise twice": ('noise = ["none", "none"]\n' + GOOD, "noise: must differ, got 'none' and 'none'"),
    "the same noise": (
        'noise = ["gradient:std=4,fraction=0.25", "none", "gradient:fraction=.25, std=4.0"]\n' + GOOD,
        "noise: must differ, got 'gradient:std=4,fraction=0.25' and 'gradient:fraction=.25, std=4.0'",
    ),
    "a setting of noise twice": ('noise = "gradient:std=1,std=4"\n' + GOOD, "noise.0: noise 'gradient' must have each"),
    "noise setting": ('noise = "gradient:std=loud"\n' + GOOD, "noise.0: noise setting 'std' must be a number"),
    "finetune": ("finetune = 2\n" + GOOD, "finetune: must be a table"),
    "unknown key of finetune": (GOOD + "[finetune]\neras = 2", "finetune: fine-tuning has no setting 'eras'; it has"),
    "value of finetune": (GOOD + "[finetune]\nlr = -1", "finetune: lr of fine-tuning must be a finite number above 0"),
    "not TOML": ("model = ", "is not TOML"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_names_the_key(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_experiment(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_single_values_are_lists_of_one() -> None:
    experiment = Experiment.model_validate(
        tomllib.loads(GOOD.replace("[0.5, 0.9]", "0.5")) | {"stages": ["auto", 3], "seeds": 4, "noise": "none"}
    )
    assert (experiment.sparsities, experiment.stages, experiment.seeds) == ([0.5], ["auto", 3], [4])


def test_a_name_alone_is_a_method_with_its_defaults() -> None:
    table = tomllib.loads(GOOD) | {"methods": ["lr", {"name": "magnitude"}]}
    spelt = table | {"methods": [{"name": "lr"}, {"name": "magnitude"}]}
    named = Experiment.model_validate(table)
    assert named == Experiment.model_validate(spelt) and [method.label for method in named.methods] == [
        "lr",
        "magnitude",
    ]
    with pytest.raises(ValueError, match="methods"):
        Experiment.model_validate(table | {"methods": "lr"})


def test_the_grid_is_the_product() -> None:
    runs = plan_runs(tiny.experiment(stages=[1, 2], noise=["none", "gradient:std=1"]), "w")
    points = {(r.seed, r.method.label, *(r.settings[k] for k in ("stages", "noise", "sparsity"))) for r in runs}
    assert len(runs) == len(points) == len({run.id for run in runs}) == 2 * 2 * 2 * 2 * 2
    assert [run.seed for run in runs] == [0] * 16 + [1] * 16  # whole comparisons first


def test_ids_do_not_depend_on_the_rest_of_the_grid() -> None:
    few = {run.id for run in plan_runs(tiny.experiment(), "w")}
    methods = [{"name": "magnitude", "label": "other words"}, *tiny.experiment().model_dump()["methods"][1:]]
    more = {run.id for run in plan_runs(tiny.experiment(sparsities=[0.8, 0.1, 0.5], seeds=9, methods=methods), "w")}
    more |= {run.id for run in plan_runs(tiny.experiment(sparsities=[0.8, 0.1, 0.5], methods=methods), "w")}
    assert few < more


@pytest.mark.parametrize(
    "change",
    [
        {"model": "tests.tiny:other"},
        {"model_options": {"normalised": False}},
        {"data": "tests.tiny:batches"},
        {"samples": 41},
        {"stages": 2},
        {"schedule": "cubic"},
        {"min_keep": 0.01},
        {"min_keep": {"0": 0.01}},
        {"noise": "gradient:std=1"},
        {"recalibrate_batchnorm": False},
        {"test_images": 10},
        {"finetune": {"epochs": 1}},
        {"targets": ["0"]},
        {"ignore": ["0"]},
        {"methods": [{"name": "lr", "settings": {"damping": 2.0}}]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_ids_depend_on_every_setting(change: dict[str, object]) -> None:
    assert not {r.id for r in plan_runs(tiny.experiment(), "w")} & {
        r.id for r in plan_runs(tiny.experiment(**change), "w")
    }


def test_ids_depend_on_what_fine_tuning_does_and_not_on_how_it_is_written() -> None:
    tables = ({"lr": 1}, {"lr": 1.0, "epochs": 2}, {"lr": 1.0, "epochs": 3})
    ids = [plan_runs(tiny.experiment(finetune=table), "w")[0].id for table in tables]
    assert ids[0] == ids[1] != ids[2]


def test_without_fine_tuning_ids_are_those_of_before_it_was_there() -> None:
    (run, *_) = plan_runs(tiny.experiment(), "w")
    assert run.id == "2cf09fdaeb6aed77"
    assert "finetune" not in run.settings and "finetune" not in tiny.experiment().model_dump(mode="json")


def test_ids_do_not_depend_on_how_a_number_is_written() -> None:
    def ids(number: object) -> list[str]:
        methods = [{"name": "lr", "settings": {"damping": number}}, {"name": "ewr", "settings": {"epsilon": number}}]
        options = {"a": number, "b": {"c": [number]}}
        return [run.id for run in plan_runs(tiny.experiment(methods=methods, model_options=options), "w")]

    assert ids(1) == ids(1.0) != ids(2)
    flags = [plan_runs(tiny.experiment(model_options={"a": flag}), "w")[0].id for flag in (1, True)]
    assert flags[0] != flags[1]
    assert tiny.experiment(model_options={"a": 1.0}).model_options["a"].__class__ is float, "as the factory gets it"


def test_ids_depend_on_the_weights_but_not_on_their_path() -> None:
    a, b, c = (
        plan_runs(tiny.experiment(weights=path), sha)[0].id for path, sha in (("x", "1"), ("y", "1"), ("x", "2"))
    )
    assert a == b != c


@pytest.mark.parametrize(
    ("key", "value"), [("defence", "none"), ("defence", "gradients+inputs"), ("storage", "low-rank")]
)
def test_a_method_that_is_run_in_two_ways_is_two(key: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(
        GOOD[: GOOD.index("[[")]
        + f'[[methods]]\nname = "lr"\n[[methods]]\nname = "lr"\nlabel = "bare"\n{key} = "{value}"\n'
    )
    runs = plan_runs(read_experiment(tmp_path / "two.toml"), "")
    assert len({run.id for run in runs}) == len(runs)
    assert {run.method.label: run.settings.get(key) for run in runs} == {"lr": None, "bare": value}
