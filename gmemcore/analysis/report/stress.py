"""The page of a stress run: what a fleet of guests did, what was refused, and what did not hold."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from gmemcore.analysis.pictures import conversion_sizes
from gmemcore.analysis.report.blocks import (
    COLUMNS,
    LABELS,
    MODEL,
    ROWS,
    counted,
    key_values,
    left_off,
    machine,
    no_pictures,
    picture,
)
from gmemcore.analysis.report.page import Block, Cell, Facts, Page, Section, Table, Text
from gmemcore.analysis.runs import Run, StressGuest, StressSums, Violation
from gmemcore.units import format_time

_CHECKS: Final = {
    "oracle": "operations repeated by a naive model",
    "invariants": "checks of all page state",
    "allocation_failure_due": "allocation failures due",
    "allocation_failure_met": "of them injected and met by a conversion",
    "pin_due": "pins due",
    "pin_met": "of them injected and met by a conversion to private",
    "poison_due": "poisoned pages due",
    "poison_met": "of them injected and met by an access",
}
_LEGEND: Final = (
    "The digest is that of every operation's outcome, all counters, and the final page state and contents: "
    "the same for any number of workers, any chunks and after any resumption. Refused counts operations with "
    "another outcome than OK, those that a fault was injected into among them."
)


def page(run: Run) -> Page:
    """Return the page."""
    total: StressSums = run.last.total
    cells: Mapping[str, StressSums] = run.last.cells
    facts = {
        "guests": f"{total.guests:,}",
        "operations": f"{total.operations:,}",
        "refused": f"{_refused(total.outcomes):,}",
        "repeated by a naive model": f"{total.checks.get('oracle', 0):,}",
        "digest": total.digest[:16],
    }
    sections = [
        Section("What guests are and do", [_sums(cells), Text(_LEGEND)]),
        Section("Conversions by size", _sizes(run)),
        Section("Outcomes", _outcomes(cells)),
        Section("Checks and faults", [_checks(total.checks)]),
        Section("Every guest", [_guests(run.records), *left_off(len(run.records))]),
        Section(
            "Spec",
            [key_values(_settings(run.first.spec, run.first.spec_hash), "What decides the results")],
        ),
        Section("Environment", [key_values(run.first.environment | {"code": run.first.code})]),
    ]
    head: list[Block] = [Facts(facts), *_verdict(run.last.violation), *no_pictures()]
    return Page("Stress run", machine(run.first.environment), "", head, sections, MODEL)


def _verdict(violation: Violation | None) -> list[Block]:
    """Say what did not hold."""
    if violation is None:
        return [Text("Everything that was checked held.")]
    where = f"guest {violation.guest}, operation {violation.operation}"
    return [Text(f"The run ended where something did not hold: {where}: {violation.what}", warning=True)]


def _refused(outcomes: Mapping[str, int]) -> int:
    return sum(count for name, count in outcomes.items() if name != "OK")


def _sums(cells: Mapping[str, StressSums]) -> Table:
    rows: list[tuple[str | Cell, ...]] = [
        (
            name,
            *(f"{figure:,}" for figure in (sums.guests, sums.operations, _refused(sums.outcomes))),
            Cell(counted(sums.counters), "long"),
            sums.digest[:16],
        )
        for name, sums in list(cells.items())[:ROWS]
    ]
    columns = ("guests that are and do", "guests", "operations", "refused", "counters", "digest")
    return Table(columns, rows, frozenset({1, 2, 3}), "By behaviour, VM type, revision and firmware")


def _sizes(run: Run) -> list[Block]:
    if len(run.last.cells) > LABELS:
        return [Text(f"No picture: more than {LABELS} kinds of guests.")]
    alternative = "Conversions by the size of their range, by behaviour, VM type, revision and firmware"
    return picture(
        lambda: conversion_sizes(run), alternative, "How many conversions asked for ranges of which size."
    )


def _outcomes(cells: Mapping[str, StressSums]) -> list[Block]:
    """Return operations by outcome, one column per outcome."""
    found = {name for sums in cells.values() for name in sums.outcomes}
    names = sorted(found, key=lambda name: (name != "OK", name))[:COLUMNS]
    rows = [
        (cell, *(f"{sums.outcomes[name]:,}" if name in sums.outcomes else "" for name in names))
        for cell, sums in list(cells.items())[:ROWS]
    ]
    numbers = frozenset(range(1, len(names) + 1))
    table = Table(("guests that are and do", *names), rows, numbers, "Operations by outcome")
    return [table, *left_off(len(found), COLUMNS, "outcomes")]


def _checks(checks: Mapping[str, int]) -> Table:
    order = {name: place for place, name in enumerate(_CHECKS)}
    names = sorted(checks, key=lambda name: (order.get(name, len(order)), name))
    rows = [(_CHECKS.get(name, name), f"{checks[name]:,}") for name in names]
    return Table(("what", "how often"), rows, frozenset({1}), "What was looked at, and what was made to fail")


def _guests(guests: Sequence[StressGuest]) -> Table:
    rows = [
        (
            *(str(guest.guest), guest.cell, f"{guest.operations:,}", f"{_refused(guest.outcomes):,}"),
            f"{guest.counters.get('pages_changed', 0):,}",
            f"{guest.counters.get('blocks_2m_split', 0):,}",
            *(format_time(guest.seconds), guest.digest[:16]),
        )
        for guest in guests[:ROWS]
    ]
    columns = (
        "guest",
        "is and does",
        "operations",
        "refused",
        "pages changed",
        "2 MiB split",
        "took",
        "digest",
    )
    return Table(columns, rows, frozenset({0, 2, 3, 4, 5, 6}))


def _settings(spec: Mapping[str, Any], spec_hash: str) -> dict[str, Any]:
    """Return what decides the results; proposals by name."""
    flat = _flat(spec) | {"hash": spec_hash}
    if "proposals" in flat:
        flat["proposals"] = [row["name"] for row in flat["proposals"]]
    return flat


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings of nested tables by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
