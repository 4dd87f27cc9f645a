"""Guest addresses of a case, moved to where a host has them.

Vectors use guest addresses up to 2^64; a host has between 36 and 52 bits. Only how ranges lie to each other
matters for a case, so ranges that touch stay together, and those that lie too high are moved as a whole.
Their offset within 1 GiB stays the same. Ranges that wrap, or end at 2^64, are wrong on purpose and stay.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from gmemcore.conformance import Case
from gmemcore.kvm.missed import Step, size_of
from gmemcore.uapi import KVM_SET_MEMORY_ATTRIBUTES, MEMORY_ATTRIBUTES_STRUCT, PAGE_SIZE

MOST_BITS: Final = 52
"""Of a guest physical address on x86."""
_UNIT: Final = 1 << 30
_END: Final = 1 << 64


class _Range(NamedTuple):
    start: int
    end: int


def fit(case: Case, bits: int) -> Case:
    """Return a case with its guest addresses below 2^bits, as far as they fit.

    Parameters
    ----------
    case : Case
        As the vectors have it.
    bits : int
        Of a guest physical address on the host; 0: not known.
    """
    limit = 1 << (bits or MOST_BITS)
    clusters = _clusters(each for step in case.steps for each in _ranges(step))
    high = [cluster for cluster in clusters if cluster.end > limit]
    taken = [cluster for cluster in clusters if cluster.end <= limit]
    moves: list[tuple[_Range, int]] = []
    for cluster in high:
        place = _place(cluster, taken, limit)
        if place is not None:
            moves.append((cluster, place.start - cluster.start))
            taken.append(place)
    if not moves:
        return case

    def moved(address: int) -> int:
        return address + next((by for old, by in moves if old.start <= address < old.end), 0)

    return Case(case.name, [_moved(step, moved) for step in case.steps], case.seed)


def _ranges(step: Step) -> Iterator[_Range]:
    """Yield the ranges of guest memory that a step is about."""
    if "gpa" in step:
        start, size = step["gpa"], size_of(step)
    elif "address" in step:
        start, size = step["address"], step["size"]
    elif (fields := _attributes(step)) is not None:
        start, size = fields[:2]
    else:
        return
    end = start + max(size, 1)
    if start >= 0 and end < _END:
        yield _Range(start & -PAGE_SIZE, -(-end // PAGE_SIZE) * PAGE_SIZE)


def _attributes(step: Step) -> tuple[int, ...] | None:
    """The fields of a raw KVM_SET_MEMORY_ATTRIBUTES on the VM fd."""
    argument = step.get("argument")
    if step["op"] != "ioctl" or step["fd"] != "vm" or step["request"] != KVM_SET_MEMORY_ATTRIBUTES:
        return None
    if argument is None or len(argument) < 2 * MEMORY_ATTRIBUTES_STRUCT.size:
        return None
    fields: tuple[int, ...] = MEMORY_ATTRIBUTES_STRUCT.unpack_from(bytes.fromhex(argument))
    return fields


def _clusters(ranges: Iterator[_Range]) -> list[_Range]:
    """Ranges that touch, together."""
    clusters: list[_Range] = []
    for each in sorted(ranges):
        if clusters and each.start <= clusters[-1].end:
            clusters[-1] = _Range(clusters[-1].start, max(clusters[-1].end, each.end))
        else:
            clusters.append(each)
    return clusters


def _place(cluster: _Range, taken: list[_Range], limit: int) -> _Range | None:
    """Where a range fits without touching another one, or None."""
    size, start = cluster.end - cluster.start, cluster.start % _UNIT + _UNIT
    while start + size <= limit:
        blocking = [each for each in taken if start <= each.end and each.start <= start + size]
        if not blocking:
            return _Range(start, start + size)
        behind = max(each.end for each in blocking) + 1
        start += -(-(behind - start) // _UNIT) * _UNIT
    return None


def _moved(step: Step, moved: Callable[[int], int]) -> Step:
    names = ("gpa", "address", "fault_gpa")
    changed: dict[str, Any] = {name: moved(step[name]) for name in names if name in step}
    if (fields := _attributes(step)) is not None:
        packed = MEMORY_ATTRIBUTES_STRUCT.pack(moved(fields[0]), *fields[1:]).hex()
        for name in ("argument", "argument_out"):
            if step.get(name) is not None:
                changed[name] = packed + step[name][len(packed) :]
    return step | changed
