"""What an import found and what it had to assume, as lines for people and as records for programs."""

from collections.abc import Iterator, Sequence
from typing import Any

from gmemcore.spelling import switch
from gmemcore.units import counted, format_bytes
from gmemcore.workload.logs.importing import Imported, Launch
from gmemcore.workload.logs.log import SHOWN
from gmemcore.workload.logs.start import NEVER

_PLACES = 4  # ranges that a line names


def summary_lines(imported: Imported, name: str, launches: Sequence[Launch] | None = None) -> Iterator[str]:
    """Yield what is to be known of an import: first the log, then each launch, indented.

    Parameters
    ----------
    imported : Imported
        The import.
    name : str
        The log's name.
    launches : sequence of Launch or None
        Those to describe; None: all.
    """
    log, several = imported.log, len(imported.launches) > 1
    yield f"{name}: {counted(log.lines, 'line')}, {counted(len(log.events), 'event')}" + (
        f", {len(imported.launches):,} launches" if several else ""
    )
    if log.unread:
        lines = counted(len(log.unread), "line")
        yield f"  skipped {lines} of known events that can't be read ({switch('strict')} refuses them)"
    yield from (f"    line {each.line}: {each.reason}" for each in log.unread[:SHOWN])
    if log.lost:
        yield f"  its tracer {log.lost}; what follows is not all that happened"
    if log.times_back:
        yield f"  times go back {counted(log.times_back, 'time')}: events are taken in the order of the lines"
    if imported.others:
        yield f"  left out {counted(imported.others, 'event')} of other guests"
    for launch in imported.launches if launches is None else launches:
        if several:
            yield f"  launch {launch.number}, lines {launch.lines[0]} to {launch.lines[1]}"
        yield from (f"  {'  ' * several}{line}" for line in launch_lines(launch))


def launch_lines(launch: Launch) -> Iterator[str]:
    """Yield what is to be known of one launch."""
    account = launch.account
    regions = [
        f"{region.gpa:#x} + {format_bytes(region.size)}" for region in launch.trace.header.layout.regions
    ]
    yield f"memory: {_some(regions)} ({launch.layout_from})"
    yield "start: " + "; ".join(
        f"{counted(n, 'page')} {'private' if private else 'shared'} ({_why(launch, why)})"
        for (why, private), n in launch.pages.items()
    )
    if account.outside:
        places = _some([f"{low:#x}-{high:#x}" for low, high in account.outside_ranges])
        yield f"{counted(account.outside, 'conversion')} outside RAM, which change nothing: {places}"
    if account.repeats:
        yield f"{counted(account.repeats, 'conversion')} reported by two events, counted once"
    if account.continued:
        yield f"{counted(account.continued, 'launch update')} asked for again from where the call stopped"
    if account.vmsa:
        yield f"{counted(account.vmsa, 'launch update')} of vCPU state (Vmsa), which change no guest memory"
    if account.unplaced:
        yield f"{counted(account.unplaced, 'change')} of RAMBlocks at offsets that no memslot shows, left out"
    if account.late:
        yield f"{counted(account.late, 'launch update')} behind the end of the launch"
    yield from (f"line {line}: refused: {text}" for line, text in launch.failures)
    if launch.unconfirmed and not launch.failures:
        yield f"line {launch.finish_line}: launch_finish, and no change of state to running after it"
    if launch.assumed_running:
        yield (
            "the log shows no launch: assumed that the guest was running "
            f"(use {switch('launching')} if it wasn't)"
        )


def summary_record(imported: Imported) -> dict[str, Any]:
    """Return what `summary_lines` says of the log, for programs."""
    log = imported.log
    return {
        "lines": log.lines,
        "events": len(log.events),
        "skipped": len(log.unread),
        "first_skipped": [{"line": each.line, "reason": each.reason} for each in log.unread[:SHOWN]],
        "lost": log.lost.number,
        "lost_unknown": log.lost.unknown,
        "times_back": log.times_back,
        "events_of_other_guests": imported.others,
        "launches": len(imported.launches),
    }


def launch_record(launch: Launch) -> dict[str, Any]:
    """Return what `launch_lines` says of a launch, for programs."""
    account = launch.account
    return {
        "launch": launch.number,
        "lines": list(launch.lines),
        "events": account.events,
        "layout_from": launch.layout_from,
        "start": [{"why": why, "private": private, "pages": n} for (why, private), n in launch.pages.items()],
        "outside_ram": account.outside,
        "outside_ranges": [{"gpa": low, "size": high - low} for low, high in account.outside_ranges],
        "repeats": account.repeats,
        "continued_updates": account.continued,
        "vmsa_updates": account.vmsa,
        "unplaced": account.unplaced,
        "late_updates": account.late,
        "finish_line": launch.finish_line,
        "failures": [{"line": line, "message": text} for line, text in launch.failures],
        "assumed_running": launch.assumed_running,
    }


def _why(launch: Launch, why: str) -> str:
    """Return what decided pages; of pages that are never shown, why their default is what it is."""
    return f"{why}, {launch.default_from}" if why == NEVER else why


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - _PLACES} more" if len(texts) > _PLACES else ""
    return ", ".join(texts[:_PLACES]) + more
