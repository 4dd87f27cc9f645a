"""What the pages of all kinds of run are made of."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final
from warnings import catch_warnings, simplefilter

import msgspec

from gmemcore.analysis.report.page import Block, Cell, Picture, Table, Text
from gmemcore.analysis.tables import extra
from gmemcore.units import format_bytes, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS: Final = 5000
"""Rows of one table at most; more say nothing to a reader, and a page of a million rows opens nowhere."""
COLUMNS: Final = 64
"""Columns that a run's own names make, at most."""
LABELS: Final = 400
"""Things that one picture tells apart at most."""
PICTURES: Final = 12
"""Pictures of one kind at most."""

MODEL: Final = (
    "Made by gmemcore, a model of in-place conversion of guest_memfd memory. ENCRYPT and DECRYPT are a key "
    "stream at the speed of XOR: a cost model, not encryption. GB/s are those of the machine above; counters "
    "carry to other hardware. GB = 1e9 bytes of guest memory, counted once."
)


def grouped(items: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Return items by key, keys in the order of their first item."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def muted(rows: Sequence[Sequence[str | Cell]], labels: int) -> list[list[str | Cell]]:
    """Mute words of the first columns that repeat the row above, as long as all before them do too."""
    shown: list[list[str | Cell]] = []
    above: Sequence[str | Cell] = ()
    for row in rows:
        pairs = zip(row[:labels], above, strict=False)
        same = next((i for i, (own, other) in enumerate(pairs) if own != other), min(labels, len(above)))
        shown.append([Cell(str(word), "again") if i < same else word for i, word in enumerate(row)])
        above = row
    return shown


def left_off(n: int, shown: int = ROWS, what: str = "rows") -> list[Block]:
    """Say how many rows or columns a table leaves off."""
    text = f"{n - shown:,} more {what} are in the file and not here."
    return [Text(text, warning=True)] if n > shown else []


def picture(draw: Callable[[], "Axes"], alternative: str, caption: str = "") -> list[Block]:
    """Return a picture, or in words why it can't be drawn; nothing without matplotlib.

    Parameters
    ----------
    draw : callable
        Makes a figure of its own and returns its Axes; ``ValueError`` says that there is nothing to draw.
    alternative, caption : str
        What it shows, for those who can't see it; and what to see in it.
    """
    if no_pictures():
        return []
    try:
        return [Picture(_svg(draw), alternative, caption)]
    except ValueError as error:
        return [Text(f"No picture: {error}")]


def no_pictures() -> list[Block]:
    """Say how to get pictures, if there can be none."""
    try:
        extra("matplotlib", "a page with pictures")
    except ImportError as error:
        return [Text(f"No pictures: {error}.")]
    return []


def _svg(draw: Callable[[], "Axes"]) -> bytes:
    """Draw into SVG. Text is paths, which need no font, and never mathematics: it comes from a file."""
    import matplotlib as mpl
    from matplotlib import pyplot

    before = set(pyplot.get_fignums())
    file = BytesIO()
    settings: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "gmemcore", "text.parse_math": False}
    try:
        with mpl.rc_context(settings), catch_warnings():
            simplefilter("ignore", UserWarning)  # characters that the font doesn't have are drawn as boxes
            figure = draw().get_figure(root=True)
            assert figure is not None
            figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    finally:
        for number in set(pyplot.get_fignums()) - before:
            pyplot.close(number)
    return file.getvalue()


def counted(counters: Mapping[str, int]) -> str:
    """Return the counters that counted anything; bytes as sizes."""
    return ", ".join(
        f"{name} {format_bytes(figure) if name.startswith('bytes_') else f'{figure:,}'}"
        for name, figure in counters.items()
        if figure
    )


def machine(environment: Mapping[str, Any]) -> str:
    """Return the machine in a line."""
    memory = environment.get("memory_bytes")
    parts = (
        environment.get("cpu"),
        f"{environment['cpus']} CPUs" if "cpus" in environment else None,
        f"{format_number(memory / 1e9)} GB" if isinstance(memory, int) else None,
        f"Linux {environment['kernel']}" if "kernel" in environment else None,
        f"gmemcore {environment['gmemcore']}" if "gmemcore" in environment else None,
        environment.get("time"),
    )
    return " \N{MIDDLE DOT} ".join(str(part) for part in parts if part)


def command(environment: Mapping[str, Any]) -> str:
    """Return the command line that made the run, if it is known."""
    words = environment.get("argv")
    return " ".join(["gmemcore", *map(str, words)]) if isinstance(words, list) else ""


def key_values(values: Mapping[str, Any], caption: str = "What the figures depend on") -> Table:
    """Return settings by name."""
    rows = [(name, Cell(_in_words(name, value), "long")) for name, value in values.items()]
    return Table(("setting", "value"), rows, caption=caption)


def _in_words(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if type(value) is int and name != "seed":  # which is typed again, to repeat the run
        return f"{value:,}"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
