"""Run cases: verify every byte of each, sample each distinct work once, and collect the results."""

import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
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
from gmemcore.engine.byte_operations import BYTE_OPERATIONS
from gmemcore.engine.host import check_available, keep_freed_memory
from gmemcore.errors import GmemError
from gmemcore.uapi import PAGE_SIZE

Progress = Callable[[float, str], None]
"""Called with the share of the run that is done, 0 to 1, and with what runs next."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much work a run does.

    Attributes
    ----------
    seconds : float
        Time of a run, including verification.
    samples : tuple of int
        Least and most samples per stage.
    region : int
        Bytes of adjacent small ranges that one sample converts.
    checked : int
        Bytes to verify of a case whose work was verified in full for another case.
    """

    seconds: float
    samples: tuple[int, int]
    region: int
    checked: int


USUAL: Final = Effort(seconds=45.0, samples=(5, 100), region=64 << 20, checked=4 << 20)
"""Under a minute for the default selection. 64 MiB are larger than most caches."""
QUICK: Final = Effort(seconds=0.0, samples=(2, 2), region=16 << 20, checked=4 << 20)
"""Run and verify every case; the figures mean little."""
QUICK_MEMORY: Final = 64 << 20
"""Default guest memory of a quick run."""
LEGACY_RANGES: Final = 4096
"""Most ranges of a sample of `legacy`, each of which makes several system calls."""
ATTRIBUTE_RANGES: Final = 16384
ATTRIBUTE_MEMORY: Final = 64 << 30
FRAGMENTED_MEMORY: Final = 1 << 30
"""Most ranges of a sample that moves no byte, and most guest memory: in one state, and page by page."""
UNJUDGED_SHARE: Final = 0.25
"""Samples of a stage that isn't judged in any case, relative to one that is."""
EFFECTS: Final = (
    *(row.effect for row in BYTE_OPERATIONS.values() if row.effect),
    *("ENCRYPT", "DECRYPT", "populate", "copy"),
)
"""Lines of the verdict."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one case.

    Attributes
    ----------
    case : Case
        The case.
    series : dict of Stage to Series
        Samples of each of its stages; empty if it was refused.
    counters : Counters
        Events of one range: its conversion and all that followed it.
    verified_bytes : int
        Bytes compared after their conversion.
    timed_as : str or None
        Name of the case that was sampled: the first one with the same work.
    """

    case: Case
    series: dict[Stage, Series]
    counters: Counters
    verified_bytes: int
    timed_as: str | None = None


class Bench:
    """Runs any number of cases in the same memory, with the same primitives.

    Parameters
    ----------
    memory : Memory
        Memory of the guests.
    effort : Effort
        How much work the run does.
    threads : int
        Threads of the primitives.
    primitives : Primitives or None
        The primitives; None: new ones in `memory`.
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
        """Execute each case once and verify it byte by byte; check that refused cases are refused.

        Parameters
        ----------
        cases : sequence of Case
            Of one setting.
        progress : callable
            Called with the share that is verified.

        Raises
        ------
        WrongContentsError
            A byte, an attribute, a counter or an answer differs from policy: no figure can be trusted.
        """
        with collector_off():
            for place, case in enumerate(cases):
                progress(place / len(cases), f"verifying {_place(case)}")
                if case not in self._verified:
                    self._verified[case] = self._refuse(case) if case.refused else self._verify(case)

    def results(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Yield the results of cases that were verified and sampled, in order."""
        for case in cases:
            series, first = {}, None
            if not case.refused:
                works = _works(case)
                jobs = {stage: self._jobs[key] for stage, key in works if key in self._jobs}
                for job in jobs.values():
                    job.series.trim()
                series = {stage: job.series for stage, job in jobs.items() if job.series.own}
                if len(series) < len(works):  # interrupted before every stage was sampled
                    continue
                first = jobs[Stage.CONVERT].case.name
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
            Any cases; refused ones are skipped.
        seconds : float
            Time to spend.
        progress : callable
            Called with the share of the time that is over.
        also : sequence of PrimitiveJob
            Primitives to sample, interleaved with the cases.
        memcpy : bool
            Also compare stages that move bytes with memcpy.
        """
        new: list[AnyJob] = list(also)
        measured = [case for case in cases if not case.refused]
        judged = {_key(case, case.judged) for case in measured}
        for case in measured:
            new += self._new_jobs(case, judged, memcpy)
        least, most = self.effort.samples
        began = time.perf_counter()
        with collector_off():
            for done, job in enumerate(take_samples(new, seconds, least, most, self._draw)):
                share = (time.perf_counter() - began) / seconds if seconds else done / len(new) / (most + 1)
                what = f"timing {_place(job.case) if isinstance(job, Job) else job.primitive}"
                progress(min(share, 1.0), what)

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
            return range_ * _attribute_ranges(range_)
        return max(min(self.effort.region, self.memory.size) // range_, 1) * range_

    # ---- one case ------------------------------------------------------------------------------

    def _refuse(self, case: Case) -> tuple[Counters, int]:
        """Check that a refused conversion is refused and changes nothing."""
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

    def _new_jobs(self, case: Case, judged: Collection[tuple[object, ...]], memcpy: bool) -> Iterator[Job]:
        """Yield the jobs of stages whose work was not sampled yet."""
        for stage, key in _works(case):
            if key in self._jobs:
                continue
            scene = self._timing_scene(case, stage)
            yardsticks = [] if stage == Stage.ACCESS else [case.primitive_of(stage)]
            if memcpy and stage == case.judged and case.primitive not in ("bitmap", "memcpy"):
                yardsticks.append("memcpy")
            share = 1.0 if key in judged else UNJUDGED_SHARE
            job = self._jobs[key] = Job(case, stage, scene, self.primitives, yardsticks, share)
            yield job

    def _timing_scene(self, case: Case, stage: Stage) -> Scene:
        """Return the scene that a stage is timed on: a large guest of attributes alone if no byte moves."""
        stages = [*Stage]
        needed = stages[: stages.index(stage) + 1]
        moves = any(case.moves(each) for each in needed if case.work(each) is not None)
        if moves or case.abi.legacy or case.setting.enforce:
            return new_scene(case, self.memory, self.reference, self._count(case))
        count = _attribute_ranges(case.range, ATTRIBUTE_MEMORY if case.uniform else FRAGMENTED_MEMORY)
        page = case.setting.page_size
        size = max(-(-count * case.range // page) * page, case.memory)
        return new_scene(case, AttributesOnly(size), self.reference, count)


def _attribute_ranges(range_: int, memory: int = ATTRIBUTE_MEMORY) -> int:
    return max(min(ATTRIBUTE_RANGES, memory // range_), 1)


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
    """Return the case behind each line of the verdict, by effect, in the order of `EFFECTS`.

    It has uniform allocated memory, the first setting and the largest range; for KEEP, which changes
    attributes alone, the smallest.
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
    """Return the line of the verdict that a case belongs to."""
    if case.judged == Stage.CONVERT:
        return None if case.abi.legacy or not case.platform.private_memory else case.does
    return "copy" if case.abi.legacy else ("populate" if case.primitive == "xor" else None)


def benches(cases: Sequence[Case], effort: Effort = USUAL) -> Iterator[tuple[Bench, list[Case]]]:
    """Yield a `Bench` per setting, with its cases; only one holds memory at a time.

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
