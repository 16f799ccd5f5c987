"""What a command says, and how it ends: whatever a user can mend is one line on standard error, and an exit status.

0 is success, 1 runs of an experiment that failed, a plan that does not fit or a reader that left, 2 what a user can
mend, 130 an interruption, 143 an end that was asked for (SIGTERM), 129 a terminal that was closed (SIGHUP).
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from typing import Any, ParamSpec, TextIO, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from swap_prune.distributed import EndedByAnother, is_first
from swap_prune.memory.planning import MemoryPlan
from swap_prune.process_memory import is_out_of_memory

__all__ = [
    "given_arguments",
    "own_output",
    "print_json",
    "print_result",
    "run",
    "say",
    "say_notes",
    "show",
    "show_plan",
    "show_table",
]

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_results: ContextVar[TextIO | None] = ContextVar("results", default=None)  # where a command's results go
_STDOUT, _STDERR = 1, 2
_TRACEBACK = "SWAP_PRUNE_TRACEBACK"  # where it is set, errors say where they come from
_INTERRUPTED = "interrupted; files that were written are complete"


def run(command: Callable[[], Any]) -> int:
    """Run a command and return its exit status."""
    try:
        with _ended_in_words():
            status = command()
    except (KeyboardInterrupt, InterruptedError, _Terminated) as stop:
        return _fail(str(stop) or _INTERRUPTED, stop.status if isinstance(stop, _Terminated) else 130)
    except (typer.Exit, typer.Abort, SystemExit) as stop:
        return _status_of(stop)
    except (ValueError, OSError) as error:
        if os.environ.get(_TRACEBACK):
            traceback.print_exc()
        return _fail(str(error) or type(error).__name__, 2)
    except Exception as error:
        if is_out_of_memory(error):
            return _fail(str(error) or "there was not enough memory", 2)
        if not hasattr(error, "format_message"):  # the argument parser's own errors have it
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 2
        return _fail(error.format_message(), 2) if is_first() else 2
    if status == 130:  # what typer makes of Ctrl-C
        return _fail(_INTERRUPTED, 130)
    return status if isinstance(status, int) else 0


class _Terminated(BaseException):
    """The system, a terminal that closes, or the launcher of a group of processes asks this one to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}; files that were written are complete")
        self.status = 128 + number


@contextmanager
def _ended_in_words() -> Iterator[None]:
    """Run a block that clears up, and says why it ended, where it is terminated."""

    def end(number: int, _frame: Any) -> None:
        raise _Terminated(number)

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    ends = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup has it ignored
        ends.append(signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _status_of(stop: typer.Exit | typer.Abort | SystemExit) -> int:
    """Return the exit status of a command that was left half-way."""
    if isinstance(stop, typer.Exit):
        return stop.exit_code
    if isinstance(stop, EndedByAnother):
        return 2
    if isinstance(stop, SystemExit) and isinstance(stop.__context__, BrokenPipeError):  # typer's, of a reader that left
        return 1
    if isinstance(stop, SystemExit):  # its own status may be that of success, and there is no result
        return _fail(f"the model or the data called sys.exit({stop.code!r}); raise an error instead", 2)
    cause = stop.__cause__ or stop.__context__
    if isinstance(cause, EOFError):
        return _fail(f"a file ended too early: {cause or 'EOFError'}", 2)
    return _fail(_INTERRUPTED, 130)


def _fail(message: str, status: int) -> int:
    """Say what is wrong in one line; return the exit status."""
    say("swap-prune: error: " + " ".join(message.split()))
    return status


def say(message: str) -> None:
    """Print a message for people, to standard error; where that is closed or full, work goes on without."""
    if sys.stderr is not None:  # print would take standard output in its place
        with suppress(OSError, ValueError):
            print(message, file=sys.stderr, flush=True)


def say_notes(notes: Iterable[str]) -> None:
    """Print what a reader should know, in the same place."""
    for note in notes:
        say(f"note: {note}")


def own_output(command: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Keep standard output for a command's results: what models and data print meanwhile goes to standard error."""

    @functools.wraps(command)
    def apart(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with _own_descriptor() as results:
            token = _results.set(results)
            try:
                with redirect_stdout(sys.stderr):
                    return command(*args, **kwargs)
            finally:
                _results.reset(token)

    return apart


@contextmanager
def _own_descriptor() -> Iterator[TextIO]:
    """Yield standard output, while what child processes and libraries of C write there goes to standard error."""
    if sys.stdout is None:  # closed: results are for nobody
        with open(os.devnull, "w", encoding="utf-8") as results:
            yield results
        return
    try:
        real = sys.stdout.fileno() == _STDOUT and sys.stderr.fileno() == _STDERR
    except (OSError, ValueError, AttributeError):  # something stands in for one
        real = False
    if not real:
        yield sys.stdout
        return
    sys.stdout.flush()
    own = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with open(own, "w", 1, sys.stdout.encoding, "backslashreplace", closefd=False) as results:
            yield results
    finally:
        os.dup2(own, _STDOUT)
        os.close(own)


def print_json(result: dict[str, Any]) -> None:
    """Print a result for programs, to standard output."""
    show(json.dumps(result, allow_nan=False))


def show(text: str) -> None:
    """Print a result for people, to standard output."""
    print(text, file=_results.get() or sys.stdout)


def show_table(table: Table, width: int = 0) -> None:
    """Print a table for people, to standard output; at least so many characters wide."""
    console = Console(file=_results.get() or sys.stdout)
    console.width = max(console.width, width)
    console.print(table)


def show_plan(forecast: MemoryPlan) -> None:
    """Print a plan for people."""
    allowed = "unknown" if forecast.limit is None else f"{forecast.limit / 1e9:.2f} GB"
    of = f", of {forecast.samples} samples a stage" if forecast.samples else ""
    table = Table(title=f"GB held in each phase{of}; memory allows {allowed}", box=None, padding=(0, 2, 0, 0))
    phases = list(forecast.forecasts[0].phases) if forecast.forecasts else []
    for column in ("storage", *phases, "G", "file", ""):
        table.add_column(column, justify="left" if column in ("storage", "") else "right", no_wrap=True)
    for one in forecast.forecasts:
        cells = [f"{size / 1e9:.2f}" for size in (*one.phases.values(), one.gradients, one.disk)]
        table.add_row(one.name, *cells, "taken" if one is forecast.chosen else "")
    if forecast.forecasts:
        show_table(table, width=100)  # figures are not cut off
    show(forecast.why)
    for one in forecast.forecasts:
        if one.obstacle and one.obstacle not in forecast.why:
            show(f"{one.name}: {one.obstacle}")


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print a result, for programs or for people."""
    if as_json:
        print_json(result)
        return
    for name, value in result.items():
        if name == "layers":
            value = ", ".join(f"{layer} {kept}" for layer, kept in value.items())
        if isinstance(value, list):
            value = "; ".join(value)
        if name == "loss" and value is None:
            value = "not finite"
        if value not in (None, ""):
            show(f"{name:>14}  {f'{value:.4f}' if isinstance(value, float) else value}")


def given_arguments(arguments: list[str] | None) -> list[str]:
    """Return the arguments, none of which may be empty: a path of no letters would be the working directory."""
    given = sys.argv[1:] if arguments is None else arguments
    before = ""
    for argument in given:
        option, equals, value = argument.partition("=")
        if not argument or (option.startswith("--") and equals and not value):
            named = option if argument else before if before.startswith("-") else "an argument"
            raise ValueError(f"{named} is empty: is a shell variable not set?")
        before = argument
    return given
