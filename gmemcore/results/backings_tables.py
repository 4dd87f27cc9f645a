"""Tables of runs with one backing and with two, for the terminal and for pages."""

from collections.abc import Iterator, Sequence
from typing import Final

from gmemcore.results.backings import BackingsRun
from gmemcore.results.statistics import Interval, interval, median, ratio
from gmemcore.units import format_number, format_ratio, format_time

HEADS: Final = ("way", "direction", "time", "95 %", "x in place", "95 % ", "memory", "faults")
FIGURES: Final = (2, 4, 6, 7)
LEGEND: Final = """\
discarding    legacy: the old side is discarded after each copy
keeping both  legacy: the old side is kept
time          to bring all memory to that side; first: the first time in a run
x in place    time relative to the same direction in place, run by run
memory        peak resident memory, in guests, over the process before the guest
faults        page faults during the work"""

_IN_PLACE: Final = "in place"


def work_words(runs: Sequence[BackingsRun]) -> str:
    """Return a work, its VM type and the revisions, in words."""
    first = runs[0]
    return f"{first.work}, {first.vm_type}: in place by {first.abi}, {first.firmware} firmware; else legacy"


def memory_words(runs: Sequence[BackingsRun]) -> str:
    """Return the memory of each way, in a sentence."""
    peaks = {way: median([run.measured.peak_bytes / run.memory for run in own]) for way, own in _ways(runs)}
    parts = [f"{_short(way)} {format_ratio(peak)}" for way, peak in peaks.items()]
    return f"{runs[0].work}, {runs[0].vm_type}: memory, in guests: {', '.join(parts)}"


def way_rows(runs: Sequence[BackingsRun]) -> Iterator[tuple[str, ...]]:
    """Yield a row per way and direction, in the order of `HEADS`."""
    base = dict(_ways(runs)).get(_IN_PLACE, [])
    for way, own in _ways(runs):
        memory = format_ratio(median([run.measured.peak_bytes / run.memory for run in own]))
        faults = format_number(median([float(run.measured.faults) for run in own]))
        for direction, seconds in _legs(own):
            taken = interval(seconds)
            other = dict(_legs(base)).get(direction)
            compared = None if other is None or len(other) != len(seconds) else ratio(seconds, other)
            yield (
                _short(way),
                direction,
                format_time(taken.median),
                f"{format_time(taken.low)} to {format_time(taken.high)}",
                "" if compared is None else _times(compared.median),
                _bounds(compared),
                memory,
                faults,
            )
            memory = faults = ""


def _ways(runs: Sequence[BackingsRun]) -> list[tuple[str, list[BackingsRun]]]:
    names = dict.fromkeys(run.way for run in runs)
    return [(name, [run for run in runs if run.way == name]) for name in names]


def _legs(runs: Sequence[BackingsRun]) -> Iterator[tuple[str, list[float]]]:
    """Yield each direction and its seconds: the first time to private apart, where memory is new."""
    first = [run.measured.to_private[0] for run in runs if run.measured.to_private]
    again = [seconds for run in runs for seconds in run.measured.to_private[1:]]
    back = [seconds for run in runs for seconds in run.measured.to_shared]
    legs = {"to private, first": first, "to private, again": again, "to shared": back}
    yield from ((direction, seconds) for direction, seconds in legs.items() if seconds)


def _short(way: str) -> str:
    return way.removeprefix("legacy, ")


def _times(figure: float) -> str:
    return format_ratio(figure) if figure < 100 else format_number(figure)


def _bounds(compared: Interval | None) -> str:
    return "" if compared is None else f"{_times(compared.low)} to {_times(compared.high)}"
