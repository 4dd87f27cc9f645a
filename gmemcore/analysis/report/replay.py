"""The page of a replay: what a workload costs under each revision, and where it is refused."""

from collections.abc import Sequence
from typing import Any, Final

from gmemcore.analysis.pictures import refusal_map
from gmemcore.analysis.report.blocks import (
    COLUMNS,
    LABELS,
    MODEL,
    ROWS,
    key_values,
    left_off,
    machine,
    muted,
    no_pictures,
    picture,
)
from gmemcore.analysis.report.page import Block, Cell, Facts, Page, Section, Table, Text
from gmemcore.analysis.runs import Replay, Run
from gmemcore.uapi import ContentMode, MemoryAttribute
from gmemcore.units import format_number, format_percent, format_size, format_time

_LEGEND: Final = (
    "An operation is refused if it ended with an errno or an exit. Of each replay the first refusals are "
    "shown: later ones are often their consequence. Times are this model's on this machine; counters carry "
    "to hardware."
)
_FIRST: Final = 5  # refusals of each replay
_TARGET: Final = ("VM type", "firmware", "abi")


def page(run: Run) -> Page:
    """Return the page."""
    replays: list[Replay] = run.records
    trace = run.first.trace
    clean = sum(replay.refused == 0 for replay in replays)
    facts = {
        "operations": f"{trace.operations:,}",
        "guest memory": format_size(trace.memory),
        "replays": f"{len(replays):,}",
        "without a refusal": f"{clean:,}",
    }
    sections = [
        Section("Revisions", [*_map(run), _summary(replays), Text(_LEGEND), *left_off(len(replays))]),
        Section("First refusals", _refusals(replays)),
        Section("Events", [_events(replays)]),
        *([Section("Predicted", [_predicted(replays)])] if any(one.predicted for one in replays) else []),
        Section("Options", [key_values(run.first.replay, "How it was replayed")]),
        Section("Environment", [key_values(run.first.environment)]),
    ]
    head: list[Block] = [Facts(facts), *no_pictures()]
    lead = " \N{MIDDLE DOT} ".join(filter(None, (trace.source, machine(run.first.environment))))
    return Page(f"Replay of {trace.name}", lead, "", head, sections, MODEL)


def _map(run: Run) -> list[Block]:
    cells = {(replay.abi, replay.vm_type) for replay in run.records}
    if not 1 < len(cells) <= LABELS or len({replay.firmware for replay in run.records}) > 1:
        return []
    return picture(
        lambda: refusal_map(run), "Conversions refused by revision and VM type, as in the table below"
    )


def _target(replay: Replay) -> tuple[str, str, str]:
    return replay.vm_type, replay.firmware, replay.abi


def _summary(replays: Sequence[Replay]) -> Table:
    shown = sorted(replays[:ROWS], key=lambda replay: replay.vm_type)
    digests = [(replay.launch_digest or "")[:16] for replay in shown]
    measured = any(digests)
    rows: list[tuple[str | Cell, ...]] = [
        (
            *_target(replay),
            f"{replay.refused:,}",
            Cell(_reasons(replay), "long"),
            f"{replay.conversions:,}",
            _refused_conversions(replay),
            *(f"{format_number(replay.peak_memory / 1e6)} MB", format_time(replay.seconds)),
            *([digest] if measured else []),
        )
        for replay, digest in zip(shown, digests, strict=True)
    ]
    last = ["launch digest"] if measured else []
    columns = (
        *(*_TARGET, "refused", "why", "conversions", "conversions refused", "peak memory", "time"),
        *last,
    )
    return Table(columns, muted(rows, 2), frozenset({3, 5, 6, 7, 8}), "What came of it, revision by revision")


def _refused_conversions(replay: Replay) -> str:
    """Return how many conversions were refused, and which share of them."""
    refused = replay.conversions_refused
    return f"{refused:,} ({format_percent(replay.refused_share)})" if refused else "0"


def _reasons(replay: Replay) -> str:
    return ", ".join(f"{one.step} {one.outcome} {one.operations:,}" for one in replay.reasons)


def _refusals(replays: Sequence[Replay]) -> list[Block]:
    rows = [
        (
            *_target(replay),
            *(str(one.operation), one.step, one.outcome, f"{one.gpa:#x}", f"{one.size:#x}"),
            _asked(one.step, one.attributes, one.flags),
        )
        for replay in replays
        for one in replay.first_refusals[:_FIRST]
    ]
    if not rows:
        return [Text("Nothing was refused.")]
    columns = (*_TARGET, "operation", "step", "outcome", "gpa", "size", "asked for")
    return [Table(columns, muted(rows[:ROWS], 3), frozenset({3, 6, 7})), *left_off(len(rows))]


def _asked(step: str, attributes: int, flags: int) -> str:
    """Return what a conversion asked for, in words."""
    if step != "CONVERT":
        return ""
    direction = "to private" if attributes & MemoryAttribute.PRIVATE else "to shared"
    known = {mode.value: mode.name or "" for mode in ContentMode}
    return f"{direction}, {known.get(flags, hex(flags)) if flags else 'no flag'}"


def _events(replays: Sequence[Replay]) -> Table:
    names = [name for name in _names(replays) if any(one.counters.get(name) for one in replays)]
    rows = [
        (*_target(replay), *(f"{replay.counters.get(name, 0):,}" for name in names))
        for replay in replays[:ROWS]
    ]
    numbers = frozenset(range(3, 3 + len(names)))
    return Table((*_TARGET, *names), muted(rows, 2), numbers, "Counters, those that counted anything")


def _names(replays: Sequence[Replay]) -> list[str]:
    return list(dict.fromkeys(name for replay in replays for name in replay.counters))[:COLUMNS]


def _predicted(replays: Sequence[Replay]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for replay in replays[:ROWS]:
        if replay.predicted is not None:
            by_event = sorted(replay.predicted.by_event.items(), key=lambda item: -item[1])
            parts = ", ".join(f"{name} {format_time(seconds)}" for name, seconds in by_event if seconds)
            missing = ", ".join(f"{name} {count:,}" for name, count in replay.predicted.not_priced.items())
            total = format_time(replay.predicted.seconds)
            rows.append((*_target(replay), total, Cell(parts, "long"), Cell(missing, "long")))
    columns = (*_TARGET, "predicted", "of which", "not priced")
    return Table(columns, muted(rows, 2), frozenset({3}), "Time by the figures of the cost file")
