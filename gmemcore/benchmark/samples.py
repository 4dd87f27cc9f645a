"""Sampling: each stage interleaved with its primitives, and all stages interleaved with each other.

Disturbances of a shared machine last from milliseconds to minutes. Within a sample a stage and its primitives
run next to each other, in random order, so a slow second slows both. Between two samples of a stage all other
stages are sampled, so a slow minute affects a few samples of every stage and not all samples of one.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Final

from gmemcore.benchmark.cases import Case, Stage
from gmemcore.benchmark.primitives import Primitives
from gmemcore.benchmark.scene import Scene
from gmemcore.uapi import PAGE_SIZE

_LONG: Final = 0.5  # seconds of a sample that is not taken twice to learn its time


@dataclass(slots=True)
class Series:
    """Samples of one stage and of the primitives interleaved with it.

    Attributes
    ----------
    pages : int
        Pages that the stage touches in one sample; those of its ranges if it moves no byte.
    ranges : int
        Ranges of one sample.
    own : list of float
        Seconds of the stage over all ranges, one per sample.
    others : dict of str to list of float
        Seconds of each primitive over the same pages, place by place.
    calls : list of float
        Seconds of one call from Python.
    moves : bool
        Whether the stage moves bytes.
    """

    pages: int
    ranges: int
    moves: bool = True
    own: list[float] = field(default_factory=list)
    others: dict[str, list[float]] = field(default_factory=dict)
    calls: list[float] = field(default_factory=list)

    def trim(self) -> None:
        """Drop an incomplete last sample."""
        whole = min(map(len, (self.own, *self.others.values())))
        for samples in (self.own, *self.others.values()):
            del samples[whole:]


class Job:
    """One stage of one case with its primitives: a unit of sampling.

    Parameters
    ----------
    case : Case
        The first case with this work.
    stage : Stage
        Which stage of it.
    scene : Scene
        The case, over all ranges of a sample.
    primitives : Primitives
        The primitives.
    yardsticks : sequence of str
        Primitives to interleave with it.
    share : float
        Samples that it gets, relative to other jobs of the same cost.
    """

    def __init__(
        self,
        case: Case,
        stage: Stage,
        scene: Scene,
        primitives: Primitives,
        yardsticks: Sequence[str],
        share: float = 1.0,
    ) -> None:
        self.case, self.stage, self.share = case, stage, share
        self._scene, self._primitives = scene, primitives
        self._touched = case.touched(case.range) if stage == Stage.CONVERT else case.range
        self._calls = stage == Stage.CONVERT and scene.count > 1
        self.series = Series(scene.count * self._touched // PAGE_SIZE, scene.count, case.moves(stage))
        self.series.others = {name: [] for name in yardsticks}
        self.cost = 0.0

    def add_yardstick(self, name: str) -> None:
        """Interleave another primitive; only before the first sample."""
        assert not self.series.own
        self.series.others.setdefault(name, [])

    def warm_up(self, draw: random.Random) -> None:
        """Take a sample that doesn't count, and learn its time."""
        try:
            began = time.perf_counter()
            self.sample(draw)  # compiles, and finds the fastest primitives
            middle = time.perf_counter()
            if middle - began < _LONG:
                self.sample(draw)
                began = middle
            self.cost = time.perf_counter() - began
        finally:
            for samples in (self.series.own, self.series.calls, *self.series.others.values()):
                samples.clear()

    def sample(self, draw: random.Random) -> None:
        """Take one sample."""
        runs: dict[str, Callable[[], float]] = {"": self._stage}
        runs |= {name: self._yardstick(name) for name in self.series.others}
        for name in draw.sample(list(runs), len(runs)):
            (self.series.others[name] if name else self.series.own).append(runs[name]())
        if self._calls:
            self._scene.prepare(self.stage, written=False)
            self.series.calls.append(self._scene.call())
        self._scene.settle()

    def _stage(self) -> float:
        """Time the stage; nothing comes between it and its preparation, least of all a primitive's writes."""
        self._scene.prepare(self.stage, written=False)
        return self._scene.time(self.stage)

    def _yardstick(self, name: str) -> Callable[[], float]:
        size, step = self._scene.count * self._touched, self._touched
        if name == "bitmap":
            return lambda: self._primitives.bits(self._scene.size, self.case.range, self.case.to_private)
        return lambda: self._primitives.seconds(name, size, step)


class PrimitiveJob:
    """One primitive at one range, by itself: a point on its curve."""

    def __init__(self, primitive: str, range_: int, size: int, primitives: Primitives) -> None:
        self.primitive, self.range = primitive, range_
        self._size, self._primitives = size, primitives
        self.series = Series(size // PAGE_SIZE, size // range_)
        self.share, self.cost = 1.0, 0.0

    @property
    def by(self) -> str:
        """Return the implementation that was fastest."""
        return self._primitives.names[self.primitive, self.range]

    def warm_up(self, draw: random.Random) -> None:
        """See `Job.warm_up`."""
        self.sample(draw)
        began = time.perf_counter()
        self.sample(draw)
        self.cost = time.perf_counter() - began
        self.series.own.clear()

    def sample(self, draw: random.Random) -> None:
        """See `Job.sample`."""
        if self.primitive == "bitmap":
            self.series.own.append(self._primitives.bits(self._size, self.range, True))
        else:
            self.series.own.append(self._primitives.seconds(self.primitive, self._size, self.range))


AnyJob = Job | PrimitiveJob


def take_samples(
    jobs: Sequence[AnyJob], seconds: float, least: int, most: int, draw: random.Random
) -> Iterator[AnyJob]:
    """Sample jobs, interleaved; yield each job after each of its samples.

    Parameters
    ----------
    jobs : sequence of Job or PrimitiveJob
        Jobs without samples.
    seconds : float
        Time for all of them. The least number of samples can exceed it.
    least, most : int
        Samples per job.
    draw : random.Random
        Draws the order.
    """
    end = time.perf_counter() + seconds
    for job in jobs:
        job.warm_up(draw)
        yield job
    counts = _counts(jobs, end - time.perf_counter(), least, most)
    order = sorted(
        ((k + draw.random()) / count, place) for place, count in enumerate(counts) for k in range(count)
    )
    for _, place in order:
        job = jobs[place]
        if len(job.series.own) < least or time.perf_counter() < end:
            job.sample(draw)
            yield job


def _counts(jobs: Sequence[AnyJob], seconds: float, least: int, most: int) -> list[int]:
    """Return the samples per job that fill the time, within the bounds.

    They are proportional to a job's share and inversely to the square root of its cost, which gives the
    figures of all jobs the least variance in total (Neyman's allocation).
    """
    costs = [max(job.cost, 1e-9) for job in jobs]
    wanted = [job.share / sqrt(cost) for job, cost in zip(jobs, costs, strict=True)]
    low, high = 0.0, max((most / each for each in wanted), default=0.0)

    def counts(unit: float) -> list[int]:
        return [max(least, min(most, int(unit * each))) for each in wanted]

    for _ in range(40):
        middle = (low + high) / 2
        taken = sum(cost * count for cost, count in zip(costs, counts(middle), strict=True))
        low, high = (middle, high) if taken <= seconds else (low, middle)
    return counts(low)
