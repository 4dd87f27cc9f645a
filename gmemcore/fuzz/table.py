"""What kernels answered, operation by operation: a Markdown table of the results of several runs."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec

from gmemcore.errors import InputError
from gmemcore.files.kinds import FUZZED, expecting
from gmemcore.files.reading import decode_json, read_file
from gmemcore.fuzz.coverage import OUTCOMES
from gmemcore.uapi import VmType

MAX_BYTES: Final = 1 << 20
"""Bytes that a result has at most."""


class Seen(msgspec.Struct, frozen=True):
    """How often an operation had an outcome."""

    vm_type: VmType
    op: str
    outcome: str
    count: int


class KnownCount(msgspec.Struct, frozen=True):
    """How often a kernel answered otherwise, as it is known to; its outcome, the model's, and why."""

    vm_type: VmType
    op: str
    model: str
    kernel: str
    why: str
    count: int


class Offer(msgspec.Struct, frozen=True):
    """What a VM type offers; reasons why not, or None. See `gmemcore.kvm.probe.VmOffer`."""

    vm_type: VmType
    creation_flags: int | None
    in_place: bool
    vm_attributes: bool
    guest: str | None
    pins: str | None


class Outcome(msgspec.Struct, frozen=True):
    """A run, as ``gmemcore kvm fuzz --json`` prints it."""

    kernel: Annotated[str, msgspec.Meta(max_length=200)]
    steps: int
    offers: list[Offer]
    coverage: list[Seen]
    known: list[KnownCount]
    difference: dict[str, object] | None

    @property
    def version(self) -> str:
        """The release without what a distribution adds, such as ``6.18.44``."""
        return self.kernel.split("-")[0]


def read_outcome(path: Path) -> Outcome:
    """Read the result of a run.

    Raises
    ------
    InputError
        The file can't be read, or is no such result.
    """
    try:
        with expecting(path, FUZZED):
            return decode_json(read_file(path, MAX_BYTES), Outcome, str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


class _Column(msgspec.Struct, frozen=True):
    """A VM type of a kernel."""

    run: Outcome
    offer: Offer

    @property
    def head(self) -> str:
        return f"{self.run.version} {self.offer.vm_type}"


def kernel_table(runs: Iterable[Outcome]) -> Iterator[str]:
    """Yield the lines of a Markdown table: a row per operation, a column per kernel and VM type.

    Parameters
    ----------
    runs : iterable of Outcome
        Those of one kernel are added up.
    """
    ordered = sorted(runs, key=lambda run: [int(part) for part in re.findall(r"\d{1,9}", run.version)])
    columns = [_Column(run, offer) for run in _added_up(ordered) for offer in run.offers]
    notes: list[str] = []
    yield _row(["operation", *(column.head for column in columns)])
    yield _row(["---"] * (1 + len(columns)))
    for op in OUTCOMES:
        yield _row([f"`{op}`", *(_cell(column, op, notes) for column in columns)])
    yield ""
    for number, note in enumerate(notes, 1):
        yield f"{number}. {note}"


def _added_up(runs: Iterable[Outcome]) -> Iterator[Outcome]:
    """Yield one result per kernel."""
    by_kernel: dict[str, list[Outcome]] = {}
    for run in runs:
        by_kernel.setdefault(run.kernel, []).append(run)
    for same in by_kernel.values():
        yield msgspec.structs.replace(
            same[0],
            steps=sum(run.steps for run in same),
            offers=[*{offer.vm_type: offer for run in same for offer in run.offers}.values()],
            coverage=[seen for run in same for seen in run.coverage],
            known=[each for run in same for each in run.known],
        )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(column: _Column, op: str, notes: list[str]) -> str:
    """How often the kernel answered as the model; how often otherwise, and why; or why it was not asked."""
    run, offer = column.run, column.offer
    if (why := _not_offered(offer, op)) is not None:
        return f"not offered ({_number(why, notes)})"
    steps = sum(seen.count for seen in run.coverage if (seen.vm_type, seen.op) == (offer.vm_type, op))
    known = [each for each in run.known if (each.vm_type, each.op) == (offer.vm_type, op)]
    if not steps:
        return "not walked"
    same = f"{steps - sum(each.count for each in known):,} as the model"
    reasons: dict[str, int] = {}
    for each in known:
        reasons[each.why] = reasons.get(each.why, 0) + each.count
    return "; ".join([same, *(f"{count:,} known ({_number(why, notes)})" for why, count in reasons.items())])


def _number(note: str, notes: list[str]) -> int:
    if note not in notes:
        notes.append(note)
    return notes.index(note) + 1


def _not_offered(offer: Offer, op: str) -> str | None:
    if offer.creation_flags is None:
        return "this VM type has no guest_memfd"
    missing = {
        "set": None if offer.in_place else "KVM_SET_MEMORY_ATTRIBUTES2 is ENOTTY",
        "vm_set": None if offer.vm_attributes else "KVM_SET_MEMORY_ATTRIBUTES is ENOTTY",
        **dict.fromkeys(("guest_read", "guest_write"), offer.guest),
        **dict.fromkeys(("pin", "unpin"), offer.pins),
    }
    return missing.get(op)
