"""Records of ``gmemcore bench`` and ``gmemcore kvm bench``.

One header, then one record per cell of policy, size and setting; docs/outputs.md describes each field.
"""

from typing import Annotated, Any

import msgspec

from gmemcore.results.fields import SCHEMA, Count, Name, Positive
from gmemcore.results.statistics import Interval
from gmemcore.uapi import PAGE_SIZE

SAMPLES = 10_000
"""Samples of one series that a reader takes."""
Samples = Annotated[list[Positive], msgspec.Meta(max_length=SAMPLES)]


class Spread(msgspec.Struct, frozen=True):
    """A median and the interval that holds the true one with 95 % confidence (bootstrap)."""

    median: Positive
    low: Positive
    high: Positive
    n: Count

    @classmethod
    def of(cls, interval: Interval) -> "Spread":
        """Return an interval as a record has it."""
        return cls(*interval)

    @property
    def interval(self) -> Interval:
        """The same as an `Interval`."""
        return Interval(self.median, self.low, self.high, self.n)


class Seconds(msgspec.Struct, frozen=True):
    """Seconds of one range's conversion within a batch.

    Attributes
    ----------
    median, p95, cv : float or None
        Null where nothing was measured; `p95` also below 20 samples.
    n : int
        Samples.
    """

    median: Positive | None
    p95: Positive | None
    cv: Positive | None
    n: Count


class Primitive(msgspec.Struct, frozen=True):
    """Speed of one memory primitive at one size, in the guest's own memory.

    Attributes
    ----------
    primitive : str
        ``memcpy``, ``memset``, ``xor`` or ``bitmap``.
    by : str
        The fastest implementation.
    range : int
        Bytes per range.
    ns_per_page : Spread
        Nanoseconds per 4 KiB page.
    gbps : float or None
        GB/s; null for ``bitmap``, which moves no page.
    """

    primitive: Name
    by: Name
    range: Count
    ns_per_page: Spread
    gbps: Positive | None


class EffectFigure(msgspec.Struct, frozen=True):
    """One line of the verdict: the cost of an effect at the largest range.

    Attributes
    ----------
    effect : str
        KEEP, ZERO, SCRAMBLE, ENCRYPT or DECRYPT; also ``populate`` and ``copy`` (two backings).
    cell : str
        Name of the case that was measured.
    range : int
        Bytes of one conversion.
    gbps : Spread or None
        GB/s; null if no byte moves.
    ns_per_page : Spread
        Nanoseconds per 4 KiB page, batched.
    memcpy : Spread or None
        Speed relative to memcpy; null if no byte moves.
    primitive : str
        The primitive of its kind.
    ratio : Spread
        Speed relative to that primitive.
    stable : bool
        Whether the interval of the ratio is narrow enough to be judged.
    primitive_ns_per_page : Spread or None
        Nanoseconds per 4 KiB page of the primitive; null in files of earlier versions.
    samples, primitive_samples, memcpy_samples : list of float
        Seconds per range of the effect, and of its primitive and memcpy interleaved with it. A ratio is the
        median of the primitive's seconds over the effect's, sample by sample.
    """

    effect: Name
    cell: Name
    range: Count
    gbps: Spread | None
    ns_per_page: Spread
    memcpy: Spread | None
    primitive: Name
    ratio: Spread
    stable: bool
    primitive_ns_per_page: Spread | None = None
    samples: Samples = []
    primitive_samples: Samples = []
    memcpy_samples: Samples = []


class RefusedFlags(msgspec.Struct, frozen=True):
    """Where one revision refuses flags, in words."""

    abi: Name
    firmware: Name
    refused: Annotated[list[Annotated[str, msgspec.Meta(max_length=500)]], msgspec.Meta(max_length=100)]


class Verdict(msgspec.Struct, frozen=True):
    """The result in a few figures: the first thing that a run prints and writes.

    Attributes
    ----------
    effects : list of EffectFigure
        One per effect that was measured.
    call_overhead_seconds : float or None
        Overhead of one `set_memory_attributes` call from Python, beyond the conversion of its page.
    refused : list of RefusedFlags
        One per revision and firmware.
    """

    effects: Annotated[list[EffectFigure], msgspec.Meta(max_length=100)] = []
    call_overhead_seconds: Positive | None = None
    refused: Annotated[list[RefusedFlags], msgspec.Meta(max_length=1000)] = []


class BenchFirst(msgspec.Struct, frozen=True):
    """First line of a bench run.

    Attributes
    ----------
    kind, schema
        ``bench`` and the version of these records.
    environment : object
        As `gmemcore.results.environment.Environment`.
    settings : object
        Memory, backing, seconds and other settings.
    primitives : object
        GB/s of memcpy, memset and xor at the largest range.
    verdict : Verdict
        The run in a few figures.
    primitives_by_range : list of Primitive
        Every primitive at every range.
    """

    environment: dict[str, Any]
    primitives: dict[Name, Positive]
    kind: Name = "bench"
    schema: Count = SCHEMA
    settings: dict[str, Any] = {}
    verdict: Verdict = Verdict()
    primitives_by_range: Annotated[list[Primitive], msgspec.Meta(max_length=1000)] = []


class BenchCell(msgspec.Struct, frozen=True):
    """One cell of policy at one size, on one setting; or one operation of a real kernel.

    Attributes
    ----------
    abi, vm_type, firmware, phase, direction, flag : str
        The question, as ``gmemcore policy --json`` has it.
    outcome, effect, unless
        Policy's answer.
    memory, range : int
        Bytes of the guest, and of one conversion.
    pages_allocated_before : int
        Allocated pages of a range before its conversion.
    bytes : str
        What the conversion does to bytes: ``none``, ``zero``, ``xor`` or ``random``.
    convert_gbps, populate_gbps, first_access_gbps : float or None
        GB/s of each step, batched, over the bytes that it touches; null where a step moves none.
    ratio : float or None
        Speed of the judged step relative to its primitive.
    seconds : Seconds
        Of one range's conversion within a batch.
    counters : object
        Events of one range.
    verified_bytes : int
        Bytes compared with their expected contents.
    fragmentation, backing, huge_pages, threads, enforce
        The setting.
    page_size : int
        Bytes of a page of the guest's file: 4 KiB, or a huge page.
    primitive : str or None
        The primitive that the judged step is compared with.
    primitive_gbps : float or None
        Its GB/s, interleaved with the step, in the same memory and at the same range.
    samples : list of float
        Seconds of one range's conversion, one per sample, warm-up dropped.
    timed_as : str or None
        Name of the case that was sampled: the first one with the same work.
    does : str or None
        What happens to the bytes, by the flag or by the platform itself: KEEP, ZERO, SCRAMBLE, ENCRYPT or
        DECRYPT; null if refused.
    operation : str
        ``conversion``, or the operation of a real kernel that was timed.
    judged : str or None
        Which step the ratio is about: ``convert`` or ``populate``.
    ns_per_page : Spread or None
        Of the conversion, batched, per 4 KiB page that it touches.
    populate_ns_per_page, access_ns_per_page : Spread or None
        Of the steps that follow.
    call_seconds : Spread or None
        One call from Python, of one range.
    ratio_low, ratio_high : float or None
        Interval of `ratio`.
    stable : bool
        Whether the interval of `ratio` is narrow enough to be judged.
    primitive_ns_per_page : float or None
        Of the primitive.
    populate_samples, primitive_samples : list of float
        Seconds per range of the populate or copy, and of the primitive for the same bytes. The ratio is the
        median of `primitive_samples` over the judged step's samples, place by place.
    why : str
        Why there is no figure, if policy doesn't refuse the cell.
    """

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
    convert_gbps: Positive | None
    populate_gbps: Positive | None
    first_access_gbps: Positive | None
    ratio: Positive | None
    seconds: Seconds
    counters: dict[Name, Count]
    verified_bytes: Count
    unless: Name | None = None
    fragmentation: Name = "uniform"
    backing: Name = "anonymous"
    huge_pages: bool = True
    threads: Count = 1
    enforce: bool = False
    page_size: Count = PAGE_SIZE
    primitive: Name | None = None
    primitive_gbps: Positive | None = None
    samples: Samples = []
    timed_as: Name | None = None
    does: Name | None = None
    operation: Name = "conversion"
    judged: Name | None = None
    ns_per_page: Spread | None = None
    populate_ns_per_page: Spread | None = None
    access_ns_per_page: Spread | None = None
    call_seconds: Spread | None = None
    ratio_low: Positive | None = None
    ratio_high: Positive | None = None
    stable: bool = True
    primitive_ns_per_page: Positive | None = None
    populate_samples: Samples = []
    primitive_samples: Samples = []
    why: Annotated[str, msgspec.Meta(max_length=500)] = ""
