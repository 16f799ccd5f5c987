"""What the callbacks of all trainers do: keep masks from the first training step to the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from swap_prune.selection import DEFAULT_TARGETS
from swap_prune.training.masks import MaskKeeper, keep_masks

__all__ = ["MaskCallback"]


class MaskCallback:
    """The first base class of a trainer's callback.

    Args:
        masks: Parameter name, as in the trained model's ``named_parameters``, to boolean mask, true where a weight is
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

    def begin(self, model: nn.Module, optimizers: Any) -> None:
        """Begin, once the optimisers are there and a checkpoint was loaded.

        Raises:
            ValueError: As :func:`swap_prune.keep_masks`.
        """
        self.end()  # of a training that was broken off
        self._keeper = keep_masks(model, optimizers, self._masks, targets=self._targets, ignore=self._ignore)

    def end(self) -> None:
        """Take the hooks off."""
        if self._keeper is not None:
            self._keeper.remove()
            self._keeper = None
