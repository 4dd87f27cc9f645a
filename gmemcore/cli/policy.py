"""``gmemcore policy``: what each revision and proposal answers, as tables, JSON or Markdown, or one why."""

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.table import Table

from gmemcore.errors import InvalidArgumentError
from gmemcore.policy import (
    ABIS,
    DEFAULT_ABI,
    HISTORY,
    UPSTREAM,
    Abi,
    Cell,
    CellKey,
    cells,
    content_flags,
    flag_name,
    get_abi,
)
from gmemcore.policy.summary import LEGEND, TABLE_LEGEND, Row, abi_table, answer_word
from gmemcore.uapi import ContentMode, Direction, Firmware, Phase, VmType

app = cyclopts.App(name="policy", help="Show what each revision and proposal of the interface answers.")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which cells; what is left out selects all."""

    vm_type: Annotated[str | None, Parameter(help=f"One of: {', '.join(VmType)}.")] = None
    firmware: Annotated[str | None, Parameter(help=f"One of: {', '.join(Firmware)}.")] = None
    phase: Annotated[str | None, Parameter(help=f"One of: {', '.join(Phase)}.")] = None
    direction: Annotated[str | None, Parameter(help=f"One of: {', '.join(Direction)}.")] = None
    flag: Annotated[str | None, Parameter(help="NONE, or the name of a content flag.")] = None

    def of(self, abi: str | None) -> list[tuple[CellKey, Cell]]:
        """Return the selected cells of an abi; of every abi for None."""
        return list(
            cells(
                abi,
                self.vm_type,
                self.firmware,
                phase=self.phase,
                direction=self.direction,
                flag=None if self.flag is None else _flag(self.flag),
            )
        )


_Abi = Annotated[
    str | None,
    Parameter(
        help=f"One of: {', '.join(ABIS)}; v6 to v12 and merged, which are v13; linux-6.8 to linux-7.3."
    ),
]
_Cells = Annotated[Selection | None, Parameter(name="*")]
_Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for programs.")]
_Why = Annotated[bool, Parameter(negative="", help="Say why one cell is as it is, and the source.")]
_Markdown = Annotated[bool, Parameter(negative="", help="Print the tables as Markdown.")]


@app.default
def show(
    *,
    abi: _Abi = None,
    selection: _Cells = None,
    as_json: _Json = False,
    why: _Why = False,
    markdown: _Markdown = False,
) -> None:
    """Show what the interface answers to a conversion, by VM type, launch phase, direction and content flag.

    Tables and ``--why`` are about one abi, v5 unless another is named; ``--json`` without ``--abi`` is about
    all of them.
    """
    selected = selection or Selection()
    with _one_line_errors():
        if as_json:
            _print_json(_as_record(key, answer) for key, answer in selected.of(abi))
        elif why:
            _print_why(selected.of(DEFAULT_ABI if abi is None else abi))
        else:
            print_table = _markdown_table if markdown else _table_with_status
            _print_tables(get_abi(DEFAULT_ABI if abi is None else abi), selected, print_table)


@app.command(name="list")
def list_revisions(*, as_json: _Json = False) -> None:
    """List every revision, proposal and release: when it was posted, where, and what became of it."""
    if as_json:
        _print_json(asdict(row) for row in HISTORY)
        return
    print(UPSTREAM)
    for row in HISTORY:
        modelled = {row.name: "", None: ", not modelled"}.get(row.abi, f", modelled as {row.abi}")
        print(f"\n{row.name}: {', '.join(part for part in (row.status, row.date) if part)}{modelled}")
        print("\n".join(_wrapped(row.summary, "  ")))
        if row.message_id:
            print(f"  <{row.message_id}>")


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 78, initial_indent=indent, subsequent_indent=indent)


@app.command
def diff(
    before: str,
    after: str,
    /,
    *,
    selection: _Cells = None,
    as_json: _Json = False,
) -> None:
    """Show the cells that two abis answer differently.

    Parameters
    ----------
    before, after
        The two abis.
    """
    selected = selection or Selection()
    with _one_line_errors():
        pairs = zip(selected.of(before), selected.of(after), strict=True)
        changes = [(key, old, new) for (key, old), (_, new) in pairs if _answer(old) != _answer(new)]
        if as_json:
            _print_json(_as_change(key, old, new, get_abi(after)) for key, old, new in changes)
        else:
            _print_changes(changes, get_abi(before), get_abi(after))


# --- input --------------------------------------------------------------------------------------------------
@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn a wrong selection into one line on stderr and exit status 2."""
    try:
        yield
    except InvalidArgumentError as error:
        print(f"gmemcore policy: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None


def _flag(name: str) -> ContentMode:
    """Return the content flag of a name."""
    by_name = {"NONE": ContentMode.NONE} | {row.name: row.bit for row in content_flags()}
    if name not in by_name:
        raise InvalidArgumentError(f"unknown flag {name!r}; known: {', '.join(by_name)}")
    return by_name[name]


# --- JSON ---------------------------------------------------------------------------------------------------
def _answer(answer: Cell) -> dict[str, str | None]:
    """Return what a program gets to know about an answer."""
    return {"outcome": answer.outcome, "effect": answer.effect, "unless": answer.unless}


def _place(key: CellKey) -> dict[str, str]:
    """Return the question as a program gets it, the abi aside."""
    return {
        "vm_type": key.vm_type,
        "firmware": key.firmware,
        "phase": key.phase,
        "direction": key.direction,
        "flag": flag_name(key.flag, key.abi),
    }


def _as_record(key: CellKey, answer: Cell) -> dict[str, Any]:
    """Return the JSON object of a cell."""
    return {"abi": key.abi, **_place(key), **_answer(answer)}


def _as_change(key: CellKey, old: Cell, new: Cell, after: Abi) -> dict[str, Any]:
    """Return the JSON object of a cell that two abis answer differently."""
    return {
        **_place(key),
        "before": {"abi": key.abi, **_answer(old)},
        "after": {"abi": after.name, **_answer(new)},
    }


def _print_json(records: Iterable[dict[str, Any]]) -> None:
    """Print a JSON list, a record a line."""
    lines = ",\n".join(json.dumps(record) for record in records)
    print(f"[\n{lines}\n]" if lines else "[]")


# --- one cell -----------------------------------------------------------------------------------------------
def _print_why(selected: list[tuple[CellKey, Cell]]) -> None:
    """Print the answer of one cell, the reason and where it can be read."""
    places = {key._replace(firmware=Firmware.TODAY) for key, _ in selected}
    if len(places) != 1:
        raise InvalidArgumentError(
            f"--why is about one cell, not {len(places)}: give --vm-type, --phase, --direction and --flag"
        )
    key, answer = selected[0]  # today's firmware comes first
    question = ", ".join(_place(key).values())
    print(f"{key.abi}: {question}: {answer.outcome}{_effect_in_words(answer)}")
    print(answer.why)
    print(f"Source: {answer.source}")


def _effect_in_words(answer: Cell) -> str:
    """Return the effect and the precondition of an answer, for the end of a line."""
    if answer.effect is None:
        return ""
    unless = f" unless a page of the range is {answer.unless}" if answer.unless else ""
    return f" ({answer.effect}){unless}"


# --- tables -------------------------------------------------------------------------------------------------
def _print_tables(abi: Abi, selected: Selection, print_table: Callable[[str, list[Row], str], None]) -> None:
    """Print what an abi answers, a row a VM type and a column a flag."""
    known = (ContentMode.NONE, *(row.bit for row in abi.flags))
    flags = [bit for bit in known if selected.flag is None or bit == _flag(selected.flag)]
    rows = abi_table(abi, selected.of(abi.name), flags)
    print_table(f"{abi.name}: {abi.title}", rows, TABLE_LEGEND)


def _table_with_status(title: str, rows: list[Row], legend: str) -> None:
    """Print what is upstream, then a table."""
    print(f"{UPSTREAM}\n")
    _rich_table(title, rows, legend)


def _rich_table(title: str, rows: list[Row], legend: str) -> None:
    """Print a table for people."""
    table = Table(box=box.SIMPLE)
    for name in rows[0]:
        table.add_column(name)
    for row in rows[1:]:
        table.add_row(*row)
    print(title)
    Console().print(table)
    print(legend)


def _markdown_table(title: str, rows: list[Row], legend: str) -> None:
    """Print a Markdown table."""
    lines = [rows[0], tuple("---" for _ in rows[0]), *rows[1:]]
    print(f"{title}\n")
    for line in lines:
        print("| " + " | ".join(text.replace("|", r"\|") for text in line) + " |")
    print(f"\n{legend}")


# --- differences --------------------------------------------------------------------------------------------
def _when(places: list[tuple[Firmware, Phase]]) -> str:
    """Return launch phases and firmware in words."""
    by_phase: dict[Phase, list[Firmware]] = {}
    for firmware, phase in places:
        by_phase.setdefault(phase, []).append(firmware)
    texts = {
        phase: "" if len(firmwares) == len(Firmware) else f" ({', '.join(firmwares)} firmware)"
        for phase, firmwares in by_phase.items()
    }
    if len(texts) == len(Phase) and not any(texts.values()):
        return "always"
    return ", ".join(f"{phase}{text}" for phase, text in texts.items())


def _print_changes(changes: list[tuple[CellKey, Cell, Cell]], before: Abi, after: Abi) -> None:
    """Print cells that two abis answer differently, equal changes of one VM type on one line."""
    if not changes:
        print(f"{before.name} and {after.name} answer alike")
        return
    lines: dict[Row, list[tuple[Firmware, Phase]]] = {}
    for key, old, new in changes:
        direction = key.direction.replace("_", " ")
        line = (key.vm_type, flag_name(key.flag, before), direction, answer_word(old), answer_word(new))
        lines.setdefault(line, []).append((key.firmware, key.phase))
    rows = [
        (vm_type, flag, direction, _when(places), was, becomes)
        for (vm_type, flag, direction, was, becomes), places in lines.items()
    ]
    header = ("VM type", "flag", "direction", "when", before.name, after.name)
    _rich_table(f"{before.name} to {after.name}", [header, *rows], LEGEND)
