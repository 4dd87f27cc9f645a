"""``gmemcore flows``: what userspace does with conversion, on every VM type and under every revision."""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from cyclopts import Parameter

from gmemcore.cli.console import progress, say_json_rows
from gmemcore.cli.options import (
    AbiOption,
    FirmwareOption,
    JsonSwitch,
    MarkdownSwitch,
    VmTypeOption,
    at_most_one,
    choice,
    chosen_revisions,
    one,
)
from gmemcore.cli.tables import Heading, print_legend, print_markdown, print_table
from gmemcore.uapi import Firmware, VmType
from gmemcore.vmm.flows import FLOWS, FlowResult, run_flows

if TYPE_CHECKING:
    _Flow = str
else:  # choices, for help and completion
    _Flow = Literal[tuple(FLOWS)]

_LEGEND: Final = {
    "ok": "the flow came through",
    "ok*": "it came through, though no flag promised to keep contents",
    "ok after FLAG": "capabilities offered FLAG, and it was refused before another one worked",
    "STEP: ERRNO": "the step at which it ended, and why",
    "CONTENTS": "a reader got bytes other than those that were written",
    "NOT_OFFERED": "contents had to be kept, and capabilities offered no flag for it",
}

_Row = tuple[str, ...]


def flows(
    proposal: Annotated[
        tuple[Path, ...], Parameter(help="TOML file of a proposal to run too. Can be repeated.")
    ] = (),
    *,
    flow: Annotated[
        _Flow | None, Parameter(help="Run this flow alone.", converter=one(choice([*FLOWS])))
    ] = None,
    abi: AbiOption = None,
    vm_type: VmTypeOption = None,
    firmware: FirmwareOption = None,
    as_json: JsonSwitch = False,
    markdown: MarkdownSwitch = False,
) -> None:
    """Run every flow under every revision and proposal, on every VM type and firmware."""
    at_most_one(json=as_json, markdown=markdown)
    chosen = chosen_revisions(abi, proposal)
    results: list[FlowResult] = []
    with progress("flows", len(chosen), "revisions") as done:
        for number, revision in enumerate(chosen, start=1):
            results += run_flows(
                [revision],
                flows=[*FLOWS] if flow is None else [flow],
                vm_types=[*VmType] if vm_type is None else [vm_type],
                firmware=[*Firmware] if firmware is None else [firmware],
            )
            done(number)
    results.sort(key=lambda result: [*FLOWS].index(result.flow))
    if as_json:
        say_json_rows(_as_record(result) for result in results)
        return
    heads, rows = _table(results)
    if markdown:
        print_markdown(("flow", *heads), rows)
        print_legend(_LEGEND, markdown=True)
        return
    by_flow: list[_Row | Heading] = []
    for name, own in groupby(rows, key=lambda row: row[0]):
        by_flow += [Heading(name), *(row[1:] for row in own)]
    print_table(heads, by_flow)
    print_legend(_LEGEND)


def _as_record(result: FlowResult) -> dict[str, Any]:
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
def _table(results: list[FlowResult]) -> tuple[_Row, list[_Row]]:
    """Return heads and rows: a row for revisions with equal results of a flow, a column per VM type."""
    vm_types = list(dict.fromkeys(result.vm_type for result in results))
    rows: list[_Row] = []
    for flow, of_flow in groupby(results, key=lambda result: result.flow):
        abis: dict[_Row, list[str]] = {}
        for abi, of_abi in groupby(of_flow, key=lambda result: result.abi):
            by_vm_type = groupby(of_abi, key=lambda result: result.vm_type)
            abis.setdefault(tuple(_cell(list(vms)) for _, vms in by_vm_type), []).append(abi)
        rows += [(flow, ", ".join(names), *cells) for cells, names in abis.items()]
    return ("revisions", *vm_types), rows


def _cell(results: list[FlowResult]) -> str:
    """Return how far a flow came on one VM type; in two parts where the firmware matters."""
    texts = {result.firmware: _text(result) for result in results}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{firmware}: {text}" for firmware, text in texts.items())


def _text(result: FlowResult) -> str:
    """Return how far a flow came on one VM."""
    if not result.ok:
        return f"{result.step}: {result.outcome}"
    after = f" after {', '.join(dict.fromkeys(result.refused))}" if result.refused else ""
    return ("ok" if result.promised else "ok*") + after
