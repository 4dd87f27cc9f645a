"""Run the benchmark and yield its records: the verdict first, then the cases of each setting."""

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
"""Share of the time left by verification that goes to the verdict."""
VERIFYING, HEADLINE, REST = (0.0, 0.3), (0.3, 0.5), (0.5, 1.0)
"""Where on the progress bar each part of a setting usually is."""
HUGE_PAGE: Final = 2 << 20
HUGE_ENOUGH: Final = 0.9
"""A smaller share of memory in transparent huge pages is reported."""


def records(
    cases: Sequence[Case],
    effort: Effort = USUAL,
    settings: dict[str, Any] | None = None,
    progress: Progress = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[BenchFirst | BenchCell]:
    """Run cases and yield the records of the run: the first line, then one per case.

    All cases of a setting are sampled in turn, so a slow minute affects a few samples of each. If the run is
    interrupted then, it yields the cases with the samples so far, and raises.

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
            note(f"the host holds only {share:.0%} of the memory in transparent huge pages")

        def during(part: tuple[float, float], number: int = number) -> Progress:
            low, high = part
            return lambda done, what: progress((number + low + (high - low) * done) / groups, what)

        end = time.perf_counter() + effort.seconds
        bench.verify(own, during(VERIFYING))
        if number == 0:
            lines = headline(own)
            curves = bench.sample_primitives(sorted({case.range for case in own if not case.refused}))
            seconds = _until(end) * HEADLINE_SHARE
            bench.sample([*lines.values()], seconds, during(HEADLINE), also=curves, memcpy=True)
            told = (settings or {}) | _settings(own, effort, bench, share)
            yield first_of(bench, lines, cases, machine, told)
        interrupted: KeyboardInterrupt | None = None
        try:
            bench.sample(own, _until(end), during(REST))
        except KeyboardInterrupt as error:
            interrupted = error
        yield from (cell_of(result) for result in bench.results(own))
        if interrupted:
            raise interrupted


def _until(end: float) -> float:
    return max(end - time.perf_counter(), 0.0)


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
