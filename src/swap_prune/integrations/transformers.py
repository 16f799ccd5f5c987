"""Hugging Face: pruned weights stay exactly zero while a ``transformers.Trainer`` trains.

Needs the extra ``transformers``.
"""

from __future__ import annotations

from typing import Any

from swap_prune.integrations.callback import MaskCallback

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "swap_prune.integrations.transformers needs the package transformers: "
        "pip install accelerate 'transformers>=4.46'"
    ) from error

__all__ = ["KeepMasks"]


class KeepMasks(MaskCallback, TrainerCallback):
    """Keeps masks from the first training step to the last: ``Trainer(..., callbacks=[KeepMasks()])``.

    The arguments are those of :class:`MaskCallback`.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, once the optimiser is there and a checkpoint was loaded.

        Raises:
            ValueError: As :func:`swap_prune.keep_masks`.
        """
        self.begin(kwargs["model"], kwargs["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        self.end()
