"""Losses with a label for each token, on dict batches, as tokenisers make them, or on pairs.

In a dict the model's arguments are by name (``input_ids``, ``attention_mask``), with the labels beside them. The logits
have the classes last: (n, T, classes), or (n, classes) for one label a sample. Labels of -100 do not count.

Place in the pipeline: a loss, as :mod:`swap_prune.losses` describes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from swap_prune.losses import CrossEntropy, check_labels, describe
from swap_prune.losses.base import IGNORE_INDEX, precise

__all__ = ["TokenCrossEntropy", "call_model", "logits_in", "told_apart"]

_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def call_model(model: nn.Module, batch: Any) -> Any:
    """Run a model on its arguments: by name in a dict, in order in a pair or list, or the only one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def told_apart(batch: Any, key: str, loss: object) -> tuple[Any, Tensor]:
    """Return what the model takes of a batch, and the targets.

    Args:
        batch: A pair of these, or a dict of the model's arguments by name and of the targets.
        key: That of the targets in a dict.
        loss: Whose batch it is.

    Raises:
        ValueError: If it is neither.
    """
    inputs, targets = None, None
    if isinstance(batch, Mapping):
        inputs, targets = {name: part for name, part in batch.items() if name != key}, batch.get(key)
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, targets = batch
    if not isinstance(targets, Tensor):
        raise ValueError(
            f"{type(loss).__name__} needs batches (what the model takes, targets), or dicts with a tensor of targets "
            f"under {key!r} (labels= names another key), got {describe(batch)}"
        )
    return inputs, targets


def logits_in(outputs: Any) -> Any:
    """Return what a mapping or an object has under the name ``logits``; what has none, as it is."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs)


def _with_decoder_inputs(model: nn.Module, inputs: Any, labels: Tensor) -> Any:
    """Return what a model takes, with what it would have made of the labels for its decoder, as in transformers.

    Some have a method for it. Others do it on the way, and their configuration says how: the start, then the labels but
    for the last, padding in place of those that do not count.
    """
    given = isinstance(inputs, Mapping) and not inputs.keys().isdisjoint(_DECODER_INPUTS)
    if given or labels.ndim != 2 or not isinstance(inputs, Mapping):
        return inputs
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is not None:
        return {**inputs, _DECODER_INPUTS[0]: make(labels=labels)}
    config = getattr(model, "config", None)
    start, padding = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "pad"))
    takes = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    if not getattr(config, "is_encoder_decoder", False) or start is None or padding is None:
        return inputs
    if _DECODER_INPUTS[0] not in takes:  # the encoder alone, with a head
        return inputs
    shifted = functional.pad(labels[:, :-1], (1, 0), value=start)
    return {**inputs, _DECODER_INPUTS[0]: shifted.masked_fill(shifted == IGNORE_INDEX, padding)}


@dataclass(frozen=True)
class TokenCrossEntropy:
    """Cross-entropy of each sample, the mean over its labelled tokens; a ``GaussNewtonLoss``.

    A batch is a dict of the model's arguments and the labels, or a pair ``(what the model takes, labels)``. The model
    returns logits with the classes last, or a mapping or an object that has them under the name ``logits``. One that
    makes its decoder's inputs from labels, which are kept from it here, gets them in a dict as ``decoder_input_ids``.

    Attributes:
        labels: Key of the labels, (n, T) or (n,), in a dict; all other entries are the model's arguments.
        causal: Whether logits at a token are for the label of the next one.
        temperature: As for :class:`swap_prune.losses.CrossEntropy`.
        forward: ``(model, what the model takes) -> logits``; by default the model is called with what the batch holds.
    """

    labels: str = "labels"
    causal: bool = False
    temperature: float = 4.0
    forward: Callable[[nn.Module, Any], Any] = call_model

    def __post_init__(self) -> None:
        CrossEntropy(self.temperature)  # checks it

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of each sample, (n,); 0 for one without labels."""
        return self.losses(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the logits z with the classes second, (n, classes, T) or (n, classes).

        Raises:
            ValueError: If the batch holds no labels, or the logits do not fit them.
        """
        inputs, labels = told_apart(batch, self.labels, self)
        if labels.is_floating_point():
            raise ValueError(
                f"TokenCrossEntropy needs classes, whole numbers, got labels {describe(labels)}: labels.long(), or "
                "loss_fn=swap_prune.SquaredError() for numbers"
            )
        if self.forward is call_model:
            inputs = _with_decoder_inputs(model, inputs, labels)
        logits = logits_in(self.forward(model, inputs))
        wanted = labels.shape
        if self.causal and len(wanted) < 2:
            raise ValueError(
                f"TokenCrossEntropy(causal=True) needs a label for each token, (n, T), got labels {tuple(wanted)}: "
                "use causal=False for one label a sample"
            )
        if not isinstance(logits, Tensor) or logits.shape[:-1] != wanted:
            raise ValueError(
                f"TokenCrossEntropy needs logits {(*wanted, 'classes')} for labels {tuple(wanted)}, got "
                f"{describe(logits)}; the classes come last, and forward=, a function (model, inputs) -> logits, says "
                "where they are"
            )
        if self.causal:
            logits = logits[:, :-1]
        result: Tensor = precise(logits.movedim(-1, 1))
        return result

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss of each sample from its logits, (n,).

        Raises:
            ValueError: If a label is out of range.
        """
        targets = self._targets(batch)
        if targets.is_cuda:  # which would say it too late, and be of no use afterwards
            check_labels(targets[targets != IGNORE_INDEX], outputs.shape[1])
        try:
            return self._plain.losses(outputs, (None, targets))
        except IndexError:
            check_labels(targets[targets != IGNORE_INDEX], outputs.shape[1])
            raise

    def curvature_root(self, outputs: Tensor, batch: Any, signs: Tensor) -> Tensor:
        """Return ``L xi``; see :meth:`swap_prune.losses.CrossEntropy.curvature_root`."""
        return self._plain.curvature_root(outputs, (None, self._targets(batch)), signs)

    def divergence(self, outputs: Tensor, batch: Any, teacher: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence of the teacher's predictions, the mean over labelled tokens, (n,)."""
        return self._plain.divergence(outputs, (None, self._targets(batch)), teacher)

    @property
    def _plain(self) -> CrossEntropy:
        return CrossEntropy(self.temperature)

    def _targets(self, batch: Any) -> Tensor:
        targets = told_apart(batch, self.labels, self)[1]
        return targets[:, 1:] if self.causal else targets
