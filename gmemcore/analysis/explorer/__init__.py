"""Explorer: page states of a guest over time, as one page to look around in.

`encoding` says what the page is told, `page` is the document, ``explorer.js`` and ``explorer.css`` draw it.
"""

import html
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from gmemcore.analysis.address import GuestMemory
from gmemcore.analysis.distributions import mappability
from gmemcore.analysis.explorer.encoding import deflated, encode_events, encode_states
from gmemcore.analysis.explorer.page import page
from gmemcore.analysis.series import Series
from gmemcore.analysis.snapshot import Snapshot, as_snapshot
from gmemcore.analysis.states import STATES, state_of_masks
from gmemcore.analysis.style import STATE_COLOURS
from gmemcore.engine.packed import PLANE_NAMES
from gmemcore.files.writing import replace_file
from gmemcore.uapi import PAGE_SHIFT
from gmemcore.units import counted, size_words

HEIGHT: Final = 720
"""Pixels of the page in a notebook."""


class Explorer:
    """A page to look around in page states: addresses, states, time.

    Made by `explore`. A notebook shows it as it is; `write` keeps it as a file that any browser opens.

    Parameters
    ----------
    series : Series
        What it shows; one snapshot at least.
    title : str
        What it is called.
    height : int
        Pixels in a notebook.
    """

    def __init__(self, series: Series, title: str = "", height: int = HEIGHT) -> None:
        if not len(series):
            raise ValueError("a series of no snapshots; at least one is needed")
        self._memory = GuestMemory(series)
        if not self._memory.pages:
            raise ValueError("a guest without memory; there is nothing to show")
        self.series = series
        self.height = height
        first = series[0]
        self.title = title or f"Page states of {size_words(first.size)}: {series.name}"

    def __repr__(self) -> str:
        return (
            f"Explorer({self.title!r}, {counted(len(self.series), 'snapshot')}); write('page.html') keeps it"
        )

    @cached_property
    def html(self) -> str:
        """The page: one HTML document, which loads nothing."""
        meta, blobs = self._data()
        first = self.series[0]
        lead = (
            f"{first.vm_type}, {first.abi}, firmware {first.firmware}; "
            f"{counted(len(self.series), 'snapshot')}"
        )
        return page(self.title, lead, meta, blobs)

    def write(self, path: str | Path) -> int:
        """Write the page to a file, replacing an existing one whole, and return its size in bytes.

        Raises
        ------
        OSError
            It can't be written there.
        """
        page_bytes = self.html.encode()
        replace_file(path, [page_bytes])
        return len(page_bytes)

    def _repr_html_(self) -> str:
        """Return a frame of its own, so that neither the notebook's style nor its scripts meet the page's."""
        return (
            f'<iframe sandbox="allow-scripts" title="{html.escape(self.title, quote=True)}" width="100%" '
            f'height="{self.height}" style="border: 1px solid #8888" '
            f'srcdoc="{html.escape(self.html, quote=True)}"></iframe>'
        )

    def _data(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What the page is told."""
        series = self.series
        memory = self._memory
        states = encode_states(series, memory)
        events, kinds = encode_events(series.events)
        last = series[-1]
        meta = {
            "pages": memory.pages,
            "unit": series.unit,
            "times": series.times.tolist(),
            "phases": [one.phase for one in series],
            "labels": [one.label for one in series],
            "ranges": [
                {"page": gpa >> PAGE_SHIFT, "pages": size >> PAGE_SHIFT, "first": first}
                for gpa, size, first in zip(
                    memory.gpas.tolist(), memory.sizes.tolist(), memory.firsts.tolist(), strict=True
                )
            ],
            "pieces": list(_pieces(memory, last)),
            "states": [
                {"name": state.name, "colour": STATE_COLOURS[state.name].lower(), "meaning": state.meaning}
                for state in STATES
            ],
            "private": [_side(state.name) for state in STATES],
            "planes": list(PLANE_NAMES),
            "state_of": state_of_masks().tolist(),
            "palette": states.palette,
            "cell": states.cell,
            "counts": [list(one.state_pages().values()) for one in series],
            "mappable": [_mappable(one) for one in series],
            "events": len(series.events),
            "kinds": kinds,
            "complete": series.complete,
        }
        return meta, {"states": deflated(states.blob), "events": deflated(events)}


def explore(what: Any, path: str | Path | None = None, *, title: str = "", height: int = HEIGHT) -> Explorer:
    """Make a page to look around in page states: in a notebook, or as a file.

    Parameters
    ----------
    what : Series, Snapshot, Vm, GuestMemfd, a result of ``gm.run``, or the path of a file of snapshots
        What is shown.
    path : str, Path or None
        Where the page is written, too.
    title : str
        What it is called; by default what was run.
    height : int
        Pixels in a notebook.

    Returns
    -------
    Explorer

    Raises
    ------
    ValueError
        No snapshot, or a guest without memory.
    ContainerError, OSError
        A file that can't be read, or written.

    Examples
    --------
    >>> import gmemcore as gm
    >>> boot = gm.run("snp-boot", memory="256m", every=50)
    >>> gm.explore(boot).html.startswith("<!doctype html>")
    True
    """
    made = Explorer(_series_of(what), title, height)
    if path is not None:
        made.write(path)
    return made


def _series_of(what: Any) -> Series:
    if isinstance(what, Series):
        return what
    if isinstance(what, (str, Path)):
        return Series.read(what)
    own = getattr(what, "series", None)
    return own if isinstance(own, Series) else Series([as_snapshot(what)])


def _pieces(memory: GuestMemory, snapshot: Snapshot) -> Iterator[dict[str, int]]:
    """Yield stretches of memory, each with how its addresses differ from offsets of its file.

    What has no memslot in this snapshot counts as aligned.
    """
    covered: list[tuple[int, int]] = []
    for slot, first in memory.slots(snapshot):
        page_, pages = slot.gpa >> PAGE_SHIFT, slot.size >> PAGE_SHIFT
        covered.append((first, first + pages))
        yield {
            "first": first,
            "pages": pages,
            "page": page_,
            "shift": abs(slot.gpa - slot.offset) >> PAGE_SHIFT,
        }
    edges = {0, memory.pages, *memory.firsts.tolist(), *(edge for pair in covered for edge in pair)}
    for low, high in pairwise(sorted(edges)):
        if not any(start <= low < end for start, end in covered):
            yield {"first": low, "pages": high - low, "page": memory.gpa_of(low) >> PAGE_SHIFT, "shift": 0}


def _side(name: str) -> int:
    """Whether a state is private (1), shared (0), or either (2)."""
    if name.startswith(("private", "accepted", "assigned")):
        return 1
    return 0 if name.startswith("shared") else 2


def _mappable(snapshot: Snapshot) -> dict[str, float]:
    table = mappability(snapshot)
    return {row["size"]: round(row["fraction"], 6) for row in table.records()}


__all__ = ["Explorer", "explore"]
