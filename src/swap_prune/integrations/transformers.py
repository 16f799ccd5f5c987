"""Hugging Face: pruned weights stay exactly zero while a ``transformers.Trainer`` trains.

Needs the extra ``transformers``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from swap_prune.masks import MaskKeeper, keep_masks
from swap_prune.selection import DEFAULT_TARGETS

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "swap_prune.integrations.transformers needs the package transformers: pip install 'swap-prune[transformers]'"
    ) from error

__all__ = ["KeepMasks"]


class KeepMasks(TrainerCallback):
    """Keeps masks from the first training step to the last: ``Trainer(..., callbacks=[KeepMasks()])``.

    Args:
        masks: Parameter name, as in the model's ``named_parameters``, to boolean mask, true where a weight is
            kept. By default what is zero when training starts is pruned.
        targets: Without ``masks``: where zeros are looked for, as for ``prune``.
        ignore: The same, where they are not.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor] | None = None,
        *,
        targets: Sequence[str] = DEFAULT_TARGETS,
        ignore: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._masks, self._targets, self._ignore = masks, targets, ignore
        self._keeper: MaskKeeper | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, once the optimiser is there and a checkpoint was loaded.

        Raises:
            ValueError: As :func:`swap_prune.keep_masks`.
        """
        self._keeper = keep_masks(
            kwargs["model"], kwargs["optimizer"], self._masks, targets=self._targets, ignore=self._ignore
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        if self._keeper is not None:
            self._keeper.remove()
