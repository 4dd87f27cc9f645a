"""``gmemcore flows``: what userspace does with conversion, on every VM type and under every revision."""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.table import Table

from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import Firmware, VmType

if TYPE_CHECKING:
    from gmemcore.policy import Abi
    from gmemcore.vmm.flows import FlowResult

_LEGEND = """\
ok: came through; ok*: came through, though no flag had promised that contents would
ok after FLAG: that flag was believed and refused before another one did
else the step it ended at. CONTENTS: somebody read other bytes than those that were written
NOT_OFFERED: contents were needed, no flag was offered, and userspace knew from capabilities and stopped"""

_WIDTH = 200  # where the output is no terminal, a table is not broken for one

_Row = tuple[str, ...]


def flows(
    proposals: Annotated[list[Path] | None, Parameter(help="Proposals to run too, TOML files.")] = None,
    /,
    *,
    flow: Annotated[str | None, Parameter(help="This flow alone.")] = None,
    abi: Annotated[str | None, Parameter(help="This abi or proposal alone.")] = None,
    vm_type: Annotated[str | None, Parameter(help=f"One of: {', '.join(VmType)}.")] = None,
    firmware: Annotated[str | None, Parameter(help=f"One of: {', '.join(Firmware)}.")] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for programs.")] = False,
    markdown: Annotated[bool, Parameter(negative="", help="Print the table as Markdown.")] = False,
) -> int:
    """Run every flow under every revision and proposal, on every VM type and firmware.

    Exit status 2: a file that isn't a proposal, or a name that doesn't exist.
    """
    from gmemcore.vmm.flows import FLOWS, run_flows
    from gmemcore.vmm.proposal import ProposalError

    try:
        results = run_flows(
            _chosen("abi", abi, _abis(proposals or [])),
            flows=_chosen("flow", flow, {name: name for name in FLOWS}),
            vm_types=_chosen("VM type", vm_type, {member.value: member for member in VmType}),
            firmware=_chosen("firmware", firmware, {member.value: member for member in Firmware}),
        )
    except (ProposalError, InvalidArgumentError) as error:
        message = error.strerror if isinstance(error, InvalidArgumentError) else error
        print(f"gmemcore flows: {message}", file=sys.stderr)
        return 2
    if as_json:
        lines = ",\n".join(json.dumps(_as_record(result)) for result in results)
        print(f"[\n{lines}\n]")
    elif markdown:
        _print_markdown(_table(results))
    else:
        _print_rich(_table(results))
    return 0


def _abis(paths: list[Path]) -> "dict[str, Abi]":
    """Return every abi by name, those of files last."""
    from gmemcore.policy import ABIS
    from gmemcore.vmm.proposal import read_proposals, shipped_proposals

    proposals = [*shipped_proposals(), *read_proposals(paths)]
    return {**ABIS, **{proposal.name: proposal for proposal in proposals}}


def _chosen(kind: str, name: str | None, known: dict[str, Any]) -> list[Any]:
    """Return the one that is asked for, or all."""
    if name is None:
        return list(known.values())
    if name not in known:
        raise InvalidArgumentError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    return [known[name]]


def _as_record(result: "FlowResult") -> dict[str, Any]:
    """Return the JSON object of a result."""
    return {
        "flow": result.flow,
        "abi": result.abi,
        "vm_type": result.vm_type,
        "firmware": result.firmware,
        "outcome": result.outcome,
        "step": result.step,
        "flags": list(result.flags),
        "refused": list(result.refused),
        "promised": result.promised,
        "counters": result.counters,
    }


# --- the table ----------------------------------------------------------------------------------------------
def _table(results: "list[FlowResult]") -> list[_Row]:
    """Return the table: a row for abis under which a flow comes equally far, a column a VM type."""
    vm_types = list(dict.fromkeys(result.vm_type for result in results))
    rows: list[_Row] = [("flow", "abi", *vm_types)]
    for flow, of_flow in groupby(results, key=lambda result: result.flow):
        abis: dict[_Row, list[str]] = {}
        for abi, of_abi in groupby(of_flow, key=lambda result: result.abi):
            by_vm_type = groupby(of_abi, key=lambda result: result.vm_type)
            abis.setdefault(tuple(_cell(list(vms)) for _, vms in by_vm_type), []).append(abi)
        first = flow
        for cells, names in abis.items():
            rows.append((first, ", ".join(names), *cells))
            first = ""
    return rows


def _cell(results: "list[FlowResult]") -> str:
    """Return how far a flow came on one VM type; in two parts where the firmware matters."""
    texts = {result.firmware: _text(result) for result in results}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{firmware}: {text}" for firmware, text in texts.items())


def _text(result: "FlowResult") -> str:
    """Return how far a flow came on one VM."""
    if not result.ok:
        return f"{result.step}: {result.outcome}"
    after = f" after {', '.join(dict.fromkeys(result.refused))}" if result.refused else ""
    return ("ok" if result.promised else "ok*") + after


def _print_rich(rows: list[_Row]) -> None:
    """Print the table for people; flows are headings in the column of abis, for it to fit 100 columns."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    flows, *columns = zip(*rows, strict=True)
    for i, texts in enumerate(columns):
        words = " ".join(texts if i else (*texts, *flows[1:])).split()
        table.add_column(texts[0], overflow="fold", min_width=max(map(len, words)))
    for flow, *cells in rows[1:]:
        if flow:
            table.add_section()
            table.add_row(f"[bold]{flow}[/bold]")
        table.add_row(*cells)
    console.print(table)
    print(_LEGEND)


def _print_markdown(rows: list[_Row]) -> None:
    """Print the table as Markdown."""
    for line in [rows[0], tuple("---" for _ in rows[0]), *rows[1:]]:
        print("| " + " | ".join(text.replace("*", r"\*") for text in line) + " |")
    print(f"\n{_LEGEND}".replace("*", r"\*"))
