"""Launch: the initial image. KVM_SEV_SNP_LAUNCH_UPDATE, KVM_TDX_INIT_MEM_REGION and their like (SPEC 7)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.counters import Counters
from gmemcore.engine.steps import ENCRYPT_BYTES, Term, populate_terms
from gmemcore.engine.store import Store
from gmemcore.errors import LaunchUpdateError
from gmemcore.machine.access import Segment
from gmemcore.machine.measurement import LaunchDigest
from gmemcore.policy import Populate
from gmemcore.uapi import PAGE_SHIFT, PageType, Phase

if TYPE_CHECKING:
    from gmemcore.machine.vm import VmFace


@dataclass(frozen=True, slots=True)
class LaunchUpdateResult:
    """What an accepted launch update did.

    Attributes
    ----------
    pages_done : int
        Pages populated; on SNP it may be fewer than asked for.
    counters : Counters
        The events of this call.
    """

    pages_done: int
    counters: Counters


@dataclass(slots=True)
class Image:
    """What is left to be loaded: its source (None: what is in place), its page type, and who measures it."""

    source: NDArray[np.uint8] | None
    page_type: PageType
    digest: LaunchDigest | None = None

    def load(self, store: Store, start: int, end: int) -> None:
        """Put the next pages' contents into DRAM, in clear."""
        size = (end - start) << PAGE_SHIFT
        part = None
        if self.source is not None:
            part, self.source = self.source[:size], self.source[size:]
        if not store.has_bytes:
            return
        if self.page_type == PageType.ZERO:
            store.raw(start << PAGE_SHIFT, size)[:] = 0
        elif part is not None:
            store.raw(start << PAGE_SHIFT, size)[:] = part

    def measure(self, store: Store, start: int, end: int, gpa: int) -> None:
        """Add pages that were loaded to the launch digest, if one is kept, while they are in clear."""
        if self.digest is not None:
            size = (end - start) << PAGE_SHIFT
            contents = store.raw(start << PAGE_SHIFT, size).data
            self.digest.update_range(gpa, size, self.page_type, contents)


def launch_update(vm: "VmFace", segments: Sequence[Segment], image: Image) -> LaunchUpdateResult:
    """Populate page by page, until one doesn't fit; the caller holds the locks.

    Raises
    ------
    LaunchUpdateError
        With the errno the platform has for the page that stopped it, and the pages done.
    """
    rules = vm.platform.populate
    assert rules is not None
    terms = populate_terms(rules)
    done, counters = 0, Counters()
    for segment in segments:
        stop, why = _first_unfit(vm, segment, terms, rules)
        start = segment.pages[0]
        if segment.store is not None and start < stop:
            end = start if vm.takes_cpuid_correction(image.page_type) else stop
            if start < end:
                counters += _populate(segment.store, start, end, segment.gpa, image, rules)
                done += end - start
            if end < stop:
                counters += _correct_cpuid(vm, segment.store, end, image)
                why = "EIO"
        if why:
            return _stopped(rules, why, segment, done, counters)
    return LaunchUpdateResult(done, counters)


def _first_unfit(vm: "VmFace", segment: Segment, terms: Sequence[Term], rules: Populate) -> tuple[int, str]:
    """First page of a segment that can't be populated, and its errno; the end and "" if all can."""
    start, end = segment.pages
    if vm.phase == Phase.RUNNING or segment.store is None:
        return start, rules.unfit
    why = ""
    for term in terms:
        page = segment.store.find(start, end, term.wanted, term.unwanted) if start < end else None
        if page is not None:
            end, why = page, term.refusal
    return end, why


def _populate(store: Store, start: int, end: int, gpa: int, image: Image, rules: Populate) -> Counters:
    with store.lock:
        store.promise(start, end)
        image.load(store, start, end)
        image.measure(store, start, end, gpa)
        if rules.encrypts:
            return store.accept(start, end, ENCRYPT_BYTES, promised=True)
        return store.touch(start, end, promised=True)


def _correct_cpuid(vm: "VmFace", store: Store, page: int, image: Image) -> Counters:
    """The firmware refuses a CPUID page and leaves its own values in place, in clear.

    KVM copies them back to the source too, if there is one that can be written.
    """
    counters = store.touch(page, page + 1)
    source = image.source
    image.load(store, page, page + 1)
    corrected = np.frombuffer(vm.take_cpuid_correction(), np.uint8)
    if source is not None and source.flags.writeable:
        source[: len(corrected)] = corrected
    if store.has_bytes:
        store.raw(page << PAGE_SHIFT, len(corrected))[:] = corrected
    return counters


def _stopped(
    rules: Populate, why: str, segment: Segment, done: int, counters: Counters
) -> LaunchUpdateResult:
    if rules.partial_success and done:
        return LaunchUpdateResult(done, counters)
    raise LaunchUpdateError(
        f"launch update of gpa {segment.gpa:#x}+{segment.size:#x} stopped after {done} pages: {why}; while "
        "the VM is launching, a page that is private, not assigned and not poisoned would be accepted",
        why,
        done,
    )
