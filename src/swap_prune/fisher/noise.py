"""Noise models: what makes gradients inaccurate.

Fourth step of the pipeline, off by default: it exists to measure how a method bears noise. A model is a
frozen object with ``apply(rows, generator)``; ``parse_noise("gradient:std=4,fraction=0.25")`` makes one from
text.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import torch

from swap_prune.fisher.factor import DenseFactor

__all__ = ["NOISE_MODELS", "GradientNoise", "NoiseModel", "parse_noise"]


class NoiseModel(Protocol):
    """What the pipeline asks of a noise model; its fields are its settings."""

    def apply(self, factor: DenseFactor, generator: torch.Generator) -> DenseFactor:
        """Return the factor of the noisy rows; the one given is left as it is."""
        ...


@dataclass(frozen=True)
class GradientNoise:
    """The paper's protocol (section 5.2): Gaussian noise on a random part of each gradient.

    In each row of G, ``round(fraction * p)`` entries drawn without replacement get independent noise
    ``N(0, (std * s)^2)``, s being the row's own standard deviation.

    Attributes:
        std: Standard deviation of the noise as a multiple of the row's, >= 0.
        fraction: Part of the entries that is hit, in [0, 1].
    """

    std: float = 1.0
    fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.std < float("inf"):
            raise ValueError(f"gradient noise: std must be finite and at least 0, got {self.std}")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"gradient noise: fraction must lie in [0, 1], got {self.fraction}")

    def apply(self, factor: DenseFactor, generator: torch.Generator) -> DenseFactor:
        """Return the factor of the noisy rows; the one given is left as it is."""
        p = factor.shape[1]
        hit = round(self.fraction * p)
        if hit == 0 or self.std == 0:
            return factor
        noisy = factor.matrix.clone()
        for row in noisy:
            index = torch.randperm(p, generator=generator)[:hit].to(row.device)
            noise = torch.randn(hit, generator=generator).to(row)
            row[index] += self.std * row.std(correction=0) * noise
        return DenseFactor(noisy)


NOISE_MODELS: dict[str, type[NoiseModel]] = {"gradient": GradientNoise}


def parse_noise(spec: str | NoiseModel | None) -> NoiseModel | None:
    """Make a noise model from ``NAME`` or ``NAME:key=value,key=value``.

    Raises:
        ValueError: If the name, a key or a value is not understood.
    """
    if spec is None or (not isinstance(spec, str | type) and callable(getattr(spec, "apply", None))):
        return spec
    name, _, rest = str(spec).partition(":")
    if name not in NOISE_MODELS:
        raise ValueError(f"noise must be one of {', '.join(NOISE_MODELS)}, got {name!r} in {spec!r}")
    model = NOISE_MODELS[name]
    known = {f.name for f in fields(model)}  # type: ignore[arg-type]
    settings: dict[str, float] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise ValueError(f"noise {name!r} has no setting {key!r}; it has {', '.join(sorted(known))}")
        try:
            settings[key] = float(value)
        except ValueError:
            raise ValueError(f"noise setting {key!r} must be a number, got {value!r}") from None
    return model(**settings)
