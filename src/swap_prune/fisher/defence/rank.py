"""Rows of low rank: what true gradients look like, and noise does not.

The gradient of one sample's loss with respect to the weight of a Linear layer that sees one vector a sample is an outer
product, ``delta a^T``: a matrix of rank 1. That of a convolution, or of a layer over tokens, is a sum over positions
with fast-falling singular values. Noise on the entries has full rank. The leading outer products of a row keep what
they have of the signal, and of the noise in an (a, b) matrix about the share ``(a + b) / (a b)`` each.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CLEAN", "energies", "leading_singular_triples", "low_rank_rows", "shares_beyond"]

CLEAN = 1e-4  # share of energy that rounding may leave: outside rank 1, or between two looks
_ITERATIONS = 3  # of the subspace iteration
_EXPONENT = 126  # powers of two that float32 has, both ways


def low_rank_rows(rows: Tensor, rank: int) -> Tensor:
    """Return the best approximations of a rank, (n, a, b), by batched subspace iteration (Halko et al., 2011).

    Args:
        rows: Matrices, (n, a, b).
        rank: At least 1, below a and b.
    """
    if rows.shape[1] > rows.shape[2]:
        return low_rank_rows(rows.transpose(1, 2), rank).transpose(1, 2)
    scaled, exponent = _scaled(rows)
    basis = _leading_basis(scaled, rank)
    return _times_power(basis, exponent) @ (basis.transpose(1, 2) @ scaled)


def leading_singular_triples(rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triples, by the same iteration: (n, a, r), (n, r) falling, and (n, b, r).

    Args:
        rows: Matrices, (n, a, b).
        rank: r, at least 1, below a and b.
    """
    if rows.shape[1] > rows.shape[2]:
        u, s, v = leading_singular_triples(rows.transpose(1, 2), rank)
        return v, s, u
    scaled, exponent = _scaled(rows)
    basis = _leading_basis(scaled, rank)
    inner, s, v = torch.linalg.svd(basis.transpose(1, 2) @ scaled, full_matrices=False)
    return basis @ inner, _times_power(s, exponent.squeeze(2)), v.transpose(1, 2)


def energies(matrices: Tensor) -> tuple[float, float]:
    """Return the energy of matrices (m, a, b), and that outside the best ones of rank 1."""
    scale = float(matrices.abs().amax())
    if scale == 0:
        return 0.0, 0.0
    matrices = matrices / scale  # or squares of small gradients would be zero
    rest = (matrices - low_rank_rows(matrices, 1)).double().square_().sum()
    return float(matrices.double().square_().sum()) * scale**2, float(rest) * scale**2


def shares_beyond(matrices: Tensor) -> Tensor:
    """Return the share of the energy of each matrix (m, a, b) outside the best one of rank 1, (m,)."""
    scaled, _ = _scaled(matrices)
    rest = (scaled - low_rank_rows(scaled, 1)).double().square_().sum((1, 2))
    return rest / scaled.double().square_().sum((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices of entries up to 1, and the powers of two (n, 1, 1) that make them what they were."""
    largest = rows.abs().amax((1, 2), keepdim=True)  # torch's infinity norm is far slower on a CPU
    exponent = torch.frexp(largest).exponent.clamp(-_EXPONENT, _EXPONENT)
    unit = _times_power(torch.ones_like(largest), -exponent)
    return rows * unit, exponent  # the fourth power of one may be no number


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """Return ``x 2^exponent`` in the precision of x; torch before 2.9 takes the default dtype."""
    return torch.ldexp(x, exponent).to(x)


def _leading_basis(rows: Tensor, rank: int) -> Tensor:
    """Return orthonormal columns that nearly span the leading left singular vectors of matrices, (n, a, rank)."""
    n, a, _ = rows.shape
    gram = rows @ rows.transpose(1, 2)  # (n, a, a): the smaller side
    largest = gram.diagonal(dim1=1, dim2=2).topk(rank, dim=1).indices
    basis = gram.gather(2, largest.unsqueeze(1).expand(n, a, rank))  # a first guess: where the energy is
    for _ in range(_ITERATIONS):
        basis, _ = torch.linalg.qr(gram @ basis)
    return basis
