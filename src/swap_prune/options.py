"""The options that commands share, and how the text of one is read."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from swap_prune.methods import METHODS

__all__ = [
    "AsJson",
    "CheckpointDir",
    "Data",
    "DataDir",
    "Device",
    "Ignore",
    "KeepRows",
    "Memory",
    "MethodName",
    "MinKeep",
    "Model",
    "Noise",
    "Pattern",
    "Recalibrate",
    "Samples",
    "Schedule",
    "Scratch",
    "Settings",
    "Sparsity",
    "Stages",
    "StorageOption",
    "Targets",
    "Weights",
    "Width",
    "parse_count",
    "parse_setting",
    "parse_shares",
    "with_options_of",
]

Model = Annotated[str, typer.Option(help="mlpnet, resnet20, mobilenetv1, resnet50, or package.module:factory")]
Weights = Annotated[Path | None, typer.Option(help="checkpoint: .safetensors, or .pt/.pth/.bin of tensors")]
Data = Annotated[str, typer.Option(help="mnist, cifar10, imagenet, or package.module:loader")]
DataDir = Annotated[Path | None, typer.Option(help="folder of the data sets; default SWAP_PRUNE_DATA or the cache")]
Width = Annotated[float | None, typer.Option(help="width multiplier of mobilenetv1, or keyword of a factory")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
Memory = Annotated[str | None, typer.Option(help="memory budget of the process, or of its GPU, such as 4GB")]
StorageOption = Annotated[
    str, typer.Option("--storage", help="auto, float32, float16, bfloat16, mapped, matrix-free, low-rank or sharded")
]
Scratch = Annotated[Path | None, typer.Option(help="directory of temporary files; default the system's")]
KeepRows = Annotated[
    bool, typer.Option("--keep-rows", help="leave G of the first stage in --scratch, and take it from there if it is")
]
CheckpointDir = Annotated[
    Path | None, typer.Option("--checkpoint", help="keep finished stages there; the same command goes on after them")
]
Sparsity = Annotated[float, typer.Option(help="fraction of the weights to remove, in [0, 1)")]
MethodName = Annotated[str, typer.Option("--method", help=", ".join(METHODS))]
Samples = Annotated[
    str, typer.Option(help="calibration samples a stage; auto: 1024, or as many as fit", metavar="INTEGER|auto")
]
Stages = Annotated[str, typer.Option(help="prune-and-recapture stages, or auto", metavar="INTEGER|auto")]
Schedule = Annotated[str, typer.Option(help="exponential, cubic, linear, geometric, constant, or auto")]
MinKeep = Annotated[
    list[str] | None,
    typer.Option(help="share of every layer that is kept, 0.01, or of some, PATTERN=0.2, which may be repeated"),
]
Pattern = Annotated[str | None, typer.Option(help="N:M, such as 2:4: so many of M neighbours stay at the most")]
Targets = Annotated[list[str] | None, typer.Option(help="what to prune; may be repeated")]
Ignore = Annotated[list[str] | None, typer.Option(help="what to leave alone; may be repeated")]
Noise = Annotated[
    list[str] | None,
    typer.Option(help="noise such as gradient:std=4,fraction=0.25; may be repeated"),
]
Recalibrate = Annotated[bool, typer.Option("--recalibrate/--no-recalibrate", help="re-estimate BatchNorm statistics")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="a method's setting: name=value; may be repeated")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


def parse_setting(text: str) -> tuple[str, Any]:
    """Return the name and the value of a method's setting."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"--set needs name=value, got {text!r}")
    try:
        return name, json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return name, value


def parse_count(option: str, text: str) -> int | Literal["auto"]:
    """Return a number, such as that of stages, or that it is to be found."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--{option} needs a whole number or auto, got {text!r}") from None


def parse_shares(texts: list[str] | None) -> float | dict[str, float]:
    """Return one share, or patterns with shares of their own."""
    shares: dict[str, float] = {}
    for text in texts or ["0"]:
        pattern, equals, share = text.rpartition("=")
        try:
            if (equals and not pattern) or pattern in shares:
                raise ValueError
            shares[pattern] = float(share)
        except ValueError:
            raise ValueError(
                f"--min-keep needs a share, or PATTERN=SHARE, each pattern once, got {' and '.join(texts or [])!r}"
            ) from None
    if "" not in shares:
        return shares
    if len(shares) > 1:
        raise ValueError(f"--min-keep has one share for all layers, or one for each pattern, got {texts}")
    return shares[""]


def with_options_of(command: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, which takes them by name, the options of another one."""

    def given(function: Callable[..., None]) -> Callable[..., None]:
        function.__signature__ = inspect.signature(command, eval_str=True)  # type: ignore[attr-defined]
        function.__annotations__ = command.__annotations__
        return function

    return given
