"""``gmemcore audit``: what userspace believes of each revision and proposal, against what it is answered."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

if TYPE_CHECKING:
    from gmemcore.vmm.audit import AuditCell, AuditRow

_COLUMNS = (
    *("abi", "VM-type checks", "broken", "lies", "hidden"),
    *("phase checks", "direction checks", "kept", "caps", "bits"),
)
_LEGEND = """\
VM-type, phase, direction checks: distinctions that userspace makes without having been told
broken: answered ok, and the new side does not read what the old side wrote; lies: believed, and refused;
hidden: not believed, and answered ok; kept: (VM, phase, direction) where some flag keeps contents
caps, bits: capabilities about flags, and the bits that their answers ever set: the cost"""

_LEGEND_OF_CELLS = """\
lie: believed, and refused; hidden: not believed, and answered ok
broken: answered ok, and the new side does not read what the old side wrote"""

_Row = tuple[str, ...]


def audit(
    proposals: Annotated[list[Path] | None, Parameter(help="Proposals to audit too, TOML files.")] = None,
    /,
    *,
    abi: Annotated[str | None, Parameter(help="This abi or proposal alone.")] = None,
    cells: Annotated[bool, Parameter(negative="", help="Show what is wrong, request by request.")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for programs.")] = False,
    markdown: Annotated[bool, Parameter(negative="", help="Print the tables as Markdown.")] = False,
    template: Annotated[bool, Parameter(negative="", help="Print a proposal's file, to start from.")] = False,
) -> int:
    """Audit every revision and proposal, best first.

    A userspace that knows names and capabilities believes a flag to be allowed, or not; each request is then
    run on a small VM. Exit status 2: a file that isn't a proposal, or an abi that doesn't exist.
    """
    from gmemcore.vmm.audit import audit as run
    from gmemcore.vmm.proposal import ProposalError, read_proposals, shipped_files

    if template:
        print(*shipped_files().values(), sep="\n", end="")
        return 0
    try:
        rows = run(read_proposals(proposals or []))
    except ProposalError as error:
        return _usage_error(str(error))
    if abi is not None:
        known = ", ".join(row.abi for row in rows)
        rows = [row for row in rows if row.abi == abi]
        if not rows:
            return _usage_error(f"unknown abi {abi!r}; known: {known}")
    print_table = _markdown_table if markdown else _rich_table
    if as_json:
        lines = ",\n".join(json.dumps(_as_record(row)) for row in rows)
        print(f"[\n{lines}\n]")
    elif cells:
        for row in rows:
            print_table(f"{row.abi}: {_in_words(row)}", [_WRONG_COLUMNS, *_wrong(row)])
        if any(_wrong(row) for row in rows):
            print(_LEGEND_OF_CELLS)
    else:
        print_table("", [_COLUMNS, *map(_as_row, rows)])
        print(_LEGEND)
    return 0


def _usage_error(message: str) -> int:
    """Say what is wrong in one line."""
    print(f"gmemcore audit: {message}", file=sys.stderr)
    return 2


# --- JSON ---------------------------------------------------------------------------------------------------
def _as_record(row: "AuditRow") -> dict[str, Any]:
    """Return the JSON object of an abi."""
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


# --- tables -------------------------------------------------------------------------------------------------
def _as_row(row: "AuditRow") -> _Row:
    """Return the table row of an abi."""
    counts = (row.vm_type_checks, row.broken, row.lies, row.hidden, row.phase_checks, row.direction_checks)
    return (
        row.abi,
        *map(str, counts),
        str(row.kept),
        str(len(row.capabilities)),
        str(row.capability_bits),
    )


_WRONG_COLUMNS = ("flag", "launch phase", "direction", "what", "VMs")


def _wrong(row: "AuditRow") -> list[_Row]:
    """Return the requests that are lies, hidden or broken, VMs for which they are so on one line."""
    lines: dict[_Row, list[str]] = {}
    for cell in row.cells:
        kinds = {"lie": cell.lie, "hidden": cell.hidden, "broken": cell.broken}
        for kind in (name for name, is_so in kinds.items() if is_so):
            line = (cell.flag, cell.phase, cell.direction.replace("_", " "), kind)
            lines.setdefault(line, []).append(f"{cell.vm_type} ({cell.firmware})")
    return [(*line, ", ".join(vms)) for line, vms in lines.items()]


def _in_words(row: "AuditRow") -> str:
    """Return the counts of an abi in words."""
    checks = (
        f"{row.vm_type_checks} VM-type, {row.phase_checks} phase, {row.direction_checks} direction checks"
    )
    return f"{row.lies} lies, {row.hidden} hidden, {row.broken} broken; {checks}"


def _rich_table(title: str, rows: list[_Row]) -> None:
    """Print a table for people."""
    numbers = rows[0] is _COLUMNS
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for i, name in enumerate(rows[0]):
        justify: JustifyMethod = "right" if numbers and i else "left"
        words = max(map(len, name.split()))
        table.add_column(name, justify=justify, overflow="fold", min_width=words, no_wrap=not i)
    for row in rows[1:]:
        table.add_row(*row)
    if title:
        print(title)
    if rows[1:]:
        Console().print(table)


def _markdown_table(title: str, rows: list[_Row]) -> None:
    """Print a Markdown table."""
    numbers = rows[0] is _COLUMNS
    rule = tuple("---:" if numbers and i else "---" for i in range(len(rows[0])))
    if title:
        print(f"{title}\n")
    for line in [rows[0], rule, *rows[1:]] if rows[1:] else []:
        print("| " + " | ".join(line) + " |")
    print()
