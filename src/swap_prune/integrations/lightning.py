"""Lightning: pruned weights stay exactly zero while a ``Trainer`` trains.

Needs the extra ``lightning``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from swap_prune.masks import MaskKeeper, keep_masks
from swap_prune.selection import DEFAULT_TARGETS

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(
        "swap_prune.integrations.lightning needs the package lightning: pip install 'swap-prune[lightning]'"
    ) from error

__all__ = ["KeepMasks"]


class KeepMasks(Callback):
    """Keeps masks from the first training step to the last: ``Trainer(callbacks=[KeepMasks()])``.

    Args:
        masks: Parameter name, as in the LightningModule's ``named_parameters``, to boolean mask, true where a weight is
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

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, once the optimisers are there and a checkpoint was loaded.

        Raises:
            ValueError: As :func:`swap_prune.keep_masks`.
        """
        self._keeper = keep_masks(
            pl_module, trainer.optimizers, self._masks, targets=self._targets, ignore=self._ignore
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hooks off."""
        if self._keeper is not None:
            self._keeper.remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off."""
        self.on_train_end(trainer, pl_module)
