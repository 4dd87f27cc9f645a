"""``gmemcore audit``: whether capabilities predict what each revision and proposal answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from gmemcore.cli.console import listed, progress, say, say_json_rows, say_paragraphs
from gmemcore.cli.options import AbiOption, JsonSwitch, MarkdownSwitch, at_most_one, chosen_revisions
from gmemcore.cli.tables import print_legend, print_markdown, print_table
from gmemcore.policy import DEFAULT_ABI, HUGE_PAGES
from gmemcore.units import counted

if TYPE_CHECKING:
    from gmemcore.vmm.audit import AuditCell, AuditRow
    from gmemcore.vmm.huge_pages import AfterFailure

_COLUMNS: Final = (
    *("revision", "VM-type checks", "contents lost", "over-promised", "under-promised"),
    *("phase checks", "direction checks", "kept", "caps", "bits"),
)
_WRONG_COLUMNS: Final = ("flag", "launch phase", "direction", "what", "VMs")
_COUNTS: Final = {"contents lost": "broken", "over-promised": "lies", "under-promised": "hidden"}
_KINDS: Final = {"over-promised": "lie", "under-promised": "hidden", "contents lost": "broken"}
_EXAMPLES: Final = ("over-promised", "contents lost", "under-promised")
_MEANINGS: Final = {
    "over-promised": "capabilities say yes, and the call is refused",
    "under-promised": "capabilities say no, and the call succeeds",
    "contents lost": "the call succeeds, and the new side doesn't read what the old side wrote",
}
_LEGEND: Final = {
    "VM-type checks": "checks of the VM type that userspace must hard-code",
    **{name: _MEANINGS[name] for name in ("contents lost", "over-promised", "under-promised")},
    "phase, direction checks": "checks of the launch phase and of the direction, likewise",
    "kept": "(VM, launch phase, direction) for which some flag keeps the contents",
    "caps, bits": "capabilities about flags, and the bits that their answers ever set",
}


def audit(
    proposal: Annotated[
        tuple[Path, ...], Parameter(help="TOML file of a proposal to audit too. Can be repeated.")
    ] = (),
    *,
    abi: AbiOption = None,
    cells: Annotated[bool, Parameter(help="List each request that goes wrong.")] = False,
    as_json: JsonSwitch = False,
    markdown: MarkdownSwitch = False,
) -> None:
    """Audit every revision and proposal, the best first.

    A userspace that knows only names and capabilities expects each flag to work or not. Every such request is
    run on a small VM, and the answers are compared with what was expected.
    """
    from gmemcore.vmm.audit import audit_abi

    at_most_one(json=as_json, markdown=markdown)
    chosen = chosen_revisions(abi, proposal)
    rows = []
    with progress("audit", len(chosen), "revisions") as done:
        for revision in chosen:
            rows.append(audit_abi(revision))
            done(len(rows))
    huge = [row for row in rows if row.after_failure]
    if abi is None and not cells:
        huge += [audit_abi(revision) for revision in HUGE_PAGES.values()]
    if as_json:
        rows += [row for row in huge if row not in rows]
    rows.sort(key=lambda row: row.rank)
    if as_json:
        say_json_rows(_as_record(row) for row in rows)
    elif cells:
        _print_cells(rows, markdown=markdown)
    elif markdown:
        say("\n\n".join(_answer(rows)), "")
        print_markdown(_COLUMNS, map(_as_row, rows), figures=range(1, len(_COLUMNS)))
        print_legend(_LEGEND, markdown=True)
        _print_after_failure(huge, markdown=True)
    else:
        say_paragraphs(_answer(rows))
        print_table(_COLUMNS, [*map(_as_row, rows)], figures=range(1, len(_COLUMNS)))
        print_legend(_LEGEND)
        _print_after_failure(huge)


# --- JSON ---------------------------------------------------------------------------------------------------
def _as_record(row: "AuditRow") -> dict[str, Any]:
    """Return the JSON object of a revision."""
    return {
        "abi": row.abi,
        "lies": row.lies,
        "hidden": row.hidden,
        "broken": row.broken,
        "vm_type_checks": row.vm_type_checks,
        "phase_checks": row.phase_checks,
        "direction_checks": row.direction_checks,
        "capabilities": list(row.capabilities),
        "cells": [_as_cell(cell) for cell in row.cells],
        "after_failure": row.after_failure and row.after_failure._asdict(),
    }


def _as_cell(cell: "AuditCell") -> dict[str, Any]:
    """Return the JSON object of a request."""
    return {
        "vm_type": cell.vm_type,
        "firmware": cell.firmware,
        "phase": cell.phase,
        "direction": cell.direction,
        "flag": cell.flag,
        "believed": cell.believed,
        "answered": cell.answered,
        "kept": cell.kept,
    }


# --- the answer ---------------------------------------------------------------------------------------------
def _answer(rows: "list[AuditRow]") -> list[str]:
    """Return the answer in a paragraph, and a request of each of the first two kinds as an example."""
    lines = []
    good = [row for row in rows if not row.misleads]
    if good:
        names = listed([row.abi for row in good])
        best = max(good, key=lambda row: row.kept)
        places = len({(cell.vm_type, cell.firmware, cell.phase, cell.direction) for cell in best.cells})
        lines.append(f"A VMM that knows only flags and capabilities is never misled under {names}.")
        if best.kept:
            which = f"Of these, {best.abi}" if len(good) > 1 else "It"
            lines.append(
                f"{which} keeps contents in {best.kept} of {places} combinations of VM, launch phase and "
                "direction."
            )
        else:
            lines.append(f"{'None of these keeps' if len(good) > 1 else 'It never keeps'} contents.")
    for kind, attribute in _COUNTS.items():
        wrong = {row.abi: getattr(row, attribute) for row in rows if getattr(row, attribute)}
        if wrong:
            names = listed([f"{abi} ({count})" for abi, count in wrong.items()])
            lines.append(f"{kind[0].upper()}{kind[1:]}, in requests: {names}.")
    return [" ".join(lines), *_examples(rows)]


def _examples(rows: "list[AuditRow]") -> list[str]:
    """Return one request of each of the first two kinds that there are, in words."""
    found = {}
    for kind in _EXAMPLES:
        for row in sorted(rows, key=lambda row: row.abi != DEFAULT_ABI):
            for cell in row.cells:
                if kind not in found and getattr(cell, _KINDS[kind]):
                    found[kind] = f"Example, {kind}: {_request(row.abi, cell)}: {_came_of_it(kind, cell)}."
    return [*found.values()][:2]


def _request(abi: str, cell: "AuditCell") -> str:
    direction = cell.direction.replace("_", " ")
    return f"{abi}, {cell.vm_type} ({cell.firmware} firmware), {cell.phase}, {direction}, {cell.flag}"


def _came_of_it(kind: str, cell: "AuditCell") -> str:
    answer = "" if cell.ok else f" with {cell.answered}"
    return f"{_MEANINGS[kind]}{answer}"


# --- tables -------------------------------------------------------------------------------------------------
def _as_row(row: "AuditRow") -> tuple[str, ...]:
    """Return the table row of a revision."""
    counts = (row.vm_type_checks, row.broken, row.lies, row.hidden, row.phase_checks, row.direction_checks)
    return (row.abi, *map(str, (*counts, row.kept, len(row.capabilities), row.capability_bits)))


def _print_after_failure(rows: "list[AuditRow]", *, markdown: bool = False) -> None:
    """Print what a caller has to handle after a conversion of huge pages failed."""
    from gmemcore.vmm.audit import FAILING_PAGES

    if not rows:
        return
    say(f"\nAfter a conversion of {counted(FAILING_PAGES, 'huge page')} failed at one, a caller handles:")
    print_legend(
        {row.abi: _handled(row.after_failure) for row in rows if row.after_failure}, markdown=markdown
    )


def _handled(after: "AfterFailure") -> str:
    size = "; needs the page size to tell which" if after.needs_page_size else ""
    return (
        f"{counted(after.states, 'state')} of the range{size}; requests to finish: "
        f"{after.calls_to_finish}, to undo: {after.calls_to_undo}"
    )


def _print_cells(rows: "list[AuditRow]", *, markdown: bool) -> None:
    """Print the requests that go wrong, and what each kind is."""
    kinds: set[str] = set()
    for row in rows:
        wrong = _wrong(row)
        kinds |= {line[3] for line in wrong}
        say(f"{row.abi}: {_in_words(row)}")
        if wrong and markdown:
            say()
            print_markdown(_WRONG_COLUMNS, wrong)
        elif wrong:
            print_table(_WRONG_COLUMNS, wrong, labels=1)
    if kinds:
        print_legend({kind: _MEANINGS[kind] for kind in _MEANINGS if kind in kinds}, markdown=markdown)


def _wrong(row: "AuditRow") -> list[tuple[str, ...]]:
    """Return the requests that go wrong, on one line the VMs for which they do so alike."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for cell in row.cells:
        for kind in (kind for kind, attribute in _KINDS.items() if getattr(cell, attribute)):
            line = (cell.flag, cell.phase, cell.direction.replace("_", " "), kind)
            lines.setdefault(line, []).append(f"{cell.vm_type} ({cell.firmware})")
    return [(*line, ", ".join(vms)) for line, vms in lines.items()]


def _in_words(row: "AuditRow") -> str:
    """Return the counts of a revision in words."""
    return (
        f"{row.lies:,} over-promised, {row.hidden:,} under-promised, {row.broken:,} contents lost; "
        f"{row.vm_type_checks} VM-type, {row.phase_checks} phase, {row.direction_checks} direction checks"
    )
