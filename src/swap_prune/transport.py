"""Entropic optimal transport between the two clouds of projected weights, and what regression needs of it.

The paper's OT_eps (its equation 6) between ``x = G w`` and ``y = G w_bar``, both (n,) with mass 1/n a point::

    OT_eps(x, y) = min over P 1 = P^T 1 = 1/n  of  sum_ij P_ij (x_i - y_j)^2 + eps KL(P | R)

The paper's reference measure is uniform, ``R = 1 1^T / n^2``. Here it may be *anchored* to the pairing of x_i
with y_i, ``R = (1 - a) I/n + a 1 1^T / n^2``: ``a = 1`` is the paper, ``a = 0`` leaves only the plan
``I/n`` and so gives back least squares (LR).

By the envelope theorem the gradient of ``n/2 OT_eps(G w, y)`` is that of least squares against the barycentric
target ``t_i = n sum_j P_ij y_j``: a sparse solver needs the target and never sees the plan.

With a *relaxation* tau the marginals need not be 1/n: their distance to it is paid for,

    min over P >= 0  of  sum_ij P_ij (x_i - y_j)^2 + eps KL(P | R) + tau KL(P 1 | 1/n) + tau KL(P^T 1 | 1/n),

so that a point which lies far from all others loses its mass (unbalanced transport; Chizat et al., Mathematics of
Computation 87, 2018). With ``a = 0`` what is left of row i is ``exp(-(x_i - y_i)^2 / (eps + 2 tau)) / n``.

A balanced plan is found on its dual, in the log domain and in float64: rows are normalised in closed form, columns by
inexact Newton steps on the concave semi-dual (Sinkhorn's update where they do not ascend). They begin at a solution
of the dual for eps = 0, which two clouds on a line have in closed form: no path of eps leads there. The plan returned
is rounded to exact marginals (Altschuler, Weed and Rigollet, 2017, algorithm 2), so that it is a coupling whatever eps
was asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "TransportPlan",
    "barycentric_target",
    "relaxed_target",
    "sorted_potential",
    "squared_cost",
    "transport_plan",
]

_CONJUGATE = 40  # steps of conjugate gradients at the most, and a tenth of n: a direct solution costs no less
_FORCING = 0.1  # relative residual of a Newton direction at the most; near the solution it is the residual of the dual


@dataclass(frozen=True)
class TransportPlan:
    """A coupling and how well it was found.

    Attributes:
        plan: P, (n, n), float64, rows and columns sum to 1/n, or less without balance; row i belongs to x_i, column j
            to y_j.
        epsilon: eps in the unit of the cost.
        converged: Whether the dual met the tolerance (of a balanced plan before the rounding).
        iterations: Dual steps.
        residual: Largest relative error of a column sum before the rounding; without balance, the largest last step of
            a logarithm of the scaling.
    """

    plan: Tensor
    epsilon: float
    converged: bool
    iterations: int
    residual: float


def squared_cost(x: Tensor, y: Tensor) -> Tensor:
    """Return the cost ``(x_i - y_j)^2``, (n, m), in float64."""
    centre = y.double().mean()
    return (x.double().sub(centre)[:, None] - y.double().sub(centre)[None, :]).square()


def transport_plan(
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    anchor: float = 1.0,
    relaxation: float = math.inf,
    tolerance: float = 1e-9,
    max_iterations: int = 200,
) -> TransportPlan:
    """Solve the anchored entropic transport problem between two point clouds on the line.

    Args:
        x: First cloud, (n,).
        y: Second cloud, (n,), paired with the first by index.
        epsilon: eps > 0, in the unit of the cost (that is, of x squared).
        anchor: a in [0, 1], the weight of the uniform part of the reference measure.
        relaxation: tau > 0, in the unit of the cost; infinite for exact marginals.
        tolerance: Residual at which the dual counts as solved.
        max_iterations: Dual steps; ten times as many, each far cheaper, without balance.

    Returns:
        The plan.

    Raises:
        ValueError: If the clouds differ in size or are not finite, or eps, the anchor or tau is out of range.
    """
    _check(x, y, epsilon, anchor, relaxation)
    n = len(x)
    if anchor == 0 and relaxation < math.inf:
        mass = (x.double() - y.double()).square_().div_(-(epsilon + 2 * relaxation)).exp_() / n
        return TransportPlan(torch.diag(mass), epsilon, converged=True, iterations=0, residual=0.0)
    if anchor == 0:
        eye = torch.eye(n, dtype=torch.float64, device=x.device) / n
        return TransportPlan(eye, epsilon, converged=True, iterations=0, residual=0.0)
    cost = squared_cost(x, y)
    log_reference = torch.full_like(cost, math.log(anchor) - 2 * math.log(n))
    log_reference.fill_diagonal_(math.log((1 - anchor) / n + anchor / n**2))
    if relaxation < math.inf:
        logits = log_reference - cost / epsilon
        return _unbalanced(logits, epsilon, relaxation, tolerance=tolerance, max_iterations=10 * max_iterations)
    potential, iterations, residual = _solve_dual(
        cost, log_reference, epsilon, sorted_potential(x, y), tolerance=tolerance, max_iterations=max_iterations
    )
    plan, _ = _row_normalised(cost, log_reference, epsilon, potential)
    return TransportPlan(_round_to_marginals(plan), epsilon, residual <= tolerance, iterations, residual)


def barycentric_target(plan: Tensor, y: Tensor) -> Tensor:
    """Return ``t_i = n sum_j P_ij y_j``, (n,): where the plan sends x_i, on average."""
    return (plan @ y.to(plan.dtype) * len(y)).to(y.dtype)


def relaxed_target(plan: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a plan without balance sends x_i, on average, and what is left of it, ``n sum_j P_ij``, (n,) each.

    What has lost all its mass is sent to y_i.
    """
    mass = plan.sum(1)
    there = mass > 0
    target = (plan @ y.to(plan.dtype)) / torch.where(there, mass, 1)
    return torch.where(there, target, y.to(plan.dtype)).to(y.dtype), (mass * len(y)).to(y.dtype)


def sorted_potential(x: Tensor, y: Tensor) -> Tensor:
    """Return an optimal potential g of y (n,), float64, for eps = 0.

    The plan then matches the clouds in order of size. With both sorted, that is optimal where no neighbour is cheaper::

        c(k+1, k+1) - c(k+1, k) <= g_{k+1} - g_k <= c(k, k+1) - c(k, k)

    The middle is taken, ``(y_{k+1} - y_k) (y_k + y_{k+1} - x_k - x_{k+1})``: each neighbour is then as far from being
    cheaper as it can be.
    """
    centre, order = y.double().mean(), y.double().argsort(stable=True)
    u, v = x.double().sub(centre).sort().values, y.double().sub(centre)[order]
    steps = (v[1:] - v[:-1]) * (v[1:] + v[:-1] - u[1:] - u[:-1])
    potential = torch.zeros_like(v).index_copy_(0, order[1:], steps.cumsum(0))
    return potential - potential.mean()


def _solve_dual(
    cost: Tensor,
    log_reference: Tensor,
    epsilon: float,
    potential: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, int, float]:
    """Maximise the semi-dual ``mean(f(g)) + mean(g)`` over g; return g, the steps and the residual."""
    n = len(potential)
    plan, value = _row_normalised(cost, log_reference, epsilon, potential)
    for iteration in range(max_iterations + 1):
        columns = plan.sum(0)
        residual = float((columns * n - 1).abs().max())
        if residual <= tolerance or iteration == max_iterations:
            break
        step = _newton_direction(plan, columns, epsilon, min(_FORCING, residual))
        scale = 1.0
        while scale > 1e-2:  # damped Newton, accepted when the dual ascends
            candidate = potential + scale * step
            candidate_plan, candidate_value = _row_normalised(cost, log_reference, epsilon, candidate)
            if candidate_value > value:
                break
            scale /= 4
        else:  # Sinkhorn's update always ascends; at its own fixed point nothing is left to gain
            candidate = potential - epsilon * (columns.clamp_min(1e-300).log() + math.log(n))
            candidate_plan, candidate_value = _row_normalised(cost, log_reference, epsilon, candidate)
            if float((candidate_plan.sum(0) * n - 1).abs().max()) >= residual and candidate_value <= value:
                break
        potential, plan, value = candidate, candidate_plan, candidate_value
    return potential, iteration, residual


def _unbalanced(
    logits: Tensor, epsilon: float, relaxation: float, *, tolerance: float, max_iterations: int
) -> TransportPlan:
    """Scale ``exp(logits)``, (n, n), by Sinkhorn's iteration with softened marginals, in the log domain.

    ``log u = k (log(1/n) - logsumexp over j of (logits + log v))`` with ``k = tau / (tau + eps)``, and v alike: each
    round brings the scaling nearer by a factor of k^2 at the least.
    """
    n, softness = len(logits), relaxation / (relaxation + epsilon)
    rows = torch.zeros(n, dtype=logits.dtype, device=logits.device)
    columns = torch.zeros_like(rows)
    residual, iteration = math.inf, 0
    while residual > tolerance and iteration < max_iterations:
        before = columns
        rows = -softness * (math.log(n) + torch.logsumexp(logits + columns, dim=1))
        columns = -softness * (math.log(n) + torch.logsumexp(logits + rows[:, None], dim=0))
        residual, iteration = float((columns - before).abs().max()), iteration + 1
    plan = (logits + rows[:, None] + columns).exp_()
    return TransportPlan(plan, epsilon, residual <= tolerance, iteration, residual)


def _row_normalised(cost: Tensor, log_reference: Tensor, epsilon: float, potential: Tensor) -> tuple[Tensor, float]:
    """Return the plan whose rows sum to 1/n for the column potential g, and the semi-dual's value."""
    n = len(potential)
    logits = (potential - cost) / epsilon + log_reference
    peak = logits.max(1, keepdim=True).values
    plan = (logits - peak).exp_()
    sums = plan.sum(1, keepdim=True)
    value = float(potential.mean() - epsilon * (peak + sums.log()).mean())
    return plan.div_(sums * n), value


def _newton_direction(plan: Tensor, columns: Tensor, epsilon: float, accuracy: float) -> Tensor:
    """Solve ``A d = eps (1/n - c)``, ``A = diag(c) - n P^T P``, up to a relative residual (inexact Newton).

    A times a vector costs two products with the plan, A itself n of them. So this goes by conjugate gradients with A's
    diagonal for a preconditioner, or directly where these take too long, as for a plan that is nearly a permutation.
    The constants are A's null space. All is in units of eps, whose square may be too small or too large for a number.
    """
    n = len(columns)
    right = 1 / n - columns  # sums to zero, but for rounding
    diagonal = (columns - n * plan.square().sum(0)).clamp_min_(1e-14 / n)
    direction, residual = torch.zeros_like(right), right - right.mean()
    ahead = conjugate = residual / diagonal
    product, goal = torch.dot(residual, ahead), accuracy * float(torch.linalg.vector_norm(residual))
    for _ in range(min(_CONJUGATE, n // 10)):
        image = columns * conjugate - n * (plan.T @ (plan @ conjugate))
        length = product / torch.dot(conjugate, image)
        direction = direction + length * conjugate
        residual = residual - length * image
        if float(torch.linalg.vector_norm(residual)) <= goal:
            return epsilon * direction
        ahead = residual / diagonal
        product, before = torch.dot(residual, ahead), product
        conjugate = ahead + (product / before) * conjugate
    return epsilon * _direct(plan, columns, right)


def _direct(plan: Tensor, columns: Tensor, right: Tensor) -> Tensor:
    """Solve the same with A written out; the null space is fixed at zero."""
    n = len(columns)
    curvature = torch.diag(columns * (1 + 1e-12) + 1e-14 / n) - n * (plan.T @ plan)
    curvature += 1 / n**2
    direction: Tensor
    direction, info = torch.linalg.solve_ex(curvature, right)
    if int(info) != 0 or not bool(torch.isfinite(direction).all()):
        return torch.zeros_like(columns)
    return direction


def _round_to_marginals(plan: Tensor) -> Tensor:
    """Return the nearest-by coupling with rows and columns summing to 1/n exactly (to rounding)."""
    n = len(plan)
    plan = plan * (1 / (n * plan.sum(1, keepdim=True))).clamp(max=1)
    plan = plan * (1 / (n * plan.sum(0, keepdim=True))).clamp(max=1)
    rows, columns = (1 / n - plan.sum(1)).clamp(min=0), (1 / n - plan.sum(0)).clamp(min=0)
    missing = rows.sum()
    return plan + torch.outer(rows, columns) / missing if float(missing) > 0 else plan


def _check(x: Tensor, y: Tensor, epsilon: float, anchor: float, relaxation: float) -> None:
    if x.ndim != 1 or x.shape != y.shape or len(x) == 0:
        raise ValueError(f"x and y must both have shape (n,), got {tuple(x.shape)} and {tuple(y.shape)}")
    if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("x and y must be finite")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if not 0 <= anchor <= 1:
        raise ValueError(f"anchor must lie in [0, 1], got {anchor}")
    if not relaxation > 0:
        raise ValueError(f"relaxation must be positive, got {relaxation}")
