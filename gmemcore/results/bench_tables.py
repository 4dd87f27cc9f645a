"""Tables of a bench run: the verdict and every cell, for the terminal, Markdown and HTML."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gmemcore.results.bench import BenchCell, BenchFirst, EffectFigure, Spread
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import counted, format_number, format_ratio, format_time, size_words

VERDICT_HEADS: Final = ("effect", "ns/page", "GB/s", "x memcpy", "primitive", "ratio", "95 %")
VERDICT_FIGURES: Final = (1, 2, 3, 5)
VERDICT_LEGEND: Final = "primitive: GB/s in the same memory (bitmap: ns/page); ratio: speed against it"
CONVERSION: Final = "conversion"
"""Operation of the cells of policy; others are operations of a real kernel."""
Setting = tuple[str, bool, int, bool, int]
"""Backing, whether in transparent huge pages, threads, whether enforced, page size of the guest's file."""
SHOWN_REVISIONS: Final = 3
"""Revisions whose refusals the verdict lists."""

_LINES: Final = {"populate": "populate", "copy": "copy (legacy)"}
_DIRECTIONS: Final = {"to_private": "to private", "to_shared": "to shared"}
_EVENTS: Final = {
    "rmp_updates": "rmp",
    "sept_changes": "sept",
    "blocks_2m_split": "split",
    "blocks_2m_merged": "merged",
}


@dataclass(frozen=True, slots=True)
class Rows:
    """Cells that share their figures, one row per range.

    Attributes
    ----------
    cells : str
        What happens, and to which cells.
    rows : list of tuple of str
        Texts, in the order of `matrix_heads`.
    records : list of BenchCell
        The records behind the rows.
    """

    cells: str
    rows: list[tuple[str, ...]]
    records: list[BenchCell]


# ---- the verdict -------------------------------------------------------------------------------
def verdict_rows(first: BenchFirst) -> list[tuple[str, ...]]:
    """Return a row per effect, in the order of `VERDICT_HEADS`."""
    largest = max((line.range for line in first.verdict.effects), default=0)
    return [
        (
            _LINES.get(line.effect, line.effect)
            + ("" if line.range == largest else f" ({size_words(line.range)})"),
            format_number(line.ns_per_page.median),
            "" if line.gbps is None else format_number(line.gbps.median),
            "" if line.memcpy is None else format_ratio(line.memcpy.median),
            _yardstick_words(line),
            *ratio_words(line.ratio, line.stable),
        )
        for line in first.verdict.effects
    ]


def setting_rows(first: BenchFirst, cells: Sequence[BenchCell]) -> list[tuple[str, ...]]:
    """Return heads, and a row of ns per page by effect for each setting; nothing for one setting.

    The range is the one that the verdict has for the effect.
    """
    wanted = {line.effect: line.range for line in first.verdict.effects}
    found: dict[Setting, dict[str, str]] = {}
    for cell in cells:
        figure, line = _line_of(cell)
        own = found.setdefault(setting_of(cell), {}) if cell.outcome == "OK" else {}
        if wanted.get(line) == cell.range and cell.fragmentation == "uniform" and cell.pages_allocated_before:
            own.setdefault(line, _median(figure))
    if len(found) < 2:
        return []
    words = telling_words(found)
    rows = [(words[setting], *(own.get(line, "") for line in wanted)) for setting, own in found.items()]
    return [("ns/page", *(_LINES.get(line, line) for line in wanted)), *rows]


def _line_of(cell: BenchCell) -> tuple[Spread | None, str]:
    """Return a cell's figure in the verdict, and the effect whose line it can be on; empty: on none."""
    legacy = cell.abi == "legacy"
    if cell.judged == "convert":
        return cell.ns_per_page, "" if legacy else cell.does or ""
    return cell.populate_ns_per_page, "copy" if legacy else "populate" if cell.primitive == "xor" else ""


def verdict_notes(first: BenchFirst) -> Iterator[str]:
    """Yield what follows the verdict's table: call overhead, and where flags are refused."""
    overhead = first.verdict.call_overhead_seconds
    if overhead is not None:
        yield f"call overhead: {format_time(overhead)} per call from Python, in none of these figures"
    listed = [each for each in first.verdict.refused if each.refused]
    for each in listed[:SHOWN_REVISIONS]:
        several = sum(other.abi == each.abi for other in first.verdict.refused) > 1
        where = f"{each.abi} with {each.firmware} firmware" if several else each.abi
        yield f"{where} refuses: {'; '.join(each.refused)}"
    if len(listed) > SHOWN_REVISIONS:
        yield f"{len(listed) - SHOWN_REVISIONS} more revisions refuse flags, see gmemcore policy"


def machine_words(first: BenchFirst) -> str:
    """Return the machine and what was measured, in one line."""
    environment, settings = first.environment, first.settings
    memory, thp = settings.get("memory"), settings.get("huge_pages")
    page_size = settings.get("page_size")
    largest = max((line.range for line in first.verdict.effects), default=0)
    parts = [
        environment.get("cpu"),
        counted(environment["cpus"], "CPU") if "cpus" in environment else None,
        f"guest {size_words(memory)}" if isinstance(memory, int) else None,
        settings.get("backing"),
        thp_words(thp) if isinstance(thp, bool) else None,
        *(page_size_words(page_size) if isinstance(page_size, int) else []),
        f"ranges of {size_words(largest)}" if largest and largest != memory else None,
    ]
    return ", ".join(str(part) for part in parts if part)


def ratio_words(ratio: Spread, stable: bool) -> tuple[str, str]:
    """Return a ratio and its interval; an unstable one isn't shown."""
    low, high = format_ratio(ratio.low), format_ratio(ratio.high)
    bounds = low if low == high else f"{low}-{high}"
    return format_ratio(ratio.median) if stable else "unstable", bounds


def _yardstick_words(line: EffectFigure) -> str:
    """Return the primitive of an effect and its GB/s, or if it moves no page, its ns per page."""
    spread = line.primitive_ns_per_page
    if spread is None:
        return line.primitive
    figure = spread.median if line.gbps is None else PAGE_SIZE / spread.median
    return f"{line.primitive} {format_number(figure)}"


# ---- every cell --------------------------------------------------------------------------------
def matrix_heads(cells: Sequence[BenchCell]) -> tuple[str, ...]:
    """Return the heads of the columns that these cells need."""
    return tuple(name for name, needed in _COLUMNS.items() if needed(cells))


def matrix_figures(heads: Sequence[str]) -> tuple[int, ...]:
    """Return the columns of figures."""
    return tuple(i for i, name in enumerate(heads) if name not in _WORDS)


def matrix(cells: Sequence[BenchCell]) -> dict[str, list[Rows]]:
    """Return the measured cells by setting; cells with equal figures share rows."""
    heads = matrix_heads(cells)
    grouped: dict[str, dict[tuple[str, ...], list[BenchCell]]] = {}
    for cell in cells:
        if cell.outcome == "OK" and cell.operation == CONVERSION:
            by_cell = grouped.setdefault(setting_words(cell), defaultdict(list))
            by_cell[_place_of(cell)].append(cell)
    return {setting: [*_collapsed(by_cell, heads)] for setting, by_cell in grouped.items()}


def setting_words(cell: BenchCell) -> str:
    """Return the setting of a cell."""
    return words_of_setting(*setting_of(cell))


def words_of_setting(backing: str, huge_pages: bool, threads: int, enforce: bool, page_size: int) -> str:
    """Return a setting: where bytes are, threads, and what isn't usual."""
    enforced = ["enforced by mprotect"] if enforce else []
    usual = [backing, thp_words(huge_pages), counted(threads, "thread")]
    return ", ".join([*usual, *enforced, *page_size_words(page_size)])


def setting_of(cell: BenchCell) -> Setting:
    """Return the setting of a cell, to compare it by."""
    return cell.backing, cell.huge_pages, cell.threads, cell.enforce, cell.page_size


def telling_words(settings: Iterable[Setting]) -> dict[Setting, str]:
    """Return each setting in the words that tell it from the others; empty for one alone."""
    words = {
        (backing, thp, threads, enforce, page_size): (
            backing,
            thp_words(thp),
            counted(threads, "thread"),
            "enforced" if enforce else "not enforced",
            _files_of(page_size),
        )
        for backing, thp, threads, enforce, page_size in settings
    }
    telling = [len(set(column)) > 1 for column in zip(*words.values(), strict=True)]
    return {
        setting: ", ".join(word for word, tells in zip(own, telling, strict=True) if tells)
        for setting, own in words.items()
    }


def thp_words(huge_pages: bool) -> str:
    """Return whether the model's own memory is transparent huge pages (the guest's file has its own)."""
    return "THP on" if huge_pages else "THP off"


def page_size_words(page_size: int) -> list[str]:
    """Return what the guest's file consists of, where it is huge pages."""
    return [] if page_size == PAGE_SIZE else [_files_of(page_size)]


def _files_of(page_size: int) -> str:
    return f"files of {size_words(page_size)} pages"


def place_words(cell: BenchCell) -> str:
    """Return phase, direction and flag of a cell."""
    return f"{cell.phase} {direction_words(cell)} {cell.flag}"


def direction_words(cell: BenchCell) -> str:
    """Return the direction of a cell, in words."""
    return _DIRECTIONS.get(cell.direction, cell.direction)


def does_words(cell: BenchCell) -> str:
    """Return what happens to the bytes of a cell, and whether the platform does it."""
    does = cell.does or cell.effect or cell.outcome
    return does if does == cell.effect or not cell.pages_allocated_before else f"{does} by the platform"


def range_words(cell: BenchCell) -> str:
    """Return the range of a cell; ``(new)``: unallocated memory."""
    size = size_words(cell.range)
    return size if cell.pages_allocated_before else f"{size} (new)"


def counter_words(counters: Mapping[str, int]) -> str:
    """Return the counters that counted anything, in few words; bytes as sizes."""
    parts = []
    for name, figure in counters.items():
        if figure:
            sized = name.startswith("bytes_") and figure % PAGE_SIZE == 0
            short = _EVENTS.get(name, name.removeprefix("pages_").removeprefix("bytes_"))
            parts.append(f"{short} {size_words(figure) if sized else figure}")
    return ", ".join(parts)


def cell_row(cell: BenchCell, heads: Sequence[str]) -> tuple[str, ...]:
    """Return the figures of a cell, one text per column."""
    compared = ("", "")
    if cell.ratio is not None:
        bounds = (cell.ratio_low or cell.ratio, cell.ratio_high or cell.ratio)
        ratio = Spread(cell.ratio, *bounds, cell.seconds.n)
        compared = ratio_words(ratio, cell.stable)
    texts = {
        "range": range_words(cell),
        "pages": cell.fragmentation,
        "ns/page": _median(cell.ns_per_page),
        "populate": _median(cell.populate_ns_per_page),
        "access": _median(cell.access_ns_per_page),
        "primitive": f"{cell.primitive or ''} {format_number(cell.primitive_ns_per_page)}".strip(),
        "ratio": compared[0],
        "95 %": compared[1],
    }
    return tuple(texts[head] for head in heads)


MATRIX_LEGEND: Final = """\
range      of one conversion; (new): unallocated memory
ns/page    conversion, batched (one compiled call for many ranges), per 4 KiB page
populate   launch update (in place after PRESERVE, else from a source) or copy (legacy), ns/page
access     first access by the new side: accept if needed, then one access per page, ns/page
primitive  memory primitive of the step that moves bytes, ns/page, interleaved in the same memory
ratio      speed of that step relative to its primitive; 95 %: interval of the ratio"""

_COLUMNS: Final[dict[str, Callable[[Sequence[BenchCell]], bool]]] = {
    "range": lambda cells: True,
    "pages": lambda cells: any(cell.fragmentation != "uniform" for cell in cells),
    "ns/page": lambda cells: True,
    "populate": lambda cells: any(cell.populate_ns_per_page is not None for cell in cells),
    "access": lambda cells: any(cell.access_ns_per_page is not None for cell in cells),
    "primitive": lambda cells: True,
    "ratio": lambda cells: True,
    "95 %": lambda cells: True,
}
_WORDS: Final = frozenset({"range", "pages", "primitive", "95 %"})


OPERATION_HEADS: Final = ("operation", "range", "call", "ns/page", "95 %", "x memcpy")
OPERATION_FIGURES: Final = (2, 3, 4, 5)


def operation_words(cell: BenchCell) -> str:
    """Return an operation of a real kernel in words: its name, direction, and attributes if not uniform."""
    direction = f", {direction_words(cell)}" if cell.direction else ""
    shape = "" if cell.fragmentation == "uniform" else f", {cell.fragmentation}"
    return f"{cell.operation}{direction}{shape}"


def operation_rows(cells: Sequence[BenchCell]) -> Iterator[tuple[str, ...]]:
    """Yield a row per measured operation of a real kernel, in the order of `OPERATION_HEADS`."""
    for cell in cells:
        if cell.outcome == "OK" and cell.operation != CONVERSION:
            page, call = cell.ns_per_page, cell.call_seconds
            yield (
                operation_words(cell),
                size_words(cell.range),
                "" if call is None else format_time(call.median),
                _median(page),
                "" if page is None else f"{format_number(page.low)} to {format_number(page.high)}",
                format_ratio(cell.ratio),
            )


def _median(spread: Spread | None) -> str:
    return "" if spread is None else format_number(spread.median)


def _place_of(cell: BenchCell) -> tuple[str, ...]:
    return cell.abi, cell.firmware, cell.vm_type, cell.phase, cell.direction, cell.flag


def _collapsed(by_cell: Mapping[tuple[str, ...], list[BenchCell]], heads: Sequence[str]) -> Iterator[Rows]:
    """Yield the cells that have the same figures together."""
    alike: dict[tuple[str, tuple[tuple[str, ...], ...]], list[list[BenchCell]]] = defaultdict(list)
    for own in by_cell.values():
        rows = tuple(cell_row(cell, heads) for cell in own)
        alike[does_words(own[0]), rows].append(own)
    for (does, rows), groups in alike.items():
        yield Rows(f"{does}. {cells_words([own[0] for own in groups])}", [*rows], groups[0])


def cells_words(cells: Sequence[BenchCell]) -> str:
    """Return cells in words: revisions and VM types that have the same places share them."""
    places: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        places[cell.abi, cell.vm_type][cell.firmware].append(place_words(cell))
    types: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (abi, vm_type), by_firmware in places.items():
        by_words = {firmware: "; ".join(own) for firmware, own in by_firmware.items()}
        alike = len(set(by_words.values())) == 1
        for firmware, each in [*by_words.items()][: 1 if alike else None]:
            types[abi if alike else f"{abi} with {firmware} firmware", each].append(vm_type)
    revisions: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (abi, words), vm_types in types.items():
        revisions[", ".join(vm_types), words].append(abi)
    return ". ".join(f"{', '.join(abis)} on {who}: {words}" for (who, words), abis in revisions.items())
