"""Picture of the audit: the requests that capabilities predict wrongly, by revision."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gmemcore.analysis.pictures.fleets import share_bars
from gmemcore.analysis.style import ORANGE, SKY, VERMILION, legend_beside
from gmemcore.units import counted
from gmemcore.vmm.audit import AuditCell, AuditRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS: Final = {
    "as believed": "#D3E5F1",
    "over-promised": ORANGE,
    "under-promised": SKY,
    "contents lost": VERMILION,
}


def audit_bars(rows: Sequence[AuditRow], ax: "Axes | None" = None) -> "Axes":
    """Draw how well capabilities predict requests: one bar per revision, its requests by what comes of them.

    Parameters
    ----------
    rows : sequence of AuditRow
        As `gmemcore.vmm.audit.audit` returns them.
    ax : matplotlib Axes or None

    Raises
    ------
    ValueError
        No row.
    """
    if not rows:
        raise ValueError("no revision; at least one is needed")
    parts = {part: [sum(_part_of(cell) == part for cell in row.cells) for row in rows] for part in _COLOURS}
    ends = [_checks_in_words(row) if row.cells else "no content flag" for row in rows]
    drawn = share_bars([row.abi for row in rows], parts, list(_COLOURS.values()), ax, ends)
    drawn.set_xlabel("share of requests with a content flag (%)")
    drawn.set_title("How well capabilities predict requests", loc="left")
    legend_beside(drawn, right_of=1.27)
    return drawn


def _checks_in_words(row: AuditRow) -> str:
    return counted(row.vm_type_checks, "VM-type check")


def _part_of(cell: AuditCell) -> str:
    """Return the bar's part that a request belongs to; lost contents weigh most."""
    if cell.broken:
        return "contents lost"
    if cell.lie:
        return "over-promised"
    return "under-promised" if cell.hidden else "as believed"
