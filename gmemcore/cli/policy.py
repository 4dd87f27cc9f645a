"""``gmemcore policy``: what each revision and proposal answers, as tables, JSON or Markdown, or one why."""

import textwrap
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from gmemcore.cli.console import reporting, say, say_json_rows
from gmemcore.cli.options import (
    AbiOption,
    DirectionOption,
    FirmwareOption,
    FlagOption,
    JsonSwitch,
    MarkdownSwitch,
    PhaseOption,
    ProposalFiles,
    VmTypeOption,
    at_most_one,
    revision_named,
)
from gmemcore.cli.tables import print_markdown, print_table
from gmemcore.errors import InputError
from gmemcore.policy import (
    ABIS,
    HISTORY,
    UPSTREAM,
    Abi,
    Cell,
    CellKey,
    HugePages,
    cell,
    cells,
    flag_bits,
    flag_name,
)
from gmemcore.policy.proposal import read_proposals
from gmemcore.policy.summary import LEGEND, TABLE_LEGEND, Row, abi_table, answer_word
from gmemcore.uapi import ContentMode, Firmware, Phase

app = cyclopts.App(name="policy", help="Show what each revision and proposal of the interface answers.")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which cells; what is left out selects all."""

    vm_type: VmTypeOption = None
    firmware: FirmwareOption = None
    phase: PhaseOption = None
    direction: DirectionOption = None
    flag: FlagOption = None

    def of(self, abi: Abi) -> list[tuple[CellKey, Cell]]:
        """Return the selected cells of a revision."""
        place = {"phase": self.phase, "direction": self.direction, "flag": self.flag}
        return list(cells(abi, self.vm_type, self.firmware, **place))


_Cells = Annotated[Selection | None, Parameter(name="*")]


@app.default
def show(
    *,
    abi: AbiOption = None,
    proposal: ProposalFiles = (),
    selection: _Cells = None,
    as_json: JsonSwitch = False,
    why: Annotated[
        bool, Parameter(help="Give the reason of one cell, or of the rules about huge pages, and its source.")
    ] = False,
    markdown: MarkdownSwitch = False,
) -> None:
    """Show the answer to each conversion, by VM type, launch phase, direction and content flag.

    Tables and --why are about one revision, by default v5 or the proposal of a file; --json without --abi is
    about all revisions.
    """
    selected = selection or Selection()
    with reporting("policy"):
        at_most_one(json=as_json, why=why, markdown=markdown)
        every = as_json and abi is None
        chosen = [*ABIS.values(), *read_proposals(proposal)] if every else [revision_named(abi, proposal)]
        if as_json:
            say_json_rows(_as_record(row, *each) for row in chosen for each in selected.of(row))
        elif why and chosen[0].huge_pages and selected == Selection():
            _print_reasons(chosen[0], chosen[0].huge_pages)
        elif why:
            _print_why(chosen[0], selected.of(chosen[0]))
        else:
            _print_answers(chosen[0], selected, markdown=markdown)


@app.command(name="list")
def list_revisions(*, as_json: JsonSwitch = False) -> None:
    """List every revision, proposal and release: when it was posted, where, and what became of it."""
    if as_json:
        say_json_rows(asdict(row) for row in HISTORY)
        return
    say(UPSTREAM)
    for row in HISTORY:
        modelled = {row.name: "", None: ", not modelled"}.get(row.abi, f", modelled as {row.abi}")
        say("", f"{row.name}: {row.status}, {row.date}{modelled}")
        say("\n".join(_wrapped(row.summary, "  ")))
        if row.message_id:
            say(f"  <{row.message_id}>")


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 78, initial_indent=indent, subsequent_indent=indent)


@app.command
def diff(
    before: Annotated[str, Parameter(help="A revision or proposal.")],
    after: Annotated[str, Parameter(help="Another one.")],
    /,
    *,
    proposal: ProposalFiles = (),
    selection: _Cells = None,
    as_json: JsonSwitch = False,
) -> None:
    """Show the cells that two revisions answer differently."""
    selected = selection or Selection()
    with reporting("policy diff"):
        old, new = revision_named(before, proposal), revision_named(after, proposal)
        places = dict.fromkeys(key[1:] for row in (old, new) for key, _ in selected.of(row))
        answers = ((CellKey(old.name, *each), cell(old, *each), cell(new, *each)) for each in places)
        changes = [change for change in answers if _answer(change[1]) != _answer(change[2])]
        if as_json:
            say_json_rows(_as_change(old, new, *change) for change in changes)
        else:
            _print_changes(changes, old, new)


# --- JSON ---------------------------------------------------------------------------------------------------
def _answer(answer: Cell) -> dict[str, str | None]:
    """Return what a program gets to know about an answer."""
    return {"outcome": answer.outcome, "effect": answer.effect, "unless": answer.unless}


def _place(abi: Abi, key: CellKey) -> dict[str, str]:
    """Return the question as a program gets it, the revision aside."""
    return {
        "vm_type": key.vm_type,
        "firmware": key.firmware,
        "phase": key.phase,
        "direction": key.direction,
        "flag": flag_name(key.flag, abi),
    }


def _as_record(abi: Abi, key: CellKey, answer: Cell) -> dict[str, Any]:
    """Return the JSON object of a cell."""
    return {"abi": abi.name, **_place(abi, key), **_answer(answer)}


def _as_change(before: Abi, after: Abi, key: CellKey, old: Cell, new: Cell) -> dict[str, Any]:
    """Return the JSON object of a cell that two revisions answer differently."""
    return {
        **_place(before, key),
        "before": {"abi": before.name, **_answer(old)},
        "after": {"abi": after.name, **_answer(new)},
    }


# --- one cell -----------------------------------------------------------------------------------------------
def _print_why(abi: Abi, selected: list[tuple[CellKey, Cell]]) -> None:
    """Print the answer of one cell, the reason and where it can be read."""
    places = {key._replace(firmware=Firmware.TODAY) for key, _ in selected}
    if len(places) != 1:
        raise InputError(
            f"--why must be about one cell, not {len(places)}; use --vm-type, --phase, --direction and --flag"
        )
    key, answer = selected[0]  # today's firmware comes first
    question = ", ".join(_place(abi, key).values())
    say(
        f"{abi.name}: {question}: {answer.outcome}{_effect_in_words(answer)}",
        answer.why,
        f"Source: {answer.source}",
    )


def _print_reasons(abi: Abi, rules: HugePages) -> None:
    """Print what a revision says about huge pages, and who says so."""
    say(f"{abi.name}: {abi.title}")
    for row in rules.reasons:
        say("", *_wrapped(f"{row.rule[0].upper()}{row.rule[1:]}."), *_wrapped(row.why, "  "))
        say(*_wrapped(f"Source: {row.source}", "  "))


def _effect_in_words(answer: Cell) -> str:
    """Return the effect and the precondition of an answer, for the end of a line."""
    if answer.effect is None:
        return ""
    unless = f" unless a page of the range is {answer.unless}" if answer.unless else ""
    return f" ({answer.effect}){unless}"


# --- tables -------------------------------------------------------------------------------------------------
def _print_answers(abi: Abi, selected: Selection, *, markdown: bool) -> None:
    """Print what a revision answers, a row per VM type and a column per flag."""
    wanted = None if selected.flag is None else flag_bits(selected.flag, abi)
    known = (ContentMode.NONE, *(row.bit for row in abi.flags))
    heads, *rows = abi_table(abi, selected.of(abi), [bit for bit in known if wanted in (None, int(bit))])
    if markdown:
        say(f"{abi.name}: {abi.title}", "")
        print_markdown(heads, rows)
    else:
        say(UPSTREAM, "", f"{abi.name}: {abi.title}")
        print_table(heads, rows)
    say("", TABLE_LEGEND)
    if abi.huge_pages:
        say(f"files of huge pages: gmemcore policy --why --abi {abi.name}")


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
    """Print cells that two revisions answer differently, equal changes of one VM type on one line."""
    if not changes:
        say(f"{before.name} and {after.name} answer alike")
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
    say(f"{before.name} to {after.name}")
    print_table(header, rows, labels=3)
    say("", LEGEND)
