"""Where the rows of G go that several processes capture together, each for the columns that it owns.

Chunks of samples are taken in turns: rank 0 fills the first of a round, rank 1 the second, and so on. At the end of the
round each sends every other one its columns. What a chunk is, and in which order chunks lie in G, does not depend
on the number of ranks, so that G has the same bits. The first chunk of all is filled by everyone: on it is decided how
gradients are taken.

Place in the pipeline: at capture, before :class:`~swap_prune.fisher.backends.sharded.ShardedFactor`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from swap_prune.distributed import Team
from swap_prune.fisher.backends.blocked import column_limit
from swap_prune.fisher.backends.sharded import ShardedFactor, owned_columns
from swap_prune.fisher.capture.row_buffer import RowBuffer, check_rows
from swap_prune.fisher.factor import DenseFactor, FisherFactor
from swap_prune.process_memory import is_out_of_memory
from swap_prune.selection import Selection

__all__ = ["SharedStore"]


class SharedStore(RowBuffer):
    """Rows of which each process keeps its columns.

    Args:
        n: Rows at the most.
        selection: Where the p columns lie.
        dtype: Of the rows.
        device: Where they are held.
        team: The processes.

    Raises:
        MemoryError: If there is no room for the columns of this process.
    """

    def __init__(self, n: int, selection: Selection, dtype: torch.dtype, device: torch.device, team: Team) -> None:
        super().__init__(selection, dtype, device)
        self.team = team
        self._limit, self._filled = column_limit(n, dtype.itemsize, device), 0
        self._round: list[int] = []  # rows of the chunks of this round
        self._places = [owned_columns(selection.total, team, rank) for rank in range(team.size)]
        try:  # parts are tensors of their own: products then take place alike wherever a part lies
            self._blocks = [torch.empty(n, b - a, dtype=dtype, device=device) for a, b in self._places[team.rank]]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            need = dtype.itemsize * n * sum(b - a for a, b in self._places[team.rank]) / 2**30
            raise MemoryError(
                f"the columns of process {team.rank} of {team.size} with {n} rows need {need:.1f} GiB, which could not "
                "be had; use fewer samples, or more processes"
            ) from error

    @property
    def is_next(self) -> bool:
        """Whether the next chunk is for this rank to fill."""
        return len(self._round) == self.team.rank

    def in_turn(self, count: int, fill: Callable[[Tensor], object]) -> int:
        """Let the rank whose turn it is write so many rows; return their number."""
        if self.is_next:
            fill(self.room(count))
        self.pass_on(count)
        return count

    def pass_on(self, count: int) -> None:
        """Go on to the next rank; whoever had its turn has written so many rows."""
        self._round.append(count)
        if len(self._round) == self.team.size:
            self.end_round()

    def take(self, rows: Tensor) -> None:
        """Keep the columns of this rank, of rows that every rank has."""
        self.end_round()
        for (a, b), block in zip(self._places[self.team.rank], self._blocks, strict=True):
            block[self._filled : self._filled + len(rows)] = rows[:, a:b]
        self._filled += len(rows)
        self.team.wait()  # none gets far ahead

    def finish(self) -> FisherFactor:
        """Return the factor."""
        self.end_round()
        size, like = (self._filled, self._selection.total), self._buffer.new_empty(0)
        self._buffer = self._buffer.new_empty(0, self._selection.total)
        blocks = tuple(DenseFactor(block[: self._filled], self._limit) for block in self._blocks)
        return ShardedFactor(blocks, size, self.team, self._limit, like)

    def end_round(self) -> None:
        """Send the rows of the round to where their columns belong; room that was given is free again."""
        if not self._round:
            return
        counts = self._round + [0] * (self.team.size - len(self._round))
        rows = self._buffer[: counts[self.team.rank]]
        check_rows(rows, self._selection)
        widths = [sum(b - a for a, b in places) for places in self._places]
        ends = [(places[0][0], places[-1][1]) if places else (0, 0) for places in self._places]
        sent = torch.cat([rows[:, a:b].reshape(-1) for a, b in ends])
        own = widths[self.team.rank]
        got = self.team.exchange(sent, [len(rows) * width for width in widths], [count * own for count in counts])
        fresh, first = got.view(sum(counts), own), ends[self.team.rank][0]
        for (a, b), block in zip(self._places[self.team.rank], self._blocks, strict=True):
            block[self._filled : self._filled + len(fresh)] = fresh[:, a - first : b - first]
        self._filled += len(fresh)
        self._round = []
