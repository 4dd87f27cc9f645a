"""What ``gmemcore stress`` prints about a fleet or a guest: progress, tables and digests."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gmemcore.cli.console import say, say_lines
from gmemcore.cli.predictions import prediction_lines
from gmemcore.cli.tables import Heading, Row, print_table
from gmemcore.units import format_number, format_size, format_time

if TYPE_CHECKING:
    from gmemcore.stress.merge import GuestResult, Totals
    from gmemcore.stress.run import Run
    from gmemcore.stress.spec import Plan
    from gmemcore.workload.cost import CostFile, Prediction

_FIGURES: Final = {
    "changed": "pages_changed",
    "allocated": "pages_allocated",
    "RMP": "rmp_updates",
    "S-EPT": "sept_changes",
    "accepted": "pages_accepted",
    "split": "blocks_2m_split",
    "merged": "blocks_2m_merged",
    "faults": "memory_faults",
}
"""Counter of each column."""
_MEANINGS: Final = {
    "pages": ("changed", "allocated", "RMP", "S-EPT", "accepted"),
    "2 MiB blocks": ("split", "merged"),
    "MEMORY_FAULT exits": ("faults",),
}
"""What columns count, for the legend."""
_CHECKS: Final = {"oracle": "operations by the oracle", "invariants": "full checks of page state"}
_FAULTS: Final = {"allocation_failure": "allocation failures", "pin": "pins", "poison": "failed pages"}


# --- progress -----------------------------------------------------------------------------------------------
def progress_text(run: "Run") -> str:
    """Return rate, time left and sums in one line."""
    if not run.operations:
        return f"{run.resumed:,} of them from the log" if run.resumed else "starting"
    left, sums = run.seconds_left, run.merger.all
    parts = [
        f"{_big(run.rate)} operations/s",
        "" if left is None else f"{_clock(left)} left",
        f"{_big(sums.counters['pages_changed'])} pages changed",
        f"{_big(sums.operations - sums.outcomes['OK'])} refused",
        f"{_big(sums.checks['oracle'])} checked by the oracle",
    ]
    return ", ".join(part for part in parts if part)


def _big(figure: float) -> str:
    """Return a number as three digits and a letter."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if figure >= unit:
            return f"{format_number(figure / unit)}{letter}"
    return format_number(figure)


def _clock(seconds: float) -> str:
    """Return a time as h:mm:ss, m:ss or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


# --- results ------------------------------------------------------------------------------------------------
def print_fleet(path: Path, run: "Run", figures: "CostFile | None") -> None:
    """Print a fleet's table and sums."""
    spec, sums = run.spec, run.merger.all
    say(f"{path}: {len(run.merger.results):,} of {spec.total:,} guests of {format_size(spec.memory)}")
    shown = _print_table(run.merger.by_cell(), figures)
    say_lines(_legend(shown))
    say(f"checked: {', '.join(f'{sums.checks[name]:,} {words}' for name, words in _CHECKS.items())}")
    if faults := ", ".join(_fault_words(sums.checks)):
        say(f"injected: {faults}")
    if run.resumed:
        say(f"{run.resumed:,} guests were in the log")
    if run.operations:
        workers = f" with {run.workers} workers" if run.workers > 1 else ""
        say(f"{_big(run.operations)} operations in {run.elapsed:.1f} s{workers}, {_big(run.rate)}/s")
    _print_prediction(sums, figures)
    say(f"digest {sums.digest}")


def print_guest(plan: "Plan", until: int | None, result: "GuestResult", figures: "CostFile | None") -> None:
    """Print the result of one guest."""
    from gmemcore.stress.merge import Totals

    sums = Totals()
    sums.add(result)
    end = "" if until is None else f", up to operation {until}"
    say(f"guest {plan.number}: {plan.cell}{end}")
    _print_table({plan.cell: sums}, figures)
    _print_prediction(sums, figures)
    say(f"digest {result.digest}")


def _fault_words(checks: Mapping[str, int]) -> Iterator[str]:
    """Yield how many faults were injected, of those that were due."""
    for name, words in _FAULTS.items():
        if due := checks.get(f"{name}_due"):
            yield f"{checks.get(f'{name}_met', 0):,} of {due:,} {words}"


def _print_prediction(sums: "Totals", figures: "CostFile | None") -> None:
    if figures is not None:
        say_lines(prediction_lines(_predicted(sums, figures), figures.title))


def _predicted(sums: "Totals", figures: "CostFile") -> "Prediction":
    from gmemcore.workload.cost import predict

    return predict(sums.counters, figures, calls=sums.conversions)


# --- the table ----------------------------------------------------------------------------------------------
def _legend(shown: Sequence[str]) -> Iterator[str]:
    """Yield what the columns that are shown count."""
    yield "operations: including injected faults and retries"
    for meaning, names in _MEANINGS.items():
        if own := [name for name in names if name in shown]:
            yield f"{', '.join(own)}: {meaning}"


def _print_table(cells: "dict[str, Totals]", figures: "CostFile | None") -> list[str]:
    """Print the figures of each kind of guest and its refusals; returns the counters that are shown."""
    names = [name for name, key in _FIGURES.items() if any(sums.counters[key] for sums in cells.values())]
    predicted = () if figures is None else ("predicted",)
    heads = ["operations", "refused", *predicted, *names]
    rows: list[Row] = []
    for cell, sums in cells.items():
        rows += [Heading(f"{cell}, {_plural(sums.guests)}"), _row(sums, names, figures)]
    print_table(heads, rows, figures=range(len(heads)))
    say()
    for cell, sums in cells.items():
        kinds = sorted(name for name in sums.outcomes if name != "OK")
        if kinds:
            say(f"refused, {cell}: {', '.join(f'{sums.outcomes[name]} {name}' for name in kinds)}")
    return names


def _plural(guests: int) -> str:
    return "1 guest" if guests == 1 else f"{_big(guests)} guests"


def _row(sums: "Totals", names: Sequence[str], figures: "CostFile | None") -> list[str]:
    """Return the figures of one kind of guest as texts, one per column."""
    return [
        *map(_big, (sums.operations, sums.operations - sums.outcomes["OK"])),
        *(() if figures is None else (format_time(_predicted(sums, figures).seconds),)),
        *(_big(sums.counters[_FIGURES[name]]) for name in names),
    ]
