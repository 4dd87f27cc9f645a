"""Steps: everything that can be done to a range of guest memory, by number, and when each is refused.

A conversion is one of them. Traces, behaviours and batches name them by these numbers, which are part of the
trace format: a new step gets the next one, and its row in `step_rows`.

What may stop a step page by page is a short list of terms, looked for over the planes; the first page that
one of them finds stops it, and where two find the same page the first of them names the reason.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.state import Plane, fields_of
from gmemcore.policy import PLATFORMS, Abi, Accept, Platform, Populate
from gmemcore.uapi import Phase, VmType


class Step(IntEnum):
    """One thing that a host, a guest or its VMM does to a range of guest memory."""

    CONVERT = 0
    """KVM_SET_MEMORY_ATTRIBUTES2: attributes and content flags."""
    HOST_READ = 1
    HOST_WRITE = 2
    GUEST_READ = 3
    GUEST_WRITE = 4
    ACCEPT = 5
    """PVALIDATE, TDG.MEM.PAGE.ACCEPT."""
    ALLOCATE = 6
    """fallocate with KEEP_SIZE."""
    PUNCH_HOLE = 7
    PIN = 8
    UNPIN = 9
    POISON = 10
    POPULATE = 11
    """A launch update; in a batch, of what is in place."""
    LAUNCH_FINISH = 12


class Term(NamedTuple):
    """Pages with every wanted plane and no unwanted one refuse the step; without any plane, every page does.

    The kernel had got so far when it refused: the page is left with the planes of `mark`, and with the source
    of a launch update if it was `copied`.
    """

    wanted: Plane
    unwanted: Plane
    refusal: str
    mark: Plane = Plane.NONE
    copied: bool = False
    why: str = ""
    """What the page is, in words: "private", say."""


IS_SHARED = Term(Plane.NONE, Plane.PRIVATE, "MEMORY_FAULT")
IS_PRIVATE = Term(Plane.PRIVATE, Plane.NONE, "MEMORY_FAULT")
IS_POISONED = Term(Plane.POISONED, Plane.NONE, "EHWPOISON")
NOT_ACCEPTED = Term(Plane.PRIVATE, Plane.ACCEPTED, "NOT_VALIDATED", Plane.ALLOCATED | Plane.ASSIGNED)

# What refuses a guest's access: by (CoCo, kind of the access; None follows the attribute).
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
POISON_TERMS = (
    Term(Plane.NONE, Plane.ALLOCATED, "EINVAL", why="not allocated; only memory in use can fail"),
)

REFUSED_BY_FIRMWARE = Term(Plane.NONE, Plane.NONE, "EIO", Plane.ALLOCATED, copied=True)
"""Every page of a launch update after launch, where KVM leaves it to the firmware to refuse."""


def populate_terms(
    rules: Populate, abi: Abi, phase: Phase, *, in_place: bool, private: bool | None = None
) -> tuple[Term, ...]:
    """Return what refuses a page of a launch update, in the order in which KVM finds out.

    Parameters
    ----------
    rules : Populate
        The platform's.
    abi : Abi
        Whether there is a populate in place.
    phase : Phase
        The launch phase.
    in_place : bool
        There is no source, and the page type wants contents.
    private : bool or None
        The page's attribute where that isn't in the file's planes but the Vm's (`legacy`).

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


# What accept and populate do to the bytes of a page of each rank (four bits each).
KEEP_BYTES = 0
READ_AS_ZEROS = int(layout.KEYSTREAM) * 0x0111  # what isn't accepted yet becomes the key stream
ENCRYPT_BYTES = int(layout.XOR) * 0x0111
ACCEPTED_PLANES = Plane.ALLOCATED | Plane.ASSIGNED | Plane.ACCEPTED
UNMAPPED = Plane.ASSIGNED | Plane.ACCEPTED
"""Planes that a page loses where unmapping takes it out of the table that assigns it."""
EVERYTHING_BUT_PRIVATE = ACCEPTED_PLANES | Plane.PINNED | Plane.POISONED

ACCEPT_OPERATIONS = {Accept.KEEP: KEEP_BYTES, Accept.CLEAR: READ_AS_ZEROS}
"""What the guest's accept does to bytes, by platform row."""

REASONS = {
    "EINVAL": layout.INVALID,
    "EOPNOTSUPP": layout.MODE_UNSUPPORTED,
    "EFAULT": layout.BAD_ADDRESS,
    "EIO": layout.INPUT_OUTPUT,
    "SIGBUS": layout.HOST_FAULT,
    "MEMORY_FAULT": layout.MEMORY_FAULT,
    "MMIO": layout.NO_SLOT,
    "EHWPOISON": layout.POISONED_PAGE,
    "NOT_VALIDATED": layout.NOT_VALIDATED,
    "EFBIG": layout.TOO_LARGE,
}
"""Outcome of a refused step -> the kernels' number for it."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of one VM and phase, of one kind of access.

    Attributes
    ----------
    terms : tuple of Term
        What refuses a page; where two match the same page, the first one.
    set, clear : Plane
        Planes that a page gets and loses.
    operations : int
        What is done to the bytes of a page, by its rank.
    aligned : bool
        The range must be whole pages, or it is EINVAL.
    signed : bool
        The range has signed 64 bits, as file offsets do: negative numbers are EINVAL, an end beyond 2^63 - 1
        is EFBIG.
    wraps : str or None
        Outcome of a range that wraps 2^64; None takes it as one that goes beyond the end of the file.
    ends_below_top : bool
        A range that ends at 2^64 wraps too, as in KVM's tests of the form ``start + size < start``.
    beyond_end : str or None
        Why the first page beyond the end of the file refuses; None cuts the range there.
    refusal : str or None
        Outcome whatever the range.
    partial : int
        0: all or nothing; else what is done of the pages before the one that refuses, see the kernels.
    """

    terms: tuple[Term, ...] = ()
    set: Plane = Plane.NONE
    clear: Plane = Plane.NONE
    operations: int = KEEP_BYTES
    aligned: bool = False
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
                *(fields_of(wanted), fields_of(unwanted), int(REASONS[refusal])),
                *(fields_of(mark), int(copied)),
            )
        ]
        missing = layout.TERM_COUNT * int(layout.TERM_WORDS) - len(terms)
        return [
            int(self.aligned),
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
    """Return the kernels' number for an outcome; 0 for none."""
    return 0 if refusal is None else int(REASONS[refusal])


ACCESS_KINDS = (None, False, True)
"""Kinds of a guest's access, by the variant of its step: as the attribute is, shared, private."""

NO_ROW = StepRow(refusal="EINVAL")
"""A step or variant that doesn't exist."""


def step_rows(abi: Abi, vm_type: VmType, phase: Phase) -> dict[Step, tuple[StepRow, ...]]:
    """Every step but the conversion, which policy rules: a row a variant, or one row for all of them."""
    platform = PLATFORMS[vm_type]
    host = StepRow(HOST_TERMS, Plane.ALLOCATED, wraps="SIGBUS", beyond_end="SIGBUS")
    guest = tuple(_guest_access(platform, kind) for kind in ACCESS_KINDS)
    return {
        Step.HOST_READ: (host,),
        Step.HOST_WRITE: (host,),
        Step.GUEST_READ: (*guest, NO_ROW),
        Step.GUEST_WRITE: (*guest, NO_ROW),
        Step.ACCEPT: (_accept(platform),),
        Step.ALLOCATE: (StepRow(set=Plane.ALLOCATED, aligned=True, signed=True),),
        Step.PUNCH_HOLE: (StepRow(clear=EVERYTHING_BUT_PRIVATE, aligned=True, signed=True, beyond_end=None),),
        Step.PIN: (StepRow(PIN_TERMS, Plane.ALLOCATED | Plane.PINNED, aligned=True, beyond_end="EFAULT"),),
        Step.UNPIN: (StepRow(clear=Plane.PINNED, aligned=True, beyond_end="EFAULT"),),
        Step.POISON: (StepRow(POISON_TERMS, Plane.POISONED, aligned=True),),
        Step.POPULATE: tuple(
            _populate(abi, platform, phase, in_place=in_place, private=private)
            for private in ((False, True) if abi.legacy else (None, None))
            for in_place in (True, False)
        ),
        Step.LAUNCH_FINISH: (NO_ROW,),  # the Vm's, and no file's
    }


def _guest_access(platform: Platform, private: bool | None) -> StepRow:
    hole = "MEMORY_FAULT" if platform.coco and private else "MMIO"  # else it counts as shared
    return StepRow(GUEST_TERMS[platform.coco, private], Plane.ALLOCATED, beyond_end=hole)


def _accept(platform: Platform) -> StepRow:
    if platform.accept is None:
        return StepRow(aligned=True, beyond_end=None)
    operations = ACCEPT_OPERATIONS[platform.accept]
    return StepRow(ACCEPT_TERMS, ACCEPTED_PLANES, Plane.NONE, operations, True, beyond_end="MEMORY_FAULT")


def _populate(abi: Abi, platform: Platform, phase: Phase, *, in_place: bool, private: bool | None) -> StepRow:
    """A launch update; of one file, its end stands for that of its memslot."""
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
    """The rows of all steps as kernels read them, shape (steps * variants * words,)."""
    shape = (layout.STEP_COUNT, int(layout.STEP_VARIANTS), int(layout.STEP_WORDS))
    table = np.zeros(shape, np.uint64)
    for step, rows in step_rows(abi, vm_type, phase).items():
        table[step] = [row.words() for row in rows * (shape[1] // len(rows))]
    return table.ravel()
