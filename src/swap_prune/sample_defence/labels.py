"""Can the calibration labels be believed? The dense network's own predictions tell.

Let q be the dense network's prediction for a sample, at a temperature T at which it is calibrated (Guo et al., ICML
2017): labels are drawn from it. Where a share rho of them was replaced by a class at random, they follow

    P(label) = (1 - rho) q(label) + rho / classes,    q = softmax(z / T),    T >= 1.

rho and T are fitted together by maximum likelihood (for T = 1 a class-independent case of Sukhbaatar et al., ICLR 2015
workshop, arXiv 1406.2080). Inputs that are unlike those of training make a network too sure of itself, most wrong where
it is least sure: that is T. A label that was replaced is wrong however sure the network is: that is rho. Where rho is
not significant beside T the labels are taken as they are. Otherwise each label gets its trust, the posterior
probability that it was not replaced, and the dense network's prediction takes the place of what is not trusted.

Place in the pipeline: a defence, for the first-order steps and for the choices by held-out loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from swap_prune.losses import CrossEntropy, LossFn

__all__ = ["TEMPERATURES", "LabelDoubt", "doubt_labels"]

_LEAST_RATE = 0.02  # of rho: less is left alone
_LEAST_EVIDENCE = 10.0  # log-likelihood ratio against rho = 0; chance exceeds it once in 10^5 times
_RATES = 100  # the grid of rho
TEMPERATURES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # the grid of T
_FURTHER = tuple(2.0**n * part for n in range(4, 12) for part in (1.5, 2.0))  # and more, if better than chance


@dataclass(frozen=True)
class LabelDoubt:
    """Labels that the dense network contradicts more often than it expects to be wrong.

    Attributes:
        rate: rho, the share of labels that say nothing, in (0, 1).
        temperature: T, that the network's outputs are divided by.
    """

    rate: float
    temperature: float = 1.0

    def wrong(self, classes: int) -> float:
        """Return the share of labels that are wrong: of those replaced at random one in ``classes`` is right again."""
        return self.rate * (1 - 1 / classes)

    def trust(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the posterior probability that each label was not replaced, (n,).

        Args:
            outputs: Logits of the dense network, (n, classes).
            targets: Class indices, (n,).
        """
        believed = (1 - self.rate) * _likelihood(outputs / self.temperature, targets)
        return (believed / (believed + self.rate / outputs.shape[1])).to(outputs.dtype)


def doubt_labels(loss_fn: LossFn, outputs: Sequence[Tensor], batches: Sequence[Any]) -> LabelDoubt | None:
    """Compare labels with what the dense network predicts.

    Args:
        loss_fn: Only for the cross-entropy of one label a sample is there an answer.
        outputs: Logits of the dense network on the batches, (n, classes) each.
        batches: Pairs of inputs and targets.

    Returns:
        The doubt; None where there is no reason for any.
    """
    if not isinstance(loss_fn, CrossEntropy) or not outputs:
        return None
    if any(z.ndim != 2 for z in outputs) or any(b[1].ndim != 1 or b[1].is_floating_point() for b in batches):
        return None
    targets, logits = torch.cat([batch[1] for batch in batches]), torch.cat(list(outputs))
    rates = torch.arange(_RATES, dtype=torch.float64, device=logits.device).unsqueeze(1) / _RATES
    chance = -len(targets) * math.log(logits.shape[1])
    temperatures, evidence = [], []
    for temperature in (*TEMPERATURES, *_FURTHER):
        likelihood = ((1 - rates) * _likelihood(logits / temperature, targets) + rates / logits.shape[1]).log().sum(1)
        if temperature in TEMPERATURES or float(likelihood[0]) > chance + _LEAST_EVIDENCE:
            temperatures.append(temperature)
            evidence.append(likelihood)
    found = torch.stack(evidence)  # (temperatures, rates)
    number, best = divmod(int(found.argmax()), _RATES)
    rate, gain = best / _RATES, found[number, best] - found[:, 0].max()
    if rate < _LEAST_RATE or not float(gain) > _LEAST_EVIDENCE:
        return None
    return LabelDoubt(rate, temperatures[number])


def _likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the softmax at the labels, (n,), in float64."""
    return (-functional.cross_entropy(outputs.double(), targets.long(), reduction="none")).exp()
