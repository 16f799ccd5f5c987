"""An experiment as a TOML file: a grid of pruning runs, checked whole before any work.

The grid is the product of seeds, stages, noise, sparsities and methods. Every run has an id, a hash of all settings
that its result depends on, by which a resumed experiment knows what it has.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from swap_prune.checks import is_number
from swap_prune.defences import name_of, parse_defence
from swap_prune.experiments.zoo import import_named
from swap_prune.fisher.noise import parse_noise
from swap_prune.memory.planning import check_storage
from swap_prune.methods import METHODS, Method, resolve_method
from swap_prune.process_memory import parse_memory
from swap_prune.schedule import MOST_STAGES, SCHEDULES
from swap_prune.selection import DEFAULT_TARGETS
from swap_prune.training.settings import FineTune, parse_finetune

__all__ = ["Experiment", "MethodEntry", "Run", "comparable", "plan_runs", "read_experiment"]

_Axis = BeforeValidator(lambda value: value if isinstance(value, list) else [value])


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError(f"must be distinct, got {values}")
    return values


def _check_label(label: str) -> str:
    control = any(unicodedata.category(letter) == "Cc" for letter in label)
    if not label.strip() or label.splitlines() != [label] or control or "|" in label:
        raise ValueError(
            f"must be one line of text without | and control characters, and not only blanks, got {label!r}"
        )
    return label


def _check_noise(spec: str) -> str:
    parse_noise(spec)
    return spec


def _differ(specs: list[str]) -> list[str]:
    models = [parse_noise(spec).models for spec in specs]
    for number, own in enumerate(models):
        if own in models[:number]:
            first = specs[models.index(own)]
            raise ValueError(f"must differ, got {first!r} and {specs[number]!r}, which are the same: leave one out")
    return specs


def _check_defence(defence: str) -> str:
    """Return the one name of what is asked for."""
    return name_of(parse_defence(defence))


def _check_storage(name: str) -> str:
    check_storage(name)
    if name == "sharded":
        raise ValueError("must not be 'sharded': runs of an experiment have one process each")
    return name


def _check_schedule(name: str) -> str:
    if name not in (*SCHEDULES, "auto"):
        raise ValueError(f"must be one of {', '.join(SCHEDULES)} or auto, got {name!r}")
    return name


def _check_min_keep(value: Any) -> Any:
    for share in value.values() if isinstance(value, Mapping) else [value]:
        if not is_number(share) or not 0 <= share <= 1:
            raise ValueError(f"must be a share in [0, 1], or a table of patterns with such shares, got {share!r}")
    return {name: float(share) for name, share in value.items()} if isinstance(value, Mapping) else float(value)


def _check_stages(stages: Any) -> int | str:
    whole = isinstance(stages, int) and not isinstance(stages, bool)
    if stages != "auto" and not (whole and 1 <= stages <= MOST_STAGES):
        raise ValueError(f"must be a whole number from 1 to {MOST_STAGES} or 'auto', got {stages!r}")
    checked: int | str = stages
    return checked


def _read_finetune(table: Any) -> FineTune:
    if isinstance(table, FineTune):
        return table
    if not isinstance(table, Mapping):
        raise ValueError(f"must be a table of settings such as epochs = 2, got {table!r}")
    return parse_finetune(table)


_Whole = Annotated[int, Field(ge=1, lt=2**63)]
_Stages = Annotated[Any, AfterValidator(_check_stages)]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]
_Sparsity = Annotated[float, Field(ge=0, lt=1)]


def _check_memory(value: str) -> str:
    parse_memory(value)
    return value


_MinKeep = Annotated[Any, AfterValidator(_check_min_keep)]
_Memory = Annotated[str, AfterValidator(_check_memory)]
_NOT_ALWAYS = ("finetune", "min_keep", "memory", "pattern")  # written only where they are asked for
_Noise = Annotated[str, AfterValidator(_check_noise)]
_FineTune = Annotated[FineTune, BeforeValidator(_read_finetune)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class MethodEntry(_Table):
    """One method of the grid.

    Attributes:
        name: A name in ``METHODS``.
        label: Its name in the tables, to tell two settings of one method apart; by default the name.
        settings: Fields of the method's config.
        defence: As for ``prune``.
        storage: As for ``prune``.
    """

    name: str
    label: Annotated[str, AfterValidator(_check_label)]
    settings: dict[str, Any] = {}
    defence: Annotated[str, AfterValidator(_check_defence)] = "auto"
    storage: Annotated[str, AfterValidator(_check_storage)] = "auto"

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is the default: a key that is new must not change the ids of runs."""
        table: dict[str, Any] = handler(self)
        return {name: value for name, value in table.items() if name not in self.ways() or value != "auto"}

    @model_validator(mode="after")
    def _holds_rows(self) -> MethodEntry:
        if self.storage != "auto" and not METHODS[self.name].needs_gradients:
            raise ValueError(f"storage is how gradients are held, and {self.name} takes none: leave it out")
        return self

    def ways(self) -> dict[str, str]:
        """Return how it is run, beside its settings: what is not the default is a part of a run's id."""
        return {"defence": self.defence, "storage": self.storage}

    @model_validator(mode="before")
    @classmethod
    def _label_by_name(cls, table: Any) -> Any:
        return {"label": table["name"], **table} if isinstance(table, Mapping) and "name" in table else table

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"must be one of {', '.join(METHODS)}, got {name!r}")
        return name

    @field_validator("settings")
    @classmethod
    def _accepted(cls, settings: dict[str, Any], info: Any) -> dict[str, Any]:
        if "name" in info.data:
            try:
                settings = _as_declared(METHODS[info.data["name"]], settings)
                resolve_method(info.data["name"], settings)
            except (TypeError, OverflowError) as error:
                raise ValueError(str(error)) from error
        return settings

    def resolve(self) -> Method:
        """Return the method's config object."""
        return resolve_method(self.name, self.settings)


class Experiment(_Table):
    """The keys of an experiment file; docs/experiments.md explains them.

    Attributes:
        model: A model of the zoo, or ``package.module:factory``.
        model_options: Keyword options of its factory.
        weights: Checkpoint of the dense network: absolute, or relative to the file or a data directory.
        data: A data set's name, or ``package.module:loader``.
        test_images: Measure on this many test images, drawn once for all runs; None for all.
        targets: What is pruned, as for ``prune``.
        ignore: What is not.
        methods: The methods to compare. The first is the reference of paired differences.
        sparsities: Sparsities asked for.
        stages: Numbers of stages, or ``"auto"``.
        noise: Noise specs, or ``"none"``.
        seeds: Seeds. The same seed gives methods the same calibration samples, as far as they hold as many out.
        samples: Calibration samples a stage.
        schedule: Sparsity over the stages.
        min_keep: Share of every layer that is kept, or patterns to shares, as for ``prune``.
        pattern: ``"N:M"``: how many of M neighbours stay at the most, as for ``prune``.
        recalibrate_batchnorm: As for ``prune``. If not, runs start from the dense network with its statistics repaired.
        evaluate_before_recalibration: Also measure the pruned weights with the dense network's BatchNorm statistics.
        finetune: Train under the mask after each stage, as these settings say; None: not at all.
        memory: Budget of a run, such as ``"4GB"``; None: what is free when it starts, which may decide how gradients
            are held, and whether a method can run.
    """

    model: str
    model_options: dict[str, Any] = {}
    weights: str | None = None
    data: str
    test_images: _Whole | None = None
    targets: list[str] = list(DEFAULT_TARGETS)
    ignore: list[str] = []
    methods: Annotated[list[MethodEntry], Field(min_length=1)]
    sparsities: Annotated[list[_Sparsity], _Axis, Field(min_length=1), AfterValidator(_distinct)]
    stages: Annotated[list[_Stages], _Axis, Field(min_length=1), AfterValidator(_distinct)] = [1]
    noise: Annotated[list[_Noise], _Axis, Field(min_length=1), AfterValidator(_differ)] = ["none"]
    seeds: Annotated[list[_Seed], _Axis, Field(min_length=1), AfterValidator(_distinct)] = [0]
    samples: _Whole = 1024
    schedule: Annotated[str, AfterValidator(_check_schedule)] = "exponential"
    min_keep: _MinKeep = 0.0
    pattern: str | None = None
    recalibrate_batchnorm: bool = True
    evaluate_before_recalibration: bool = False
    finetune: _FineTune | None = None
    memory: _Memory | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not asked for: a key that is new must not change the ids of runs."""
        table: dict[str, Any] = handler(self)
        if self.finetune is not None and "finetune" in table:
            table["finetune"] = self.finetune.settings()
        return {name: value for name, value in table.items() if value or name not in _NOT_ALWAYS}

    @field_validator("methods", mode="before")
    @classmethod
    def _by_name(cls, methods: Any) -> Any:
        """Take a name alone for a method with its default settings."""
        if not isinstance(methods, list):
            return methods
        return [{"name": one} if isinstance(one, str) else one for one in methods]

    @field_validator("methods")
    @classmethod
    def _told_apart(cls, methods: list[MethodEntry]) -> list[MethodEntry]:
        labels = [method.label for method in methods]
        for number, label in enumerate(labels):
            if label in labels[:number]:
                raise ValueError(f"labels must be distinct, got {label!r} twice: give one of them another label")
        entries = [(method.resolve(), method.ways()) for method in methods]
        for number, entry in enumerate(entries):
            if entry in entries[:number]:
                raise ValueError(
                    f"must differ in name, settings, defence or storage, got {labels[number]!r} under two labels"
                )
        return methods

    @model_validator(mode="before")
    @classmethod
    def _import_first(cls, table: Any) -> Any:
        """Import what model and data name, which may register methods and noise models."""
        if isinstance(table, Mapping):
            import_named(table.get("model"), table.get("data"))
        return table

    @model_validator(mode="after")
    def _rows_to_disturb(self) -> Experiment:
        """Refuse runs that could only fail: noise on the rows of G needs them in memory, as they are."""
        disturbing = [spec for spec in self.noise if parse_noise(spec).acts_on_rows]
        for method in self.methods:
            if disturbing and method.storage not in ("auto", "float32"):
                raise ValueError(
                    f"storage {method.storage!r} of {method.label!r} does not hold the rows that noise "
                    f"{disturbing[0]!r} acts on: leave one of them out, or use storage 'float32'"
                )
        return self


@dataclass(frozen=True)
class Run:
    """One point of the grid.

    Attributes:
        id: Hash of ``settings`` and ``seed``.
        method: The method.
        seed: Seed of the run.
        settings: All else that the result depends on, the method's settings with their defaults included.
    """

    id: str
    method: MethodEntry
    seed: int
    settings: dict[str, Any]


def read_experiment(path: str | Path) -> Experiment:
    """Read and check an experiment file.

    Raises:
        ValueError: If it cannot be read, is not TOML, or a key or value is refused; names the key.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        return Experiment.model_validate(table)
    except OSError as error:
        raise ValueError(f"experiment file {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {key}: {_explain(first)}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, nested too deeply
        raise ValueError(f"experiment file {path} is not TOML: {error}") from error


def plan_runs(experiment: Experiment, weights_sha256: str) -> list[Run]:
    """Return the grid, seed by seed, so that an unfinished experiment holds whole comparisons.

    Args:
        experiment: The experiment.
        weights_sha256: Hash of the dense network's weights.
    """
    shared = experiment.model_dump(include=_SHARED) | {"weights_sha256": weights_sha256}
    shared["model_options"] = comparable(shared["model_options"])
    grid = itertools.product(
        experiment.seeds, experiment.stages, experiment.noise, experiment.sparsities, experiment.methods
    )
    return [
        _run(method, seed, shared | {"stages": stages, "noise": noise, "sparsity": sparsity})
        for seed, stages, noise, sparsity, method in grid
    ]


def comparable(value: Any) -> Any:
    """Return a value whose JSON text is that of all values which mean the same: 1.0 becomes 1, and true stays true."""
    if isinstance(value, Mapping):
        return {name: comparable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


_SHARED = set(Experiment.model_fields) - {"methods", "sparsities", "stages", "noise", "seeds", "weights"}


def _run(method: MethodEntry, seed: int, settings: dict[str, Any]) -> Run:
    solver = method.resolve()
    settings = settings | {"method": {"name": method.name, **asdict(solver)}}  # type: ignore[call-overload]
    settings |= {name: way for name, way in method.ways().items() if way != "auto"}
    text = json.dumps([settings, seed], sort_keys=True, default=str)  # TOML has dates
    return Run(hashlib.sha256(text.encode()).hexdigest()[:16], method, seed, settings)


def _as_declared(method: type[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a method's settings, whole numbers as floats where its config has floats: 1 and 1.0 are one run."""
    floats = {field.name for field in fields(method) if "float" in str(field.type)}
    return {name: float(value) if name in floats and is_number(value) else value for name, value in settings.items()}


def _explain(error: Mapping[str, Any]) -> str:
    """Say in our words what pydantic found."""
    if error["type"] == "extra_forbidden":
        known = MethodEntry if "methods" in error["loc"] else Experiment
        return f"unknown key; the keys are {', '.join(known.model_fields)}"
    if error["type"] == "missing":
        return "this key is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return message if error["type"] == "value_error" else f"{message}, got {error['input']!r}"
