"""Comparisons that hold on a busy machine: interleaved runs, paired ratios, intervals of their median.

A round runs every contestant once, in random order, so none always finds the caches and the clock as the same
other one left them. Ratios are taken within a round: if the machine changes its speed half-way, all times
change and no ratio does.

>>> seconds = {"engine": [2.0, 4.0, 2.0], "memset": [1.0, 2.0, 1.0]}
>>> ratio(seconds, "engine", "memset")
Interval(median=2.0, low=2.0, high=2.0, n=3)
>>> verdict("engine / memset", ratio(seconds, "engine", "memset"), most=2.5)
engine / memset: 2 (2 to 2, 3 pairs), at most 2.5: met
True
"""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gmemcore.results import statistics
from gmemcore.results.statistics import Interval


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def paired(
    runs: Mapping[str, Callable[[], float]], pairs: int, warmup: int = 1, seed: int = 1
) -> dict[str, list[float]]:
    """Run every contestant once per round, in random order, with the garbage collector off.

    Parameters
    ----------
    runs : mapping of str to callable
        Each does its work and returns its seconds, without preparation.
    pairs : int
        Rounds that count, at least one.
    warmup : int
        Rounds before them, dropped.
    seed : int
        Of the order.

    Returns
    -------
    dict of str to list of float
        Seconds by contestant, one per round.
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


def ratio(seconds: Mapping[str, Sequence[float]], of: str, to: str) -> Interval:
    """Return the paired ratio of the times of two contestants.

    The *speed* of `a` relative to `b` is ``ratio(seconds, b, a)``.

    Parameters
    ----------
    seconds : mapping
        As `paired` returns.
    of, to : str
        Numerator and denominator.
    """
    return statistics.ratio(seconds[of], seconds[to])


def verdict(
    what: str,
    figure: Interval,
    *,
    least: float | None = None,
    least_low: float | None = None,
    most: float | None = None,
) -> bool:
    """Print a ratio and its bar on one line; return whether it is met (true without a bar).

    Parameters
    ----------
    what : str
        What is compared, with the times if they matter.
    figure : Ratio
        The ratio.
    least, most : float or None
        Bounds of the median.
    least_low : float or None
        Least lower bound of the interval.
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
    """Switch the garbage collector off."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
