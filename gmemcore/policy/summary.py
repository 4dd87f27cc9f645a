"""A revision as one table: one row per VM type, one column per content flag."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

from gmemcore.html import note, table
from gmemcore.policy.abi import Abi
from gmemcore.policy.lookup import Cell, CellKey, cells, flag_name
from gmemcore.uapi import ContentMode, Direction, Firmware, Phase

_REFUSED: Final = "- is EOPNOTSUPP"
_EFFECTS_ARE: Final = "ok is KEEP, an effect in capitals another one; (cipher): with that firmware"
LEGEND: Final = f"{_REFUSED}; {_EFFECTS_ARE}"
"""Legend of answers."""
TABLE_LEGEND: Final = f"to private | to shared; pre, post: before, after launch; {_REFUSED}\n{_EFFECTS_ARE}"
"""Legend of the table's cells."""

_PHASE_PREFIX = {Phase.LAUNCHING: "pre", Phase.RUNNING: "post"}
_OUTCOMES = {"EOPNOTSUPP": "-"}
_EFFECTS = {"KEEP": "ok"}

Row = tuple[str, ...]


def abi_table(
    abi: Abi,
    selected: Iterable[tuple[CellKey, Cell]] | None = None,
    flags: Sequence[ContentMode] | None = None,
) -> list[Row]:
    """Return what a revision answers: a header, then one row per VM type, or two where firmware matters.

    Parameters
    ----------
    abi : Abi
    selected : iterable of (CellKey, Cell), or None
        Some of its cells, as returned by `gmemcore.policy.cells`; None: all.
    flags : sequence of ContentMode, or None
        Columns; None: no flag, and each flag that it knows.
    """
    columns = (ContentMode.NONE, *(row.bit for row in abi.flags)) if flags is None else flags
    header = ("VM type", *("flags = 0" if not bit else flag_name(bit, abi) for bit in columns))
    rows: list[Row] = [header]
    of_all = cells(abi) if selected is None else selected
    for vm_type, group in groupby(of_all, key=lambda pair: pair[0].vm_type):
        answers = list(group)
        by_firmware: dict[Row, list[Firmware]] = {}
        for firmware in dict.fromkeys(key.firmware for key, _ in answers):
            row = tuple(
                _table_cell(pair for pair in answers if (pair[0].firmware, pair[0].flag) == (firmware, flag))
                for flag in columns
            )
            by_firmware.setdefault(row, []).append(firmware)
        for row, firmwares in by_firmware.items():
            label = vm_type if len(by_firmware) == 1 else f"{vm_type} ({firmwares[0]})"
            rows.append((label, *row))
    return rows


def answer_word(answer: Cell) -> str:
    """Return an answer as a word: ok (KEEP), the effect, ``-`` (EOPNOTSUPP), or the errno's name."""
    if answer.effect is None:
        return _OUTCOMES.get(answer.outcome, answer.outcome)
    unless = f" unless {answer.unless}" if answer.unless else ""
    return _EFFECTS.get(answer.effect, answer.effect) + unless


def _table_cell(selected: Iterable[tuple[CellKey, Cell]]) -> str:
    """Return the text of a cell: to private | to shared."""
    by_direction: dict[Direction, dict[Phase, str]] = {}
    for key, answer in selected:
        by_direction.setdefault(key.direction, {})[key.phase] = answer_word(answer)
    return " | ".join(_both_phases(answers) for answers in by_direction.values())


def _both_phases(answers: dict[Phase, str]) -> str:
    """Return the answers before and after launch as one text."""
    if len(set(answers.values())) == 1:
        return next(iter(answers.values()))
    return ", ".join(f"{_PHASE_PREFIX[phase]} {text}" for phase, text in answers.items())


def _html(abi: Abi) -> str:
    """Return what a revision answers, for notebooks."""
    header, *rows = abi_table(abi)
    return table(f"{abi.name}: {abi.title}", header, rows, note(TABLE_LEGEND))


Abi.to_html = staticmethod(_html)
