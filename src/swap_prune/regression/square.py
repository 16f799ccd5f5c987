"""Square systems: Cholesky where it goes through, LU where it does not, least norm where neither does.

Solutions are those of float64. A symmetric float32 matrix on a CPU is factorised in float32 all the same, several times
as fast, and a solution refined once: the correction is as large as the relative error was, so what is left has the
square of that (Wilkinson). Where a correction is not small, the matrix is factorised again in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from swap_prune.fisher.backends.half import wide_product

__all__ = ["SquareSystem", "solve_square"]

_LEAST_PIVOT = 2**10 * torch.finfo(torch.float32).eps  # of the entry that it is left of, for a factor in float32
_CORRECTION = 1e-3  # of a solution in float32: what remains after it is of the size of the rounding of float32


@dataclass(frozen=True)
class SquareSystem:
    """A factorised matrix, (m, m); one factorisation serves every right-hand side.

    Attributes:
        kind: What ``factors`` hold: the Cholesky factor, LU factors and pivots, or the pseudo-inverse, in float64; or
            ``single``, the Cholesky factor in float32 and the matrix.
        factors: See there.
    """

    kind: Literal["cholesky", "single", "lu", "inverse"]
    factors: tuple[Tensor, ...]

    @classmethod
    def of(cls, matrix: Tensor, *, symmetric: bool = True, rounding: float = 0.0) -> SquareSystem:
        """Factorise a matrix.

        A pivot of rounding size, in the matrix's own precision, counts as zero: of a symmetric matrix against the entry
        that it is what is left of, of another against the largest pivot.

        Args:
            matrix: (m, m), of any floating dtype. It may be held, and is not to be changed any more.
            symmetric: Whether it is symmetric, up to rounding.
            rounding: Relative size of rounding in it, where that is larger than its precision says.
        """
        if symmetric and matrix.dtype == torch.float32 and matrix.device.type == "cpu":
            factor, info = torch.linalg.cholesky_ex(matrix)
            if int(info) == 0 and float((factor.diagonal().square() / matrix.diagonal()).min()) > _LEAST_PIVOT:
                return cls("single", (factor, matrix))
        return cls._wide_of(matrix, symmetric=symmetric, rounding=rounding)

    @classmethod
    def _wide_of(cls, matrix: Tensor, *, symmetric: bool, rounding: float = 0.0) -> SquareSystem:
        """Factorise in float64."""
        a = matrix.double()
        rounding = 8 * max(torch.finfo(matrix.dtype).eps, rounding)
        if symmetric:
            factor, info = torch.linalg.cholesky_ex(a)
            pivots = factor.diagonal().square()
            if int(info) == 0 and float((pivots / a.diagonal()).min()) > rounding:
                return cls("cholesky", (factor,))
        factors, order, info = torch.linalg.lu_factor_ex(a)
        sizes = factors.diagonal().abs()
        if int(info) == 0 and float(sizes.min()) > rounding * float(sizes.max()):
            return cls("lu", (factors, order))
        return cls("inverse", (torch.linalg.pinv(a, rtol=rounding),))

    def solve(self, right: Tensor) -> Tensor:
        """Return the solution for right-hand sides (m,) or (m, r); that of least norm where there are many."""
        b = right.double()
        b = b if b.ndim == 2 else b.unsqueeze(1)
        if self.kind == "single":
            solution = self._refined(b)
        elif self.kind == "cholesky":
            solution = torch.cholesky_solve(b, self.factors[0])
        elif self.kind == "lu":
            solution = torch.linalg.lu_solve(self.factors[0], self.factors[1], b)
        else:
            solution = self.factors[0] @ b
        return solution.reshape(right.shape).to(right.dtype)

    def forms(self, right: Tensor) -> Tensor:
        """Return ``r^T A^-1 r`` for each column r of right-hand sides (m, c), in float64, (c,).

        Those in bfloat16 are left as they are, for matrix units. L^-1 is then rounded to 2^-17: forms are as exact as
        float32 would make them of a matrix whose condition is a hundred times as large.
        """
        if self.kind == "cholesky" and right.dtype == torch.bfloat16:
            high, low = self._inverse_pieces
            halves = wide_product(high, right).add_(wide_product(low, right))
            norms: Tensor = torch.linalg.vector_norm(halves, dim=0)
            return norms.double().square_()
        if self.kind == "single":
            narrow: Tensor = torch.linalg.solve_triangular(self.factors[0], right.float(), upper=False)
            return narrow.square_().sum(0, dtype=torch.float64)
        b = right.double()
        if self.kind == "cholesky":  # half the work of a solution
            return self._halves(b).square_().sum(0)
        return (b * self.solve(b)).sum(0)

    def _refined(self, b: Tensor) -> Tensor:
        """Return the solution for right-hand sides (m, r), float64: one in float32 and a correction."""
        factor, matrix = self.factors
        size = b.abs().amax(0).clamp_min(torch.finfo(b.dtype).tiny)  # float32 has few exponents
        right = b / size
        first = torch.cholesky_solve(right.float(), factor).double()
        step = torch.cholesky_solve((right - matrix.double() @ first).float(), factor).double()
        if not bool((step.norm(dim=0) <= _CORRECTION * first.norm(dim=0)).all()):
            return self._wide.solve(b)
        return first.add_(step).mul_(size)

    @cached_property
    def _wide(self) -> SquareSystem:
        """The system in float64."""
        return self._wide_of(self.factors[1], symmetric=True)

    def _halves(self, b: Tensor) -> Tensor:
        """Return ``L^-1 b``: a GPU multiplies by the inverse faster than it substitutes, where there are many b."""
        factor = self.factors[0]
        if b.device.type == "cuda" and b.shape[1] > len(factor):
            return self._inverse @ b
        halves: Tensor = torch.linalg.solve_triangular(factor, b, upper=False)
        return halves

    @cached_property
    def _inverse(self) -> Tensor:
        """``L^-1``."""
        factor = self.factors[0]
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
        return inverse

    @cached_property
    def _inverse_pieces(self) -> tuple[Tensor, Tensor]:
        """``L^-1`` as a sum of two in bfloat16, of eight digits each."""
        high = self._inverse.bfloat16()
        return high, (self._inverse - high).bfloat16()


def solve_square(matrix: Tensor, right: Tensor, rounding: float = 0.0) -> Tensor:
    """Solve one square system: a symmetric matrix (m, m), a right-hand side (m,)."""
    return SquareSystem.of(matrix, rounding=rounding).solve(right)
