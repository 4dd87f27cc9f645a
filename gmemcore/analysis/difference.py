"""Diff: what changed from one snapshot of a guest to a later one."""

from dataclasses import dataclass
from typing import Any

from gmemcore.analysis.snapshot import Snapshot
from gmemcore.analysis.tables import Table, make_table
from gmemcore.engine.counters import Counters
from gmemcore.engine.packed import PLANE_NAMES
from gmemcore.html import facts


@dataclass(frozen=True, slots=True, eq=False)
class Diff:
    """What changed from one snapshot to a later one. Made by `diff`.

    Attributes
    ----------
    before, after : Snapshot
        The two.
    changes : Table
        Rows (file, plane, set, cleared, ranges): pages that became set and cleared, in how many maximal runs
        of changed pages; planes without a change have none.
    counters : Counters
        Events between them.
    appeared, gone : tuple of int
        Files that only the later and only the earlier one has.
    """

    before: Snapshot
    after: Snapshot
    changes: Table
    counters: Counters
    appeared: tuple[int, ...]
    gone: tuple[int, ...]

    def _repr_html_(self) -> str:
        phases = f"{self.before.phase} to {self.after.phase}"
        values = {"from": f"{self.before.at:g}", "to": f"{self.after.at:g}"}
        values |= {"phase": phases} if self.before.phase != self.after.phase else {}
        values |= {"new files": ", ".join(map(str, self.appeared))} if self.appeared else {}
        values |= {"closed files": ", ".join(map(str, self.gone))} if self.gone else {}
        return facts("Diff", values, self.changes._repr_html_(), self.counters._repr_html_())

    def ranges(self, plane: str, file: int = 0) -> Table:
        """Ranges of pages in which a plane changed: rows (start, end, now), half-open pages of the file."""
        old, new = self.before.planes(file)[plane], self.after.planes(file)[plane]
        parts = [((new & ~old).ranges(), True), ((old & ~new).ranges(), False)]
        rows = [(start, end, now) for ranges, now in parts for start, end in ranges.tolist()]
        return make_table(
            f"pages whose plane {plane} changed, file {file}",
            [("start", "<i8"), ("end", "<i8"), ("now", "?")],
            sorted(rows),
            ("start",),
            {"start": "pages", "end": "pages"},
        )

    def __bool__(self) -> bool:
        return bool(len(self.changes) or self.appeared or self.gone or self.before.phase != self.after.phase)


def diff(before: Snapshot, after: Snapshot) -> Diff:
    """Compare two snapshots of a guest: planes page by page, counters, files.

    Raises
    ------
    ValueError
        A file that both have differs in size: they are of different guests.
    """
    old, new = ({file.index: file for file in snapshot.files} for snapshot in (before, after))
    rows: list[tuple[Any, ...]] = []
    for index in sorted(old.keys() & new.keys()):
        if old[index].size != new[index].size:
            sizes = f"{old[index].size:#x} and {new[index].size:#x}"
            raise ValueError(f"file {index} has {sizes} bytes; snapshots of one guest can be compared")
        planes = before.planes(index), after.planes(index)
        for name in PLANE_NAMES:
            was, now = planes[0][name], planes[1][name]
            changed = was ^ now
            total = changed.count()
            if total:
                became_set = (changed & now).count()
                rows.append((index, name, became_set, total - became_set, len(changed.ranges())))
    changes = make_table(
        "changes by file and plane",
        [("file", "<i8"), ("plane", "U12"), ("set", "<i8"), ("cleared", "<i8"), ("ranges", "<i8")],
        rows,
        ("file", "plane"),
        {"set": "pages", "cleared": "pages"},
    )
    appeared, gone = sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys())
    return Diff(before, after, changes, after.counters - before.counters, tuple(appeared), tuple(gone))
