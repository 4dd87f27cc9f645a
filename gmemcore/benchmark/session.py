"""Run the benchmark and yield its records: the verdict first, then a block per revision."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from gmemcore.benchmark.cases import Case
from gmemcore.benchmark.memory import huge_page_share
from gmemcore.benchmark.record import cell_of, first_of
from gmemcore.benchmark.run import USUAL, Bench, Effort, Progress, benches, headline
from gmemcore.engine import warmup
from gmemcore.results.bench import BenchCell, BenchFirst
from gmemcore.results.environment import environment
from gmemcore.uapi import PAGE_SIZE

HEADLINE_SHARE: Final = 0.25
"""Share of the time of a setting that goes to the verdict."""
HUGE_PAGE: Final = 2 << 20
HUGE_ENOUGH: Final = 0.9
"""A smaller share of memory in huge pages is reported."""


def records(
    cases: Sequence[Case],
    effort: Effort = USUAL,
    settings: dict[str, Any] | None = None,
    progress: Progress = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[BenchFirst | BenchCell]:
    """Run cases and yield the records of the run: the first line, then one per case.

    If the run is interrupted while it samples, it yields the cases of the current block with the samples so
    far, and then raises.

    Parameters
    ----------
    cases : sequence of Case
        Grouped by setting.
    effort : Effort
        How much work the run does, per setting.
    settings : dict or None
        Settings for the first record.
    progress : callable
        Called with the share that is done, and with what runs next.
    note : callable
        Called with each difference from what was asked for.

    Raises
    ------
    WrongContentsError
        A byte, an attribute, a counter or an answer is wrong: no figure can be trusted.
    OutOfMemoryError
        ENOMEM: the host has too little memory.
    """
    machine = environment()
    warmup()
    groups = len(list(groupby(cases, key=lambda case: case.setting)))
    for number, (bench, own) in enumerate(benches(cases, effort)):
        setting, share = own[0].setting, huge_page_share(bench.memory.side(0).words)
        if setting.huge_pages and share < HUGE_ENOUGH and own[0].memory >= HUGE_PAGE:
            note(f"the host holds only {share:.0%} of the memory in huge pages")
        lines = headline(own) if number == 0 else {}
        blocks = _blocks(own, list(lines.values()))
        clock = _Clock(effort.seconds, [_weight(block) for block in blocks])

        def tell(done: float, what: str, clock: _Clock = clock, number: int = number) -> None:
            progress((number + clock.share(done)) / groups, what)

        for place, block in enumerate(blocks):
            bench.verify(block, tell)
            interrupted: KeyboardInterrupt | None = None
            ranges = sorted({case.range for case in own if not case.refused})
            curves = bench.sample_primitives(ranges) if number == place == 0 else []
            try:
                bench.sample(block, clock.seconds(), tell, also=curves, memcpy=not place)
            except KeyboardInterrupt as error:
                interrupted = error
            if number == place == 0:
                if interrupted:
                    raise interrupted
                told = (settings or {}) | _settings(own, effort, bench, share)
                yield first_of(bench, lines, cases, machine, told)
            else:
                yield from (cell_of(result) for result in bench.results(block))
            if interrupted:
                raise interrupted
            clock.next()


def _settings(cases: Sequence[Case], effort: Effort, bench: Bench, share: float) -> dict[str, Any]:
    setting = cases[0].setting
    # Only where it is an axis: every figure of a default run is of pages of 4 KiB.
    page_size = {} if setting.page_size == PAGE_SIZE else {"page_size": setting.page_size}
    return {
        "memory": cases[0].memory,
        "backing": setting.backing,
        "huge_pages": setting.huge_pages,
        "huge_page_share": round(share, 3),
        "threads": setting.threads,
        "seconds": effort.seconds,
        "seed": bench.reference.seed,
        **page_size,
    }


def _blocks(cases: Sequence[Case], first: Sequence[Case]) -> list[list[Case]]:
    """Return the headline cases, then all cases by revision and firmware."""
    blocks: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        blocks.setdefault((case.key.abi, case.key.firmware), []).append(case)
    return [list(first), *blocks.values()]


def _weight(cases: Sequence[Case]) -> float:
    return sum(not case.refused for case in cases) or 0.01


class _Clock:
    """Shares the time of a setting among its blocks; the first has the headline cases."""

    def __init__(self, seconds: float, weights: Sequence[float]) -> None:
        total = sum(weights[1:]) or 1.0
        rest = 1 - HEADLINE_SHARE
        self._ends, at = [HEADLINE_SHARE], HEADLINE_SHARE
        for weight in weights[1:]:
            at += rest * weight / total
            self._ends.append(at)
        self._seconds, self._began, self._place = seconds, time.perf_counter(), 0

    def seconds(self) -> float:
        """Return the time left for the current block."""
        return max(self._began + self._seconds * self._ends[self._place] - time.perf_counter(), 0.0)

    def share(self, done: float) -> float:
        """Return the share of the setting that is done, given that of the current block."""
        before = self._ends[self._place - 1] if self._place else 0.0
        return before + (self._ends[self._place] - before) * done

    def next(self) -> None:
        """Go on to the next block."""
        self._place += 1
