"""Comparisons that hold on a busy machine: runs in turn, ratios pair by pair, and how sure their median is.

A round runs every contestant once, in an order drawn anew, so that none always meets the caches and the clock
that the same one left behind. What is compared are the times of one round; a machine that changes its speed
half-way changes every time and no ratio.

>>> seconds = {"engine": [2.0, 4.0, 2.0], "memset": [1.0, 2.0, 1.0]}
>>> ratio(seconds, "engine", "memset")
Ratio(median=2.0, low=2.0, high=2.0, n=3)
>>> verdict("engine / memset", ratio(seconds, "engine", "memset"), most=2.5)
engine / memset: 2 (2 to 2, 3 pairs), at most 2.5: met
True
"""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gmemcore.benchmark.summary import quantile

CONFIDENCE: Final = 0.95
"""Of the interval that a ratio is given with."""
RESAMPLES: Final = 4000
"""Of the bootstrap: its bounds then move by less than the ratios' last printed digit."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of paired ratios.

    Attributes
    ----------
    median : float
        Of the ratios of each pair.
    low, high : float
        Bounds of the median, `CONFIDENCE` between them, by bootstrap.
    n : int
        Pairs.
    """

    median: float
    low: float
    high: float
    n: int


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the seconds of one call: what makes a plain call a contestant."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def paired(
    runs: Mapping[str, Callable[[], float]], pairs: int, warmup: int = 1, seed: int = 1
) -> dict[str, list[float]]:
    """Run every contestant once a round, in an order that changes, with the garbage collector off.

    Parameters
    ----------
    runs : mapping of str to callable
        Each does its work and returns the seconds that count: what it must prepare isn't timed.
    pairs : int
        Rounds whose times are kept, at least one.
    warmup : int
        Rounds before them, whose times are dropped.
    seed : int
        Of the order.

    Returns
    -------
    dict of str to list of float
        Seconds by contestant, a round an element.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(seed)  # noqa: S311  an order, no secret
    with collector_off():
        for round_ in range(warmup + pairs):
            for name in order.sample(list(runs), len(runs)):
                taken = runs[name]()
                if round_ >= warmup:
                    seconds[name].append(taken)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], of: str, to: str) -> Ratio:
    """Return the time of one contestant over the time of another.

    How many times as *fast* `a` is as `b` is the same question the other way round: ``ratio(seconds, b, a)``.

    Parameters
    ----------
    seconds : mapping
        As `paired` returns.
    of, to : str
        Numerator and denominator.
    """
    ratios = [own / other for own, other in zip(seconds[of], seconds[to], strict=True)]
    drawn = np.random.default_rng(1).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    medians = np.median(np.asarray(ratios)[drawn], axis=1).tolist()
    outside = (1 - CONFIDENCE) / 2
    return Ratio(
        quantile(ratios, 0.5), quantile(medians, outside), quantile(medians, 1 - outside), len(ratios)
    )


def verdict(
    what: str,
    figure: Ratio,
    *,
    least: float | None = None,
    least_low: float | None = None,
    most: float | None = None,
) -> bool:
    """Print a ratio and its bar on one line; returns whether it is met, true where there is no bar.

    Parameters
    ----------
    what : str
        What is compared with what, and the times behind it if they matter.
    figure : Ratio
        The ratio.
    least, most : float or None
        What the median must reach, what it must not exceed.
    least_low : float or None
        What the lower bound must reach.
    """
    bars = (
        (least, "at least {:g}", figure.median, 1),
        (least_low, "the lower bound at least {:g}", figure.low, 1),
        (most, "at most {:g}", figure.median, -1),
    )
    asked = [
        (text.format(bar), (found - bar) * sign >= 0) for bar, text, found, sign in bars if bar is not None
    ]
    met = all(holds for _, holds in asked)
    found = f"{figure.median:.3g} ({figure.low:.3g} to {figure.high:.3g}, {figure.n} pairs)"
    answer = ("met" if met else "MISSED") if asked else "reported"
    print(f"{what}: {', '.join([found, *(text for text, _ in asked)])}: {answer}", flush=True)
    return met


@contextmanager
def collector_off() -> Iterator[None]:
    """Keep the garbage collector out of the samples."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
