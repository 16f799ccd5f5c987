"""What a caller brought fails: the line that says on what.

Place in the pipeline: around every call of the caller's model and loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from swap_prune.checks import first_line
from swap_prune.losses.base import LossFn
from swap_prune.process_memory import pass_on_shortage
from swap_prune.samples.batches import in_own_containers

__all__ = ["describe", "errors_worded", "failures_named", "run_loss"]

_SHOWN = 8  # parts of a batch that a message describes


def describe(batch: Any) -> str:
    """Say in a few words what a batch holds."""
    if isinstance(batch, Tensor):
        return f"tensor {tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        shown = [describe(part) for part in batch[:_SHOWN]]
        shown += [f"... {len(batch)} in all"] if len(batch) > _SHOWN else []
        return "(" + ", ".join(shown) + ")"
    return type(batch).__name__


@contextmanager
def errors_worded(words: Callable[[str], str]) -> Iterator[None]:
    """Run what the caller brought; what it raises becomes a ValueError in a line. An OSError, and this package's, stay.

    Args:
        words: Makes the line of a reason.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # whatever they raise
        pass_on_shortage(error)
        if isinstance(error, ValueError) and _is_own(error):
            raise
        raise ValueError(words(first_line(error, typed=True))) from error


def failures_named(kind: str, batch: Any) -> AbstractContextManager[None]:
    """Run the caller's model and loss on a batch, and say on what they failed.

    Args:
        kind: What the batch is for.
        batch: The batch.
    """
    remedy = ""
    if kind.startswith("cut of"):
        remedy = (
            " (of a batch, samples are cut along the first dimension of every tensor that has as many; wrap a list of "
            "samples in a DataLoader, or make a batch that cannot be cut an object of its own)"
        )
    return errors_worded(lambda reason: f"the loss failed on a {kind} {describe(batch)}: {reason}{remedy}")


def run_loss(model: nn.Module, batch: Any, loss_fn: LossFn, kind: str = "calibration batch") -> Tensor:
    """Return the losses of a batch, which the caller's loss may take apart; a failure names it.

    Args:
        model: The network, in the mode that the caller wants.
        batch: The batch.
        loss_fn: Per-sample loss.
        kind: What the batch is for.
    """
    with failures_named(kind, batch):
        return loss_fn(model, in_own_containers(batch))


def _is_own(error: Exception) -> bool:
    """Whether this package raised an error, and not what the caller brought, or torch in it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("swap_prune.")
