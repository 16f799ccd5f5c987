"""N:M patterns: at most N of M neighbouring weights stay. Of 2:4 sparse tensor cores make use.

Neighbours lie along the second dimension of a parameter, its inputs: of one output, and at one place of a kernel
(Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv 2104.08378). Where more than N of M are kept in
the mean, on the way to the end, the pattern is the tightest that leaves room for them::

    c(k) = max(N, ceil(k M / p)) of M.

Where all groups are full in the end, N of each stay on the way as well: a group that has lost more would be filled with
zeros. The sets of k weights that hold to this are those of a matroid (groups of limited size, and k in all), so that of
all of them the greedy one has the largest sum of scores: the best N of each group, then the best of what may follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["GroupPattern", "parse_pattern"]


@dataclass(frozen=True)
class GroupPattern:
    """At most ``most`` weights of each group of ``size`` are kept.

    Attributes:
        most: N, ``1 <= N < M``.
        size: M.
        shapes: Of the parameters that the p weights are made of, in their order; the second dimension of each is a
            multiple of M.
        filled: Whether all groups are full in the end.
    """

    most: int
    size: int
    shapes: tuple[torch.Size, ...]
    filled: bool = False

    def __str__(self) -> str:
        """Return it as it was written."""
        return f"{self.most}:{self.size}"

    @property
    def count(self) -> int:
        """Number of groups."""
        return sum(shape.numel() for shape in self.shapes) // self.size

    def limit(self, keep: int) -> int:
        """Return c, how many of each group a set of ``keep`` weights may have."""
        return max(self.most, -(-keep // self.count))

    def is_full(self, keep: int) -> bool:
        """Whether ``keep`` weights fill every group up to its limit; rounding of a sparsity may have taken one."""
        return keep >= self.limit(keep) * self.count - 1

    def bounded(self, scores: Tensor, keep: int) -> Tensor:
        """Return scores (p,) of which the largest ``keep`` hold to the pattern.

        Those beyond the best c of their group are minus infinity, and those that have to stay infinity; of equal scores
        the first are better.
        """
        bounded = scores.clamp_min(torch.finfo(scores.dtype).min)  # no other is as low as those that may not stay
        limit, least = self.limit(keep), self.most if self.filled and keep >= self.most * self.count else 0
        for values in self._grouped(bounded):
            order = values.argsort(dim=2, descending=True, stable=True)
            values.scatter_(2, order[:, :, limit:], -torch.inf)
            values.scatter_(2, order[:, :, :least], torch.inf)
        return bounded

    def best(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest value of each group, (groups,), and its index among the p, (groups,)."""
        largest, index = [], []
        for grouped, place in zip(self._grouped(values), self._places(), strict=True):
            value, at = grouped.max(dim=2)
            rows, groups, size, kernel = grouped.shape
            first = torch.arange(rows * groups, device=values.device).view(rows, groups, 1) * size
            spot = torch.arange(kernel, device=values.device)
            largest.append(value.flatten())
            index.append(((first + at) * kernel + spot).flatten() + place.start)
        return torch.cat(largest), torch.cat(index)

    def group_of(self, index: Tensor) -> Tensor:
        """Return the number of the group that each of some weights is in, as :meth:`best` counts them."""
        places = list(self._places())
        starts, inputs, kernels = (
            torch.tensor(numbers, device=index.device)
            for numbers in (
                [place.start for place in places],
                [shape[1] for shape in self.shapes],
                [shape[2:].numel() for shape in self.shapes],
            )
        )
        layer = torch.searchsorted(starts, index, right=True) - 1
        kernel = kernels[layer]
        row, spot = (index - starts[layer]).div(kernel, rounding_mode="floor"), (index - starts[layer]) % kernel
        output, channel = row.div(inputs[layer], rounding_mode="floor"), row % inputs[layer]
        group = output * inputs[layer].div(self.size, rounding_mode="floor")
        group = group + channel.div(self.size, rounding_mode="floor")
        return starts[layer].div(self.size, rounding_mode="floor") + group * kernel + spot

    def spread(self, values: Tensor) -> Tensor:
        """Return the value (groups,) of the group that each weight is in, (p,)."""
        spread = values.new_empty(self.size * self.count)
        start = 0
        for grouped in self._grouped(spread):
            rows, groups, _, kernel = grouped.shape
            grouped.copy_(values[start : start + rows * groups * kernel].view(rows, groups, 1, kernel))
            start += rows * groups * kernel
        return spread

    def room(self, support: Tensor) -> Tensor:
        """Return how many weights each group could take beside those of a set, (groups,)."""
        return self.limit(len(support)) - self._counts(support)

    def spare(self, support: Tensor) -> Tensor:
        """Return how many weights of a set each group could do without, (groups,)."""
        return self._counts(support) - (self.most if self.filled else 0)

    def _counts(self, support: Tensor) -> Tensor:
        return self.group_of(support).bincount(minlength=self.count)

    def _places(self) -> Iterator[slice]:
        ends = accumulate((shape.numel() for shape in self.shapes), initial=0)
        return (slice(end, end + shape.numel()) for end, shape in zip(ends, self.shapes, strict=False))

    def _grouped(self, values: Tensor) -> Iterator[Tensor]:
        """View (p,) as the groups of each parameter, (outputs, groups, M, places of the kernel)."""
        for place, shape in zip(self._places(), self.shapes, strict=True):
            yield values[place].view(shape[0], shape[1] // self.size, self.size, -1)


def parse_pattern(text: str, shapes: Mapping[str, torch.Size], keep: int) -> GroupPattern:
    """Read a pattern such as ``"2:4"`` for parameters.

    Args:
        text: N and M.
        shapes: Of the parameters, by name.
        keep: k, of all of them together.

    Raises:
        ValueError: If it is none, a parameter cannot be divided into its groups, or more weights are to be kept.
    """
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text) if isinstance(text, str) else None
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"pattern must be 'N:M' with 0 < N < M, such as '2:4', got {text!r}")
    most, size = int(match[1]), int(match[2])
    odd = [name for name, shape in shapes.items() if len(shape) < 2 or shape[1] % size]
    if odd:
        raise ValueError(
            f"pattern {text} needs parameters whose second dimension, their inputs, is a multiple of {size}: add "
            f"the others to ignore=, {odd}"
        )
    pattern = GroupPattern(most, size, tuple(shapes.values()))
    pattern = replace(pattern, filled=pattern.is_full(keep))
    if keep > most * pattern.count:
        raise ValueError(
            f"pattern {text} keeps {most * pattern.count} of {size * pattern.count} weights at the most, and the "
            f"sparsity asks for {keep}: one of {1 - most / size:g} or more is needed"
        )
    return pattern
