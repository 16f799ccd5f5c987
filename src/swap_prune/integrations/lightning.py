"""Lightning: pruned weights stay exactly zero while a ``Trainer`` trains.

Needs the extra ``lightning``.
"""

from __future__ import annotations

from typing import Any

from swap_prune.integrations.callback import MaskCallback

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(
        "swap_prune.integrations.lightning needs the package lightning: pip install 'lightning>=2.1'"
    ) from error

__all__ = ["KeepMasks"]


class KeepMasks(MaskCallback, Callback):
    """Keeps masks from the first training step to the last: ``Trainer(callbacks=[KeepMasks()])``.

    The arguments are those of :class:`MaskCallback`.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, once the optimisers are there and a checkpoint was loaded.

        Raises:
            ValueError: As :func:`swap_prune.keep_masks`.
        """
        self.begin(pl_module, trainer.optimizers)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hooks off."""
        self.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off."""
        self.on_train_end(trainer, pl_module)
