"""Steps: all operations on a range of guest memory, and what refuses each of them.

A conversion is a step, too. Traces, behaviours and batches use the numbers of steps, which are part of the
trace format: a new step gets the next number and a row in `step_rows`.

A step has a short list of terms over planes. The first page that matches a term refuses the step; if it
matches several, the first of them is the reason.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.state import Plane, fields_of
from gmemcore.policy import PLATFORMS, Abi, Accept, Platform, Populate
from gmemcore.uapi import Phase, VmType


class Step(IntEnum):
    """An operation of a host, a guest or a VMM on a range of guest memory."""

    CONVERT = 0
    """KVM_SET_MEMORY_ATTRIBUTES2."""
    HOST_READ = 1
    HOST_WRITE = 2
    GUEST_READ = 3
    GUEST_WRITE = 4
    ACCEPT = 5
    """PVALIDATE or TDG.MEM.PAGE.ACCEPT."""
    ALLOCATE = 6
    """fallocate with KEEP_SIZE."""
    PUNCH_HOLE = 7
    PIN = 8
    UNPIN = 9
    POISON = 10
    POPULATE = 11
    """A launch update; in a batch, one in place."""
    LAUNCH_FINISH = 12


class Term(NamedTuple):
    """Pages with all wanted planes and no unwanted one refuse the step; without planes, every page does.

    The kernel has changed the page before it refuses: it gets the planes of `mark` and, if `copied`, the
    source of the launch update.
    """

    wanted: Plane
    unwanted: Plane
    refusal: str
    mark: Plane = Plane.NONE
    copied: bool = False
    why: str = ""
    """The reason in words, after "the page is"."""


IS_SHARED = Term(Plane.NONE, Plane.PRIVATE, "MEMORY_FAULT")
IS_PRIVATE = Term(Plane.PRIVATE, Plane.NONE, "MEMORY_FAULT")
IS_POISONED = Term(Plane.POISONED, Plane.NONE, "EHWPOISON")
NOT_ACCEPTED = Term(Plane.PRIVATE, Plane.ACCEPTED, "NOT_VALIDATED", Plane.ALLOCATED | Plane.ASSIGNED)

# Terms of a guest's access, by (CoCo, kind of the access; None: as the attribute is).
GUEST_TERMS: dict[tuple[bool, bool | None], tuple[Term, ...]] = {
    (True, True): (IS_SHARED, IS_POISONED, NOT_ACCEPTED),
    (True, False): (IS_PRIVATE, IS_POISONED),
    (True, None): (IS_POISONED, NOT_ACCEPTED),
    (False, True): (IS_POISONED,),
    (False, False): (IS_POISONED,),
    (False, None): (IS_POISONED,),
}
ACCEPT_TERMS = (IS_SHARED, IS_POISONED)
_TO_SHARED = "private; convert it to shared first"
HOST_TERMS = (
    Term(Plane.PRIVATE, Plane.NONE, "SIGBUS", why=_TO_SHARED),
    Term(Plane.POISONED, Plane.NONE, "SIGBUS", why="poisoned"),
)
PIN_TERMS = (
    Term(Plane.PRIVATE, Plane.NONE, "EFAULT", why=_TO_SHARED),
    Term(Plane.POISONED, Plane.NONE, "EFAULT", why="poisoned"),
)
PUNCH_TERMS = (Term(Plane.PINNED, Plane.NONE, "EAGAIN", why="pinned; unpin it first"),)
POISON_TERMS = (
    Term(Plane.NONE, Plane.ALLOCATED, "EINVAL", why="not allocated; only memory in use can fail"),
)

REFUSED_BY_FIRMWARE = Term(Plane.NONE, Plane.NONE, "EIO", Plane.ALLOCATED, copied=True)
"""A launch update after launch, which KVM leaves to the firmware to refuse."""


def populate_terms(
    rules: Populate, abi: Abi, phase: Phase, *, in_place: bool, private: bool | None = None
) -> tuple[Term, ...]:
    """Return the terms of a launch update, in the order of KVM's checks.

    Parameters
    ----------
    rules : Populate
        The platform's rules.
    abi : Abi
        The revision, which can lack populate in place.
    phase : Phase
        The launch phase.
    in_place : bool
        There is no source, and the page type needs contents.
    private : bool or None
        The page's attribute if it belongs to the Vm (`legacy`).

    References
    ----------
    __kvm_gmem_populate, sev_gmem_post_populate, tdx_gmem_post_populate.
    """
    shared = {
        None: (Term(Plane.NONE, Plane.PRIVATE, "EINVAL", Plane.ALLOCATED),),
        False: (Term(Plane.NONE, Plane.NONE, "EINVAL", Plane.ALLOCATED),),
        True: (),
    }[private]
    terms = [IS_POISONED, *shared]
    if in_place and not abi.in_place_populate and rules.in_place_refusal:
        terms.append(Term(Plane.NONE, Plane.NONE, rules.in_place_refusal, Plane.ALLOCATED))
    elif rules.encrypts:
        terms.append(Term(Plane.ASSIGNED, Plane.NONE, "EIO"))
        if phase == Phase.RUNNING and not rules.checks_phase:
            terms.append(REFUSED_BY_FIRMWARE)
    return tuple(term._replace(refusal=rules.page_refusal or term.refusal) for term in terms)


# What accept and launch updates do to the bytes of a page, by rank (four bits each).
KEEP_BYTES = 0
READ_AS_ZEROS = int(layout.KEYSTREAM) * 0x0111  # pages not accepted before
ENCRYPT_BYTES = int(layout.XOR) * 0x0111
ACCEPTED_PLANES = Plane.ALLOCATED | Plane.ASSIGNED | Plane.ACCEPTED
UNMAPPED = Plane.ASSIGNED | Plane.ACCEPTED
"""Planes that a page loses where unmapping removes it from the S-EPT."""
EVERYTHING_BUT_PRIVATE = ACCEPTED_PLANES | Plane.PINNED | Plane.POISONED

ACCEPT_OPERATIONS = {Accept.KEEP: KEEP_BYTES, Accept.CLEAR: READ_AS_ZEROS}
"""What the guest's accept does to bytes."""

REASONS = {
    "EINVAL": layout.INVALID,
    "EOPNOTSUPP": layout.MODE_UNSUPPORTED,
    "EFAULT": layout.BAD_ADDRESS,
    "EIO": layout.INPUT_OUTPUT,
    "EAGAIN": layout.PAGE_PINNED,
    "SIGBUS": layout.HOST_FAULT,
    "MEMORY_FAULT": layout.MEMORY_FAULT,
    "MMIO": layout.NO_SLOT,
    "EHWPOISON": layout.POISONED_PAGE,
    "NOT_VALIDATED": layout.NOT_VALIDATED,
    "EFBIG": layout.TOO_LARGE,
}
"""Kernels' numbers of the outcomes of refused steps."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of one VM and phase, for one kind of access.

    Attributes
    ----------
    terms : tuple of Term
        What refuses a page; the first one that matches.
    set, clear : Plane
        Planes that the step sets and clears.
    operations : int
        What it does to the bytes of a page, by rank.
    aligned : bool
        The range must be whole pages; otherwise EINVAL.
    whole_folios : bool
        It must be whole huge pages.
    signed : bool
        The range is signed 64-bit, as file offsets are: negative numbers are EINVAL, an end beyond 2^63 - 1
        is EFBIG.
    wraps : str or None
        Outcome of a range that wraps 2^64; None: as for one beyond the end of the file.
    ends_below_top : bool
        A range that ends at 2^64 wraps, too, as in KVM's tests ``start + size < start``.
    beyond_end : str or None
        Outcome of the first page beyond the end of the file; None: the range ends there.
    refusal : str or None
        Outcome of any range.
    partial : int
        0: all or nothing; otherwise pages before the refusing one stay done (see ``kernels.py``).
    """

    terms: tuple[Term, ...] = ()
    set: Plane = Plane.NONE
    clear: Plane = Plane.NONE
    operations: int = KEEP_BYTES
    aligned: bool = False
    whole_folios: bool = False
    signed: bool = False
    wraps: str | None = "EINVAL"
    ends_below_top: bool = False
    beyond_end: str | None = "EINVAL"
    refusal: str | None = None
    partial: int = 0

    def words(self) -> list[int]:
        """Return the row as kernels read it."""
        terms = [
            word
            for wanted, unwanted, refusal, mark, copied, _ in self.terms
            for word in (
                fields_of(wanted),
                fields_of(unwanted),
                int(REASONS[refusal]),
                fields_of(mark),
                int(copied),
            )
        ]
        missing = layout.TERM_COUNT * int(layout.TERM_WORDS) - len(terms)
        return [
            int(self.aligned) + int(self.whole_folios),
            int(self.signed),
            reason_of(self.wraps),
            int(self.ends_below_top),
            reason_of(self.beyond_end),
            reason_of(self.refusal),
            self.partial,
            *terms,
            *[0] * missing,
            self.operations,
            fields_of(self.set),
            fields_of(self.clear),
        ]


def reason_of(refusal: str | None) -> int:
    """Return the kernels' number of an outcome; 0 for None."""
    return 0 if refusal is None else int(REASONS[refusal])


ACCESS_KINDS = (None, False, True)
"""Kinds of a guest access, by variant: as the attribute is, shared, private."""

NO_ROW = StepRow(refusal="EINVAL")
"""A step or variant that doesn't exist."""


def step_rows(abi: Abi, vm_type: VmType, phase: Phase) -> dict[Step, tuple[StepRow, ...]]:
    """Return the rows of all steps but the conversion: one row per variant, or one for all variants."""
    platform = PLATFORMS[vm_type]
    host = StepRow(HOST_TERMS, Plane.ALLOCATED, wraps="SIGBUS", beyond_end="SIGBUS")
    guest = tuple(_guest_access(platform, kind) for kind in ACCESS_KINDS)
    return {
        Step.HOST_READ: (host,),
        Step.HOST_WRITE: (host,),
        Step.GUEST_READ: (*guest, NO_ROW),
        Step.GUEST_WRITE: (*guest, NO_ROW),
        Step.ACCEPT: (_accept(platform),),
        Step.ALLOCATE: _of_pages_and_folios(StepRow(set=Plane.ALLOCATED, aligned=True, signed=True)),
        Step.PUNCH_HOLE: _of_pages_and_folios(
            StepRow(clear=EVERYTHING_BUT_PRIVATE, aligned=True, signed=True, beyond_end=None),
            StepRow(PUNCH_TERMS, clear=EVERYTHING_BUT_PRIVATE, aligned=True, signed=True, beyond_end=None),
        ),
        Step.PIN: (StepRow(PIN_TERMS, Plane.ALLOCATED | Plane.PINNED, aligned=True, beyond_end="EFAULT"),),
        Step.UNPIN: (StepRow(clear=Plane.PINNED, aligned=True, beyond_end="EFAULT"),),
        Step.POISON: (StepRow(POISON_TERMS, Plane.POISONED, aligned=True),),
        Step.POPULATE: tuple(
            _populate(abi, platform, phase, in_place=in_place, private=private)
            for private in ((False, True) if abi.legacy else (None, None))
            for in_place in (True, False)
        ),
        Step.LAUNCH_FINISH: (NO_ROW,),  # a step of the Vm
    }


def _of_pages_and_folios(of_pages: StepRow, of_folios: StepRow | None = None) -> tuple[StepRow, ...]:
    """Return the rows of fallocate in files of pages and of huge pages; the file selects one."""
    rows = of_pages, replace(of_folios or of_pages, whole_folios=True)
    return rows * (int(layout.STEP_VARIANTS) // len(rows))


def _guest_access(platform: Platform, private: bool | None) -> StepRow:
    hole = "MEMORY_FAULT" if platform.coco and private else "MMIO"  # a hole counts as shared
    return StepRow(GUEST_TERMS[platform.coco, private], Plane.ALLOCATED, beyond_end=hole)


def _accept(platform: Platform) -> StepRow:
    if platform.accept is None:
        return StepRow(aligned=True, beyond_end=None)
    operations = ACCEPT_OPERATIONS[platform.accept]
    return StepRow(ACCEPT_TERMS, ACCEPTED_PLANES, Plane.NONE, operations, True, beyond_end="MEMORY_FAULT")


def _populate(abi: Abi, platform: Platform, phase: Phase, *, in_place: bool, private: bool | None) -> StepRow:
    """Return the row of a launch update; in a batch the end of the file is that of the memslot."""
    rules = platform.populate
    if rules is None:
        return NO_ROW
    return StepRow(
        populate_terms(rules, abi, phase, in_place=in_place, private=private),
        ACCEPTED_PLANES if rules.encrypts else Plane.ALLOCATED,
        operations=ENCRYPT_BYTES if rules.encrypts else KEEP_BYTES,
        aligned=True,
        wraps=None if rules.one_memslot else "EINVAL",
        ends_below_top=True,
        refusal="EINVAL" if phase == Phase.RUNNING and rules.checks_phase else None,
        partial=int(layout.PARTIAL_DONE if rules.partial_success else layout.PARTIAL_REFUSED),
    )


def compile_steps(abi: Abi, vm_type: VmType, phase: Phase) -> NDArray[np.uint64]:
    """Compile the rows of all steps for kernels, shape (steps * variants * words,)."""
    shape = (layout.STEP_COUNT, int(layout.STEP_VARIANTS), int(layout.STEP_WORDS))
    table = np.zeros(shape, np.uint64)
    for step, rows in step_rows(abi, vm_type, phase).items():
        table[step] = [row.words() for row in rows * (shape[1] // len(rows))]
    return table.ravel()
