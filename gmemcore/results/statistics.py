"""Statistics of timings: medians with bootstrap intervals, paired ratios, changes between two runs.

All intervals are percentile bootstrap intervals of a median, drawn from a fixed seed, so the same samples
always give the same interval.

>>> ratio([2.0, 4.0, 2.0], [1.0, 2.0, 1.0])
Interval(median=2.0, low=2.0, high=2.0, n=3)
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE: Final = 0.95
"""Default confidence level of intervals."""
RESAMPLES: Final = 2000
"""Bootstrap resamples; only the third digit of a bound is then random."""
P95_SAMPLES: Final = 20
"""Samples needed for a 95th percentile."""
STABLE_WIDTH: Final = 0.10
"""Half-width of an interval, relative to its median, above which a figure is called unstable."""
STABLE_SAMPLES: Final = 5
"""Samples needed for an interval that means anything."""


class Interval(NamedTuple):
    """A median and its confidence interval.

    Attributes
    ----------
    median : float
        In the unit of the samples.
    low, high : float
        Bounds of the interval.
    n : int
        Samples.
    """

    median: float
    low: float
    high: float
    n: int

    @property
    def width(self) -> float:
        """Half the width of the interval, relative to the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0

    @property
    def stable(self) -> bool:
        """Whether the median is known well enough to be judged."""
        return self.n >= STABLE_SAMPLES and self.width <= STABLE_WIDTH

    def scaled(self, factor: float) -> "Interval":
        """Return the interval in another unit; `factor` is positive."""
        return Interval(self.median * factor, self.low * factor, self.high * factor, self.n)

    def inverse(self, factor: float = 1.0) -> "Interval":
        """Return `factor` divided by the interval: a rate from a time, and the reverse."""
        return Interval(factor / self.median, factor / self.high, factor / self.low, self.n)


def quantile(samples: Sequence[float], q: float) -> float:
    """Return the quantile of q, 0 to 1, with linear interpolation."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(samples: Sequence[float]) -> float:
    """Return the median of at least one sample."""
    return quantile(samples, 0.5)


def p95(samples: Sequence[float]) -> float | None:
    """Return the 95th percentile, or None for fewer than `P95_SAMPLES` samples."""
    return quantile(samples, 0.95) if len(samples) >= P95_SAMPLES else None


def variation(samples: Sequence[float]) -> float:
    """Return the coefficient of variation, standard deviation over mean; 0 for a single sample."""
    n = len(samples)
    mean = math.fsum(samples) / n
    squares = math.fsum((sample - mean) ** 2 for sample in samples)
    return math.sqrt(squares / max(n - 1, 1)) / mean if mean else 0.0


def interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the median of at least one sample, with its interval.

    Parameters
    ----------
    samples : sequence of float
        In any unit.
    confidence : float
        Confidence level, between 0 and 1.
    """
    low, high = _bounds(_medians(samples, 1), confidence)
    return Interval(median(samples), low, high, len(samples))


def ratio(samples: Sequence[float], others: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the median of the ratios of paired samples, with its interval.

    Parameters
    ----------
    samples, others : sequence of float
        Numerators and denominators; those at one place were measured in turn.

    Raises
    ------
    ValueError
        The two have different lengths.
    """
    return interval([own / other for own, other in zip(samples, others, strict=True)], confidence)


def change(new: Sequence[float], old: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the median of `new` over that of `old`, with its interval; the samples aren't paired.

    `n` is that of the smaller series.
    """
    low, high = _bounds(_medians(new, 1) / _medians(old, 2), confidence)
    return Interval(median(new) / median(old), low, high, min(len(new), len(old)))


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of at least one positive value.

    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms))


def _medians(samples: Sequence[float], seed: int) -> NDArray[np.float64]:
    """Return the median of each resample."""
    drawn = np.random.default_rng(seed).integers(0, len(samples), (RESAMPLES, len(samples)))
    medians: Any = np.median(np.asarray(samples, np.float64)[drawn], axis=1)
    return np.asarray(medians, np.float64)


def _bounds(medians: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    outside = (1 - confidence) / 2
    low, high = np.quantile(medians, (outside, 1 - outside)).tolist()
    return low, high
