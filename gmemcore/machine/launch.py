"""Launch: the initial image. KVM_SEV_SNP_LAUNCH_UPDATE, KVM_TDX_INIT_MEM_REGION and their like."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.counters import Counters
from gmemcore.engine.steps import ENCRYPT_BYTES, Term, populate_terms
from gmemcore.engine.store import Store
from gmemcore.errors import LaunchUpdateError
from gmemcore.machine.access import Segment, first_page
from gmemcore.machine.measurement import LaunchDigest
from gmemcore.policy import Populate
from gmemcore.uapi import PAGE_SHIFT, PageType

if TYPE_CHECKING:
    from gmemcore.machine.vm import VmFace


@dataclass(frozen=True, slots=True)
class LaunchUpdateResult:
    """What an accepted launch update did.

    Attributes
    ----------
    pages_done : int
        Pages populated; on SNP they can be fewer than asked for.
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

    @property
    def in_place(self) -> bool:
        """Whether the contents must be in the pages already."""
        return self.source is None and self.page_type != PageType.ZERO

    def load(self, store: Store, start: int, end: int) -> None:
        """Put the next pages' contents into DRAM, in clear."""
        if self.page_type == PageType.ZERO and store.has_bytes:
            store.raw(start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)[:] = 0
        self.copy(store, start, end)

    def copy(self, store: Store, start: int, end: int) -> None:
        """Copy the next pages of the source, if there is one."""
        if self.source is not None:
            size = (end - start) << PAGE_SHIFT
            part, self.source = self.source[:size], self.source[size:]
            if store.has_bytes:
                store.raw(start << PAGE_SHIFT, size)[:] = part

    def measure(self, store: Store, start: int, end: int, gpa: int) -> None:
        """Add pages that were loaded to the launch digest, if one is kept, while they are in clear."""
        if self.digest is not None:
            size = (end - start) << PAGE_SHIFT
            contents = store.raw(start << PAGE_SHIFT, size).data
            self.digest.update_range(gpa, size, self.page_type, contents)


def launch_update(vm: "VmFace", segments: Sequence[Segment], image: Image) -> LaunchUpdateResult:
    """Populate page by page, until one is refused; the caller holds the locks.

    Raises
    ------
    LaunchUpdateError
        With the errno the platform has for the page that stopped it, and the pages done.
    """
    rules = vm.platform.populate
    assert rules is not None
    done, counters = 0, Counters()
    for segment in segments:
        if segment.store is None:
            why = (rules.page_refusal or "EFAULT") if segment.closed else "EINVAL"
            return _stopped(rules, why, segment, 0, done, counters)
        start, end = segment.pages
        stop, term = first_page(segment.store, start, end, _terms(vm, rules, image, segment))
        segment.store.promise(start, stop + 1 if term is not None and term.mark else stop)
        if start < stop and vm.takes_cpuid_correction(image.page_type):
            counters += _correct_cpuid(vm, segment.store, start, image)
            return _stopped(rules, "EIO", segment, start, done, counters)
        if start < stop:
            counters += _populate(segment.store, start, stop, segment.gpa, image, rules)
            done += stop - start
        if term is not None:
            counters += _refuse(segment.store, stop, term, image)
            return _stopped(rules, term.refusal, segment, stop, done, counters)
    return LaunchUpdateResult(done, counters)


def _terms(vm: "VmFace", rules: Populate, image: Image, segment: Segment) -> tuple[Term, ...]:
    return populate_terms(rules, vm.abi, vm.phase, in_place=image.in_place, private=segment.private)


def _populate(store: Store, start: int, end: int, gpa: int, image: Image, rules: Populate) -> Counters:
    image.load(store, start, end)
    image.measure(store, start, end, gpa)
    if rules.encrypts:
        return store.accept(start, end, ENCRYPT_BYTES, promised=True)
    return store.touch(start, end, promised=True)


def _refuse(store: Store, page: int, term: Term, image: Image) -> Counters:
    """Leave the page that refuses as the kernel does."""
    counters = store.mark(page, term.mark)
    if term.copied:
        image.copy(store, page, page + 1)
    return counters


def _correct_cpuid(vm: "VmFace", store: Store, page: int, image: Image) -> Counters:
    """The firmware refuses a CPUID page and leaves its own values in place, in clear.

    KVM copies them back to the source too, if there is one that can be written.
    """
    counters = store.touch(page, page + 1, promised=True)
    source = image.source
    image.load(store, page, page + 1)
    corrected = np.frombuffer(vm.take_cpuid_correction(), np.uint8)
    if source is not None and source.flags.writeable:
        source[: len(corrected)] = corrected
    if store.has_bytes:
        store.raw(page << PAGE_SHIFT, len(corrected))[:] = corrected
    return counters


def _stopped(
    rules: Populate, why: str, segment: Segment, page: int, done: int, counters: Counters
) -> LaunchUpdateResult:
    if rules.partial_success and done:
        return LaunchUpdateResult(done, counters)
    at = segment.gpa + (page << PAGE_SHIFT) - segment.offset if segment.store is not None else segment.gpa
    raise LaunchUpdateError(
        f"launch update stopped at gpa {at:#x} after {done} pages: {why}; a page must be in a memslot, "
        "private, not assigned and not poisoned, and the VM must be launching",
        why,
        done,
    )
