"""Run cases: verify every byte of each, sample what is new in them, and put figures together."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

from gmemcore.benchmark.cases import Case, Stage, allocated_pages
from gmemcore.benchmark.expected import Reference, WrongContentsError
from gmemcore.benchmark.memory import AttributesOnly, Memory
from gmemcore.benchmark.pairs import collector_off
from gmemcore.benchmark.primitives import SOURCE, Primitives
from gmemcore.benchmark.samples import AnyJob, Job, PrimitiveJob, Series, take_samples
from gmemcore.benchmark.scene import Scene, new_scene
from gmemcore.engine import Counters
from gmemcore.engine.host import check_available, keep_freed_memory
from gmemcore.errors import GmemError
from gmemcore.uapi import PAGE_SIZE

Progress = Callable[[float, str], None]
"""Told how much of a run is done, 0 to 1, and what is done now."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is done.

    Attributes
    ----------
    seconds : float
        Time for a run, verification included.
    samples : tuple of int
        Samples of each stage, at least and at most.
    region : int
        Bytes of neighbouring small ranges that one sample converts.
    checked : int
        Bytes that are verified of a case whose work another case has, verified in full.
    """

    seconds: float
    samples: tuple[int, int]
    region: int
    checked: int


USUAL: Final = Effort(seconds=45.0, samples=(5, 30), region=64 << 20, checked=4 << 20)
"""Under a minute for the default selection; 64 MiB are more than caches hold."""
QUICK: Final = Effort(seconds=0.0, samples=(2, 2), region=16 << 20, checked=4 << 20)
"""Every case runs and is verified; the figures mean little."""
QUICK_MEMORY: Final = 64 << 20
"""Default guest memory of a quick run."""
LEGACY_RANGES: Final = 64
"""Ranges of a sample of `legacy`, which are converted call by call."""
ATTRIBUTE_RANGES: Final = (256, 16384)
"""Ranges of a sample that moves no byte, at least and at most."""
EFFECTS: Final = ("KEEP", "ZERO", "SCRAMBLE", "ENCRYPT", "DECRYPT", "populate", "copy")
"""Lines of the verdict."""


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one case.

    Attributes
    ----------
    case : Case
        The case.
    series : dict of Stage to Series
        Samples of each of its stages; empty if it was refused.
    counters : Counters
        Events of one range: its conversion and all that followed it.
    verified_bytes : int
        Bytes that were compared after their conversion.
    timed_as : str or None
        Name of the case whose conversion was sampled: the first one that executes the same.
    """

    case: Case
    series: dict[Stage, Series]
    counters: Counters
    verified_bytes: int
    timed_as: str | None = None


class Bench:
    """Memory, yardsticks and reference, made once; then any number of cases.

    Parameters
    ----------
    memory : Memory
        The guests' bytes.
    effort : Effort
        How much is done for each case.
    threads : int
        Threads of the yardsticks.
    primitives : Primitives or None
        The yardsticks; None: in `memory`.
    """

    def __init__(
        self,
        memory: Memory,
        effort: Effort = USUAL,
        threads: int = 1,
        primitives: Primitives | None = None,
    ) -> None:
        self.memory = memory
        self.effort = effort
        self.reference = Reference()
        self.primitives = primitives or Primitives(memory.side(0).words, memory.source(), threads=threads)
        self.curves: list[PrimitiveJob] = []
        self._jobs: dict[tuple[object, ...], Job] = {}
        self._verified: dict[Case, tuple[Counters, int]] = {}
        self._known: set[tuple[object, ...]] = set()
        self._draw = random.Random(1)  # noqa: S311  an order, no secret
        keep_freed_memory()

    # ---- many cases ----------------------------------------------------------------------------

    def run(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Verify cases, sample them for the time of the effort, and yield their results in order.

        Raises
        ------
        WrongContentsError
            As `verify`.
        """
        self.verify(cases)
        self.sample(cases, self.effort.seconds)
        yield from self.results(cases)

    def verify(self, cases: Sequence[Case], progress: Progress = lambda *_: None) -> None:
        """Execute every case that was not yet, and verify it byte by byte; refused ones are refused.

        Parameters
        ----------
        cases : sequence of Case
            Of one setting.
        progress : callable
            Told the share that is done, up to a half.

        Raises
        ------
        WrongContentsError
            A byte, an attribute, a counter or an answer isn't what policy says: no figure can be trusted.
        """
        with collector_off():
            for place, case in enumerate(cases):
                progress(place / len(cases) / 2, f"verifying {_place(case)}")
                if case not in self._verified:
                    self._verified[case] = self._refuse(case) if case.refused else self._verify(case)

    def results(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Yield the results of cases that were verified and sampled, in order."""
        for case in cases:
            series, first = {}, None
            if not case.refused:
                works = {stage: self._jobs[key] for stage, key in _works(case) if key in self._jobs}
                for job in works.values():
                    job.series.trim()
                series = {stage: job.series for stage, job in works.items() if job.series.own}
                if case.judged not in series:  # interrupted before it was sampled
                    continue
                first = works[Stage.CONVERT].case.name
            yield Result(case, series, *self._verified[case], first)

    def sample(
        self,
        cases: Sequence[Case],
        seconds: float,
        progress: Progress = lambda *_: None,
        *,
        also: Sequence[PrimitiveJob] = (),
        memcpy: bool = False,
    ) -> None:
        """Sample the stages of cases that were not sampled before.

        Parameters
        ----------
        cases : sequence of Case
            Any cases; refused ones are passed over.
        seconds : float
            Time for it.
        progress : callable
            Told the share that is done, from a half on.
        also : sequence of PrimitiveJob
            Primitives to sample in turn with them.
        memcpy : bool
            Compare what moves bytes with memcpy, too.
        """
        new: list[AnyJob] = list(also)
        for case in cases:
            if not case.refused:
                new += self._new_jobs(case, memcpy)
        least, most = self.effort.samples
        began = time.perf_counter()
        with collector_off():
            for done, job in enumerate(take_samples(new, seconds, least, most, self._draw)):
                share = (time.perf_counter() - began) / seconds if seconds else done / len(new) / (most + 1)
                what = f"timing {_place(job.case) if isinstance(job, Job) else job.primitive}"
                progress(0.5 + min(share, 1.0) / 2, what)

    def measured(self, case: Case, stage: Stage) -> Series:
        """Return the samples of a stage of a case that was sampled."""
        return self._jobs[_key(case, stage)].series

    def sample_primitives(self, ranges: Sequence[int]) -> list[PrimitiveJob]:
        """Return a job for each primitive at each range, to be sampled with cases."""
        self.curves = [
            PrimitiveJob(name, size, self._primitive_size(name, size), self.primitives)
            for size in ranges
            for name in ("memcpy", "memset", "xor", "bitmap")
        ]
        return self.curves

    def _primitive_size(self, name: str, range_: int) -> int:
        if name == "bitmap":
            return range_ * _attribute_ranges(range_, self.effort)
        return max(min(self.effort.region, self.memory.size) // range_, 1) * range_

    # ---- one case ------------------------------------------------------------------------------

    def _refuse(self, case: Case) -> tuple[Counters, int]:
        """Make sure that a refused conversion is refused and changes nothing."""
        scene = new_scene(case, self.memory, self.reference)
        scene.prepare()
        try:
            scene.request()
        except GmemError as error:
            outcome = error.outcome
        else:
            outcome = "OK"
        if outcome != case.cell.outcome:
            raise WrongContentsError(f"{case.name}: answered {outcome}, not {case.cell.outcome}")
        scene.check_unchanged()
        return Counters(), case.range

    def _verify(self, case: Case) -> tuple[Counters, int]:
        """Run one range alone for its counters, then a batch, and verify both byte by byte.

        A case whose work another one has is verified on `Effort.checked` bytes.
        """
        keys = {key for _, key in _works(case)}
        limit = self.effort.checked if keys <= self._known else self.memory.size
        self._known |= keys
        alone = new_scene(case, self.memory, self.reference)
        whole = case.range <= limit
        alone.prepare(written=whole)
        alone.run()
        if whole:
            alone.check()
            counters, verified = alone.counters(), case.range
        else:
            alone.time(Stage.ACCESS)
            counters, verified = alone.counters(), self._check(_smaller(case, limit), 1)
        count = min(self._count(case), max(limit // case.range, 1))
        if count > 1:
            verified += self._check(case, count)
        return counters, verified

    def _check(self, case: Case, count: int) -> int:
        scene = new_scene(case, self.memory, self.reference, count)
        scene.prepare()
        scene.run()
        scene.check()
        return scene.size

    def _count(self, case: Case) -> int:
        """Return how many ranges one sample converts."""
        count = max(min(self.effort.region, case.memory) // case.range, 1)
        return min(count, LEGACY_RANGES) if case.abi.legacy else count

    def _new_jobs(self, case: Case, memcpy: bool) -> Iterator[Job]:
        """Yield the jobs of stages whose work was not sampled yet."""
        for stage, key in _works(case):
            if key in self._jobs:
                continue
            scene = self._timing_scene(case, stage)
            yardsticks = [] if stage == Stage.ACCESS else [case.primitive_of(stage)]
            if memcpy and stage == case.judged and case.primitive not in ("bitmap", "memcpy"):
                yardsticks.append("memcpy")
            job = self._jobs[key] = Job(case, stage, scene, self.primitives, yardsticks)
            yield job

    def _timing_scene(self, case: Case, stage: Stage) -> Scene:
        """Return the scene that a stage is timed on: a large guest of attributes alone if no byte moves."""
        stages = [*Stage]
        needed = stages[: stages.index(stage) + 1]
        moves = any(case.moves(each) for each in needed if case.work(each) is not None)
        if moves or case.abi.legacy or case.setting.enforce:
            return new_scene(case, self.memory, self.reference, self._count(case))
        count = _attribute_ranges(case.range, self.effort)
        size = max(count * case.range, case.memory)
        return new_scene(case, AttributesOnly(size), self.reference, count)


def _attribute_ranges(range_: int, effort: Effort) -> int:
    least, most = ATTRIBUTE_RANGES
    return max(least, min(most, effort.region // range_))


def _key(case: Case, stage: Stage) -> tuple[object, ...]:
    """Return what is executed, and at which size."""
    return case.work(stage), case.range, case.pages_allocated_before


def _works(case: Case) -> list[tuple[Stage, tuple[object, ...]]]:
    return [(stage, _key(case, stage)) for stage in Stage if case.work(stage) is not None]


def _smaller(case: Case, size: int) -> Case:
    """Return the case with a smaller range."""
    smaller = replace(case, range=size)
    return replace(
        smaller, pages_allocated_before=allocated_pages(smaller) if case.pages_allocated_before else 0
    )


def _place(case: Case) -> str:
    return f"{case.key.abi} {case.key.vm_type}"


def headline(cases: Sequence[Case]) -> dict[str, Case]:
    """Return the case that stands for each line of the verdict, by effect, in the order of `EFFECTS`.

    Uniform allocated memory of the first setting at the largest range; for KEEP, whose cost is that of
    attributes, at the smallest.
    """
    able = [
        case
        for case in cases
        if not case.refused
        and case.uniform
        and case.pages_allocated_before
        and case.setting == cases[0].setting
    ]
    found: dict[str, Case] = {}
    for effect in EFFECTS:
        own = [case for case in able if _line_of(case) == effect]
        if own:
            sign = 1 if effect == "KEEP" else -1
            found[effect] = min(own, key=lambda case: sign * case.range)
    return found


def _line_of(case: Case) -> str | None:
    """Return the line of the verdict that a case is an example of."""
    if case.judged == Stage.CONVERT:
        return None if case.abi.legacy or not case.platform.private_memory else case.does
    return "copy" if case.abi.legacy else ("populate" if case.primitive == "xor" else None)


def benches(cases: Sequence[Case], effort: Effort = USUAL) -> Iterator[tuple[Bench, list[Case]]]:
    """Yield a `Bench` for each setting of the cases in turn, with its cases; only one holds memory at a time.

    Raises
    ------
    OutOfMemoryError
        ENOMEM: the host has too little memory for one of them.
    """
    for setting, group in groupby(cases, key=lambda case: case.setting):
        own = list(group)
        check_available(memory_needed(own))
        memory = Memory(max(case.memory for case in own), setting.backing, setting.huge_pages)
        bench = Bench(memory, effort, setting.threads)
        try:
            yield bench, own
        finally:
            bench.primitives.close()
            memory.close()


def memory_needed(cases: Sequence[Case]) -> int:
    """Return the bytes that a `Bench` for these cases allocates: guest, `legacy`'s other side, a source."""
    memory = max(case.memory for case in cases)
    sides = 2 if any(case.abi.legacy for case in cases) else 1
    return sides * memory + min(memory, SOURCE)


__all__ = [
    "EFFECTS",
    "PAGE_SIZE",
    "QUICK",
    "QUICK_MEMORY",
    "USUAL",
    "Bench",
    "Effort",
    "Progress",
    "Result",
    "benches",
    "headline",
    "memory_needed",
]
