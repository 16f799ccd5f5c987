"""Slow, obvious float64 versions of what the library computes fast."""

import itertools
import math

import torch


def dense_value(G, target, w, reference, ridge, metric, smoothing=None):
    """Q(w), by its formula, with every matrix written out."""
    n = len(G)
    residual = G @ w - target
    drift = w - reference
    S = torch.eye(n, dtype=G.dtype) if smoothing is None else smoothing
    return float(residual @ S @ residual / 2 + n * ridge / 2 * (drift @ torch.diag(metric) @ drift))


def difference_gradient(function, w, step=1e-5):
    """Central differences of a function (p,) -> float."""
    gradient = torch.empty_like(w)
    for j in range(len(w)):
        ahead, behind = w.clone(), w.clone()
        ahead[j] += step
        behind[j] -= step
        gradient[j] = (function(ahead) - function(behind)) / (2 * step)
    return gradient


def normal_equation_refit(G, target, reference, ridge, metric, support, smoothing=None):
    """Minimise Q on a support; of several minimisers the one nearest to the reference in the metric.

    In the coordinates ``sqrt(m) (w - w_bar)`` the metric is Euclidean, and the pseudo-inverse picks that one.
    """
    n = len(G)
    S = torch.eye(n, dtype=G.dtype) if smoothing is None else smoothing
    scale = metric[support].rsqrt()
    columns = G[:, support] * scale
    kept = reference[support]
    residual = target - G[:, support] @ kept
    matrix = columns.T @ S @ columns + n * ridge * torch.eye(len(support), dtype=G.dtype)
    change = torch.linalg.pinv(matrix, rtol=1e-12) @ (columns.T @ S @ residual)
    w = torch.zeros_like(reference)
    w[support] = kept + scale * change
    return w


def best_subset(G, target, reference, ridge, metric, keep, smoothing=None):
    """The optimum over every support of size k: (value, support)."""
    best = (math.inf, ())
    for support in itertools.combinations(range(G.shape[1]), keep):
        w = normal_equation_refit(G, target, reference, ridge, metric, list(support), smoothing)
        best = min(best, (dense_value(G, target, w, reference, ridge, metric, smoothing), support))
    return best


def per_sample_gradients(model, names, loss_fn, samples):
    """One backward pass a sample: rows (n, p) in float64, and losses (n,). The model must be in the mode wanted."""
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    rows, losses = [], []
    for sample in samples:
        (loss,) = loss_fn(model, sample)
        gradients = torch.autograd.grad(loss, chosen, allow_unused=True)
        filled = [torch.zeros_like(w) if g is None else g for w, g in zip(chosen, gradients, strict=True)]
        rows.append(torch.cat([g.reshape(-1).double() for g in filled]))
        losses.append(loss.detach().double())
    return torch.stack(rows), torch.stack(losses)


def reference_measure(n, anchor):
    """R = (1 - a) I/n + a 11^T/n^2."""
    return (1 - anchor) * torch.eye(n, dtype=torch.float64) / n + anchor * torch.ones(n, n, dtype=torch.float64) / n**2


def sinkhorn(cost, measure, epsilon, iterations=2000):
    """Plain log-domain Sinkhorn: the plan of ``<P, C> + eps KL(P | R)`` with both marginals 1/n."""
    n = len(cost)
    logits = measure.log() - cost / epsilon
    f = torch.zeros(n, dtype=torch.float64)
    g = torch.zeros(n, dtype=torch.float64)
    for _ in range(iterations):
        f = -math.log(n) - torch.logsumexp(logits + g[None, :], 1)
        g = -math.log(n) - torch.logsumexp(logits + f[:, None], 0)
    return (logits + f[:, None] + g[None, :]).exp()


def transport_value(x, y, epsilon, anchor=1.0):
    """OT_eps(x, y) = sum P C + eps KL(P | R) at the plan of `sinkhorn`."""
    cost = (x[:, None] - y[None, :]) ** 2
    measure = reference_measure(len(x), anchor)
    plan = sinkhorn(cost, measure, epsilon)
    return float((plan * cost).sum() + epsilon * (plan * (plan / measure).log()).sum())


def damped_fisher(G, damping):
    """F = G^T G/n + c I, written out."""
    return G.T @ G / len(G) + damping * torch.eye(G.shape[1], dtype=G.dtype)


def brain_surgeon(F, w, removed):
    """Minimise 1/2 d^T F d subject to w + d = 0 on the removed weights, by its Lagrange conditions: w + d."""
    p, q = len(w), len(removed)
    E = torch.eye(p, dtype=w.dtype)[:, removed]
    system = torch.cat([torch.cat([F, E], 1), torch.cat([E.T, torch.zeros(q, q, dtype=w.dtype)], 1)])
    return w + torch.linalg.solve(system, torch.cat([torch.zeros(p, dtype=w.dtype), -w[removed]]))[:p]
