"""One page of a run: what was measured, what was refused, where, and how far to trust it."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from gmemcore.analysis.page import Block, Cell, Facts, Page, Section, Table, Text, to_html
from gmemcore.analysis.runs import BenchCell, Run
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import NOISY, format_number, format_ratio, format_size, format_time

ROWS: Final = 5000
"""Rows of one table at most; more say nothing to a reader, and a page of a million rows opens nowhere."""

_MODEL: Final = (
    "Made by gmemcore, a model of in-place conversion of guest_memfd memory. ENCRYPT and DECRYPT are a key "
    "stream at the speed of XOR: a cost model, not encryption. GB/s are those of the machine above; counters "
    "carry to other hardware. "
    "GB = 1e9 bytes of guest memory, counted once."
)


def report(run: Run) -> str:
    """Return the HTML page of a run."""
    return to_html(PAGES[run.kind](run))


# --- bench --------------------------------------------------------------------------------------------------
_DIRECTIONS: Final = {"to_private": "to private", "to_shared": "to shared"}
_BENCH_COLUMNS: Final = {
    **dict.fromkeys(("VM type", "phase", "direction", "flag", "effect"), False),
    "range": True,
    "bytes": False,
    **dict.fromkeys(("GB/s", "a call", "p95", "cv", "n", "populate GB/s", "access GB/s"), True),
    "ratio to its primitive": False,
    "counters of a range": False,
}
_BENCH_LEGEND: Final = (
    "GB/s: the conversion itself, where it moves bytes; a call: its median time. populate: launch update in "
    "place (PRESERVE) or from a source, before launch; legacy: copying across. access: the new side accepts "
    "where it must, and reads everything. ratio: speed of the step that moves the bytes over that of the "
    "memory primitive of its kind, measured in turn with it. +hole: pages that nobody had touched before."
)


def _bench(run: Run) -> Page:
    cells: list[BenchCell] = run.records
    measured = [cell for cell in cells if cell.effect is not None]
    noisy = [cell for cell in measured if _is_noisy(cell)]
    environment = run.first.environment
    facts = {
        "cases measured": str(len(measured)),
        "refused, as they must be": str(len(cells) - len(measured)),
        "compared byte by byte": f"{format_number(sum(cell.verified_bytes for cell in cells) / 1e9)} GB",
        "noisy (cv above 10 %)": str(len(noisy)),
    }
    sections = [
        Section("Primitives", [_primitives(run.first.primitives, environment)]),
        Section("At a glance", _glances(cells)),
        Section("Every case", [Text(_BENCH_LEGEND), *_details(measured)]),
        Section("Environment", [_key_values(environment)]),
    ]
    head: list[Block] = [Facts(facts), *_warnings(environment, len(noisy))]
    return Page("Conversion cost", _machine(environment), _command(environment), head, sections, _MODEL)


def _is_noisy(cell: BenchCell) -> bool:
    return cell.seconds.cv is not None and cell.seconds.cv > NOISY


def _warnings(environment: Mapping[str, Any], noisy: int) -> Iterator[Text]:
    """Say what makes the figures worth less."""
    if environment.get("quick"):
        yield Text("A quick run: every case ran and was verified, but the figures say little.", warning=True)
    load, cpus = environment.get("load_average"), environment.get("cpus")
    if isinstance(load, int | float) and isinstance(cpus, int) and load > max(cpus - 1, 0.5):
        text = f"The machine was busy when the run began: load {format_number(load)} on {cpus} CPUs."
        yield Text(text, warning=True)
    if noisy:
        text = (
            f"Samples of {noisy} cases differ by more than 10 % (~): trust their ratios before their times."
        )
        yield Text(text, warning=True)


def _primitives(speeds: Mapping[str, float], environment: Mapping[str, Any]) -> Table:
    best = max(speeds.values(), default=0) or 1.0
    libraries = environment.get("primitives_by")
    by: Mapping[str, Any] = libraries if isinstance(libraries, dict) else {}
    rows = [
        (name, Cell(format_number(speed), share=speed / best), str(by.get(name, "")))
        for name, speed in speeds.items()
    ]
    return Table(
        ("primitive", "GB/s", "the best is"),
        rows,
        caption="What this machine's memory can do, in the same run",
    )


def _glances(cells: Sequence[BenchCell]) -> list[Block]:
    """Return a table a revision: every cell of policy at its largest range, refusals in place."""
    blocks: list[Block] = []
    for (abi, firmware), group in _grouped(cells, lambda cell: (cell.abi, cell.firmware)).items():
        by_flag = _grouped(group, lambda cell: cell.flag)
        refused = {flag: _refusal_everywhere(column) for flag, column in by_flag.items()}
        flags = [flag for flag, outcome in refused.items() if outcome is None]
        rows = [
            (*place, *(_glance([cell for cell in row if cell.flag == flag]) for flag in flags))
            for place, row in _grouped(group, _place).items()
        ]
        caption = f"{abi}, firmware {firmware}: effect and cost of the largest range, or the refusal"
        blocks.append(Table(("VM type", "phase", "direction", *flags), _muted(rows, 3), caption=caption))
        blocks += [
            Text(f"{outcome} everywhere: {', '.join(flag for flag in refused if refused[flag] == outcome)}")
            for outcome in dict.fromkeys(filter(None, refused.values()))
        ]
    return blocks


def _refusal_everywhere(cells: Sequence[BenchCell]) -> str | None:
    """Return the outcome that all cells are refused with; None if one isn't, or they differ."""
    outcomes = {cell.outcome for cell in cells}
    return outcomes.pop() if len(outcomes) == 1 and all(cell.effect is None for cell in cells) else None


def _place(cell: BenchCell) -> tuple[str, str, str]:
    return cell.vm_type, cell.phase, _DIRECTIONS.get(cell.direction, cell.direction)


def _glance(cells: Sequence[BenchCell]) -> Cell:
    """Return one cell of policy in few words."""
    if not cells:
        return Cell("")
    cell = max(cells, key=lambda cell: (cell.pages_allocated_before > 0, cell.range))
    if cell.effect is None:
        return Cell(cell.outcome, "refused")
    own_step = f" ({cell.bytes})" if cell.effect == "KEEP" and cell.bytes != "none" else ""
    return Cell(f"{cell.effect}{own_step} {_cost(cell)} ({format_size(cell.range)})")


def _cost(cell: BenchCell) -> str:
    if cell.convert_gbps is None:
        return format_time(cell.seconds.median)
    return f"{format_number(cell.convert_gbps)} GB/s"


def _details(cells: Sequence[BenchCell]) -> list[Table | Text]:
    """Return a table a revision with every figure."""
    numbers = frozenset(i for i, numeric in enumerate(_BENCH_COLUMNS.values()) if numeric)
    blocks: list[Table | Text] = []
    for (abi, firmware), group in _grouped(cells, lambda cell: (cell.abi, cell.firmware)).items():
        rows = _muted([_detail(cell) for cell in group[:ROWS]], 5)
        blocks.append(Table(tuple(_BENCH_COLUMNS), rows, numbers, f"{abi}, firmware {firmware}"))
        blocks += _left_off(len(group))
    return blocks


def _detail(cell: BenchCell) -> tuple[str | Cell, ...]:
    seconds = cell.seconds
    size = "all" if cell.range == cell.memory else format_size(cell.range)
    noise = "" if seconds.cv is None else f"{seconds.cv:.0%}{'~' if _is_noisy(cell) else ''}"
    return (
        *(*_place(cell), cell.flag, cell.effect or ""),
        size if cell.pages_allocated_before else f"{size}+hole",
        cell.bytes,
        *(format_number(cell.convert_gbps), format_time(seconds.median), format_time(seconds.p95)),
        Cell(noise, "noisy" if _is_noisy(cell) else ""),
        str(seconds.n),
        *(format_number(cell.populate_gbps), format_number(cell.first_access_gbps)),
        Cell(format_ratio(cell.ratio), share=cell.ratio),
        Cell(_counted(cell.counters), "long"),
    )


# --- what the pages share -----------------------------------------------------------------------------------
def _grouped(items: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Return items by key, keys in the order of their first item."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _muted(rows: Sequence[Sequence[str | Cell]], labels: int) -> list[list[str | Cell]]:
    """Mute words of the first columns that repeat the row above, as long as all before them do too."""
    shown: list[list[str | Cell]] = []
    above: Sequence[str | Cell] = ()
    for row in rows:
        pairs = zip(row[:labels], above, strict=False)
        same = next((i for i, (own, other) in enumerate(pairs) if own != other), min(labels, len(above)))
        shown.append([Cell(str(word), "again") if i < same else word for i, word in enumerate(row)])
        above = row
    return shown


def _left_off(rows: int) -> list[Text]:
    return (
        [Text(f"{rows - ROWS} more rows are in the file and not here.", warning=True)] if rows > ROWS else []
    )


def _counted(counters: Mapping[str, int]) -> str:
    """Return the counters that counted anything; bytes as sizes."""
    return ", ".join(
        f"{name} {format_size(figure) if name.startswith('bytes_') and figure % PAGE_SIZE == 0 else figure}"
        for name, figure in counters.items()
        if figure
    )


def _machine(environment: Mapping[str, Any]) -> str:
    """Return the machine in a line."""
    memory = environment.get("memory_bytes")
    parts = (
        environment.get("cpu"),
        f"{environment['cpus']} CPUs" if "cpus" in environment else None,
        f"{format_number(memory / 1e9)} GB" if isinstance(memory, int) else None,
        f"Linux {environment['kernel']}" if "kernel" in environment else None,
        f"gmemcore {environment['gmemcore']}" if "gmemcore" in environment else None,
    )
    return " \N{MIDDLE DOT} ".join(str(part) for part in parts if part)


def _command(environment: Mapping[str, Any]) -> str:
    words = environment.get("argv")
    return " ".join(["gmemcore", *map(str, words)]) if isinstance(words, list) else ""


def _key_values(values: Mapping[str, Any]) -> Table:
    rows = [(name, Cell(_in_words(value), "long")) for name, value in values.items()]
    return Table(("setting", "value"), rows, caption="What the figures depend on")


def _in_words(value: Any) -> str:
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


PAGES: Final[Mapping[str, Callable[[Run], Page]]] = {"bench": _bench}
"""Kind of run -> its page."""
