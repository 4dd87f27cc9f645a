"""Figures of a series of samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gmemcore.units import NOISY


@dataclass(frozen=True, slots=True)
class Summary:
    """A series of samples in four figures.

    Attributes
    ----------
    median, p95 : float
        In the unit of the samples.
    cv : float
        Standard deviation over mean; 0 for a single sample.
    n : int
        Samples.
    """

    median: float
    p95: float
    cv: float
    n: int

    @property
    def noisy(self) -> bool:
        """Whether the samples differ so much that the median says little."""
        return self.cv > NOISY


def quantile(samples: Sequence[float], q: float) -> float:
    """Return a quantile, 0 <= q <= 1, linear between neighbours."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(samples: Sequence[float]) -> Summary:
    """Return the figures of a series of at least one sample."""
    n = len(samples)
    mean = math.fsum(samples) / n
    variance = math.fsum((sample - mean) ** 2 for sample in samples) / max(n - 1, 1)
    cv = math.sqrt(variance) / mean if mean else 0.0
    return Summary(quantile(samples, 0.5), quantile(samples, 0.95), cv, n)


def median_ratio(seconds: Sequence[float], yardstick: Sequence[float]) -> float:
    """Return the median of the paired ratios yardstick / seconds: above 1 is faster than the yardstick."""
    return quantile([base / own for own, base in zip(seconds, yardstick, strict=True)], 0.5)
