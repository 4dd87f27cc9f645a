"""Files of results: what kind of run one is, and its records, checked before anything is drawn.

A run comes from elsewhere: its size is bounded, every field has a type, and an error names the line.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

MAX_BYTES: Final = 256 << 20
"""Bytes of a file that are read at most."""

Name = Annotated[str, msgspec.Meta(max_length=200)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Speed = Annotated[float, msgspec.Meta(ge=0)]


class RunError(ValueError):
    """A file that isn't a run, or a line of one that can't be read."""


# --- what the lines of each kind hold; fields that are not named here are left alone ------------------------
class Seconds(msgspec.Struct, frozen=True):
    """A series of samples, as `gmemcore.benchmark.summary.Summary`."""

    median: Speed | None
    p95: Speed | None
    cv: Speed | None
    n: Count


class BenchFirst(msgspec.Struct, frozen=True):
    """The first line of ``gmemcore bench --json``."""

    environment: dict[str, Any]
    primitives: dict[Name, Speed]


class BenchCell(msgspec.Struct, frozen=True):
    """A line of ``gmemcore bench --json``: one cell at one size."""

    abi: Name
    vm_type: Name
    firmware: Name
    phase: Name
    direction: Name
    flag: Name
    outcome: Name
    effect: Name | None
    memory: Count
    range: Count
    pages_allocated_before: Count
    bytes: Name
    convert_gbps: Speed | None
    populate_gbps: Speed | None
    first_access_gbps: Speed | None
    ratio: Speed | None
    seconds: Seconds
    counters: dict[Name, Count]
    verified_bytes: Count
    fragmentation: Name = "uniform"
    backing: Name = "anonymous"
    huge_pages: bool = True
    threads: Count = 1
    enforce: bool = False
    primitive: Name | None = None


class StressFirst(msgspec.Struct, frozen=True):
    """The first line of ``gmemcore stress --json``."""

    environment: dict[str, Any]
    code: str
    spec_hash: str
    spec: dict[str, Any]


class StressGuest(msgspec.Struct, frozen=True):
    """A line of ``gmemcore stress --json``: one guest."""

    guest: Count
    cell: Name
    operations: Count
    outcomes: dict[Name, Count]
    counters: dict[Name, Count]
    checks: dict[Name, Count]
    sizes: Annotated[list[Count], msgspec.Meta(max_length=64)]
    digest: Name
    seconds: Speed


class StressSums(msgspec.Struct, frozen=True):
    """Sums over guests of ``gmemcore stress --json``."""

    guests: Count
    operations: Count
    outcomes: dict[Name, Count]
    counters: dict[Name, Count]
    checks: dict[Name, Count]
    sizes: Annotated[list[Count], msgspec.Meta(max_length=64)]
    digest: Name


class Violation(msgspec.Struct, frozen=True):
    """What did not hold, where a stress run ended."""

    guest: Count
    operation: Count
    what: str


class StressLast(msgspec.Struct, frozen=True):
    """The last line of ``gmemcore stress --json``."""

    total: StressSums
    cells: dict[Name, StressSums]
    violation: Violation | None


class ReplayTrace(msgspec.Struct, frozen=True):
    """What was replayed."""

    name: str
    source: str
    operations: Count
    memory: Count


class ReplayFirst(msgspec.Struct, frozen=True):
    """The first line of ``gmemcore replay --json``; ``replay`` are its options."""

    trace: ReplayTrace
    replay: dict[str, Any]
    environment: dict[str, Any] = {}


class Reason(msgspec.Struct, frozen=True):
    """Operations that were refused for one reason."""

    step: Name
    outcome: Name
    operations: Count


class Refusal(msgspec.Struct, frozen=True):
    """One operation that was refused."""

    operation: Count
    step: Name
    outcome: Name
    gpa: Count
    size: Count
    attributes: Count
    flags: Count


class Prediction(msgspec.Struct, frozen=True):
    """Time that counted events take by the figures of a cost file."""

    seconds: Speed
    by_event: dict[Name, Speed]
    not_priced: dict[Name, Count]


class Replay(msgspec.Struct, frozen=True):
    """A line of ``gmemcore replay --json``: the trace under one revision, on one VM type."""

    abi: Name
    vm_type: Name
    firmware: Name
    operations: Count
    refused: Count
    conversions: Count
    reasons: list[Reason]
    first_refusals: list[Refusal]
    counters: dict[Name, Count]
    seconds: Speed
    peak_memory: Count
    launch_digest: Name | None
    predicted: Prediction | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of run.

    Attributes
    ----------
    name : str
        The command that writes it.
    keys : frozenset of str
        Keys of the first line by which it is recognised.
    first, record : type
        What the first line and each other line hold.
    last : type or None
        What the last line holds, where that is something else.
    """

    name: str
    keys: frozenset[str]
    first: type[msgspec.Struct]
    record: type[msgspec.Struct]
    last: type[msgspec.Struct] | None = None


KINDS: Final = (
    Kind("bench", frozenset({"environment", "primitives"}), BenchFirst, BenchCell),
    Kind("stress", frozenset({"environment", "spec", "spec_hash"}), StressFirst, StressGuest, StressLast),
    Kind("replay", frozenset({"replay", "trace"}), ReplayFirst, Replay),
)


@dataclass(frozen=True, slots=True)
class Run:
    """A run that was read: its kind, its first line, the others, and the last where it is of another form."""

    kind: str
    first: Any
    records: list[Any]
    last: Any = None

    def require(self, kind: str) -> None:
        """Make sure that it is a run of a kind; a ValueError if not."""
        if self.kind != kind:
            raise ValueError(f"a run of {self.kind}; the JSON Lines of gmemcore {kind} would be accepted")


def read_run(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Run:
    """Read a file of results.

    Parameters
    ----------
    path : str or Path
        JSON Lines of ``gmemcore bench``, ``stress`` or ``replay``.
    max_bytes : int
        A larger file is refused before it is read.

    Raises
    ------
    RunError
        Not a run, or a line that can't be read: which one and why.
    OSError
        The file can't be opened.
    """
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise RunError(f"{path}: more than {max_bytes} bytes; up to that many would be read")
    lines = _lines(data)
    if not lines:
        raise RunError(f"{path}: empty; {_wanted()}")
    number, line = lines[0]
    kind = _recognise(_decode(line, dict[str, Any], path, number), path, number)
    first = _decode(line, kind.first, path, number)
    last = None
    if kind.last is not None:
        number, line = lines.pop() if len(lines) > 1 else (number + 1, b"")
        last = _decode(line, kind.last, path, number)
    records = [_decode(line, kind.record, path, number) for number, line in lines[1:]]
    return Run(kind.name, first, records, last)


def _lines(data: bytes) -> list[tuple[int, bytes]]:
    """Return the lines that hold anything, each with its number from 1."""
    return [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def _decode(line: bytes, wanted: Any, path: str | Path, number: int) -> Any:
    try:
        return msgspec.json.decode(line, type=wanted)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = f"; {_wanted()}" if number == 1 and not isinstance(error, msgspec.ValidationError) else ""
        raise RunError(f"{path}: line {number}: {error}{hint}") from None


def _recognise(first: Mapping[str, Any], path: str | Path, number: int) -> Kind:
    for kind in KINDS:
        if kind.keys <= first.keys():
            return kind
    keys = ", ".join(sorted(first)[:8]) or "none"
    raise RunError(f"{path}: line {number}: no run begins with these keys: {keys[:200]}; {_wanted()}")


def _wanted() -> str:
    forms = " or ".join(f"{{{', '.join(sorted(kind.keys))}}} ({kind.name})" for kind in KINDS)
    return f"a run begins with a line like {forms}"
