"""Checks of batches, targets and losses that a caller brings, before and while they are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.checks import first_line
from swap_prune.losses.base import IGNORE_INDEX, CrossEntropy, GaussNewtonLoss, LossFn
from swap_prune.losses.failures import describe, failures_named, run_loss
from swap_prune.process_memory import pass_on_shortage
from swap_prune.samples.batches import batch_size, in_own_containers, is_sliceable, map_tensors, slice_batch

__all__ = [
    "check_calibration",
    "check_divergence",
    "check_independence",
    "check_labels",
    "check_losses",
    "check_pair",
    "least_precise",
]

_FEW = 2  # samples; one could not show a loss that leaves one out
_SOME = 16  # samples: whole batches would cost what their gradients do


def check_pair(batch: Any) -> None:
    """Check that a batch is ``(inputs, targets)``, as the default loss needs.

    Raises:
        ValueError: If it is not.
    """
    is_pair = isinstance(batch, Sequence) and len(batch) == 2
    if is_pair and isinstance(batch[0], Tensor) and _is_one_label(batch[1]):
        raise ValueError(
            f"the data gives single samples, (inputs {tuple(batch[0].shape)}, one label), and not batches: pass "
            "torch.utils.data.DataLoader(data, batch_size=64)"
        )
    if not is_pair or not all(isinstance(part, Tensor) for part in batch):
        what = f"a {type(batch).__name__}"
        if isinstance(batch, Mapping):
            what = f"a dict with keys {sorted(map(str, batch))}"
        elif isinstance(batch, Sequence):
            what = f"a {type(batch).__name__} of {len(batch)}"
        elif isinstance(batch, Tensor):
            what = f"a tensor of shape {tuple(batch.shape)}"
        labelled = "labels" in batch if isinstance(batch, Mapping) else is_pair and isinstance(batch[1], Tensor)
        own = "swap_prune.TokenCrossEntropy(), which takes them, or a function of your own" if labelled else ""
        if isinstance(batch, Mapping) and not labelled:  # labels of samples, too
            own = "swap_prune.TokenCrossEntropy(labels=the key of the class labels), or a function of your own"
        raise ValueError(
            f"the default loss needs batches (inputs, targets) of tensors, got {what}; pass loss_fn={own}, "
            "or wrap tensors X, y as torch.utils.data.TensorDataset(X, y)"
        )
    inputs, targets = batch
    if inputs.ndim and targets.ndim and len(inputs) != len(targets):
        raise ValueError(
            "a batch (inputs, targets) must have a target for each input: "
            f"there are {len(targets)} targets and {len(inputs)} inputs. Samples are the first dimension: transpose "
            "where it is another"
        )


def _is_one_label(target: Any) -> bool:
    """Whether a target is that of one sample, without a dimension for samples."""
    return isinstance(target, int) or (isinstance(target, Tensor) and target.ndim == 0)


def check_labels(targets: Tensor, classes: int) -> None:
    """Check class indices against the number of classes.

    Raises:
        ValueError: If a label is negative or not below ``classes``.
    """
    if targets.is_floating_point():
        return
    valid = targets[targets != IGNORE_INDEX] if targets.ndim > 1 else targets
    low, high = (int(valid.min()), int(valid.max())) if valid.numel() else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels out of range: the model has {classes} outputs, so labels must lie in 0..{classes - 1}, "
            f"got {low}..{high}" + (f" (where targets have positions, {IGNORE_INDEX} leaves one out)")
        )


def _check_targets(targets: Tensor, logits: Tensor) -> None:
    """Check targets, (n,) or (n, ...) of class indices, or (n, classes) of probabilities, against a few logits.

    Raises:
        ValueError: If there is but one class, a label out of range, whole numbers with a dimension that the logits have
            not, or floating-point targets that are no probabilities, as in a regression.
    """
    classes = logits.shape[1] if logits.ndim > 1 else 1
    if classes < 2:
        raise ValueError(
            "the default loss is the cross-entropy of two classes or more, and the model has one output: pass loss_fn="
            ", such as swap_prune.SquaredError(), or swap_prune.BinaryCrossEntropy() for yes or no"
        )
    if not targets.is_floating_point():
        if logits.ndim > 2 and targets.shape[1:] == logits.shape[1:-1] != logits.shape[2:]:
            raise ValueError(
                f"the default loss needs logits (n, classes, ...) for targets {tuple(targets.shape)}, got "
                f"{('n', *logits.shape[1:])}, the classes last: pass loss_fn=swap_prune.TokenCrossEntropy(), or, if "
                "each item of the data is a whole batch, DataLoader(data, batch_size=None)"
            )
        if logits.ndim == 2 and targets.ndim == 2:
            remedy = "as a column: take targets.squeeze(1)"
            if targets.shape[1] > 1:
                remedy = "one-hot, or of several labels: targets.argmax(1), or loss_fn=swap_prune.BinaryCrossEntropy()"
            raise ValueError(f"the default loss needs class indices (n,), got {describe(targets)} {remedy}")
        check_labels(targets, classes)
        return
    shares = targets.ndim == 2 and targets.shape[1] == classes
    if (
        not shares
        or bool((targets < 0).any())
        or not torch.allclose(targets.sum(1), torch.ones((), dtype=targets.dtype, device=targets.device), atol=1e-2)
    ):
        raise ValueError(
            f"the default loss is the cross-entropy, whose floating-point targets are probabilities of {classes} "
            f"classes, (n, {classes}), got {describe(targets)} that are not: pass loss_fn=, such as "
            "swap_prune.SquaredError() for numbers, or swap_prune.BinaryCrossEntropy() for several labels at once"
        )


def check_losses(losses: Any, expected: int | None) -> Tensor:
    """Check what a loss function returned.

    Args:
        losses: The value returned.
        expected: Number of samples of the batch, or None where it cannot be known beforehand.

    Returns:
        The losses, (n,).

    Raises:
        ValueError: If it is not one finite loss a sample.
    """
    if not isinstance(losses, Tensor):
        raise ValueError(f"loss_fn must return a tensor of per-sample losses, got a {type(losses).__name__}")
    if losses.ndim != 1 or (expected is not None and losses.numel() != expected):
        wanted = f"({expected},)" if expected is not None else "(n,)"
        remedy = (
            "use reduction='none', and let the samples be the first dimension of a batch's first tensor; a batch whose "
            "tensors are not so, such as a list of sequences of several lengths, has to be an object of its own"
        )
        if losses.ndim == 0:
            remedy = (
                "use reduction='none'; in place of the loss that a model returns itself, which is a mean, pass "
                "swap_prune.TokenCrossEntropy(), which takes dicts with labels of samples or of tokens"
            )
        elif losses.ndim > 1:
            remedy = "average over all dimensions but the first, which is that of the samples"
        raise ValueError(f"loss_fn must return one loss a sample, shape {wanted}, got {tuple(losses.shape)}; {remedy}")
    if not losses.is_floating_point():
        raise ValueError(f"loss_fn must return floating-point losses, got {losses.dtype}")
    finite = torch.isfinite(losses.detach())
    if not bool(finite.all()):
        bad = int((~finite).sum())
        value = losses.detach()[~finite][0].item()
        raise ValueError(
            f"the loss is not finite on {bad} of {losses.numel()} samples (first: {value}); "
            "check the weights and the normalisation of the data"
        )
    return losses


def check_divergence(loss: GaussNewtonLoss, outputs: Tensor, batch: Any) -> None:
    """Check that a divergence has a value a sample, and does not fall where outputs leave those of the teacher.

    Args:
        loss: The loss.
        outputs: Of the teacher, on a batch.
        batch: The batch.

    Raises:
        ValueError: If it is none.
    """
    with failures_named("divergence on a batch", batch), torch.no_grad():
        losses, own = loss.losses(outputs, batch), loss.divergence(outputs, batch, outputs)
        if not isinstance(own, Tensor) or own.shape != losses.shape:
            got = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(f"divergence of {type(loss).__name__} must return one value a sample, (n,), got {got}")
        bad = int((~own.isfinite()).sum())
        if bad:
            raise ValueError(
                f"divergence of {type(loss).__name__} is not finite on {bad} of {len(own)} samples, where outputs are "
                "the teacher's own: take differences of log_softmax, and not the logarithm of a quotient"
            )
        others = loss.divergence(outputs.roll(1, 0), batch, outputs)  # those of other samples
    least, there = float(own.double().mean()), float(others.double().mean())
    if there < least - 1e-3 * abs(least):
        raise ValueError(
            f"divergence of {type(loss).__name__} must grow as outputs leave the teacher's, and it is {there:g} where "
            f"they are those of other samples, and {least:g} where they are the same: check its sign"
        )


def check_calibration(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> list[int]:
    """Run the loss on a few samples without gradients, with every check, before any gradient is taken.

    Args:
        model: The network, in the mode that the caller wants.
        loss_fn: Per-sample loss.
        batches: Batches on the model's device.

    Returns:
        The number of samples of each batch.

    Raises:
        ValueError: If a batch does not fit the loss or the model, a label is out of range, or a loss is not
            finite or not per sample.
    """
    sizes: list[int] = []
    logits: Any = None
    for batch in batches:
        known = batch_size(batch) if is_sliceable(batch) else None
        with failures_named("calibration batch", batch), torch.no_grad():
            if isinstance(loss_fn, CrossEntropy):
                check_pair(batch)
                if logits is None:
                    logits = _few_logits(model, batch[0])
                _check_targets(batch[1], logits)
            elif callable(check := getattr(loss_fn, "check_targets", None)):
                check(batch)
            if known is None:
                known = len(check_losses(loss_fn(model, batch), None))
            elif not sizes:  # a few samples speak for their like
                _check_cut(model, loss_fn, batch, known)
        assert known is not None, "just counted"
        sizes.append(known)
    return sizes


def _check_cut(model: nn.Module, loss_fn: LossFn, batch: Any, size: int) -> None:
    """Run the loss on a few of the samples of a batch; where it fails on all of them as well, that is what is said.

    Raises:
        ValueError: If it cannot be.
    """
    few = min(size, _FEW)
    part = map_tensors(torch.clone, slice_batch(batch, 0, few))
    kind = "calibration batch" if few == size else f"cut of {few} of the {size} samples of a batch,"
    try:
        with failures_named(kind, part), _unchanged(part):
            check_losses(loss_fn(model, part), few)
    except ValueError:
        if few < size:
            with suppress(MemoryError):
                run_loss(model, map_tensors(torch.clone, batch), loss_fn)
        raise


@contextmanager
def _unchanged(batch: Any) -> Iterator[None]:
    """Run a block in which a batch is read alone: samples are used many times.

    Raises:
        ValueError: If it is written to.
    """
    tensors: list[Tensor] = []
    map_tensors(tensors.append, batch)
    before = [tensor._version for tensor in tensors if not tensor.is_inference()]
    yield
    if before != [tensor._version for tensor in tensors if not tensor.is_inference()]:
        raise ValueError(
            "the model, or the loss, changes its inputs in place, and samples are used many times: let it work on a "
            "copy, as by x = x - mean in place of x.sub_(mean)"
        )


def _are_wrapped(logits: Any) -> bool:
    return hasattr(logits, "logits") or (isinstance(logits, Mapping) and "logits" in logits)


def _few_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits of a sample or two; refuse a model that gives others than those."""
    logits = model(inputs[:_FEW].clone())
    if isinstance(logits, Tensor):
        return logits
    raise ValueError(
        f"the default loss needs a model that returns logits (n, classes), got a {type(logits).__name__}: pass loss_fn="
        + ("swap_prune.TokenCrossEntropy(), which takes them" if _are_wrapped(logits) else "a function of your own")
    )


def check_independence(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> None:
    """Check that the losses of two samples do not depend on the others in a batch, as gradients of single samples need.

    The first ``_SOME`` samples of a batch are looked at. A network that is random, and has another loss each time, is
    not judged.

    Args:
        model: The network, in the mode that the caller wants.
        loss_fn: Per-sample loss.
        batches: Batches that passed :func:`check_calibration`.

    Raises:
        ValueError: If it does.
    """
    larger = next((batch for batch in batches if is_sliceable(batch) and batch_size(batch) > 1), None)
    if larger is None:
        return
    some = slice_batch(larger, 0, min(batch_size(larger), _SOME))
    pair = slice_batch(larger, 0, 2)
    with torch.no_grad():
        together, again = (loss_fn(model, in_own_containers(some))[:2] for _ in range(2))
        try:
            alone = torch.cat([loss_fn(model, slice_batch(pair, i, i + 1)) for i in range(2)])
        except Exception as error:  # whatever the caller's model or loss raises
            pass_on_shortage(error)
            raise ValueError(
                f"the network failed on a single sample {describe(slice_batch(pair, 0, 1))}: "
                f"{first_line(error, typed=True)}; "
                "gradients are taken of single samples, so it has to take one: BatchNorm needs running statistics, and "
                "squeeze() a dimension"
            ) from error
    check_losses(torch.cat([together, alone]), None)
    digits = torch.finfo(least_precise(model.parameters())).eps ** 0.5
    if torch.equal(together, again) and not torch.allclose(together, alone, rtol=digits, atol=digits):
        raise ValueError(
            f"what the network gives for a sample depends on the others in its batch ({float(alone[0]):.4g} alone, "
            f"{float(together[0]):.4g} beside another): gradients of single samples need a loss_fn, and a network, "
            "that do not mix them"
        )


def least_precise(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the floating dtype of fewest digits among tensors, of which one has to be floating."""
    return max((t.dtype for t in tensors if t.is_floating_point()), key=lambda dtype: torch.finfo(dtype).eps)
