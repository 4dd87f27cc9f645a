"""Style: the one place for colours, sizes, fonts and units of all pictures.

Colours are Okabe and Ito's, which people who see few of them can tell apart; where areas touch, lightness
differs too, so that a grey print still reads. Text and axes keep the colours of the matplotlib style in
force, so that pictures follow a notebook's theme.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from gmemcore.analysis.tables import extra
from gmemcore.units import size_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

BLUE, SKY, GREEN, ORANGE, VERMILION, PINK, BLACK = (
    *("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000"),
)

STATE_COLOURS: Final = {
    "poisoned": BLACK,
    "pinned": VERMILION,
    "accepted": BLUE,
    "assigned-unaccepted": GREEN,
    "private-unassigned": SKY,
    "shared": ORANGE,
    "private-unallocated": "#D3E5F1",
    "shared-unallocated": "#FBEBCB",
}
"""Private is blue and green, shared is orange; without memory they are pale."""

LINES: Final = (
    *((BLUE, "-", "o"), (VERMILION, "--", "s"), (GREEN, "-.", "^"), (PINK, ":", "D")),
    *((SKY, "-", "v"), (ORANGE, "--", "P"), (BLACK, "-.", "X")),
)
"""Colour, dash and marker of the n-th line: any one of them tells lines apart."""

FRACTION_MAP: Final = "cividis_r"
"""Colour map of fractions and speeds: even in lightness, the same for people who see few colours."""

SIZE: Final = (7.0, 4.2)
"""Inches of a picture, unless its shape asks for others."""

_RC: Final = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 150,
    "figure.dpi": 100,
    "svg.hashsalt": "gmemcore",
}


def axes_for(ax: "Axes | None", size: tuple[float, float] = SIZE) -> "Axes":
    """Return the Axes to draw in: the caller's, or those of a new figure in this style.

    Raises
    ------
    ImportError
        matplotlib isn't installed.
    """
    if ax is not None:
        return ax
    matplotlib = extra("matplotlib", "a picture")
    pyplot = extra("matplotlib.pyplot", "a picture")
    # A notebook's backend turns interactive mode on as it is loaded, which the context would undo.
    pyplot.draw_if_interactive()
    with matplotlib.rc_context(_RC):
        drawn: Axes = pyplot.subplots(figsize=size, layout="constrained")[1]
    return drawn


def legend_beside(
    ax: "Axes", handles: Sequence[Any] | None = None, title: str | None = None, right_of: float = 1.01
) -> None:
    """Put the legend to the right of the picture, where it hides nothing."""
    given = ax.get_legend_handles_labels()[0] if handles is None else handles
    ax.legend(
        handles=given,
        loc="upper left",
        bbox_to_anchor=(right_of, 1),
        frameon=False,
        title=title,
        alignment="left",
    )


def line_style(number: int, marks: int = 0) -> dict[str, Any]:
    """How the n-th line is drawn; marks: how many points it has, so that many of them share a marker."""
    colour, dash, marker = LINES[number % len(LINES)]
    every = max(1, marks // 10)
    style = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 5, "clip_on": False}
    return style | {"markevery": (number * every // 3 % every, every)}  # not on top of each other


def size_axis(axis: "Axis") -> None:
    """Let an axis show sizes in bytes, in powers of two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.axes.set_xscale("log", base=2)
    axis.set_major_locator(LogLocator(base=16, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda size, _: size_words(int(size))))


def text_colour(image: Any, value: float) -> str:
    """The colour of text that can be read over a value of an image: black or white."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
