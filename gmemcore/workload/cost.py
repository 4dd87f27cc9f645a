"""Cost files: nanoseconds per event, which turn exact counters into predicted time on other hardware.

A cost file is TOML. Each figure has its source; one without is refused. Files with public figures ship with
gmemcore (`shipped`); anybody can write their own. An event that was counted and has no figure is listed as
not priced: it is never taken for free.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from gmemcore.engine.byte_operations import BYTE_OPERATIONS
from gmemcore.engine.counters import COUNTER_NAMES, Counters
from gmemcore.errors import InputError, InvalidArgumentError
from gmemcore.files.kinds import COST, expecting
from gmemcore.files.reading import decode_toml, read_file

_SHIPPED_FOLDER: Final = Path(__file__).parent / "cost_files"
MAX_BYTES: Final = 256 << 10
"""Bytes that a cost file has at most."""
CALL: Final = "call"
"""The event that no counter counts: one request by userspace, the ioctl."""


EVENTS: Final[dict[str, str]] = {
    "pages_changed": "a page whose attribute changed; KVM keeps ranges, so most may be in the call",
    **{row.counter: row.counts for row in BYTE_OPERATIONS.values() if row.counter},
    "pages_allocated": "a page allocated, and touched for the first time",
    "rmp_updates": "an SNP page that became assigned, or ceased to be: RMPUPDATE",
    "sept_changes": "a TDX page added to the S-EPT or removed: TDH.MEM.PAGE.AUG, .REMOVE",
    "cache_lines_flushed": "a cache line flushed as its page ceased to be assigned: CLFLUSHOPT (SNP)",
    "pages_accepted": "a page that became accepted: PVALIDATE, TDG.MEM.PAGE.ACCEPT",
    "blocks_2m_split": "a 2 MiB block that ceased to have one attribute: a split huge page",
    "blocks_2m_merged": "a 2 MiB block that has one attribute again",
    "folios_2m_split": "a 2 MiB folio split into pages, its struct pages and TLB flush aside",
    "folios_2m_merged": "a 2 MiB folio merged from pages, likewise",
    "folios_1g_split": "a 1 GiB folio split into pages, likewise",
    "folios_1g_merged": "a 1 GiB folio merged from pages, likewise",
    "pages_restructured": "a page of a folio that was split or merged",
    "vmemmap_pages_allocated": "a page of struct pages allocated because a folio was split (HVO)",
    "vmemmap_pages_freed": "a page of struct pages freed because a folio was merged",
    "tlb_flushes": "a TLB flush because of huge pages",
    "psmashes": "a 2 MiB RMP entry split: PSMASH",
    "sept_demotions": "a 2 MiB S-EPT entry split: TDH.MEM.PAGE.DEMOTE",
    "memory_faults": "a KVM_EXIT_MEMORY_FAULT: exit to userspace and back",
    "notifications": "a listener's call-back in userspace (VFIO maps or unmaps)",
    CALL: "a conversion request: the ioctl itself, whatever it changes",
}
"""Every event that can have a figure -> what one is, in the order of the counters."""

_Source = Annotated[str, Meta(min_length=1, pattern=r"\S")]


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one event costs, and who says so.

    Attributes
    ----------
    source : str
        Where the figure is from: a measurement, a document, a mail.
    ns : float or None
        Nanoseconds per event; for bytes, per byte.
    gbps : float or None
        For bytes, in place of `ns`: 1e9 bytes per second.
    """

    source: _Source
    ns: float | None = None
    gbps: float | None = None

    @property
    def ns_each(self) -> float:
        """Nanoseconds per event."""
        if self.ns is not None:
            return self.ns
        assert self.gbps is not None  # one of the two, since the file was checked
        return 1 / self.gbps


class CostFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Figures of one machine.

    Attributes
    ----------
    title : str
        Which machine.
    events : dict
        `Figure` by name of `EVENTS`; those that aren't there aren't priced.
    """

    title: Annotated[str, Meta(min_length=1)]
    events: dict[str, Figure] = {}


@dataclass(frozen=True, slots=True)
class Part:
    """One event's part of a predicted time.

    Attributes
    ----------
    count : int
        How often it happened.
    ns_each : float
        What one costs.
    seconds : float
        What all of them cost.
    source : str
        Who says so.
    """

    count: int
    ns_each: float
    seconds: float
    source: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted time of a run.

    Attributes
    ----------
    seconds : float
        In all, of what is priced.
    parts : dict
        `Part` by event, in the order of `EVENTS`.
    not_priced : dict
        How often events happened that have no figure: the time is short of them.
    """

    seconds: float
    parts: dict[str, Part] = field(default_factory=dict)
    not_priced: dict[str, int] = field(default_factory=dict)

    def asdict(self) -> dict[str, Any]:
        """The prediction as JSON has it."""
        return {
            "seconds": self.seconds,
            "by_event": {name: part.seconds for name, part in self.parts.items()},
            "not_priced": dict(self.not_priced),
        }


def predict(counters: Counters | Mapping[str, int], cost: CostFile, *, calls: int = 0) -> Prediction:
    """Return the time that counted events take by the figures of a cost file.

    Parameters
    ----------
    counters : Counters or mapping of counter names
        What happened; counters that aren't there are 0.
    cost : CostFile
        What it costs.
    calls : int
        How many conversion requests made it happen.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a counter that doesn't exist.

    Notes
    -----
    Events are taken to cost the same each and one after the other: no overlap, no batching, no contention.
    """
    counted = counters.asdict() if isinstance(counters, Counters) else dict(counters)
    unknown = [name for name in counted if name not in COUNTER_NAMES]
    if unknown:
        raise InvalidArgumentError(f"no counter {unknown[0]!r}; there are {', '.join(COUNTER_NAMES)}")
    counted[CALL] = calls
    happened = {name: counted[name] for name in EVENTS if counted.get(name)}
    parts = {}
    for name, count in happened.items():
        if name in cost.events:
            figure = cost.events[name]
            parts[name] = Part(count, figure.ns_each, count * figure.ns_each / 1e9, figure.source)
    not_priced = {name: count for name, count in happened.items() if name not in parts}
    return Prediction(math.fsum(part.seconds for part in parts.values()), parts, not_priced)


# --- files ----------------------------------------------------------------------------------------------
def shipped() -> dict[str, CostFile]:
    """Return the cost files that ship with gmemcore, by name."""
    paths = sorted(_SHIPPED_FOLDER.glob("*.toml"))
    return {path.stem: parse_cost(path.read_bytes(), path.name) for path in paths}


def load_cost(path: Path | str) -> CostFile:
    """Read a cost file: one that ships with gmemcore, by its name, or any other by its path.

    Raises
    ------
    InvalidArgumentError
        EINVAL: it can't be read or isn't a cost file; the message has the path in it.
    """
    own = {each.stem: each for each in _SHIPPED_FOLDER.glob("*.toml")}
    if str(path) in own and not os.path.exists(path):
        path = own[str(path)]
    path = Path(path)
    try:
        data = read_file(path, MAX_BYTES)
    except OSError as error:
        shipped_ones = f", and no cost file of gmemcore; there are {', '.join(sorted(own))}"
        is_name = isinstance(error, FileNotFoundError) and os.sep not in str(path)
        more = shipped_ones if is_name else ""
        raise InvalidArgumentError(f"{path}: {error.strerror}{more}") from error
    except InputError as error:
        raise InvalidArgumentError(str(error)) from error
    with expecting(path, COST):
        return parse_cost(data, str(path))


def parse_cost(data: bytes, name: str) -> CostFile:
    """Return the cost file of TOML text; `name` says where it is from, in errors.

    Raises
    ------
    InvalidArgumentError
        EINVAL: not TOML, an unknown key, a wrong type, a figure that isn't one, or one without its source.
    """
    try:
        cost = decode_toml(data, CostFile, name)
    except InputError as error:
        raise InvalidArgumentError(str(error)) from error
    for path, problem in _problems(cost):
        raise InvalidArgumentError(f"{name}: {problem} - at `$.events.{path}`")
    return cost


def _problems(cost: CostFile) -> Iterator[tuple[str, str]]:
    """Yield what types can't say: (path, problem)."""
    for name, figure in cost.events.items():
        if name not in EVENTS:
            yield name, f"no event of this name; there are {', '.join(EVENTS)}"
            continue
        given = {unit: value for unit in ("ns", "gbps") if (value := getattr(figure, unit)) is not None}
        if figure.gbps is not None and not name.startswith("bytes_"):
            yield f"{name}.gbps", "only bytes have GB/s; use ns"
        if len(given) != 1:
            yield name, "must have either ns or gbps"
        for unit, value in given.items():
            if not math.isfinite(value) or value < 0 or (unit == "gbps" and not value):
                least = "above 0" if unit == "gbps" else "0 or more"
                yield f"{name}.{unit}", f"must be a finite number {least}, not {value}"


def cost_text(cost: CostFile) -> str:
    """Return a cost file as text: its figures, and every other event as lines to be filled in.

    What it returns is read back as the same figures, by `parse_cost`.
    """
    lines = [
        "# Cost of events in nanoseconds. A figure needs its source; events without a figure are listed as",
        "# not priced. Bytes can have gbps (1e9 bytes per second) in place of ns (per byte).",
        f"title = {_quoted(cost.title)}",
    ]
    for name, meaning in EVENTS.items():
        lines += ["", f"# {meaning}"]
        figure = cost.events.get(name)
        if figure is None:
            unit = "gbps" if name.startswith("bytes_") else "ns"
            lines += [f"# [events.{name}]", f"# {unit} =", '# source = ""']
            continue
        unit, value = ("ns", figure.ns) if figure.ns is not None else ("gbps", figure.gbps)
        lines += [f"[events.{name}]", f"{unit} = {value!r}", f"source = {_quoted(figure.source)}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a TOML basic string: JSON's, and DEL escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


# --- runs -----------------------------------------------------------------------------------------------
def counters_in(record: Any) -> dict[str, int] | None:
    """Return the counters of a JSON record: its object ``counters``, or its keys ``counters.NAME``; or None.

    Raises
    ------
    InvalidArgumentError
        EINVAL: what is there are no counters.
    """
    if not isinstance(record, dict):
        return None
    if "counters" in record:
        found = record["counters"]
    else:
        found = {key[9:]: value for key, value in record.items() if key.startswith("counters.")} or None
    if found is None:
        return None
    if not isinstance(found, dict):
        raise InvalidArgumentError(f"counters are an object of numbers, not {found!r}")
    for name, count in found.items():
        if name not in COUNTER_NAMES or type(count) is not int or count < 0:
            raise InvalidArgumentError(
                f"counters must be whole numbers of {', '.join(COUNTER_NAMES)}, not {name} = {count!r}"
            )
    return found


def calls_in(record: Mapping[str, Any]) -> int | None:
    """Return how many conversion requests a record with counters covers; None: it doesn't say.

    A replay has ``conversions``, and a guest of a fleet has ``sizes``, their histogram. A cell of the bench
    is one conversion of its ``range``. Records from elsewhere can say it in ``calls``.

    Raises
    ------
    InvalidArgumentError
        EINVAL: what is there is no number of calls.
    """
    for name, read in _CALLS_IN.items():
        if name in record:
            try:
                calls = read(record[name])
            except TypeError:
                calls = None
            if type(calls) is not int or calls < 0:
                raise InvalidArgumentError(f"{name} must hold whole numbers, not {record[name]!r}")
            return calls
    return None


_CALLS_IN: Final[dict[str, Callable[[Any], Any]]] = {
    "calls": lambda calls: calls,
    "conversions": lambda conversions: conversions,
    "sizes": sum,
    "range": lambda _: 1,
}
"""Field of a record -> how many calls it tells of, the first that is there."""
